"""The symmetric loss of paired rows over all processes, in OpenCLIP's four gathering modes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from llave_kernels import checks
from llave_kernels.agreement import agree
from llave_kernels.distributed import Call, checked, loss_over
from llave_kernels.exchange import gather_rows
from llave_kernels.functional import hardness_weighted_contrastive_loss
from llave_kernels.precision import autocast


class Gather(NamedTuple):
    """OpenCLIP's gathering settings. They decide each process's loss value and gradients.

    | local_loss | gather_with_grad | value | gradients, before they are averaged |
    |---|---|---|---|
    | True | True | mean over own rows | exact: their average is the global batch's |
    | False | True | global mean | exact |
    | False | False | global mean | from own rows only: their average is exact / world_size |
    | True | False | mean over own rows | from own rows against constants: not exact |

    Each process's gradients equal OpenCLIP's. With both settings True, the gradient of
    ``logit_scale`` equals OpenCLIP's only after the average.

    Attributes:
        local_loss, gather_with_grad: as in OpenCLIP.
        world_size: number of processes. With 1, nothing is gathered.
    """

    local_loss: bool
    gather_with_grad: bool
    world_size: int


def gathered_clip_loss(
    query: Tensor,
    target: Tensor,
    logit_scale: float | Tensor,
    alpha: float,
    gather: Gather,
    backend: str = "auto",
) -> Tensor:
    """Symmetric loss of paired rows, with OpenCLIP's value and gradients in each process.

    Args:
        query, target: (N_local, D). The positive of query row i is target row i.
        logit_scale: float or tensor of one element.
        alpha: hardness strength in both directions.
        gather: must be the same on every process.
        backend: as in ``hardness_weighted_contrastive_loss``.

    Returns:
        0-d tensor, float32, or float64 for float64 inputs.

    Raises:
        RuntimeError, TypeError, ValueError: as in ``distributed_contrastive_loss``.
    """
    settings: dict[str, Any] = {"logit_scale": logit_scale, "alpha": alpha, "backend": backend}
    if gather.world_size == 1:
        check_pairs(query, target)
        return hardness_weighted_contrastive_loss(query, target, **settings)
    return _over_processes(query, target, settings, gather)


def check_pairs(query: Tensor, target: Tensor) -> None:
    """Raise ValueError unless both have the same number of rows."""
    checks.embeddings(*autocast(query, target))
    if len(query) != len(target):
        raise ValueError(
            f"query and target must be pairs of rows, got {len(query)} and {len(target)} rows"
        )


def check_world(world_size: int) -> None:
    """Raise ValueError unless this is torch.distributed's number of processes."""
    if world_size != (world := dist.get_world_size()):
        raise ValueError(f"world_size must be torch.distributed's, {world}, got {world_size}")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _over_processes(
    query: Tensor, target: Tensor, settings: dict[str, Any], gather: Gather
) -> Tensor:
    world = dist.get_world_size()
    # With both settings False, the exact gradients are the sum over the processes, not the average.
    share = 1.0 if gather.local_loss or gather.gather_with_grad else 1.0 / world

    def arguments() -> dict[str, Any]:
        check_pairs(query, target)
        check_world(gather.world_size)
        scale = settings["logit_scale"]
        if isinstance(scale, Tensor) and not gather.local_loss:
            scale = _SumGradient.apply(scale, 1.0 / (world * share))
        return {"query": query, "target": target, **settings, "logit_scale": scale}

    told = {"the loss": "gathered_clip_loss", **gather._asdict()}
    if gather.local_loss and not gather.gather_with_grad:
        call, peers = agree(lambda: checked(**arguments(), settings=told), None)
        return _against_constants(call, [peer.rows for peer in peers])
    loss = loss_over(None, arguments, told)
    if gather.local_loss:
        return loss
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    loss = share * loss
    return loss + (mean / world - loss.detach())


def _against_constants(call: Call, rows: list[int]) -> Tensor:
    """The loss of each side's own rows against all rows of the other side, taken as constants.

    Args:
        rows: number of rows of each process.
    """
    first = sum(rows[: dist.get_rank()])
    device = call.query.device
    labels = torch.arange(first, first + len(call.query), device=device)
    directions = []
    for own, other in ((call.query, call.target), (call.target, call.query)):
        everything = gather_rows(other.detach(), rows, None)
        directions.append(
            hardness_weighted_contrastive_loss(
                own, everything, logit_scale=call.scale, alpha=call.rules.alpha, symmetric=False,
                labels=labels, owners=range(len(everything)),
                backend=call.backend,
            )
        )  # fmt: skip
    return (directions[0] + directions[1]) / 2


class _SumGradient(torch.autograd.Function):
    """The identity. Its gradient is ``factor`` times the sum over the processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient * ctx.factor
        dist.all_reduce(total)
        return total, None
