"""The paper's loss as a sentence-transformers loss, plain and with gradient caching."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from llave_kernels import hardness_weighted_contrastive_loss
from llave_kernels.distributed import distributed_contrastive_loss
from llave_kernels.integrations.sentence_transformers import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)


class LLaVELoss(MultipleNegativesRankingLoss):
    """The symmetric hardness-weighted loss over the global batch (eq. 4-6).

    It is a ``loss`` for ``SentenceTransformerTrainer``. The columns are anchor, positive and any
    number of negatives. A dataset may also have a ``label`` column of shape (N, columns - 1). It
    holds the content ids of positive and negatives. A target with the id of a row's positive is not
    a negative of that row. A mined negative with the id of its own row's positive is a placeholder
    for a missing negative, and no row counts it.

    Under torch.distributed the loss is that of the global batch. This holds for any trainer that
    averages the gradients.

    Args:
        model: a SentenceTransformer. The loss normalises its embeddings.
        scale: 1 / temperature (paper: 50).
        alpha: hardness strength in both directions (paper: 9; 0 is InfoNCE).
        false_negative_margin, backend: as in ``llave_kernels.hardness_weighted_contrastive_loss``.

    Attributes:
        last: detached float32 queries and positives (N, D) of the last batch, and the (N,) content
            ids of the positives, or None. All None before the first batch.
    """

    last: tuple[Tensor, Tensor, Tensor | None] | None = None

    def __init__(
        self,
        model: Any,
        scale: float = 50.0,
        alpha: float = 9.0,
        *,
        false_negative_margin: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            model,
            scale,
            directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
            hardness_mode="in_batch_negatives",
            hardness_strength=alpha,
            target_hardness_strength=alpha,
            false_negative_margin=false_negative_margin,
            backend=backend,
        )

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        """Return the 0-d loss of a batch.

        Args:
            embeddings: anchors, positives and negatives, each of shape (N, D).
            labels: (N, columns - 1) content ids of positives and negatives, or None.
        """
        query, *columns = (normalize(x, dim=-1) for x in embeddings)
        target = torch.cat(columns)
        pairs: dict[str, Any] = {}
        self.last = query.detach().float(), columns[0].detach().float(), None
        if labels is not None and labels.dim() == 2:
            if labels.shape[1] != len(columns):
                raise ValueError(
                    f"label has shape {tuple(labels.shape)}, expected one content id for each of "
                    f"the {len(columns)} positive and negative columns"
                )
            ids = labels.to(query.device, torch.int64).T
            pairs = {"query_ids": ids[0].contiguous(), "target_ids": ids.flatten()}
            self.last = *self.last[:2], pairs["query_ids"]
            if len(columns) > 1:
                there = ids != ids[0]
                there[0] = True  # the positives
                rows = torch.arange(len(query), device=query.device).expand_as(ids)
                target = target[there.flatten()]
                pairs |= {"target_ids": ids[there], "owners": rows[there]}
        distributed = dist.is_available() and dist.is_initialized()
        loss = distributed_contrastive_loss if distributed else hardness_weighted_contrastive_loss
        return loss(
            query,
            target,
            logit_scale=self.scale,
            alpha=self.hardness_strength,
            false_negative_margin=self.false_negative_margin,
            backend=self.backend,
            **pairs,
        )


class CachedLLaVELoss(CachedMultipleNegativesRankingLoss):
    """``LLaVELoss`` with gradient caching. Activation memory depends only on the mini-batch.

    Args:
        mini_batch_size: samples embedded at a time.
        model, scale, alpha, false_negative_margin, backend: as in ``LLaVELoss``.
    """

    def __init__(
        self,
        model: Any,
        scale: float = 50.0,
        alpha: float = 9.0,
        *,
        mini_batch_size: int = 4,
        false_negative_margin: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(model, scale, mini_batch_size=mini_batch_size)
        self.loss = LLaVELoss(
            model, scale, alpha, false_negative_margin=false_negative_margin, backend=backend
        )
