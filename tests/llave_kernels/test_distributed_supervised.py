"""The supervised loss over the batch of four processes equals that of one."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from llave_kernels.reference import reference_supervised_loss
from tests.helpers import relative_error
from tests.processes import cases, run, supervised


@lru_cache
def results() -> list[dict[Any, Any]]:
    return run("tests.processes.supervised", "everything", supervised.WORLD)


def test_every_grid_equals_one_process() -> None:
    for case in supervised.CASES:
        truth = supervised.of_one_process(case)
        for c in (1, 2, 4):
            average = torch.stack([found[c, case] for found in results()]).mean(0)
            for name, part in cases.PARTS.items():
                assert relative_error(average[part], truth[part]) < 1e-9, (case, c, name)


def test_losses_of_rows_and_their_sum() -> None:
    whole, rows, _ = supervised.batch(True)
    truth = reference_supervised_loss(
        torch.cat(whole.query), query_groups=torch.cat(rows), reduction="none"
    )
    assert relative_error(torch.cat([found["none"] for found in results()]), truth) < 1e-12
    assert relative_error(sum(found["sum"] for found in results()), truth.sum()) < 1e-12


def test_a_mistake_is_an_error_in_every_process() -> None:
    for rank, found in enumerate(results()):
        assert "alpha is" in found["alone"], rank
        message = "reduction must be one of" if rank != 1 else "refused its arguments"
        assert message in found["refused"], rank
