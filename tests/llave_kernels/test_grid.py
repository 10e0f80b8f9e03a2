"""The grid of processes: its choice, and the loss over every grid of 4, 6, 8 and 16 processes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from llave_kernels import grid
from llave_kernels.agreement import Peer
from tests.helpers import relative_error
from tests.processes import cases, grids, run


@lru_cache
def results() -> list[dict[str, Any]]:
    return run("tests.processes.grids", "everything", 16, timeout=300)


def assert_one_process(found: list[torch.Tensor], case: tuple[Any, ...]) -> None:
    average, truth = torch.stack(found).mean(0), cases.of_one_process(len(found), case)
    for name, part in cases.PARTS.items():
        assert relative_error(average[part], truth[part]) < 1e-9, (case, name)


@pytest.mark.long
@pytest.mark.parametrize("size", grids.SIZES)
def test_every_grid_equals_one_process(size: int) -> None:
    """The groups of fewer processes are parts of the world."""
    for c in grids.row_lengths(size):
        members = [found[f"{size} in rows of {c}"] for found in results()[:size]]
        for i, case in enumerate(grids.CASES):
            assert_one_process([found["outcomes"][i] for found in members], case)
        assert all(found["bit-equal"] for found in members)


@pytest.mark.long
@pytest.mark.parametrize("size", grids.SIZES)
def test_the_bytes_received_are_those_of_the_formula(size: int) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import traffic

    for c in grids.row_lengths(size):
        expected = [
            traffic.received(size, c, grids.N, grids.M, grids.D, 4, symmetric=symmetric)
            for symmetric in (True, False)
        ]
        for found in results()[:size]:
            assert found[f"{size} in rows of {c}"]["received"] == expected, c


@pytest.mark.long
def test_a_mesh_of_two_dimensions_is_the_grid() -> None:
    found = results()
    assert_one_process([each["mesh"] for each in found], grids.CASES[1])
    parts: dict[int, dict[int, torch.Tensor]] = {}
    for rank, each in enumerate(found):  # four meshes of 2 x 2
        parts.setdefault(rank % 4, {})[each["place"]] = each["part"]
    for part in parts.values():
        assert_one_process([part[place] for place in range(4)], grids.CASES[1])
    for rank, each in enumerate(found):
        assert each["3-D"].startswith(
            "ValueError: gather_group must be a DeviceMesh of 2 dimensions, got 3"
        )
        refused = {4: "ValueError: alpha must be >= 0", 0: "RuntimeError: rank 1 refused its"}
        expected = refused.get(rank, refused[0] if rank % 4 == 0 else "nothing")
        assert each["refused"].startswith(expected), rank


@pytest.mark.parametrize(
    ("world", "rows", "columns", "per_node", "expected"),
    [
        (1, 8, 8, 1, 1),
        (2, 8, 8, 2, 1),
        (7, 8, 8, 1, 1),
        (4, 8, 8, 1, 2),
        (8, 8, 8, 8, 2),
        (8, 8, 8, 4, 4),  # R = 4 or 2 receives as much. Only 2 keeps the rows inside nodes
        (64, 8, 8, 8, 8),
        (16, 8, 8, 8, 8),  # 8 of its own node cost less than 2 of the other
        (1024, 8, 8, 8, 32),
        (1024, 8, 8, 1, 32),
        (2, 8, 32, 2, 2),  # mined negatives: the queries are fewer
        (16, 8, 32, 1, 8),
    ],
)
def test_the_grid_that_receives_least(
    world: int, rows: int, columns: int, per_node: int, expected: int
) -> None:
    assert grid.row_length(world, rows, columns, per_node) == expected


@pytest.mark.parametrize("world", [1, 2, 6, 12, 16, 24, 64, 360])
@pytest.mark.parametrize("columns", [8, 24])
def test_no_other_grid_receives_less(world: int, columns: int) -> None:
    def received(c: int) -> int:
        return (c - 1) * 8 + (world // c - 1) * columns

    assert received(grid.row_length(world, 8, columns, 1)) == min(
        map(received, grids.row_lengths(world))
    )


def test_the_processes_of_a_node_are_consecutive_or_unknown() -> None:
    for nodes, expected in (
        ("aaaa", 4),
        ("aabb", 2),
        ("abab", 1),
        ("aabbcc", 2),
        ("aaab", 1),
        ("aaabb", 1),
        ("abcd", 1),
    ):
        assert grid.per_node([Peer(1, 1, node=ord(x)) for x in nodes]) == expected, nodes
