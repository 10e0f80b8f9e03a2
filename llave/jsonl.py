"""Read JSON from untrusted files, with limits on its size and depth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, BinaryIO

from llave import limits

BLOCK = 1 << 20  # bytes read at a time


def parsed(data: bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is not JSON, or it is nested deeper than LLAVE_MAX_JSON_DEPTH.
    """
    text = str(data, json.detect_encoding(data), "surrogatepass")
    # Parsing recurses. Printing and freeing the result do so too.
    if text.count("[") + text.count("{") > limits.value("LLAVE_MAX_JSON_DEPTH"):
        limits.check("LLAVE_MAX_JSON_DEPTH", _depth(text), "lists and objects in each other")
    return json.loads(text)


def lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield a file's lines. Raise ValueError for a line longer than LLAVE_MAX_LINE_BYTES."""
    most = limits.value("LLAVE_MAX_LINE_BYTES")
    while line := file.readline(most + 1):
        limits.check("LLAVE_MAX_LINE_BYTES", len(line), "bytes or more in a line", file.name)
        yield line


def whole(file: BinaryIO) -> Any:
    """Parse a whole file as one JSON value.

    Raises:
        ValueError: as in ``parsed``, or the file is larger than LLAVE_MAX_JSON_BYTES.
    """
    data, most = bytearray(), limits.value("LLAVE_MAX_JSON_BYTES")
    # In blocks: Python reserves memory for all that a read may return.
    while block := file.read(min(BLOCK, most + 1 - len(data))):
        data += block
    limits.check("LLAVE_MAX_JSON_BYTES", len(data), "bytes or more", file.name)
    return parsed(bytes(data))


def _depth(text: str) -> int:
    # Once escapes are removed, every quote begins or ends a string. After a split at the quotes,
    # every other part is outside strings.
    outside = "".join(text.replace("\\\\", "").replace('\\"', "").split('"')[::2])
    steps = {"[": 1, "{": 1, "]": -1, "}": -1}
    return max(accumulate(steps[c] for c in outside if c in steps), default=0)
