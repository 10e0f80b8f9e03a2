"""The supervised contrastive loss over the batch of all processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llave_kernels import supervised
from llave_kernels.agreement import Group, Peer, Terms, agree
from llave_kernels.distributed import told_of
from llave_kernels.grid import block_of
from llave_kernels.group_losses import Call, group_losses


# torch.compile breaks the graph here, as in ``distributed_contrastive_loss``.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def distributed_supervised_loss(
    query: Tensor,
    target: Tensor | None = None,
    *,
    query_groups: Tensor,
    target_groups: Tensor | None = None,
    group: Group = None,
    logit_scale: float | Tensor = 10.0,
    alpha: float = 0.0,
    denominator: str = "all",
    symmetric: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """``supervised_contrastive_loss`` over the rows of all processes of a group.

    The contract is that of ``distributed_contrastive_loss``: with ``reduction="mean"`` under data
    parallelism that averages gradients, all parameters have the gradients of the global batch.
    Batch sizes may differ between processes, and a group may have rows in several of them.

    Args:
        query: (N_local, D) this process's rows.
        target: (M_local, D) this process's targets. Default: ``query``, on every process.
        query_groups, target_groups: (N_local,), (M_local,) int64, compared across processes.
        group: as in ``distributed_contrastive_loss``.
        reduction: ``"mean"``: the sum over this process's rows, times the number of processes,
            divided by the global number of rows with a positive. ``"sum"``: the sum over this
            process's rows. ``"none"``: (N_local,) one loss per row of this process.
        logit_scale, alpha, denominator, symmetric, backend: as in ``supervised_contrastive_loss``.
            They must be the same on every process.

    Returns:
        0-d tensor or (N_local,). float32, or float64 for float64 inputs.

    Raises:
        RuntimeError, TypeError, ValueError: as in ``distributed_contrastive_loss``.
    """

    def prepare() -> tuple[Call, Terms]:
        call = supervised.checked(
            query, target, query_groups, target_groups, logit_scale=logit_scale, alpha=alpha,
            denominator=denominator, symmetric=symmetric, reduction=reduction, backend=backend,
        )  # fmt: skip
        told: dict[str, Any] = told_of(
            "distributed_supervised_loss", call.query, call.target, call.scale, False, reduction,
            call.backend,
        )  # fmt: skip
        told |= {
            "presence of target": target is not None,
            "alpha": call.alpha,
            "denominator": call.denominator,
            "symmetric": call.symmetric,
        }
        # A number is compared without a look at the device.
        scale = torch.as_tensor(logit_scale, dtype=call.scale.dtype)
        return call, Terms(Peer(len(call.query), len(call.target)), told, scale)

    call, peers = agree(prepare, group)
    block = block_of(group, peers, call.query.device)
    found = group_losses(call, block)
    if reduction == "none":
        return found[0].losses
    totals = torch.stack([x.losses.sum() for x in found])
    if reduction == "mean":
        known = torch.stack([(x.counts > 0).sum() for x in found])
        for side in (block.rows, block.columns):  # all processes, by the rows of the grid
            if side.shared:
                dist.all_reduce(known, group=side.group)
        totals = totals * len(peers) / known.clamp(min=1)
    return totals.mean()
