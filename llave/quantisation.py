"""How a folder of embeddings stores them: how many values, as floats, 8-bit numbers or bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import numpy as np
from sentence_transformers.util.quantization import quantize_embeddings

Dtype = Literal["float32", "float16", "int8", "binary"]
DTYPES = get_args(Dtype)
LEVELS = 256  # of an 8-bit number


def stored_type(manifest: dict[str, Any]) -> tuple[np.dtype[Any], int]:
    """Return the type of the stored values and how many of them an embedding takes."""
    dtype, dimension = manifest["dtype"], manifest["dimension"]
    if dtype == "binary":
        return np.dtype("uint8"), -(-dimension // 8)
    return np.dtype(dtype), dimension


def float_type(manifest: dict[str, Any]) -> np.dtype[Any]:
    """Return the type of the embeddings before they are stored."""
    return np.dtype("float16" if manifest["dtype"] == "float16" else "float32")


def quantise(vectors: np.ndarray, manifest: dict[str, Any]) -> np.ndarray:
    """Return (rows, values) of the stored type for (rows, D) embeddings.

    ``"int8"`` has 256 equal levels between the ends of a dimension's range
    (``manifest["ranges"]``). ``"binary"`` has one bit a value: whether it is above 0.
    """
    dtype = manifest["dtype"]
    if dtype not in ("int8", "binary"):
        return vectors.astype(dtype, copy=False)
    ranges = np.array(manifest["ranges"], np.float32) if dtype == "int8" else None
    precision: Any = "ubinary" if dtype == "binary" else dtype
    return quantize_embeddings(vectors.astype(np.float32, copy=False), precision, ranges=ranges)


def restore(values: np.ndarray, manifest: dict[str, Any]) -> np.ndarray:
    """Return the (rows, D) embeddings that stored values stand for, in float16 or float32.

    A bit stands for plus or minus ``1 / sqrt(D)``, so embeddings have length 1.
    """
    dtype, dimension = manifest["dtype"], manifest["dimension"]
    if dtype == "int8":
        low, high = np.array(manifest["ranges"], np.float32)
        return low + (values.astype(np.float32) + (LEVELS / 2 + 0.5)) * (
            (high - low) / (LEVELS - 1)
        )
    if dtype == "binary":
        bits = np.unpackbits(values, axis=1, count=dimension)
        return (2 * bits.astype(np.float32) - 1) / np.float32(dimension**0.5)
    return values


def truncated(vectors: np.ndarray, manifest: dict[str, Any]) -> np.ndarray:
    """Return the first values of (rows, D) embeddings, as many as a folder's embeddings have."""
    dimension = manifest["dimension"]
    if vectors.shape[1] <= dimension:
        return vectors
    vectors = vectors[:, :dimension].astype(np.float32)
    if manifest["normalised"]:
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors /= np.maximum(lengths, np.finfo(np.float32).tiny)
    return vectors


def check_truncate_dim(truncate_dim: int | None, dimension: int) -> None:
    """Raise ValueError where embeddings of ``dimension`` values cannot be cut to so many."""
    if truncate_dim is not None and not 1 <= truncate_dim <= dimension:
        raise ValueError(f"truncate_dim must be in 1..{dimension}, got {truncate_dim}")


def value_ranges(blocks: Iterable[np.ndarray]) -> list[list[float]]:
    """Return the least and the largest value of each dimension of (rows, D) blocks.

    Raises:
        ValueError: there are no rows.
    """
    found = [(x.min(0), x.max(0)) for x in blocks if len(x)]
    if not found:
        raise ValueError("no row is usable, so there are no values to take the ranges of int8 from")
    low, high = (np.array(ends, np.float32) for ends in zip(*found, strict=True))
    return [low.min(0).tolist(), high.max(0).tolist()]


def check_ranges(manifest: dict[str, Any]) -> None:
    """Raise ValueError where a manifest lacks the ranges of ``"int8"``, or has some for others."""
    if (manifest["dtype"] == "int8") != ("ranges" in manifest):
        raise ValueError(f"it has dtype {manifest['dtype']} and ranges do not go with it")
    if "ranges" in manifest:
        ranges = np.array(manifest["ranges"], np.float32)
        if ranges.shape != (2, manifest["dimension"]) or not np.isfinite(ranges).all():
            raise ValueError(f"its ranges are not 2 x {manifest['dimension']} numbers")
