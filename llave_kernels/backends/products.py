"""Matrix products of half precision or wider, with results in float32 or float64.

Half precision is multiplied as it is if the device sums such products in float32. GPUs of every age
do, on tensor cores. Elsewhere it is widened to float32. A product that returns half precision would
lose three digits of the logits.

On a CPU, large float32 products go to oneDNN. torch would take MKL, which leaves AVX-512 unused on
AMD. For 512 x 8,192 from D = 1,024 on two cores, oneDNN reaches 481 GFLOP/s and MKL 226.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from threading import Lock

import torch
from torch import Tensor

from llave_kernels.precision import float32_matmul

ONEDNN_WORK = 1 << 24  # multiplications from which oneDNN's set-up pays off
CPU_TRIAL = 256  # side of a square product that is large enough for oneDNN
TF32_EPS = 2.0**-10
SUM_COLUMNS = 1024  # rows added at a time where the library cannot add in place
WIDENED = 1 << 21  # numbers widened at a time: 8 MiB of float32
# The largest float16 is 65504, almost twice this.
LARGEST = 15.0  # log2 of the largest |dS| after the gain
SMALLEST = -100.0  # log2 of the smallest |dS| that the gain brings up to the largest
# torch's settings that let cuBLAS round the parts of a split sum to half precision
ROUNDED_PARTS = {
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    torch.float16: "allow_fp16_reduced_precision_reduction",
}
_SETTINGS = Lock()  # all threads share them


@lru_cache
def multiplies_halves(device_type: str) -> bool:
    """Whether the device multiplies half precision with float32 results."""
    key = device_type.upper()
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm.dtype", key)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32, or in float64 for float64. Either factor may be in half precision."""
    if _halves(a, b):
        return torch.mm(a, b, out_dtype=torch.float32)
    if a.dtype.itemsize == 2 or b.dtype.itemsize == 2:
        out = a.new_zeros((len(a), b.shape[1]), dtype=torch.float32)
        add_product(out, a, b)
        return out
    if _takes_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    return a @ b


def store_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out = a @ b``. Half precision is the sum in float32, rounded once."""
    if _halves(a, b) and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif _halves(a, b):
        _store_halves(out, a, b)
    elif a.dtype == b.dtype == out.dtype and a.dtype.itemsize > 2 and not _takes_onednn(a, b):
        torch.mm(a, b, out=out)
    else:
        out.copy_(product(a, b))


def _store_halves(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out = a @ b`` with the parts of a split sum in float32."""
    settings, name = torch.backends.cuda.matmul, ROUNDED_PARTS[out.dtype]
    with _SETTINGS:
        allowed = getattr(settings, name)
        try:
            if allowed:
                setattr(settings, name, False)
            torch.mm(a, b, out=out)
        finally:
            if allowed:
                setattr(settings, name, True)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b``. ``out`` is in float32, or in float64 for float64."""
    if _halves(a, b):
        # A batch of one. Before torch 2.10, addmm does not add half precision to float32.
        total = out[None]
        torch.baddbmm(total, a[None], b[None], out_dtype=torch.float32, out=total)
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
    """Relative error of a product's term, if torch multiplies ``x`` in a smaller type. Else 0.

    torch may do so for float32. It does not say how it rounds to the smaller type.
    """
    precision = float32_matmul(x.device.type)
    on_cpu = x.device.type == "cpu"
    if precision == "highest" or (on_cpu and not _cpu_rounds(precision)):
        return 0.0
    smaller = torch.finfo(torch.bfloat16).eps if on_cpu and precision == "medium" else TF32_EPS
    # Both factors of a term lose up to this, or half of it if they are rounded to the nearest.
    return 0.0 if x.dtype == torch.float64 or torch.finfo(x.dtype).eps >= smaller else 2 * smaller


@lru_cache
def _cpu_rounds(precision: str) -> bool:
    """Whether this CPU multiplies float32 in a smaller type under the precision that is set."""
    ones = torch.ones(CPU_TRIAL, CPU_TRIAL)
    return bool((product(ones + TF32_EPS / 4, ones) == CPU_TRIAL).any())


def gain(scale: Tensor, *upstream: Tensor) -> Tensor:
    """The power of two (0-d) that brings the largest possible |dS| to at most 2^15.

    It is found on the device. dS is multiplied by it, and the gradients are divided by it. So dS
    stays within the range of its type for upstream gradients of any size. The smallest float16 is
    6e-8. Upstream gradients that are not finite are ignored, so that other rows are not affected.
    """
    largest = [d.abs().nan_to_num(nan=0.0, posinf=0.0).amax() for d in upstream if d.numel()]
    # Both are bounded below, so that neither the gain nor its product with the scale overflows.
    upstream_sum = torch.stack(largest).sum().clamp(min=2.0**SMALLEST)
    bound = (scale * upstream_sum).clamp(2.0**SMALLEST, 2.0**-SMALLEST)
    return torch.exp2(torch.floor(LARGEST - torch.log2(bound)))


def factors(dtype: torch.dtype, gain: Tensor, d_total: Tensor) -> tuple[Tensor, Tensor | None]:
    """What dS is multiplied by, and what the gradients are then divided by, for a total loss.

    Args:
        gain: the power of two that brings dS into the range of float16, without ``d_total``.
        d_total: the upstream gradient ().
    """
    return (gain, gain / d_total) if dtype == torch.float16 else (d_total, None)


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
