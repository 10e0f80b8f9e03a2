"""The choice of tiles, from the table and from timings kept on disk."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llave_kernels import atomic_files
from llave_kernels.backends import tiles
from llave_kernels.backends import triton_backend as backend
from llave_kernels.rules import Rules
from tests.helpers import embeddings

PLAIN = Rules(
    labels=None,
    owners=None,
    query_ids=None,
    target_ids=None,
    row_limit=None,
    column_limit=None,
    query_bias=None,
    target_bias=None,
    alpha=9.0,
    target_alpha=9.0,
    hardness="in_batch",
    margin=None,
    symmetric=True,
)
COLUMNS = torch.arange(2)
CHOICES = tiles.CANDIDATES[tiles.Kind(9, 2)]


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "test GPU")
    monkeypatch.setenv(tiles.CACHE_DIR, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv(tiles.AUTOTUNE, "1")
    tiles._remembered.cache_clear()


def test_table_depends_on_what_it_says() -> None:
    large = tiles.table(9, torch.bfloat16, 1536, 8192)
    assert tiles.table(9, torch.bfloat16, 1536, 256).bm < large.bm
    assert tiles.table(9, torch.bfloat16, 8, 8192).stages < large.stages
    assert tiles.table(9, torch.bfloat16, 1536, 8192, masked=True) != large
    assert tiles.table(10, torch.bfloat16, 1536, 8192) == large
    assert tiles.table(8, torch.float32, 1536, 8192) in tiles.CANDIDATES[tiles.Kind(8, 4)]


def test_which_rules_need_smaller_tiles_depends_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, ids in (((3, 6), True), ((3, 9), False)):
        monkeypatch.setattr(tiles, "_triton", lambda version=version: version)
        assert tiles.masked(torch.bfloat16, ids=True, margin=False) == ids
        assert tiles.masked(torch.float32, ids=True, margin=False)
        assert tiles.masked(torch.bfloat16, ids=False, margin=True)
        assert tiles.masked(torch.bfloat16, ids=False, margin=False, biases=True)
        assert not tiles.masked(torch.float32, ids=False, margin=False)


class OnGpu:
    """Stands for a tensor on a GPU, with its sizes, dtype and device."""

    def __init__(self, n: int, m: int, d: int) -> None:
        self.shape, self.dtype, self.device = (n, d), torch.bfloat16, SimpleNamespace(type="cuda")
        self.columns = m

    def __len__(self) -> int:
        return self.shape[0]


def tuning(
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Any] = backend._Forward,
    n: int = 3000,
    m: int = 3000,
    d: int = 384,
    **settings: Any,
) -> tuple[tiles.Tile, list[tiles.Tile]]:
    """The tile chosen for a call on that GPU, and the tiles timed for it."""
    call = object.__new__(kind)
    call.query, call.sizes = OnGpu(n, m, d), (n, m, d)
    call.rules = PLAIN._replace(**settings)
    call.pairs = backend.pairs(*embeddings(2, 2, 3), call.rules)
    timed: list[tiles.Tile] = []

    def do_bench(trial: Any, **_: Any) -> float:
        trial()
        return -timed[-1].bk

    monkeypatch.setattr(backend.triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(kind, "trial", lambda _, tile: timed.append(tile))
    return call.tile(), timed


def test_timing_happens_once_and_is_remembered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    best, timed = tuning(monkeypatch)
    assert best == min(CHOICES, key=lambda tile: -tile.bk)
    assert timed == list(CHOICES)
    tiles._remembered.cache_clear()  # as in a new process
    assert tuning(monkeypatch, n=4096, m=2049) == (best, [])
    assert [path.name for path in tmp_path.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize(
    "other",
    [
        {"kind": backend._Backward},
        {"n": 5000},
        {"m": 9000},
        {"d": 768},
        {"symmetric": False},
        {"hardness": "all"},
        {"margin": 0.1},
        {"labels": COLUMNS},
        {"owners": COLUMNS},
        {"query_ids": COLUMNS, "target_ids": COLUMNS},
        {"target_alpha": 2.5},
        {"target_bias": torch.ones(2)},
    ],
    ids=str,
)
def test_another_kind_of_call_is_timed_itself(
    monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    tuning(monkeypatch)
    assert tuning(monkeypatch, **other)[1] == list(CHOICES)
    assert tuning(monkeypatch, **other)[1] == []


def test_nothing_is_timed_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning(monkeypatch) == (CHOICES[0], [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    best, _ = tuning(monkeypatch, symmetric=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning(monkeypatch, symmetric=False) == (best, [])


def test_a_tile_beyond_the_shared_memory_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def do_bench(trial: Any, **_: Any) -> float:
        raise backend.triton.runtime.errors.OutOfResources(200_000, 100_000, "shared memory")

    call = object.__new__(backend._Forward)
    monkeypatch.setattr(backend.triton.testing, "do_bench", do_bench)
    assert call._time(CHOICES[0]) == float("inf")


def test_processes_add_to_one_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiles._remembered()  # before the other process writes
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps({"of another process": CHOICES[1]}))
    tuning(monkeypatch)
    assert len(json.loads(file.read_text())) == 2


def test_a_folder_that_cannot_be_written_is_said_and_no_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(tiles.CACHE_DIR, str(tmp_path / "file" / "folder"))
    with pytest.warns(UserWarning, match=r"cannot be kept in .*folder.*set LLAVE_CACHE_DIR"):
        best, _ = tuning(monkeypatch)
    assert tuning(monkeypatch) == (best, [])  # kept in memory


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 1}', "not json"])
def test_a_damaged_cache_is_timed_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str
) -> None:
    (tmp_path / "tiles.json").write_text(content)
    assert tuning(monkeypatch)[1] == list(CHOICES)


def test_a_full_disk_leaves_the_cache_that_was_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tuning(monkeypatch)
    before = (tmp_path / "tiles.json").read_bytes()

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic_files, "sync", full)
    with pytest.warns(UserWarning, match="cannot be kept in .*No space left"):
        tuning(monkeypatch, d=768)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
