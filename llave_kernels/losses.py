"""The losses as functions of the log-sum-exps (arXiv 2503.04812, eq. 4-6)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def direction_loss(positive: Tensor, lse: Tensor) -> Tensor:
    """``softplus(lse - positive)``, elementwise: the loss of one direction.

    The positive stays out of the log-sum-exp. Inside it, its logit would cancel. A loss below 1e-7
    would then be 0 in float32.
    """
    return -logsigmoid(positive - lse)


def loss_of_rows(positive: Tensor, query_lse: Tensor, target_lse: Tensor | None) -> Tensor:
    """(N,) losses. ``target_lse`` (N,) is of the positives' columns, None in one direction."""
    loss = direction_loss(positive, query_lse)
    return loss if target_lse is None else (loss + direction_loss(positive, target_lse)) / 2


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """The losses (N,) themselves, or their mean or sum ()."""
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()
