"""The ``cuda`` backend: the compiled kernels of ``csrc/``.

Built by ``pip install`` where nvcc is found. float32 is multiplied as TF32, so it is refused while
``torch.get_float32_matmul_precision()`` is "highest". ``LLAVE_CUDA_ARCH=80`` makes a GPU of sm_90
run the kernels of sm_80.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llave_kernels.backends import positives, products, strip_gemm
from llave_kernels.rules import Rules

NAME = "cuda"
ARCHITECTURE = "LLAVE_CUDA_ARCH"
BUILD_NOTE = Path(__file__).parents[1] / "cuda_build.txt"  # written by setup.py
ROW_BYTES = 16  # what the loads want rows to start at and to be a multiple of

_cuda: ModuleType | None
try:
    from llave_kernels import _cuda  # type: ignore[attr-defined, no-redef]
except ImportError as error:
    _cuda, _import_error = None, str(error)


def unavailable() -> str | None:
    """Why the compiled kernels cannot run on this machine, or None."""
    if _cuda is None:
        return _not_built()
    if _cuda.device == "cuda" and not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False"
    return None


def _not_built() -> str:
    try:
        return f"not built: {BUILD_NOTE.read_text().strip()}"
    except OSError:
        return f"not built: {_import_error}; reinstall with nvcc on PATH or CUDA_HOME set"


def supports(query: Tensor, target: Tensor, rules: Rules) -> str | None:
    """Why these inputs cannot run here, or None. Strided and unaligned ones are copied."""
    if _cuda is None:
        return _not_built()
    if query.is_cuda and torch.version.cuda is None:
        return "no kernels for GPUs other than NVIDIA's; use backend='torch'"
    if query.device.type != _cuda.device:
        return f"device {query.device} is not a {_cuda.device} device; use backend='torch'"
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return (
            f"dtype {query.dtype} is not one of torch.float32, torch.bfloat16, torch.float16; use "
            "backend='torch'"
        )
    if query.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return (
            "float32 is multiplied as TF32, and the float32 matmul precision is 'highest'; call "
            "torch.set_float32_matmul_precision('high') or use backend='triton'"
        )
    built, wanted = _cuda.architectures, _architecture(query.device)
    if wanted not in built:
        names = ", ".join(f"sm_{a}" for a in built)
        return f"no kernels for this GPU (built: {names}); reinstall with LLAVE_CUDA_ARCHS set"
    return None


def _architecture(device: torch.device) -> int:
    """80 or 90: whose kernels run on this device; 0 where none do."""
    assert _cuda is not None
    if os.environ.get(ARCHITECTURE):
        return int(os.environ[ARCHITECTURE])
    major = 9 if device.type == "cpu" else torch.cuda.get_device_capability(device)[0]
    if major == 9 and 90 in _cuda.architectures:
        return 90
    return 80 if major >= 8 else 0


def margin_limit(query: Tensor, target: Tensor, labels: Tensor, margin: float) -> Tensor:
    """``positives.margin_limit`` of this backend's products: TMA rounds float32 to the nearest
    TF32, and so does our own code before sm_90."""
    nearest = positives.nearest_tf32 if query.dtype == torch.float32 else None
    return positives.margin_limit(query, target, labels, margin, nearest)


def forward(
    query: Tensor, target: Tensor, logit_scale: Tensor, rules: Rules
) -> tuple[Tensor, Tensor, Tensor]:
    """Positive logits (N,), n (N,), and n' (M,) or (0,), float32. ``logit_scale`` is 0-d
    float32."""
    assert _cuda is not None
    call = _Call(query, target, logit_scale, rules)
    n, m = len(query), len(target)
    sizes = (n, n, m if rules.symmetric else 0)
    positive, query_lse, target_lse = (query.new_empty(k, dtype=torch.float32) for k in sizes)
    rows = strip_gemm.strip_rows(n, m, query.dtype.itemsize)
    workspace_bytes = _cuda.forward_workspace(call.problem, rows)
    workspace = query.new_empty(workspace_bytes, dtype=torch.uint8)
    for start in range(0, n, rows):
        _cuda.forward(
            **call.launch,
            start=start,
            stop=min(start + rows, n),
            workspace=workspace.data_ptr(),
            workspace_bytes=workspace_bytes,
            positive=positive.data_ptr(),
            query_lse=query_lse.data_ptr(),
            target_lse=target_lse.data_ptr(),
        )
    return positive, query_lse, target_lse


def backward(
    d_positive: Tensor,
    d_query_lse: Tensor,
    d_target_lse: Tensor,
    query: Tensor,
    target: Tensor,
    logit_scale: Tensor,
    positive: Tensor,
    query_lse: Tensor,
    target_lse: Tensor,
    rules: Rules,
    *,
    scale_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ (N, D) and dT (M, D) in the inputs' dtype and d logit_scale () or, unless asked for, NaN,
    given those of ``forward``'s outputs."""
    assert _cuda is not None
    call = _Call(query, target, logit_scale, rules)
    upstream = (d_positive, d_query_lse, *([d_target_lse] if rules.symmetric else []))
    half = query.dtype == torch.float16
    gain = products.gain(logit_scale, *upstream) if half else None

    def fill(ds: Tensor, start: int, stop: int) -> None:
        _cuda.backward(
            **call.launch,
            start=start,
            stop=stop,
            query_lse=query_lse.data_ptr(),
            target_lse=target_lse.data_ptr(),
            d_positive=d_positive.data_ptr(),
            d_query_lse=d_query_lse.data_ptr(),
            d_target_lse=d_target_lse.data_ptr(),
            gain=_address(gain),
            ds=ds.data_ptr(),
            pitch=ds.stride(0),
        )

    return strip_gemm.gradients(
        query, target, logit_scale, fill, gain, scale_gradient=scale_gradient
    )


