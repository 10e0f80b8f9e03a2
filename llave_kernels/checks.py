"""Argument checks. Each error names the argument, its value and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def embeddings(query: Tensor, target: Tensor) -> None:
    for name, x in (("query", query), ("target", target)):
        if x.dim() != 2:
            raise ValueError(f"{name} must have shape (rows, D), got {tuple(x.shape)}")
        if x.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}; convert it"
            )
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}; use to_dense()")
        if 0 in x.shape:
            raise ValueError(
                f"{name} is empty, shape {tuple(x.shape)}: at least one row and column"
            )
    if query.shape[1] != target.shape[1]:
        raise ValueError(
            f"query and target must have the same width, got {query.shape[1]} and {target.shape[1]}"
        )
    if query.dtype != target.dtype:
        raise TypeError(
            f"query and target must have the same dtype, got {query.dtype} and {target.dtype}"
        )
    _device("target", target, query.device)


def logit_scale(value: float | Tensor, query: Tensor) -> Tensor:
    """0-d tensor on the query's device; a tensor of one element keeps its graph."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if not isinstance(value, Tensor):
        value = positive("logit_scale", value)
        return torch.full((), value, dtype=dtype, device=query.device)
    if value.numel() != 1:
        raise ValueError(
            "logit_scale must be a float or a tensor of one element, got shape "
            f"{tuple(value.shape)}"
        )
    if value.dtype not in FLOATS + INTEGERS:
        raise TypeError(f"logit_scale must be a tensor of real numbers, got {value.dtype}")
    _device("logit_scale", value, query.device)
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        number = value.item()
        if not math.isnan(number):  # NaN in, NaN out
            positive("logit_scale", number)
    return value.reshape(()).to(dtype)


def positive(name: str, value: float) -> float:
    value = number(name, value)
    if not 0 < value < math.inf:
        remedy = ": 1 / temperature, not its log" if name == "logit_scale" else ""
        raise ValueError(f"{name} must be positive and finite, got {value}{remedy}")
    return value


def strength(name: str, value: float) -> float:
    value = number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be >= 0 and finite, got {value}; 0 turns the weight off")
    return value


def margin(value: float | None) -> float | None:
    if value is None:
        return None
    value = number("false_negative_margin", value)
    if not math.isfinite(value):
        raise ValueError(f"false_negative_margin must be finite, got {value}; None turns it off")
    return value


def number(name: str, value: Any) -> float:
    """A real number, numpy's too, or that of a tensor of one element, as a float."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name} is a constant, got a tensor that requires grad; pass its item()")
    value = _element(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    return float(value)


def count(name: str, value: Any, least: int, remedy: str = "") -> int:
    """An integer, numpy's too, or that of a tensor of one element, as an int."""
    found = _element(value)
    if isinstance(found, bool) or not isinstance(found, Integral) or found < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}{remedy}")
    return int(found)


def _element(value: Any) -> Any:
    """The number in a tensor or array of one element; others as they are."""
    one = (isinstance(value, Tensor) and value.numel() == 1) or (
        isinstance(value, np.ndarray) and value.size == 1
    )
    return value.item() if one else value


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def columns(
    name: str, value: Tensor, length: int, m: int, device: torch.device, *, unique: bool = False
) -> Tensor:
    """int64 column numbers of shape (length,); range and uniqueness are checked on a CPU."""
    _integers(name, value, length, device)
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(value.min()), int(value.max())
        if low < 0 or high >= m:
            raise ValueError(
                f"{name} must be columns from 0 to {m - 1}, got values from {low} to {high}"
            )
        if unique and int(value.bincount().max()) > 1:
            raise ValueError(
                f"{name} must not repeat a column when symmetric=True, where a column has one "
                "positive row; pass symmetric=False where queries share a target"
            )
    return value.to(torch.int64)


def ids(query: Tensor | None, target: Tensor | None, n: int, m: int, device: torch.device) -> None:
    for name, value, other, length in (
        ("query_ids", query, "target_ids", n),
        ("target_ids", target, "query_ids", m),
    ):
        if value is None:
            continue
        if (target if other == "target_ids" else query) is None:
            raise ValueError(f"{name} needs {other}: ids are compared between rows and columns")
        _integers(name, value, length, device)
        if value.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {value.dtype}; use to(torch.int64)")


def _integers(name: str, value: Tensor, length: int, device: torch.device) -> None:
    tensor(name, value)
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name} must be an integer tensor, got {value.dtype}; use to(torch.int64)")
    if value.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), got {tuple(value.shape)}")
    _device(name, value, device)


def _device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(
            f"{name} must be on query's device {device}, got {value.device}; move it there"
        )
