"""Tile shapes of the Triton kernels: a table, or on request timed once and remembered.

With ``LLAVE_AUTOTUNE=1`` the first call of each class (kernel, device, dtype, rules, D, and N and M
to the next power of two) times the candidates and stores the best under ``LLAVE_CACHE_DIR``
(default ``~/.cache/llave``); later processes read it there.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

AUTOTUNE = "LLAVE_AUTOTUNE"
CACHE_DIR = "LLAVE_CACHE_DIR"


class Tile(NamedTuple):
    """Block sizes over rows, columns and D; warps per program; software pipeline stages."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int


INTERPRETER = Tile(32, 32, 32, 4, 1)


def _triton() -> tuple[int, ...]:
    """Major and minor version."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return (0, 0)
    return tuple(int(part) for part in version.split(".")[:2])


class Kind(NamedTuple):
    """What a table entry holds for: compute capability 8 or, with those after it, 9; bytes of an
    input's number."""

    major: int
    itemsize: int


class Choices(NamedTuple):
    """Tiles by kind of call: one without, and one with ids or a margin, and one of a small batch,
    which takes small tiles to fill the chip."""

    plain: Tile
    masked: Tile
    small: Tile


# Chosen from the code that triton 3.4, 3.6 and 3.9 compile, which spills no registers; not timed on
# a GPU. In 3.4 exact float32 spills twice with a third stage.
STAGES_9_4 = 3 if _triton() >= (3, 6) else 2
TABLE = {
    Kind(9, 2): Choices(
        plain=Tile(128, 128, 64, 8, 3), masked=Tile(128, 64, 64, 8, 4), small=Tile(64, 64, 64, 4, 4)
    ),
    Kind(8, 2): Choices(
        plain=Tile(128, 128, 32, 8, 4), masked=Tile(128, 64, 64, 8, 3), small=Tile(64, 64, 32, 4, 3)
    ),
    Kind(9, 4): Choices(
        plain=Tile(128, 64, 32, 8, STAGES_9_4),
        masked=Tile(64, 64, 32, 8, 3),
        small=Tile(64, 64, 32, 8, 3),
    ),
    Kind(8, 4): Choices(
        plain=Tile(128, 64, 32, 8, 3), masked=Tile(64, 64, 32, 8, 3), small=Tile(64, 64, 32, 8, 3)
    ),
}
# Timed beside those of the table. In triton before 3.7 the widest spills 42 to 138 times.
TIMED = {Kind(9, 2): (Tile(128, 256, 64, 8, 3),)} if _triton() >= (3, 7) else {}
CANDIDATES = {
    kind: tuple(dict.fromkeys((*choices, *TIMED.get(kind, ())))) for kind, choices in TABLE.items()
}
SMALL_BATCH = 1024


def kind(major: int, dtype: torch.dtype) -> Kind:
    return Kind(9 if major >= 9 else 8, dtype.itemsize)


def table(major: int, dtype: torch.dtype, d: int, n: int, *, masked: bool = False) -> Tile:
    """The tile for a compute capability, input dtype, width and number of rows, without timing.

    ``masked``: ids or a margin keep more masks alive, which spills in the largest tile.
    """
    choices = TABLE[kind(major, dtype)]
    tile = choices.small if n <= SMALL_BATCH else choices.masked if masked else choices.plain
    return tile._replace(stages=min(tile.stages, max(2, -(-d // tile.bk))))


def autotuning() -> bool:
    return os.environ.get(AUTOTUNE, "0") == "1"


def size_class(n: int) -> int:
    """The power of two that a number of rows is timed as."""
    return 1 << max(0, n - 1).bit_length()


def known(key: str) -> Tile | None:
    """The tile remembered for a class of calls."""
    return _remembered().get(key)


def tuned(key: str, candidates: Sequence[Tile], time: Callable[[Tile], float]) -> Tile:
    """The tile remembered for a class of calls, or the fastest by ``time`` (milliseconds)."""
    found = _remembered()
    if key not in found:
        found[key] = min(candidates, key=time)
        _write_cache()
    return found[key]


def _cache_file() -> Path:
    return Path(os.environ.get(CACHE_DIR, Path.home() / ".cache" / "llave")) / "tiles.json"


@lru_cache(maxsize=1)
def _remembered() -> dict[str, Tile]:
    """Of this process; it starts with what is on disk."""
    return _read_cache()


def _read_cache() -> dict[str, Tile]:
    try:
        return {key: Tile(*tile) for key, tile in json.loads(_cache_file().read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # absent or damaged: time again, and write it anew


def _write_cache() -> None:
    path = _cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        everything = _read_cache() | _remembered()  # other processes write here too
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as beside:
            json.dump(everything, beside, indent=1)
        os.replace(beside.name, path)
    except OSError as error:
        warnings.warn(
            f"tile timings cannot be kept in {path.parent} ({error}), and are made anew in every "
            f"process; set {CACHE_DIR} to a folder that can be written",
            stacklevel=2,
        )
