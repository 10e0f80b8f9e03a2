"""The ``cuda`` backend: the compiled kernels of ``csrc/``.

``pip install`` builds them if it finds nvcc. float32 is multiplied as TF32. So it is refused while
``torch.get_float32_matmul_precision()`` is "highest". ``LLAVE_CUDA_ARCH=80`` makes an sm_90 GPU run
the sm_80 kernels.
"""

from __future__ import annotations

import importlib
import os
import sysconfig
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llave_kernels.backends import positives, products, strip_gemm
from llave_kernels.backends.protocol import Gradients, LogSumExps, Sums
from llave_kernels.backends.rows import aligned
from llave_kernels.precision import float32_matmul
from llave_kernels.rules import Rules

NAME = "cuda"
ARCHITECTURE = "LLAVE_CUDA_ARCH"
OUTPUTS = LogSumExps._fields
UPSTREAM = tuple("d_" + name for name in OUTPUTS)
BUILD_NOTE = Path(__file__).parents[1] / "cuda_build.txt"  # written by setup.py


def _not_built(error: ImportError) -> str:
    """Why there is no compiled module, and what to do."""
    if not isinstance(error, ModuleNotFoundError):
        return f"cannot be loaded: {error}; reinstall llave_kernels on this machine"
    if not BUILD_NOTE.exists():
        how = "run pip install . in the folder of pyproject.toml"
        return f"not built: llave_kernels is not installed; {how}"
    note = BUILD_NOTE.read_text().strip()
    if note.startswith("built"):
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        return f"not built for this Python: {note}, no _cuda{suffix}; reinstall llave_kernels"
    return f"not built: {note}"


_cuda: Any = None
_missing: str | None = None
try:
    _cuda = importlib.import_module("llave_kernels._cuda")
except ImportError as error:
    _missing = _not_built(error)


def unavailable() -> str | None:
    """Why the compiled kernels cannot run on this machine, or None."""
    if _missing is not None:
        return _missing
    if _cuda.device == "cuda" and not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False"
    return None


def supports(query: Tensor, target: Tensor, rules: Rules) -> str | None:
    """Why these inputs cannot run here, or None. Strided and unaligned inputs are copied."""
    if _missing is not None:
        return _missing
    if query.is_cuda and torch.version.cuda is None:
        return "no kernels for GPUs other than NVIDIA's; use backend='torch'"
    if query.device.type != _cuda.device:
        return f"device {query.device} is not a {_cuda.device} device; use backend='torch'"
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return (
            f"dtype {query.dtype} is not one of torch.float32, torch.bfloat16, torch.float16; use "
            "backend='torch'"
        )
    if query.dtype == torch.float32 and float32_matmul(query.device.type) == "highest":
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
    """The architecture whose kernels run on this device, 80 or 90. 0 if none do."""
    if os.environ.get(ARCHITECTURE):
        return int(os.environ[ARCHITECTURE])
    major = 9 if device.type == "cpu" else torch.cuda.get_device_capability(device)[0]
    if major == 9 and 90 in _cuda.architectures:
        return 90
    return 80 if major >= 8 else 0


def margin_limit(query: Tensor, target: Tensor, labels: Tensor | None, margin: float) -> Tensor:
    """``positives.margin_limit`` for this backend's products.

    They round float32 to the nearest TF32. TMA does that on sm_90, our own code elsewhere.
    """
    nearest = positives.nearest_tf32 if query.dtype == torch.float32 else None
    return positives.margin_limit(query, target, labels, margin, nearest)


def kept_shape(query: Tensor, target: Tensor, rules: Rules) -> tuple[int, ...]:
    """As ``Backend.kept_shape``."""
    return strip_gemm.kept_shape(query, target)


def forward(
    query: Tensor, target: Tensor, logit_scale: Tensor, rules: Rules, kept: Tensor
) -> LogSumExps:
    """The log-sum-exps, in float32."""
    call = _Call(query, target, logit_scale, rules)
    outputs = LogSumExps(*(query.new_empty(k, dtype=torch.float32) for k in call.lengths))
    call.forward(*(x.data_ptr() for x in outputs), kept=kept)
    return outputs


