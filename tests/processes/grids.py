"""The loss over the grids of several groups of processes, and the bytes that a process receives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from llave_kernels import HardnessWeightedContrastiveLoss, grid
from llave_kernels.distributed import distributed_contrastive_loss
from tests.processes.cases import EVERYTHING, outcome, said

# Every rule at once, in even and uneven batches and in one and both directions.
CASES = [
    (EVERYTHING[number % 2], uneven, symmetric, hardness)
    for number, (uneven, symmetric, hardness) in enumerate(
        [
            (False, True, "in_batch"),
            (True, True, "hard_negatives"),
            (True, False, "in_batch"),
            (True, True, "in_batch"),
        ]
    )
]
SIZES = (4, 6, 8, 16)
N, M, D = 6, 12, 8


def row_lengths(size: int) -> list[int]:
    """C of every grid of so many processes."""
    return [c for c in range(1, size + 1) if size % c == 0]


def everything() -> dict[str, Any]:
    """What this process, of 16, finds over groups of the first processes and over meshes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = {size: dist.new_group([*range(size)]) for size in SIZES}
    whole = init_device_mesh("cpu", (2, 8))
    deep = init_device_mesh("cpu", (2, 2, 4), mesh_dim_names=("a", "b", "c"))
    part = deep["a", "b"]
    place = 2 * part.get_local_rank(0) + part.get_local_rank(1)
    pair = [torch.randn(4, 5) for _ in range(2)]
    found: dict[str, Any] = {
        "mesh": outcome(CASES[1], whole, rank, world),
        "part": outcome(CASES[1], part, place, 4),
        "place": place,
        "3-D": said(lambda: HardnessWeightedContrastiveLoss(gather_group=deep)),
        "refused": said(
            lambda: distributed_contrastive_loss(*pair, group=part, alpha=1.0 - 2.0 * (rank == 4))
        ),
    }
    for size, group in reversed(groups.items()):
        if rank < size:
            for c in row_lengths(size):
                with rows_of_length(c):
                    found[f"{size} in rows of {c}"] = over_a_grid(group, size)
    return found


@contextmanager
def rows_of_length(c: int) -> Iterator[None]:
    """Take the grid with C = ``c``."""
    original, grid.row_length = grid.row_length, lambda *given: c
    try:
        yield
    finally:
        grid.row_length = original


def over_a_grid(group: Any, size: int) -> dict[str, Any]:
    """The outcome of each case, whether a rerun is bit-equal, and the bytes received."""
    rank = dist.get_rank(group)
    outcomes = [outcome(case, group, rank, size) for case in CASES]
    return {
        "outcomes": outcomes,
        "bit-equal": torch.equal(outcome(CASES[1], group, rank, size), outcomes[1]),
        "received": [received(group, symmetric=symmetric) for symmetric in (True, False)],
    }


def received(group: Any, *, symmetric: bool) -> int:
    """The bytes received for a step of N queries and M targets a process, in float32."""
    query, target = (torch.randn(rows, D, requires_grad=True) for rows in (N, M))
    with counted() as found:
        loss = distributed_contrastive_loss(
            query, target, group=group, symmetric=symmetric, owners=range(M)
        )
        loss.backward()
    return sum(found)


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes that this process receives from the others in each collective."""
    found: list[int] = []
    # In a reduction each of the others sends its part of what this process keeps.
    sizes = {
        "all_gather_into_tensor": lambda out, given: out.nbytes - given.nbytes,
        "reduce_scatter_tensor": lambda out, given: given.nbytes - out.nbytes,
        "all_to_all_single": lambda out, given, own, *rest: out.nbytes - own[0] * out.itemsize,
    }
    originals = {name: getattr(dist, name) for name in sizes}

    def counting(name: str) -> Any:
        def call(out: Tensor, given: Tensor, *rest: Any) -> Any:
            found.append(sizes[name](out, given, *rest[: name == "all_to_all_single"]))
            return originals[name](out, given, *rest)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield found
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