class _Call:
    """What the launches of one call share. Holds the tensors whose addresses it passes on."""

    def __init__(self, query: Tensor, target: Tensor, scale: Tensor, rules: Rules) -> None:
        assert _cuda is not None
        if query.device.type != _cuda.device:
            raise ValueError(f"query is on {query.device}, not on a {_cuda.device} device")
        query, target = _aligned(query), _aligned(target)
        optional = (rules.owners, rules.query_ids, rules.target_ids)
        owners, query_ids, target_ids = (None if x is None else x.contiguous() for x in optional)
        labels, row_limit, column_limit = rules.labels.contiguous(), None, None
        if rules.margin is not None:
            row_limit = margin_limit(query, target, labels, rules.margin)
            column_limit = rules.column_limits(row_limit, len(target)).contiguous()
        ids = owners, query_ids, target_ids
        self.tensors = query, target, scale, labels, *ids, row_limit, column_limit
        self.problem = _cuda.Problem(
            type=str(query.dtype).removeprefix("torch."),
            query=query.data_ptr(),
            target=target.data_ptr(),
            query_stride=query.stride(0),
            target_stride=target.stride(0),
            n=len(query),
            m=len(target),
            d=query.shape[1],
            scale=scale.data_ptr(),
            labels=labels.data_ptr(),
            owners=_address(owners),
            query_ids=_address(query_ids),
            target_ids=_address(target_ids),
            row_limit=_address(row_limit),
            column_limit=_address(column_limit),
            alpha=rules.alpha,
            target_alpha=rules.target_alpha,
            hardness=rules.hardness,
            symmetric=rules.symmetric,
        )
        stream = torch.cuda.current_stream(query.device).cuda_stream if query.is_cuda else 0
        self.launch: dict[str, Any] = {
            "device": query.device.index or 0,
            "architecture": _architecture(query.device),
            "problem": self.problem,
            "stream": stream,
        }


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _aligned(x: Tensor) -> Tensor:
    """``x``, or a copy padded with zeros whose rows are multiples of 16 bytes."""
    n, d = x.shape
    step = ROW_BYTES // x.itemsize
    width = -(-d // step) * step
    aligned = x.data_ptr() % ROW_BYTES == 0 and x.stride(0) % step == 0 and x.stride(0) >= d
    if width == d and x.stride(1) == 1 and aligned:
        return x
    padded = x.new_zeros((n, width))
    padded[:, :d] = x
    return padded
