"""Limits on one file, so that a small file cannot fill the memory or take hours.

An environment variable of the same name raises or lowers each limit. The defaults are above what
data sets hold.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

DEFAULTS = {
    # Pixels in one image. Also the pixels in all images that one process of embed or evaluate
    # decodes at a time.
    "LLAVE_MAX_PIXELS": 2**27,
    # Pixels in all images and frames of one training batch. Such a batch cannot be divided.
    "LLAVE_MAX_BATCH_PIXELS": 2**32,
    # Pixels in the frames taken from one video. Fewer than 16 frames count as 16, because a
    # decoder itself keeps as many in memory.
    "LLAVE_MAX_VIDEO_PIXELS": 320_000_000,
    "LLAVE_MAX_VIDEO_FRAMES": 2**20,  # frames in one video file, taken or not
    "LLAVE_MAX_LINE_BYTES": 2**26,  # bytes in a line of JSON
    "LLAVE_MAX_JSON_BYTES": 2**31,  # bytes in a file that is one JSON value
    "LLAVE_MAX_JSON_DEPTH": 100,  # nesting depth of lists and objects
    "LLAVE_MAX_ROWS": 2**32,  # rows that a parquet file declares
    # Uncompressed bytes that a parquet file declares in one row group, in the columns read.
    "LLAVE_MAX_ROW_GROUP_BYTES": 2**33,
    "LLAVE_MAX_SHARDS": 2**20,  # shards in a folder of embeddings
    # Bytes of one shard in memory. It applies only to a shard that takes over four times its file.
    "LLAVE_MAX_SHARD_BYTES": 2**30,
    "LLAVE_MAX_DOWNLOAD_BYTES": 2**30,  # bytes of an image given as a URL
}


def value(name: str) -> int:
    """Return a limit: the environment variable's value, or the default.

    Raises:
        ValueError: the environment variable is not a positive integer.
    """
    text = os.environ.get(name)
    if not text:
        return DEFAULTS[name]
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text)):
        raise ValueError(f"{name}={text!r} in the environment must be a positive integer")
    return int(text)


def remedy(name: str) -> str:
    """Say how to raise a limit that refused a file."""
    allowed = f"{name} is {value(name):,}"
    return f"({allowed}; for a file that you trust set that environment variable higher)"


def check(name: str, amount: int, unit: str, of: object = "it") -> None:
    """Raise ValueError where ``amount`` is above a limit. The message says how to raise it.

    Args:
        name: the limit's name.
        amount: the amount to check.
        unit: its unit, for the message.
        of: what has that amount, for the message.
    """
    if amount > value(name):
        raise ValueError(f"{of} has {amount:,} {unit}, above the limit {remedy(name)}")


def check_parquet(metadata: Any, columns: Collection[str], path: object) -> None:
    """Raise ValueError where a parquet file's footer declares more rows or bytes than the limits.

    Args:
        metadata: the file's ``pyarrow.parquet.FileMetaData``.
        columns: names of the columns to be read. Only these count.
        path: the file, for the message.
    """
    check("LLAVE_MAX_ROWS", metadata.num_rows, "rows", path)
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = (group.column(place) for place in range(group.num_columns))
        sizes = [
            c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns
        ]
        check("LLAVE_MAX_ROW_GROUP_BYTES", sum(sizes), f"bytes in row group {number}", path)
