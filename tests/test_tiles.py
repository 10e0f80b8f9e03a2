"""Tile choice: the table, and the timings remembered on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llave_kernels.backends import tiles

DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "test GPU")
    monkeypatch.setenv(tiles.CACHE_DIR, str(tmp_path))
    tiles._read_cache.cache_clear()


def test_table_depends_on_what_it_says() -> None:
    large = tiles.table(9, torch.bfloat16, 1536, 8192)
    assert tiles.table(9, torch.bfloat16, 1536, 256).bm < large.bm
    assert tiles.table(9, torch.bfloat16, 8, 8192).stages < large.stages
    assert tiles.table(9, torch.bfloat16, 1536, 8192, masked=True) != large
    assert tiles.table(10, torch.bfloat16, 1536, 8192) == large
    assert tiles.table(8, torch.float32, 1536, 8192) in tiles.CANDIDATES[8, 4]


def test_timing_happens_once_and_is_remembered(tmp_path: Path) -> None:
    timed: list[tiles.Tile] = []

    def time(tile: tiles.Tile) -> float:
        timed.append(tile)
        return -tile.bk

    choices = tiles.CANDIDATES[9, 2]
    best = tiles.tuned(DEVICE, torch.bfloat16, 384, 3000, time)
    assert best == min(choices, key=lambda tile: -tile.bk)
    assert timed == list(choices)
    tiles._read_cache.cache_clear()  # as a new process would
    assert tiles.tuned(DEVICE, torch.bfloat16, 384, 4096, time) == best
    assert len(timed) == len(choices)
    assert [path.name for path in tmp_path.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 1}', "not json"])
def test_a_damaged_cache_is_timed_again(tmp_path: Path, content: str) -> None:
    (tmp_path / "tiles.json").write_text(content)
    tile = tiles.tuned(DEVICE, torch.float32, 8, 8, lambda tile: tile.bm)
    assert tile == min(tiles.CANDIDATES[9, 4], key=lambda tile: tile.bm)
