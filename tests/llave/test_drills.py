"""The short form of the kill drills (``tests.drills``)."""

from __future__ import annotations

from pathlib import Path

import pytest

for needed in ("sentence_transformers", "datasets", "torchvision"):
    pytest.importorskip(needed)

from tests.drills import embed, evaluate  # noqa: E402


def test_embed_ends_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    assert embed.run(tmp_path, kills=4, seed=0).total() == 4


def test_evaluate_ends_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    assert evaluate.run(tmp_path, kills=3, seed=0).total() == 3
