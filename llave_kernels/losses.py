"""The losses as functions of the log-sum-exps (arXiv 2503.04812, eq. 4-6)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llave_kernels.backends.protocol import LogSumExps
from llave_kernels.rules import at_labels, inside


def direction_loss(positive: Tensor, lse: Tensor) -> Tensor:
    """``softplus(lse - positive)``, elementwise: the loss of one direction.

    The positive stays out of the log-sum-exp. Inside it, its logit would cancel. A loss below 1e-7
    would then be 0 in float32.
    """
    return -logsigmoid(positive - lse)


def joined(*lse: Tensor) -> Tensor:
    """The log-sum-exp of several, elementwise. Where all are -inf, the gradient is 0, not NaN."""
    return torch.stack(lse).clamp(min=torch.finfo(lse[0].dtype).min).logsumexp(0)


def loss_of_rows(
    positive: Tensor,
    query_lse: Tensor,
    target_lse: Tensor | None,
    within_lse: Tensor | None = None,
) -> Tensor:
    """(N,) losses. ``target_lse`` (N,) is of the positives' columns, None in one direction.

    ``within_lse`` (N,) is of the negatives within a side, if they count. Each direction has them.
    """
    if within_lse is not None:
        query_lse = joined(query_lse, within_lse)
        target_lse = None if target_lse is None else joined(target_lse, within_lse)
    loss = direction_loss(positive, query_lse)
    return loss if target_lse is None else (loss + direction_loss(positive, target_lse)) / 2


def total_and_slopes(
    outputs: LogSumExps, labels: Tensor | None, weight: float
) -> tuple[Tensor, LogSumExps]:
    """``weight`` times the sum of the losses (), and its gradients with respect to ``outputs``."""
    positive, query_lse, target_lse = outputs
    if not len(target_lse):
        total = weight * loss_of_rows(positive, query_lse, None).sum()
        rows = weight * torch.sigmoid(query_lse - positive)
        return total, LogSumExps(-rows, rows, target_lse)
    columns = at_labels(target_lse, labels, len(positive))
    total = weight * loss_of_rows(positive, query_lse, columns).sum()
    rows, columns = (weight / 2 * torch.sigmoid(x - positive) for x in (query_lse, columns))
    slopes = torch.zeros_like(target_lse)
    if labels is None:
        slopes[: len(columns)] = columns
    else:
        known, safe = inside(labels, len(target_lse))
        slopes.index_add_(0, safe, torch.where(known, columns, 0.0))
    return total, LogSumExps(-(rows + columns), rows, slopes)


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """The losses (N,) themselves, or their mean or sum ()."""
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()
