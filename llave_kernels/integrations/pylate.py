"""PyLate's contrastive losses, hardness-weighted. They are dense: late interaction gives scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from pylate import utils
from pylate.losses import cached_contrastive, contrastive
from torch import Tensor
from torch.nn.functional import normalize

from llave_kernels import checks
from llave_kernels.rules import HARDNESS_MODES
from llave_kernels.scores import scores_loss


class Contrastive(contrastive.Contrastive):  # type: ignore[misc]
    """``pylate.losses.Contrastive`` with a weight on the negatives.

    At ``alpha=0`` value and gradients are the host's for every setting.

    Args:
        args, kwargs: the host's.
        alpha: hardness strength. Default 0: the host's loss. It multiplies scores. The host's
            scores are sums over the query's tokens.
        hardness: as in ``llave_kernels.hardness_weighted_contrastive_loss``.

    Raises:
        TypeError, ValueError: ``alpha`` or ``hardness`` has the wrong type or value.

    Example:
        >>> loss_fn = Contrastive(model, temperature=0.5, alpha=0.3)
    """

    def __init__(
        self, *args: Any, alpha: float = 0.0, hardness: str = "in_batch", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.alpha = checks.strength("alpha", alpha)
        checks.one_of("hardness", hardness, HARDNESS_MODES)
        self.hardness = hardness

    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> Tensor:
        """Loss (0-d) of tokenized queries, their positives, and columns of mined negatives."""
        features = list(sentence_features)
        embeddings = [normalize(self.model(f)["token_embeddings"], dim=-1) for f in features]
        masks = contrastive.extract_skiplist_mask(features, _unwrapped(self.model).skiplist)
        rows = len(embeddings[0])
        step = self.score_mini_batch_size or rows
        loss = torch.stack(list(_losses(self, embeddings, masks, step))).sum()
        return loss / rows if self.size_average else loss


class CachedContrastive(cached_contrastive.CachedContrastive):  # type: ignore[misc]
    """``pylate.losses.CachedContrastive`` with a weight on the negatives.

    Arguments, call and errors are those of ``Contrastive``, and the host's own. As in the host,
    ``size_average`` divides the value but not the gradients, which are those of the sum.
    """

    def __init__(
        self, *args: Any, alpha: float = 0.0, hardness: str = "in_batch", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.alpha = checks.strength("alpha", alpha)
        checks.one_of("hardness", hardness, HARDNESS_MODES)
        self.hardness = hardness

    def calculate_loss(
        self, reps: list[list[Tensor]], masks: list[Tensor], with_backward: bool = False
    ) -> Tensor:
        """Loss of each column's mini-batches of token embeddings, (rows, tokens, D) each; 0-d.

        With ``with_backward`` the embeddings receive their gradients and the loss is detached.
        """
        embeddings = [torch.cat(column) for column in reps]
        total = embeddings[0].new_zeros((), dtype=torch.float32)
        for loss in _losses(self, embeddings, masks, self.score_mini_batch_size):
            if with_backward:
                loss.backward()  # type: ignore[no-untyped-call]
                loss = loss.detach()
            total = total + loss
        return total / len(embeddings[0]) if self.size_average else total


def _losses(
    loss_fn: Any, embeddings: list[Tensor], masks: list[Tensor], step: int
) -> Iterator[Tensor]:
    """Yield the sum of the losses (0-d) of ``step`` queries at a time, scaled as in the host.

    Args:
        loss_fn: the loss with its settings.
        embeddings: (rows, tokens, D) of the queries, the positives and each column of negatives.
        masks: (rows, tokens) of each.
        step: the number of queries.
    """
    query, *documents = embeddings
    query_mask, *document_masks = masks
    first, factor = 0, 1
    if loss_fn.gather_across_devices:
        documents = [torch.cat(list(utils.all_gather_with_gradients(x))) for x in documents]
        document_masks = [torch.cat(list(utils.all_gather(x))) for x in document_masks]
        first, factor = utils.get_rank() * len(query), utils.get_world_size()
    stacked, mask = torch.stack(documents, 1), torch.stack(document_masks, 1)
    expanded = _unwrapped(loss_fn.model).do_query_expansion
    width = len(documents)  # a positive and its mined negatives, side by side
    labels = (first + torch.arange(len(query), device=query.device)) * width
    columns = torch.arange(width * len(stacked), device=query.device)
    for begin in range(0, len(query), step):
        some = slice(begin, begin + step)
        scores = loss_fn.score_metric(
            query[some],
            stacked,
            queries_mask=None if expanded else query_mask[some],
            documents_mask=mask,
        )
        yield factor * scores_loss(
            scores,
            logit_scale=1 / loss_fn.temperature,
            alpha=loss_fn.alpha,
            hardness=loss_fn.hardness,
            symmetric=False,
            labels=labels[some],
            owners=columns // width * width,
            reduction="sum",
        )


def _unwrapped(model: Any) -> Any:
    """Return the model inside DDP."""
    return model if hasattr(model, "skiplist") else model.module
