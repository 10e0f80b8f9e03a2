"""Limits on what one file may ask for, so that a small file cannot fill the memory or take hours.

Each limit is raised, or lowered, by the environment variable of its name, for every process that
inherits it. The defaults are above what data sets hold.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

DEFAULTS = {
    # Of one image; and of those that embed and evaluate decode at a time, unless it is one alone.
    "LLAVE_MAX_PIXELS": 2**27,
    # Of all images and frames in one batch of training, which cannot be divided.
    "LLAVE_MAX_BATCH_PIXELS": 2**32,
    # Of the frames taken of one video, counted as 16 at least: a decoder keeps as many itself.
    "LLAVE_MAX_VIDEO_PIXELS": 320_000_000,
    "LLAVE_MAX_VIDEO_FRAMES": 2**20,  # in one video file, taken or not
    "LLAVE_MAX_LINE_BYTES": 2**26,  # of a line of JSON
    "LLAVE_MAX_JSON_BYTES": 2**31,  # of a file that is one JSON value
    "LLAVE_MAX_JSON_DEPTH": 100,  # of lists and objects in each other
    "LLAVE_MAX_ROWS": 2**32,  # that a parquet file declares
    "LLAVE_MAX_ROW_GROUP_BYTES": 2**33,  # the same, of the columns read
    "LLAVE_MAX_SHARDS": 2**20,  # of a folder of embeddings
    # Of one of them, unpacked: those of embed are not packed, and as large as their files.
    "LLAVE_MAX_SHARD_BYTES": 2**30,
    "LLAVE_MAX_DOWNLOAD_BYTES": 2**30,  # of an image given as a URL
}


def value(name: str) -> int:
    """A limit: the environment's, or the default.

    Raises:
        ValueError: the environment's is not a positive integer.
    """
    text = os.environ.get(name)
    if not text:
        return DEFAULTS[name]
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text)):
        raise ValueError(f"{name}={text!r} in the environment must be a positive integer")
    return int(text)


def remedy(name: str) -> str:
    """What to do where a limit refuses a file."""
    allowed = f"{name} is {value(name):,}"
    return f"({allowed}; for a file that you trust set that environment variable higher)"


def check(name: str, amount: int, unit: str, of: object = "it") -> None:
    """ValueError, with the limit and how to raise it, where ``of`` has more than it allows."""
    if amount > value(name):
        raise ValueError(f"{of} has {amount:,} {unit}, above the limit {remedy(name)}")


def check_parquet(metadata: Any, columns: Collection[str], path: object) -> None:
    """ValueError where a parquet file's footer declares more than is read of the columns."""
    check("LLAVE_MAX_ROWS", metadata.num_rows, "rows", path)
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = (group.column(place) for place in range(group.num_columns))
        sizes = [
            c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns
        ]
        check("LLAVE_MAX_ROW_GROUP_BYTES", sum(sizes), f"bytes in row group {number}", path)
