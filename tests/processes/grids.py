"""The loss over every grid of the processes, and the bytes that a process receives for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import normalize

from llave_kernels import grid
from llave_kernels.distributed import distributed_contrastive_loss
from tests.processes.cases import KINDS, averaged, outcome

# Every rule at once, in even and uneven batches and in one and both directions.
CASES = [
    (KINDS[-1], uneven, symmetric, hardness)
    for uneven, symmetric, hardness in (
        (False, True, "in_batch"),
        (True, True, "hard_negatives"),
        (True, False, "in_batch"),
    )
]
N, M, D = 6, 12, 8


@contextmanager
def rows_of_length(c: int) -> Iterator[None]:
    """Take the grid with C = ``c``."""
    original, grid.row_length = grid.row_length, lambda *given: c
    try:
        yield
    finally:
        grid.row_length = original


def every_grid() -> dict[int, dict[str, Any]]:
    """By C: the averaged outcome of each case, whether a rerun is bit-equal, and the traffic."""
    world = dist.get_world_size()
    found = {}
    for c in (c for c in range(1, world + 1) if world % c == 0):
        with rows_of_length(c):
            outcomes = [outcome(case) for case in CASES]
            again = outcome(CASES[1])
            found[c] = {
                "outcomes": [averaged(x.clone()) for x in outcomes],
                "rerun": torch.equal(again, outcomes[1]),
                "received": [traffic(symmetric=symmetric) for symmetric in (True, False)],
            }
    return found


def meshes() -> dict[str, Any]:
    """The averaged outcomes over DeviceMeshes, C of the grid that is chosen, and refusals."""
    from tests.processes.cases import said

    world = dist.get_world_size()
    pair = [normalize(torch.randn(4, 5), dim=1) for _ in range(2)]
    whole = init_device_mesh("cpu", (2, 2, world // 4), mesh_dim_names=("a", "b", "c"))
    part = whole["a", "b"]
    half = dist.new_group([0, 1, 2, 3])
    with rows_of_length(2):
        inside = dist.get_rank() < 4
        sub = float(distributed_contrastive_loss(*seeded(), group=half)) if inside else None
    return {
        "outcomes": [
            averaged(outcome(case, init_device_mesh("cpu", shape)))
            for case, shape in zip(
                CASES, [(2, world // 2), (world // 2, 2), (1, world)], strict=True
            )
        ],
        "part": float(distributed_contrastive_loss(*seeded(), group=part)),
        "sub-group": sub,
        "3-D": said(lambda: distributed_contrastive_loss(*pair, group=whole)),
        "refused": said(
            lambda: distributed_contrastive_loss(
                *pair, group=part, alpha=-1.0 if dist.get_rank() == 1 else 1.0
            )
        ),
    }


def seeded() -> list[Tensor]:
    torch.manual_seed(5)
    return [normalize(torch.randn(4, 5), dim=1) for _ in range(2)]


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes that this process receives from others in each collective."""
    received: list[int] = []
    own = {
        "all_gather_into_tensor": lambda out, given, *rest: given.nbytes,
        "reduce_scatter_tensor": lambda out, given, *rest: out.nbytes,
        "all_to_all_single": lambda out, given, *rest: out.nbytes // rest[2].size(),
    }
    originals = {name: getattr(dist, name) for name in own}

    def counting(name: str) -> Any:
        def call(out: Tensor, given: Tensor, *rest: Any) -> Any:
            whole = given.nbytes if name == "reduce_scatter_tensor" else out.nbytes
            received.append(whole - own[name](out, given, *rest))
            return originals[name](out, given, *rest)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield received
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


def traffic(*, symmetric: bool) -> int:
    """The bytes received for a step of N queries and M targets a process, in float32."""
    query, target = (torch.randn(rows, D, requires_grad=True) for rows in (N, M))
    with counted() as received:
        distributed_contrastive_loss(query, target, symmetric=symmetric, owners=range(M)).backward()
    return sum(received)
