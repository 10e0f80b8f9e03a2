"""The short form of the kill drills (``tests.drills``)."""

from __future__ import annotations

from pathlib import Path

import pytest

for needed in ("sentence_transformers", "datasets", "torchvision"):
    pytest.importorskip(needed)

from tests.drills import compress, embed, evaluate, index  # noqa: E402


def test_embed_ends_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    assert embed.run(tmp_path, kills=4, seed=0).total() == 4


def test_evaluate_ends_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    assert evaluate.run(tmp_path, kills=3, seed=0).total() == 3


def test_compress_ends_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    assert compress.run(tmp_path, kills=2, seed=0).total() == 2


def test_index_ends_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    assert index.run(tmp_path, kills=2, seed=0).total() == 2
