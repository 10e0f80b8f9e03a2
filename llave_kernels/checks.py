"""Argument checks. Each error names the argument, its value and what was expected."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Sequence
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llave_kernels.rules import HARDNESS_MODES, Rules, RuleSettings, biased

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
SIDES = ("query", "target")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# The smallest normal and the largest number of a dtype. Constants below count as 0, above as
# infinite.
LIMITS = {x: (torch.finfo(x).tiny, torch.finfo(x).max) for x in (torch.float32, torch.float64)}


def tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {typed(value)}")
    if value.is_nested or value.layout != torch.strided:
        layout = "nested" if value.is_nested else value.layout
        raise TypeError(
            f"{name} must be a dense tensor, got a {layout} one; use to_dense() or "
            "to_padded_tensor()"
        )
    if type(value) not in (Tensor, torch.nn.Parameter):
        for way in ("to_local", "get_data"):  # of DTensor, of MaskedTensor
            if hasattr(value, way):
                raise TypeError(
                    f"{name} must be a plain torch.Tensor, got {type(value).__name__}; pass "
                    f"{name}.{way}()"
                )


def embeddings(query: Tensor, target: Tensor) -> None:
    for name, x in (("query", query), ("target", target)):
        if x.dim() != 2:
            raise ValueError(f"{name} must have shape (rows, D), got {tuple(x.shape)}")
        if x.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}; convert it"
            )
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


def logit_scale(
    value: float | Tensor, strength: float, dtype: torch.dtype, device: torch.device
) -> float | Tensor:
    """The scale as a number, or as a tensor () on ``device``, which keeps its graph.

    Args:
        strength: the larger alpha. The scale plus alpha is the largest factor of a logit.
        dtype: dtype of the sums.
    """
    if not isinstance(value, Tensor):
        found = positive("logit_scale", value, dtype)
        _finite_sum(found, strength, dtype)
        return found
    for number in _one_element("logit_scale", value, device):
        _finite_sum(positive("logit_scale", number, dtype), strength, dtype)
    return value.reshape(()).to(dtype)


def logit_bias(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> float | Tensor:
    """The bias as a number, or as a tensor () on ``device``, which keeps its graph."""
    if not isinstance(value, Tensor):
        return finite("logit_bias", value, dtype)
    for number in _one_element("logit_bias", value, device):
        finite("logit_bias", number, dtype)
    return value.reshape(()).to(dtype)


def _one_element(name: str, value: Tensor, device: torch.device) -> list[float]:
    """Check a tensor of one real number. Return the number if it can be read and is not NaN."""
    tensor(name, value)
    if value.numel() != 1:
        raise ValueError(
            f"{name} must be a float or a tensor of one element, got shape {tuple(value.shape)}"
        )
    if value.dtype not in FLOATS + INTEGERS:
        raise TypeError(f"{name} must be a tensor of real numbers, got {value.dtype}")
    _device(name, value, device)
    return [x for x in read(value, Tensor.max) if not math.isnan(x)]  # NaN in, NaN out


def _finite_sum(scale: float, strength: float, dtype: torch.dtype) -> None:
    if scale + strength > LIMITS[dtype][1]:
        raise ValueError(
            f"logit_scale + alpha must be finite, got {scale} + {strength} in {dtype}; lower one"
        )


def read(x: Tensor, *reductions: Callable[[Tensor], Tensor]) -> list[Any]:
    """The results of reductions of a tensor, as numbers. Empty where they cannot be read cheaply.

    To read a value on a device, the host would have to wait. A traced graph and vmap have no
    values.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return []
    try:
        found = [reduction(x).item() for reduction in reductions]
    except RuntimeError:
        return []
    return found if all(isinstance(x, (int, float)) for x in found) else []  # not symbols


def positive(name: str, value: Any, dtype: torch.dtype = torch.float32) -> float:
    found = number(name, value, dtype)
    if not 0 < found < math.inf:
        remedy = ": 1 / temperature, not its log" if name == "logit_scale" else ""
        raise ValueError(
            f"{name} must be positive and finite, got {short(value)} in {dtype}{remedy}"
        )
    return found