def total_loss(
    query: Tensor,
    target: Tensor,
    scale: float | Tensor,
    rules: Rules,
    weight: float,
    *,
    keep: bool,
) -> tuple[Tensor, tuple[Tensor, ...], object]:
    """As ``FusedLoss.total_loss``. It saves the results: six vectors and the gain."""
    call = _Call(query, target, scale, rules)
    kept = strip_gemm.new_kept(query, target) if keep else None
    results = query.new_empty(2 * sum(call.lengths) + 1, dtype=torch.float32)
    total = query.new_empty((), dtype=torch.float32)
    *vectors, gain = call.places(results)
    outputs, slopes = vectors[:3], vectors[3:]
    call.forward(*outputs, kept=kept)
    _cuda.loss(
        device=call.launch["device"],
        problem=call.problem,
        stream=call.launch["stream"],
        weight=weight,
        total=total.data_ptr(),
        gain=gain,
        **dict(zip(OUTPUTS, outputs, strict=True)),
        **dict(zip(UPSTREAM, slopes, strict=True)),
    )
    saved = (results,) if kept is None else (results, kept)
    return total, saved, None if call.copies else call


def backward(
    upstream: LogSumExps,
    query: Tensor,
    target: Tensor,
    logit_scale: Tensor,
    outputs: LogSumExps,
    kept: Tensor,
    rules: Rules,
    *,
    scale_gradient: bool,
    bias_gradients: bool = False,
    sums: Sums | None = None,
) -> Gradients:
    """The gradients. That of logit_scale is uninitialised unless ``scale_gradient``."""
    gain = products.gain(logit_scale, *upstream) if query.dtype == torch.float16 else None
    call = _Call(query, target, logit_scale, rules)
    vectors = [x.data_ptr() for x in (*outputs, *upstream)]
    if sums is not None:
        fill = call.strips(vectors, sums.gain, kept, scale_parts=False)
        return strip_gemm.add_gradients(query, target, fill, sums)
    # A loss composed from log-sum-exps has many launches anyway. So the scale's gradient is left to
    # the products.
    return call.gradients(
        vectors, gain, gain, kept,
        scale_gradient=scale_gradient, scale_parts=False, bias_gradients=bias_gradients,
    )  # fmt: skip


def total_gradients(
    d_total: Tensor,
    query: Tensor,
    target: Tensor,
    scale: float | Tensor,
    saved: tuple[Tensor, ...],
    rules: Rules,
    prepared: object,
    *,
    scale_gradient: bool,
    bias_gradients: bool = False,
) -> Gradients:
    """As ``FusedLoss.total_gradients``."""
    call = prepared if isinstance(prepared, _Call) else _Call(query, target, scale, rules)
    results, *kept = saved
    factor, divisor = products.factors(query.dtype, results[-1], d_total)
    vectors = call.places(results)[:6]
    return call.gradients(
        vectors, factor, divisor, kept[0] if kept else None,
        scale_gradient=scale_gradient, scale_parts=scale_gradient, bias_gradients=bias_gradients,
    )  # fmt: skip


