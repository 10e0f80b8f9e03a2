"""Matrix products of half precision or wider, with results in float32 or float64.

Half precision is multiplied as it is where the device adds such products in float32: GPUs of every
age do, on tensor cores. Elsewhere it is widened: a product that returns half precision loses three
digits of the logits.

On a CPU float32 products of some size go to oneDNN: MKL, which torch would take, leaves AVX-512
unused on AMD (512 x 8,192 from D = 1,024 on two cores: 481 against 226 GFLOP/s).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from llave_kernels.precision import float32_matmul

ONEDNN_WORK = 1 << 24  # multiplications from which a product repays oneDNN's set-up
CPU_TRIAL = 256  # rows and columns of a product that is large enough for it
TF32_EPS = 2.0**-10
SUM_COLUMNS = 1024  # rows of a sum at a time where the library cannot add in place
WIDENED = 1 << 21  # numbers widened at a time: 8 MiB of float32
# float16 ends at 65504; twice this still fits.
LARGEST = 15.0  # log2 of the largest |dS| after the gain
SMALLEST = -100.0  # log2 of the bound below which gradients are zero in every type


@lru_cache
def multiplies_halves(device_type: str) -> bool:
    """Whether the device multiplies half precision into float32."""
    key = device_type.upper()
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm.dtype", key)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32, or in float64 of float64. Either may be of half precision."""
    if _halves(a, b):
        return torch.mm(a, b, out_dtype=torch.float32)
    if a.dtype.itemsize == 2 or b.dtype.itemsize == 2:
        out = a.new_zeros((len(a), b.shape[1]), dtype=torch.float32)
        add_product(out, a, b)
        return out
    if _takes_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    return a @ b


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b``"""
    if _halves(a, b):
        out += product(a, b)
    elif a.dtype.itemsize == 2 or b.dtype.itemsize == 2:
        for part in _inner_parts(a, b):
            out.addmm_(a[:, part].float(), b[part].float())
    elif _takes_onednn(a, b):
        for start in range(0, len(a), SUM_COLUMNS):
            part = slice(start, start + SUM_COLUMNS)
            out[part] += product(a[part], b)
    else:
        out.addmm_(a, b)


def rounding(x: Tensor) -> float:
    """Relative error that a product of ``x`` may make of a term before the sum, 0 where it makes
    none: torch may multiply float32 in a smaller type, and how it rounds to that is not said."""
    precision = float32_matmul(x.device.type)
    on_cpu = x.device.type == "cpu"
    if precision == "highest" or (on_cpu and not _cpu_rounds(precision)):
        return 0.0
    smaller = torch.finfo(torch.bfloat16).eps if on_cpu and precision == "medium" else TF32_EPS
    # Both factors of a term lose up to this, or half of it where they are rounded to the nearest.
    return 0.0 if x.dtype == torch.float64 or torch.finfo(x.dtype).eps >= smaller else 2 * smaller


@lru_cache
def _cpu_rounds(precision: str) -> bool:
    """Whether the CPU at hand has instructions for it."""
    ones = torch.ones(CPU_TRIAL, CPU_TRIAL)
    return bool((product(ones + TF32_EPS / 4, ones) == CPU_TRIAL).any())


def gain(scale: Tensor, *upstream: Tensor) -> Tensor:
    """The power of two that brings the largest possible |dS| under 2^15, 0-d, found on the device.

    dS is multiplied by it and the gradients divided, so that upstream gradients of any size stay
    within the range of dS's type: float16 ends at 6e-8. Upstream gradients that are not finite have
    no say: they leave the others' rows as they are.
    """
    largest = [d.abs().nan_to_num(nan=0.0, posinf=0.0).amax() for d in upstream if d.numel()]
    bound = (scale * torch.stack(largest).sum()).clamp(2.0**SMALLEST, 2.0**-SMALLEST)
    return torch.exp2(torch.floor(LARGEST - torch.log2(bound)))


def _halves(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.dtype.itemsize == 2 and multiplies_halves(a.device.type)


def _inner_parts(a: Tensor, b: Tensor) -> Iterator[slice]:
    step = max(1, WIDENED // (len(a) + b.shape[1]))
    return (slice(start, start + step) for start in range(0, len(b), step))


def _takes_onednn(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == torch.float32
        and a.device.type == "cpu"
        and a.shape[0] * a.shape[1] * b.shape[1] >= ONEDNN_WORK
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
