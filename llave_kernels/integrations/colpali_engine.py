"""colpali-engine's losses with in-batch negatives: fused, or from late-interaction scores."""

from __future__ import annotations

from typing import Any

import torch
from colpali_engine.loss import bi_encoder_losses, late_interaction_losses
from torch import Tensor

from llave_kernels import checks, dispatch
from llave_kernels.functional import hardness_weighted_contrastive_loss
from llave_kernels.scores import scores_loss
from llave_kernels.sigmoid import sigmoid_contrastive_loss


class BiEncoderLoss(bi_encoder_losses.BiEncoderLoss):  # type: ignore[misc]
    """colpali-engine's ``BiEncoderLoss`` without the N x M scores.

    At ``alpha=0`` value and gradients are the host's for every setting. It also serves as the
    ``inner_loss`` of the host's ``BiNegativeCELoss``. With ``pos_aware_negative_filtering`` the
    scores are computed, because the host's filter changes them.

    Args:
        args, kwargs: the host's ``temperature``, ``pos_aware_negative_filtering``,
            ``max_batch_size``, ``filter_threshold`` and ``filter_factor``. Only the filter limits
            the batch to ``max_batch_size``.
        alpha: hardness strength (LLaVE: 9). Default 0: the host's loss.
        backend: as in ``llave_kernels.hardness_weighted_contrastive_loss``.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.

    Example:
        >>> loss_fn = BiEncoderLoss(temperature=0.02, alpha=9.0)
        >>> loss = loss_fn(query_embeddings, doc_embeddings)
    """

    symmetric = False

    def __init__(
        self, *args: Any, alpha: float = 0.0, backend: str = "auto", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.alpha = checks.strength("alpha", alpha)
        self.backend = dispatch.known(backend)

    def forward(self, query_embeddings: Tensor, doc_embeddings: Tensor, offset: int = 0) -> Tensor:
        """Mean loss (0-d) of (N, D) queries. Query i's positive is row ``offset + i`` of (M, D)."""
        if self.pos_aware_negative_filtering:
            scores = query_embeddings @ doc_embeddings.T
            return _loss_of_scores(self, scores, offset, symmetric=self.symmetric)
        return hardness_weighted_contrastive_loss(
            query_embeddings,
            doc_embeddings,
            logit_scale=1 / self.temperature,
            alpha=self.alpha,
            symmetric=self.symmetric,
            labels=_labels(query_embeddings, offset),
            owners=range(len(doc_embeddings)),
            backend=self.backend,
        )


class BiPairedEncoderLoss(BiEncoderLoss):
    """colpali-engine's ``BiPairedEncoderLoss``, which averages both directions.

    Arguments, call and errors are those of ``BiEncoderLoss``. The host's fails where documents
    were gathered from several processes. Here a document is then compared with the queries of this
    process.
    """

    symmetric = True


class BiSigmoidLoss(bi_encoder_losses.BiSigmoidLoss):  # type: ignore[misc]
    """colpali-engine's ``BiSigmoidLoss`` without the N x M scores.

    Value and gradients are the host's for every setting. With ``pos_aware_negative_filtering`` the
    host's own code computes the loss, because its filter changes the scores.

    Args:
        args, kwargs: the host's.
        backend: as in ``llave_kernels.sigmoid_contrastive_loss``.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.

    Example:
        >>> loss = BiSigmoidLoss(temperature=0.02)(query_embeddings, doc_embeddings)
    """

    def __init__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backend = dispatch.known(backend)

    def forward(self, query_embeddings: Tensor, doc_embeddings: Tensor, offset: int = 0) -> Tensor:
        """Mean loss (0-d) of all pairs. Query i's positive is row ``offset + i`` of (M, D)."""
        if self.pos_aware_negative_filtering:
            return super().forward(query_embeddings, doc_embeddings, offset)
        loss = sigmoid_contrastive_loss(
            query_embeddings,
            doc_embeddings,
            logit_scale=1 / self.temperature,
            logit_bias=0.0,
            labels=_labels(query_embeddings, offset),
            backend=self.backend,
        )
        return loss / len(doc_embeddings)


class ColbertLoss(late_interaction_losses.ColbertLoss):  # type: ignore[misc]
    """colpali-engine's ``ColbertLoss``: dense, because late interaction gives only scores.

    At ``alpha=0`` value and gradients are the host's for every setting. It also serves as the
    ``inner_loss`` of the host's ``ColbertNegativeCELoss``.

    Args:
        args, kwargs: the host's.
        alpha: hardness strength. Default 0: the host's loss. It multiplies scores. By default
            these are means over the query's tokens. With ``normalize_scores=False`` they are sums.

    Raises:
        TypeError, ValueError: ``alpha`` has the wrong type or value.

    Example:
        >>> loss_fn = ColbertLoss(temperature=0.02, alpha=9.0)
        >>> loss = loss_fn(query_embeddings, doc_embeddings)
    """

    def __init__(self, *args: Any, alpha: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alpha = checks.strength("alpha", alpha)

    def forward(self, query_embeddings: Tensor, doc_embeddings: Tensor, offset: int = 0) -> Tensor:
        """Mean loss (0-d) of (N, query tokens, D) queries and (M, document tokens, D) documents.

        Query i's positive is document ``offset + i``.
        """
        scores = self._inbatch_scores(query_embeddings, doc_embeddings)
        return _loss_of_scores(self, scores, offset, symmetric=False)


def _labels(query: Tensor, offset: int) -> Tensor | None:
    return offset + torch.arange(len(query), device=query.device) if offset else None


def _loss_of_scores(loss_fn: Any, scores: Tensor, offset: int, *, symmetric: bool) -> Tensor:
    if loss_fn.pos_aware_negative_filtering:
        loss_fn._filter_high_negatives(
            scores, loss_fn._get_idx(len(scores), offset, scores.device)[1]
        )
    return scores_loss(
        scores,
        logit_scale=1 / loss_fn.temperature,
        alpha=loss_fn.alpha,
        symmetric=symmetric,
        labels=_labels(scores, offset),
        owners=range(scores.shape[1]),
    )
