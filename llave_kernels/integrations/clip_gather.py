"""The four ways in which CLIP trainers gather embeddings across processes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from llave_kernels import checks, functional
from llave_kernels.agreement import agree
from llave_kernels.distributed import Call, checked, gather_rows, loss_over
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
        query, target: (N_local, D), row i's positive in row i.
        logit_scale: float or one-element tensor.
        alpha: hardness strength in both directions.
        world_size: number of processes; 1 gathers nothing.

    Raises:
        TypeError, ValueError: as in ``distributed_contrastive_loss``; these settings must be the
            same on every process too.
    """
    given: dict[str, Any] = {"logit_scale": logit_scale, "alpha": alpha, "backend": backend}
    if world_size == 1:
        paired(query, target)
        return hardness_weighted_contrastive_loss(query, target, **given)
    gather = Gather(local_loss, gather_with_grad, world_size)
    return _over_processes(query, target, given, gather)


def paired(query: Tensor, target: Tensor) -> None:
    """ValueError unless they have as many rows."""
    checks.embeddings(*functional.autocast(query, target))
    if len(query) != len(target):
        raise ValueError(
            f"query and target must be pairs of rows, got {len(query)} and {len(target)} rows"
        )


class Gather(NamedTuple):
    """OpenCLIP's settings."""

    local_loss: bool
    gather_with_grad: bool
    world_size: int


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _over_processes(query: Tensor, target: Tensor, given: dict[str, Any], gather: Gather) -> Tensor:
    world = dist.get_world_size()
    # Where each process's loss is the global mean, the exact gradients are what all add up to.
    share = 1.0 if gather.local_loss or gather.gather_with_grad else 1.0 / world

    def arguments() -> dict[str, Any]:
        paired(query, target)
        if gather.world_size != world:
            raise ValueError(
                f"world_size must be torch.distributed's, {world}, got {gather.world_size}"
            )
        scale = given["logit_scale"]
        if isinstance(scale, Tensor) and not gather.local_loss:
            scale = _SumGradient.apply(scale, 1.0 / (world * share))
        return {"query": query, "target": target, **given, "logit_scale": scale}

    settings = {"the loss": "gathered_clip_loss", **gather._asdict()}
    if gather.local_loss and not gather.gather_with_grad:
        call, peers = agree(lambda: checked(**arguments(), settings=settings), None)
        return _against_constants(call, [peer.rows for peer in peers])
    loss = loss_over(None, arguments, settings)
    if gather.local_loss:
        return loss
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    loss = share * loss
    return loss + (mean / world - loss.detach())


def _against_constants(call: Call, rows: list[int]) -> Tensor:
    """Each side's own rows against all rows of the other, which receive no gradient."""
    first = sum(rows[: dist.get_rank()])
    device = call.query.device
    labels = torch.arange(first, first + len(call.query), device=device)
    directions = []
    for own, other in ((call.query, call.target), (call.target, call.query)):
        everything = gather_rows(other.detach(), rows, None)
        directions.append(
            hardness_weighted_contrastive_loss(
                own, everything, logit_scale=call.scale, alpha=call.rules.alpha, symmetric=False,
                labels=labels, owners=torch.arange(len(everything), device=device),
                backend=call.backend,
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