class _Call:
    """The arguments that the launches of one call share. It keeps their tensors alive."""

    def __init__(self, query: Tensor, target: Tensor, scale: float | Tensor, rules: Rules) -> None:
        if query.device.type != _cuda.device:
            raise ValueError(f"query is on {query.device}, not on a {_cuda.device} device")
        self.query, self.target, self.scale, self.rules = query, target, scale, rules
        n, m = query.shape[0], target.shape[0]
        self.lengths = n, n, m if rules.symmetric else 0  # of LogSumExps
        query, target = aligned(query), aligned(target)
        row_limit = rules.row_limits(query, target, margin_limit)
        column_limit = None
        if row_limit is not None:
            column_limit = rules.column_limits(row_limit, len(target))
        tensors = {
            "labels": rules.labels,
            "owners": rules.owners,
            "query_ids": rules.query_ids,
            "target_ids": rules.target_ids,
            "row_limit": row_limit,
            "column_limit": column_limit,
            "query_bias": rules.query_bias,
            "target_bias": rules.target_bias,
        }
        held = {name: None if x is None else x.contiguous() for name, x in tensors.items()}
        self.held = query, target, held
        self.copies = query is not self.query or target is not self.target  # as large as inputs
        self.problem = _cuda.Problem(
            type=str(query.dtype).removeprefix("torch."),
            query=query.data_ptr(),
            target=target.data_ptr(),
            query_stride=query.stride(0),
            target_stride=target.stride(0),
            n=n,
            m=m,
            d=query.shape[1],
            scale=scale if isinstance(scale, float) else scale.data_ptr(),
            **{name: 0 if x is None else x.data_ptr() for name, x in held.items()},
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

    def places(self, results: Tensor) -> list[int]:
        """The addresses of the vectors and of the gain in the results of ``total_loss``."""
        sizes = accumulate((0, *self.lengths, *self.lengths))
        start = results.data_ptr()
        return [start + 4 * size for size in sizes]

    def forward(
        self, positive: int, query_lse: int, target_lse: int, *, kept: Tensor | None
    ) -> None:
        """Fill the log-sum-exps at these addresses, and ``kept`` if there is room in it."""
        n, m, itemsize = self.query.shape[0], self.target.shape[0], self.query.dtype.itemsize
        rows = strip_gemm.strip_rows(n, m, itemsize)
        workspace_bytes = _cuda.forward_workspace(self.problem, rows)
        workspace = self.query.new_empty(workspace_bytes, dtype=torch.uint8)
        for start in range(0, n, rows):
            _cuda.forward(
                **self.launch,
                start=start,
                stop=min(start + rows, n),
                workspace=workspace.data_ptr(),
                workspace_bytes=workspace_bytes,
                positive=positive,
                query_lse=query_lse,
                target_lse=target_lse,
                **_kept(kept),
            )

    def gradients(
        self,
        vectors: list[int],
        factor: Tensor | None,
        divisor: Tensor | None,
        kept: Tensor | None,
        *,
        scale_gradient: bool,
        scale_parts: bool,
        bias_gradients: bool,
    ) -> Gradients:
        """The gradients, from dS times ``factor``, over ``divisor``. None is 1.

        ``vectors`` and ``scale_parts`` are as in ``strips``.
        """
        fill = self.strips(vectors, factor, kept, scale_parts=scale_parts)
        return strip_gemm.gradients(
            self.query, self.target, self.scale, fill, divisor,
            self.rules.bias_gradients(bias_gradients), scale_gradient=scale_gradient,
        )  # fmt: skip

    def strips(
        self, vectors: list[int], factor: Tensor | None, kept: Tensor | None, *, scale_parts: bool
    ) -> Callable[[Tensor, int, int], Tensor | None]:
        """The ``fill`` of ``strip_gemm.gradients``, with dS times ``factor``. None is 1.

        ``vectors``: the addresses of the log-sum-exps and of their upstream gradients.
        ``scale_parts``: whether the kernel sums the scale's gradient, where its tiles can.
        """
        positive, query_lse, target_lse, *upstream = vectors
        given = dict(zip(UPSTREAM, upstream, strict=True)) | _kept(kept)

        def fill(ds: Tensor, start: int, stop: int) -> Tensor | None:
            parts = None
            if scale_parts:
                count = _cuda.most_scale_parts(self.problem, stop - start)
                parts = ds.new_empty(count, dtype=torch.float32)
            count = _cuda.backward(
                **self.launch,
                start=start,
                stop=stop,
                query_lse=query_lse,
                target_lse=target_lse,
                **given,
                gain=_address(factor),
                ds=ds.data_ptr(),
                pitch=ds.stride(0),
                positive=positive,
                scale_parts=_address(parts),
            )
            return parts[:count].sum() if parts is not None and count else None

        return fill


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _kept(kept: Tensor | None) -> dict[str, int]:
    """The arguments for the kept similarities. Without any, the defaults hold."""
    if kept is None or not kept.numel():
        return {}
    return {"kept": kept.data_ptr(), "kept_pitch": kept.stride(0)}
