"""Tile shapes of the Triton kernels: a table, or on request timed once and remembered.

With ``LLAVE_AUTOTUNE=1`` the first call of each (device, dtype, D, N) class times the candidates
and stores the best under ``LLAVE_CACHE_DIR`` (default ``~/.cache/llave``); later processes read it
there.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
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
# Chosen from the compiled code, which spills no registers; not timed on a GPU. The second serves
# calls with ids or a margin, the last small batches, which take small tiles to fill the chip.
CANDIDATES = {
    (9, 2): (
        Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 4),
        Tile(128, 256, 64, 8, 3), Tile(64, 64, 64, 4, 4),
    ),
    (8, 2): (Tile(128, 128, 32, 8, 4), Tile(128, 64, 32, 8, 4), Tile(64, 64, 32, 4, 4)),
    (9, 4): (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 8, 3)),
    (8, 4): (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 8, 3)),
}  # fmt: skip
SMALL_BATCH = 1024


def table(major: int, dtype: torch.dtype, d: int, n: int, *, masked: bool = False) -> Tile:
    """The tile for a compute capability, input dtype, width and number of rows, without timing.

    ``masked``: ids or a margin keep more masks alive, which spills in the largest tile.
    """
    choices = CANDIDATES[(9 if major >= 9 else 8, dtype.itemsize)]
    tile = choices[-1] if n <= SMALL_BATCH else choices[1 if masked else 0]
    return tile._replace(stages=min(tile.stages, max(2, -(-d // tile.bk))))


def tuned(
    device: torch.device, dtype: torch.dtype, d: int, n: int, time: Callable[[Tile], float]
) -> Tile:
    """The fastest candidate by ``time`` (milliseconds), from the disk cache where it is known."""
    major, minor = torch.cuda.get_device_capability(device)
    size = 1 << max(0, n - 1).bit_length()
    key = f"{torch.cuda.get_device_name(device)} {major}.{minor} {dtype} D{d} N{size}"
    cache = _read_cache()
    if key not in cache:
        choices = CANDIDATES[(9 if major >= 9 else 8, dtype.itemsize)]
        cache[key] = min(choices, key=time)
        _write_cache(cache)
    return Tile(*cache[key])


def autotuning() -> bool:
    return os.environ.get(AUTOTUNE, "0") == "1"


def _cache_file() -> Path:
    return Path(os.environ.get(CACHE_DIR, Path.home() / ".cache" / "llave")) / "tiles.json"


@lru_cache(maxsize=1)
def _read_cache() -> dict[str, Tile]:
    try:
        return {key: Tile(*tile) for key, tile in json.loads(_cache_file().read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # absent or damaged: time again, and write it anew


def _write_cache(cache: dict[str, Tile]) -> None:
    path = _cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as beside:
        json.dump(cache, beside, indent=1)
    os.replace(beside.name, path)