def strength(name: str, value: Any, dtype: torch.dtype = torch.float32) -> float:
    found = number(name, value, dtype)
    if not 0 <= found < math.inf:
        raise ValueError(
            f"{name} must be >= 0 and finite, got {short(value)} in {dtype}; 0 turns the weight off"
        )
    return found


def rule_settings(
    *,
    alpha: float = 9.0,
    hardness: str = "in_batch",
    symmetric: bool = True,
    target_alpha: float | None = None,
    false_negative_margin: float | None = None,
) -> RuleSettings:
    """Checked settings for an object that holds them. Errors come before its first call."""
    one_of("hardness", hardness, HARDNESS_MODES)
    if target_alpha is not None:
        target_alpha = strength("target_alpha", target_alpha)
    return {
        "alpha": strength("alpha", alpha),
        "hardness": hardness,
        "symmetric": flag("symmetric", symmetric),
        "target_alpha": target_alpha,
        "false_negative_margin": margin(false_negative_margin),
    }


def margin(value: Any, dtype: torch.dtype = torch.float32) -> float | None:
    if value is None:
        return None
    return finite("false_negative_margin", value, dtype, "; None turns it off")


def finite(name: str, value: Any, dtype: torch.dtype = torch.float32, remedy: str = "") -> float:
    found = number(name, value, dtype)
    if not math.isfinite(found):
        raise ValueError(f"{name} must be finite, got {short(value)} in {dtype}{remedy}")
    return found


def number(name: str, value: Any, dtype: torch.dtype) -> float:
    """A real number, a numpy number or a tensor of one element, as a float.

    Above the range of ``dtype`` it becomes infinite. Below the smallest normal number it becomes 0.
    """
    found = value if type(value) is float else _real(name, value)
    least, most = LIMITS[dtype]
    if abs(found) > most:
        return math.inf
    return found if abs(found) >= least or math.isnan(found) else 0.0


def _real(name: str, value: Any) -> float:
    found = _element(name, value)
    if isinstance(found, bool) or not isinstance(found, (Real, Decimal)):
        raise TypeError(f"{name} must be a float, got {typed(value)}")
    try:
        return float(found)
    except (OverflowError, ValueError):  # 10**400, Decimal("sNaN")
        return math.inf


def count(name: str, value: Any, least: int, most: int | None = None, remedy: str = "") -> int:
    """An integer, a numpy integer or a tensor of one element, as an int."""
    found = _element(name, value)
    below = f" and <= {most}" if most is not None else ""
    whole = isinstance(found, Integral) and not isinstance(found, bool)
    if not whole or found < least or (most is not None and found > most):
        raise ValueError(f"{name} must be an integer >= {least}{below}, got {short(value)}{remedy}")
    return int(found)


def _element(name: str, value: Any) -> Any:
    """The number in a tensor or array of one element. Other values are returned as they are."""
    if isinstance(value, Tensor):
        tensor(name, value)
        if value.requires_grad:
            raise ValueError(
                f"{name} is a constant, got a tensor that requires grad; pass its item()"
            )
        try:
            return value.item() if value.numel() == 1 else value
        except RuntimeError:  # on "meta", in a graph that is traced, under vmap
            raise TypeError(
                f"{name} must be a float, got a tensor whose value is not known; pass a number"
            ) from None
    return value.item() if type(value) is np.ndarray and value.size == 1 else value


def one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {short(value)}")


def sides(name: str, value: Any, rules: Rules | None = None) -> tuple[str, ...]:
    """Sides of the pairs, each once, in the order of ``SIDES``. ``rules``: of a call."""
    given = value if isinstance(value, (tuple, list, set, frozenset)) else [value]
    if isinstance(value, str) or not all(isinstance(x, str) and x in SIDES for x in given):
        raise ValueError(
            f"{name} must be a tuple of {' and '.join(map(repr, SIDES))}, or (), got {short(value)}"
        )
    if given and rules is not None and biased(rules):
        raise ValueError(
            f"{name}={value!r} does not go with query_bias or target_bias, which are of pairs of a "
            "query and a target; leave one out"
        )
    return tuple(side for side in SIDES if side in given)


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {short(value)}")
    return bool(value)


def typed(value: object) -> str:
    """Type and value of a wrong argument, for a message."""
    return short(value, f"{type(value).__name__} ")


