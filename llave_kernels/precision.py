"""Which dtype a batch is multiplied in, and which its sums are taken in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llave_kernels import checks

# torch.backends names precisions otherwise than torch.set_float32_matmul_precision.
_PRECISIONS = {"ieee": "highest", "none": "highest", "tf32": "high", "bf16": "medium"}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast(query: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast float32 embeddings take its dtype, as in a matrix product."""
    checks.tensor("query", query)
    checks.tensor("target", target)
    device = query.device.type
    if not _can_autocast(device) or not torch.is_autocast_enabled(device):
        return query, target
    dtype = torch.get_autocast_dtype(device)
    if not {query.dtype, target.dtype} <= {torch.float32, torch.bfloat16, torch.float16}:
        return query, target
    return query.to(dtype), target.to(dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _can_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)  # torch below 2.12 cannot trace it


def float32_matmul(device_type: str) -> str:
    """What torch multiplies float32 as on such a device: "highest", "high" or "medium"."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it is set through torch.backends, for each device apart
        backends: Any = torch.backends
        place = backends.cuda if device_type == "cuda" else backends.mkldnn
        return _PRECISIONS[place.matmul.fp32_precision]
