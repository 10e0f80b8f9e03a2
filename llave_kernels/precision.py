"""The dtype in which a batch is multiplied, and the dtype of its sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llave_kernels import checks

# torch.backends and torch.set_float32_matmul_precision use different names for a precision.
_PRECISIONS = {"ieee": "highest", "none": "highest", "tf32": "high", "bf16": "medium"}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every other dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(query: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the accumulation dtype. If they are one tensor, they stay one."""
    wide = query.to(accumulation_dtype(query.dtype))
    return wide, wide if target is query else target.to(wide.dtype)


def scale_tensor(scale: float | Tensor, query: Tensor) -> Tensor:
    """A scale or bias as a tensor () in the accumulation dtype, on the device of ``query``."""
    if isinstance(scale, Tensor):
        return scale
    dtype = accumulation_dtype(query.dtype)
    return torch.full((), scale, dtype=dtype, device=query.device)


def autocast(query: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cast embeddings to the autocast dtype if autocast is on. float64 stays as it is.

    If they are one tensor, they stay one.
    """
    checks.tensor("query", query)
    checks.tensor("target", target)
    device = query.device.type
    if not _can_autocast(device) or not torch.is_autocast_enabled(device):
        return query, target
    dtype = torch.get_autocast_dtype(device)
    if not {query.dtype, target.dtype} <= {torch.float32, torch.bfloat16, torch.float16}:
        return query, target
    cast = query.to(dtype)
    return cast, cast if target is query else target.to(dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _can_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)  # torch below 2.12 cannot trace this


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def float32_matmul(device_type: str) -> str:
    """The float32 matmul precision on such a device: "highest", "high" or "medium"."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch.backends was used instead, with a setting for each device
        backends: Any = torch.backends
        place = backends.cuda if device_type == "cuda" else backends.mkldnn
        return _PRECISIONS[place.matmul.fp32_precision]
