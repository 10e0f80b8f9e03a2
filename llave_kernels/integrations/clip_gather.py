"""The four ways in which CLIP trainers gather embeddings across processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llave_kernels.distributed import distributed_contrastive_loss
from llave_kernels.functional import hardness_weighted_contrastive_loss


def gathered_clip_loss(
    query: Tensor,
    target: Tensor,
    logit_scale: float | Tensor,
    alpha: float,
    *,
    local_loss: bool,
    gather_with_grad: bool,
    world_size: int,
    backend: str = "auto",
) -> Tensor:
    """Symmetric loss of paired rows with OpenCLIP's value and gradients in each process.

    | local_loss | gather_with_grad | value | gradients, before they are averaged |
    |---|---|---|---|
    | True | True | mean over own rows | exact: their average is the global batch's |
    | False | True | global mean | the same |
    | False | False | global mean | of own rows only: their average is exact / world_size |
    | True | False | mean over own rows | of own rows against constants: not exact |

    In the first setting a process's gradient of ``logit_scale`` agrees once averaged.

    Args:
        query, target: (N_local, D), row i's positive in row i, as many on every process.
        logit_scale: float or one-element tensor.
        alpha: hardness strength in both directions.
        world_size: number of processes; 1 gathers nothing.
    """
    if isinstance(logit_scale, Tensor) and logit_scale.dim():
        logit_scale = logit_scale.reshape(())
    settings: dict[str, Any] = {"alpha": alpha, "backend": backend}
    if world_size == 1:
        return hardness_weighted_contrastive_loss(
            query, target, logit_scale=logit_scale, **settings
        )
    return _over_processes(query, target, logit_scale, settings, local_loss, gather_with_grad)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _over_processes(
    query: Tensor,
    target: Tensor,
    logit_scale: float | Tensor,
    settings: dict[str, Any],
    local_loss: bool,
    gather_with_grad: bool,
) -> Tensor:
    if local_loss and gather_with_grad:
        return distributed_contrastive_loss(query, target, logit_scale=logit_scale, **settings)
    if local_loss:
        return _against_constants(query, target, logit_scale, settings)
    # Every process's loss is the global mean: the exact gradients are what all of them add up to.
    world_size = dist.get_world_size()
    share = 1.0 if gather_with_grad else 1.0 / world_size
    if isinstance(logit_scale, Tensor):
        logit_scale = _SumGradient.apply(logit_scale, 1.0 / (world_size * share))
    loss = distributed_contrastive_loss(query, target, logit_scale=logit_scale, **settings)
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    loss = share * loss
    return loss + (mean / world_size - loss.detach())


def _against_constants(
    query: Tensor, target: Tensor, logit_scale: float | Tensor, settings: dict[str, Any]
) -> Tensor:
    """Each side's own rows against all rows of the other, which receive no gradient."""
    labels = torch.arange(len(query), device=query.device) + dist.get_rank() * len(query)
    directions = []
    for own, other in ((query, target), (target, query)):
        everything = other.new_empty((len(other) * dist.get_world_size(), other.shape[1]))
        dist.all_gather_into_tensor(everything, other.detach().contiguous())
        owners = torch.arange(len(everything), device=query.device)
        directions.append(
            hardness_weighted_contrastive_loss(
                own, everything, logit_scale=logit_scale, symmetric=False, labels=labels,
                owners=owners, **settings,
            )
        )  # fmt: skip
    return (directions[0] + directions[1]) / 2


class _SumGradient(torch.autograd.Function):
    """The identity; its gradient is the sum over the processes times ``factor``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient * ctx.factor
        dist.all_reduce(total)
        return total, None
