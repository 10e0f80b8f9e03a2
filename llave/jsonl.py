"""JSON that others wrote: lines and values of bounded size and depth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, BinaryIO

from llave import limits


def parsed(data: bytes) -> Any:
    """The value that JSON stands for.

    Raises:
        ValueError: it is not JSON, or deeper than LLAVE_MAX_JSON_DEPTH.
    """
    text = str(data, json.detect_encoding(data), "surrogatepass")
    # Parsers recurse, and what they make is printed and freed by recursion too.
    if text.count("[") + text.count("{") > limits.value("LLAVE_MAX_JSON_DEPTH"):
        limits.check("LLAVE_MAX_JSON_DEPTH", _depth(text), "lists and objects in each other")
    return json.loads(text)


def lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; ValueError where one is longer than LLAVE_MAX_LINE_BYTES."""
    most = limits.value("LLAVE_MAX_LINE_BYTES")
    while line := file.readline(most + 1):
        limits.check("LLAVE_MAX_LINE_BYTES", len(line), "bytes or more in a line", file.name)
        yield line


def whole(file: BinaryIO) -> Any:
    """The one value of a file; ValueError as ``parsed``, or above LLAVE_MAX_JSON_BYTES."""
    data = file.read(limits.value("LLAVE_MAX_JSON_BYTES") + 1)
    limits.check("LLAVE_MAX_JSON_BYTES", len(data), "bytes or more", file.name)
    return parsed(data)


def _depth(text: str) -> int:
    # Without escapes every quote begins or ends a string, so that every other part is outside.
    outside = "".join(text.replace("\\\\", "").replace('\\"', "").split('"')[::2])
    steps = {"[": 1, "{": 1, "]": -1, "}": -1}
    return max(accumulate(steps[c] for c in outside if c in steps), default=0)
