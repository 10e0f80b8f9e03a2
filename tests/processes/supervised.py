"""The supervised contrastive loss in several processes, over every grid of them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from llave_kernels.distributed_supervised import distributed_supervised_loss
from llave_kernels.group_losses import DENOMINATORS
from llave_kernels.reference import reference_supervised_loss
from tests.processes.cases import Batch, encoder, said, vector
from tests.processes.grids import row_lengths, rows_of_length

WORLD = 4
KINDS = 5  # groups. Some have rows in several processes, and one has no target
CASES = [
    (denominator, alpha, itself, symmetric)
    for denominator, alpha, itself, symmetric in itertools.product(
        DENOMINATORS, (0.0, 9.0), (True, False), (True, False)
    )
    if not (itself and symmetric)
]


def batch(itself: bool) -> tuple[Batch, list[Tensor], list[Tensor]]:
    """The embeddings, and the groups of queries and of targets by process."""
    whole = Batch(WORLD, () if itself else ("mined",), uneven=True)
    generator = torch.Generator().manual_seed(7)

    def draw(sizes: list[int], kinds: int) -> list[Tensor]:
        return [torch.randint(kinds, (n,), generator=generator) for n in sizes]

    return whole, draw(whole.rows, KINDS), draw(whole.columns, KINDS - 1)


def settings(case: tuple[Any, ...]) -> dict[str, Any]:
    denominator, alpha, _, symmetric = case
    return {"denominator": denominator, "alpha": alpha, "symmetric": symmetric}


def of_one_process(case: tuple[Any, ...]) -> Tensor:
    """Loss and gradients of encoder and scale over the whole batch."""
    whole, rows, columns = batch(case[2])
    model, scale = encoder(), torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    query, target = (normalize(model(torch.cat(x)), dim=1) for x in (whole.query, whole.target))
    sides = {"query": query, "query_groups": torch.cat(rows)}
    if not case[2]:
        sides |= {"target": target, "target_groups": torch.cat(columns)}
    loss = reference_supervised_loss(**sides, logit_scale=scale, **settings(case))
    loss.backward()
    return vector(loss, model, scale)


def outcome(case: tuple[Any, ...], **more: Any) -> Tensor:
    """The same of this process. The average over the processes is that of DDP."""
    rank = dist.get_rank()
    whole, rows, columns = batch(case[2])
    model, scale = encoder(), torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    sides = {"query": normalize(model(whole.query[rank]), dim=1), "query_groups": rows[rank]}
    if not case[2]:
        sides["target"] = normalize(model(whole.target[rank]), dim=1)
        sides["target_groups"] = columns[rank]
    loss = distributed_supervised_loss(**sides, logit_scale=scale, **settings(case), **more)
    loss.sum().backward()
    return vector(loss.sum(), model, scale)


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
