"""Tile shapes of the Triton kernels, from a table or from timings.

With ``LLAVE_AUTOTUNE=1``, the first call of each class times the candidates. A class is kernel,
device, dtype, rules, D, and N and M rounded up to powers of two. The fastest tile is stored under
``LLAVE_CACHE_DIR`` (default ``~/.cache/llave``). Later processes read it there.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

from llave_kernels.atomic_files import publish

AUTOTUNE = "LLAVE_AUTOTUNE"
CACHE_DIR = "LLAVE_CACHE_DIR"


class Tile(NamedTuple):
    """Block sizes over rows, columns and D, warps per program, and software pipeline stages."""

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
    """The key of a table entry.

    Attributes:
        major: compute capability: 8, or 9 for 9 and later.
        itemsize: bytes of an element of the inputs.
    """

    major: int
    itemsize: int


class Choices(NamedTuple):
    """Tiles by kind of call.

    Attributes:
        plain: without masks that do not fit in its registers.
        masked: with those (``masked``).
        small: for a small batch. It needs small tiles to fill the GPU.
    """

    plain: Tile
    masked: Tile
    small: Tile


# The code that triton 3.4, 3.6 and 3.9 compile for these spills no registers, but for two in 3.6 in
# the backward with mined negatives. They are not timed on a GPU.
TABLE = {
    Kind(9, 2): Choices(
        plain=Tile(128, 128, 64, 8, 3), masked=Tile(128, 64, 64, 8, 4), small=Tile(64, 64, 64, 4, 4)
    ),
    Kind(8, 2): Choices(
        plain=Tile(128, 128, 32, 8, 4), masked=Tile(128, 64, 64, 8, 3), small=Tile(64, 64, 32, 4, 3)
    ),
    Kind(9, 4): Choices(
        plain=Tile(64, 128, 32, 8, 3), masked=Tile(64, 64, 32, 8, 3), small=Tile(64, 64, 32, 8, 3)
    ),
    Kind(8, 4): Choices(
        plain=Tile(128, 64, 32, 8, 4), masked=Tile(64, 64, 32, 8, 3), small=Tile(64, 64, 32, 8, 3)
    ),
}
CANDIDATES = {kind: tuple(dict.fromkeys(choices)) for kind, choices in TABLE.items()}
SMALL_BATCH = 1024


def kind(major: int, dtype: torch.dtype) -> Kind:
    return Kind(9 if major >= 9 else 8, dtype.itemsize)


def masked(dtype: torch.dtype, *, ids: bool, margin: bool, biases: bool = False) -> bool:
    """Whether the rules keep so many values alive that the largest tile would spill registers.

    Biases do so beside owners or ids, and beside labels if triton is older than 3.9.
    """
    return margin or biases or (ids and (dtype.itemsize == 4 or _triton() < (3, 9)))


def table(major: int, dtype: torch.dtype, d: int, n: int, *, masked: bool = False) -> Tile:
    """The tile for a compute capability, input dtype, width and number of rows, without timing.

    ``masked``: see the function of that name.
    """
    choices = TABLE[kind(major, dtype)]
    tile = choices.small if n <= SMALL_BATCH else choices.masked if masked else choices.plain
    return tile._replace(stages=min(tile.stages, max(2, -(-d // tile.bk))))


def autotuning() -> bool:
    return os.environ.get(AUTOTUNE, "0") == "1"


def size_class(n: int) -> int:
    """The number of rows rounded up to a power of two. It stands for a class of sizes."""
    return 1 << max(0, n - 1).bit_length()


def known(key: str) -> Tile | None:
    """The tile remembered for a class of calls, or None."""
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
    """The tiles that this process remembers. They start with those on disk."""
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
        publish(path, partial(Path.write_text, data=json.dumps(everything, indent=1)))
    except OSError as error:
        warnings.warn(
            f"tile timings cannot be kept in {path.parent} ({error}), and are made anew in every "
            f"process; set {CACHE_DIR} to a folder that can be written",
            stacklevel=2,
        )
