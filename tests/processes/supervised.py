"""The supervised contrastive loss in several processes, over every grid of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llave_kernels.distributed_supervised import distributed_supervised_loss
from llave_kernels.group_losses import DENOMINATORS
from llave_kernels.reference import reference_supervised_loss
from tests.processes.cases import Batch, Learned, said
from tests.processes.grids import row_lengths, rows_of_length

WORLD = 4
KINDS = 5  # groups. Some have rows in several processes, and one has no target
CASES = [
    (denominator, alpha, itself, symmetric)
    for denominator, alpha, itself, symmetric in itertools.product(
        DENOMINATORS, (0.0, 9.0), (True, False), (True, False)
    )
    if not (itself and symmetric) and (alpha or denominator == "all")
]


def batch(itself: bool) -> tuple[Batch, list[Tensor], list[Tensor]]:
    """The embeddings, and the groups of queries and of targets by process."""
    whole = Batch(WORLD, () if itself else ("mined",), uneven=True)
    generator = torch.Generator().manual_seed(7)

    def draw(sizes: list[int], kinds: int) -> list[Tensor]:
        return [torch.randint(kinds, (n,), generator=generator) for n in sizes]

    return whole, draw(whole.rows, KINDS), draw(whole.columns, KINDS - 1)


def of_one_process(case: tuple[Any, ...]) -> Tensor:
    """Loss and gradients over the whole batch, in one vector."""
    whole, rows, columns = batch(case[2])
    sides = (torch.cat(x) for x in (whole.query, whole.target, rows, columns))
    return trained(reference_supervised_loss, case, *sides)


def outcome(case: tuple[Any, ...]) -> Tensor:
    """The same of this process. The average over the processes is that of DDP."""
    whole, rows, columns = batch(case[2])
    sides = (x[dist.get_rank()] for x in (whole.query, whole.target, rows, columns))
    return trained(distributed_supervised_loss, case, *sides)


def trained(
    loss: Callable[..., Tensor],
    case: tuple[Any, ...],
    query: Tensor,
    target: Tensor,
    rows: Tensor,
    columns: Tensor,
) -> Tensor:
    denominator, alpha, itself, symmetric = case
    learned = Learned()
    call: dict[str, Any] = learned.arguments(query, target, biased=False)
    call |= {"query_groups": rows, "target_groups": columns}
    if itself:
        del call["target"], call["target_groups"]
    call |= {"denominator": denominator, "alpha": alpha, "symmetric": symmetric}
    return learned.vector(loss(**call))


def everything() -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for c in row_lengths(dist.get_world_size()):
        with rows_of_length(c):
            found |= {(c, case): outcome(case) for case in CASES}
    whole, rows, _ = batch(True)
    rank = dist.get_rank()
    call = {"query": whole.query[rank], "query_groups": rows[rank]}
    found["none"] = distributed_supervised_loss(**call, reduction="none")
    found["sum"] = distributed_supervised_loss(**call, reduction="sum")
    found["alone"] = said(lambda: distributed_supervised_loss(**call, alpha=float(rank == 1)))
    found["refused"] = said(
        lambda: distributed_supervised_loss(**call, reduction="none" if rank == 1 else "all")
    )
    return found