def short(value: object, kind: str = "") -> str:
    """The value in one short line, after ``kind``. An array of several numbers shows its shape."""
    if isinstance(value, Tensor) and value.is_nested:
        return "a nested Tensor"
    if isinstance(value, (Tensor, np.ndarray)) and math.prod(value.shape) != 1:
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    return kind + " ".join(reprlib.repr(value).split())


def columns(
    name: str,
    value: Tensor,
    length: int,
    m: int,
    device: torch.device,
    *,
    least: int = 0,
    unique: bool = False,
) -> Tensor:
    """(length,) column numbers as int64. Range and uniqueness are checked on a CPU only."""
    _integers(name, value, length, device)
    if found := read(value, Tensor.min, Tensor.max):
        low, high = found
        if low < least or high >= m:
            raise ValueError(
                f"{name} must be columns from {least} to {m - 1}, got values from {low} to {high}"
            )
        named = value if low >= 0 else value[value >= 0]
        if unique and len(named) and int(named.bincount().max()) > 1:
            raise ValueError(
                f"{name} must not repeat a column when symmetric=True, where a column has one "
                "positive row; pass symmetric=False where queries share a target"
            )
    return value.to(torch.int64)


def every_column(name: str, value: range, m: int) -> None:
    if value != range(m):
        raise ValueError(
            f"{name} as a range must be range({m}), which makes every column its own owner, got "
            f"{value}; pass a tensor for other owners"
        )


def rule_tensors(
    query: Tensor,
    target: Tensor,
    *,
    labels: Tensor | None,
    owners: Tensor | None,
    query_ids: Tensor | None,
    target_ids: Tensor | None,
    query_bias: Tensor | None = None,
    target_bias: Tensor | None = None,
    symmetric: bool,
    least_label: int = 0,
) -> tuple[Tensor | None, Tensor | None]:
    """Labels and owners as int64, checked along with the other tensors of the rules."""
    n, m, device = query.shape[0], target.shape[0], query.device
    if labels is not None:
        labels = columns("labels", labels, n, m, device, least=least_label, unique=symmetric)
    elif m < n:
        raise ValueError(
            f"target has {m} rows for {n} queries: every query needs its positive; pass labels "
            "where several queries share one"
        )
    if owners is not None:
        owners = columns("owners", owners, m, m, device)
    ids(query_ids, target_ids, n, m, device)
    for name, value, rows in (("query_bias", query_bias, n), ("target_bias", target_bias, m)):
        if value is not None:
            _bias(name, value, rows, query)
    return labels, owners


def ids(query: Tensor | None, target: Tensor | None, n: int, m: int, device: torch.device) -> None:
    for name, value, other, length in (
        ("query_ids", query, "target_ids", n),
        ("target_ids", target, "query_ids", m),
    ):
        if value is None:
            continue
        if (target if other == "target_ids" else query) is None:
            raise ValueError(f"{name} needs {other}: ids are compared between rows and columns")
        int64(name, value, length, device)


def int64(name: str, value: Tensor, length: int, device: torch.device) -> None:
    _integers(name, value, length, device)
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {value.dtype}; use to(torch.int64)")


def _bias(name: str, value: Tensor, length: int, query: Tensor) -> None:
    tensor(name, value)
    dtype = torch.promote_types(query.dtype, torch.float32)
    if value.dtype != dtype:
        raise TypeError(
            f"{name} must be {dtype} for embeddings in {query.dtype}, got {value.dtype}; use "
            f"to({dtype})"
        )
    _shape(name, value, length)
    _device(name, value, query.device)
    # NaN in, NaN out
    if any(math.isinf(found) for found in read(value, Tensor.min, Tensor.max)):
        raise ValueError(
            f"{name} must be finite, got an infinite value; -1e3 keeps a row or a column out of "
            "the sums of others"
        )


def _integers(name: str, value: Tensor, length: int, device: torch.device) -> None:
    tensor(name, value)
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name} must be an integer tensor, got {value.dtype}; use to(torch.int64)")
    _shape(name, value, length)
    _device(name, value, device)


def _shape(name: str, value: Tensor, length: int) -> None:
    if value.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), got {tuple(value.shape)}")


def _device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(
            f"{name} must be on query's device {device}, got {value.device}; move it there"
        )
