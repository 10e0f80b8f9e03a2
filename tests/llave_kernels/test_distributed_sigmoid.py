"""The sigmoid loss in 1 to 4 processes, compared with one process and with OpenCLIP's class."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from tests.helpers import relative_error
from tests.processes import run, sigmoid

pytest.importorskip("open_clip")


@lru_cache
def results(world: int) -> list[dict[str, Any]]:
    return run("tests.processes.sigmoid", "everything", world)


WORLDS = [2, *(pytest.param(world, marks=pytest.mark.long) for world in (1, 3, 4))]


@pytest.mark.parametrize("world", WORLDS)
def test_every_case_equals_one_process(world: int) -> None:
    """Four processes form a grid of 2 x 2."""
    by_rank = [found["losses"] for found in results(world)]
    for case in sigmoid.CASES:
        reduction = case[-1]
        *rows, weight, bias, d_scale, d_bias = sigmoid.of_one_process(world, case)
        count = sum(len(x) for x in rows)
        # Averaged gradients are those of the global mean, or of the global sum over the processes.
        factor = 1 / count if reduction == "mean" else 1 / world
        value = world / count if reduction == "mean" else 1.0
        for rank, found in enumerate(by_rank):
            own = rows[rank] if reduction == "none" else value * rows[rank].sum()
            assert relative_error(found[case][0], own) < 1e-12, (case, rank)
        average = [
            torch.stack(x).mean(0) for x in zip(*(f[case][1:] for f in by_rank), strict=True)
        ]
        for a, b in zip(average, (weight, bias, d_scale, d_bias), strict=True):
            assert relative_error(a, factor * b) < 1e-9, case


@pytest.mark.parametrize("world", WORLDS)
def test_open_clips_class_in_every_process(world: int) -> None:
    """In a grid, the gradients of scale and bias are compared after their average."""
    by_rank = [found["open_clip"] for found in results(world)]
    for position, (setting, *_) in enumerate(by_rank[0]):
        for i in range(5):
            pairs = [[values[i] for values in found[position][1:]] for found in by_rank]
            if i > 2 and world > 3:
                pairs = [[torch.stack(x).mean(0) for x in zip(*pairs, strict=True)]]
            for host, ours in pairs:
                assert relative_error(ours, host) < 1e-5, (setting, i)


def test_a_process_that_differs_is_an_error_on_all() -> None:
    first, second = (found["mistakes"] for found in results(2))
    for name, message in (
        ("logit_scale", "logit_scale is 11.0 on rank 1 and 10.0 here"),
        ("logit_bias", "logit_bias is -11.0 on rank 1 and -10.0 here"),
        ("a bias's tensor", "logit_bias is -11.0 on rank 1 and -10.0 here"),
        ("its gradient", "requires_grad of logit_bias is True on rank 1 and False here"),
        ("reduction", "reduction is sum on rank 1 and mean here"),
    ):
        assert first[name] == f"ValueError: {message}; it must be the same on every process"
        assert second[name].startswith("ValueError: ")
    for name in ("refused", "world_size"):
        assert first[name] == "RuntimeError: rank 1 refused its arguments; its own error says why"
    assert second["refused"].startswith("ValueError: reduction must be one of")
    assert second["world_size"] == "ValueError: world_size must be torch.distributed's, 2, got 3"
    for each in (first, second):
        assert each["a setting of another loss"].startswith("TypeError")
        assert each["class"] == each["module"] == "nothing"
