"""The ``triton`` backend: launches of the kernels in ``triton_kernels``.

float32 inputs follow ``torch.set_float32_matmul_precision``: "highest" is IEEE, the others TF32.
On CPU tensors the kernels run in Triton's interpreter when ``TRITON_INTERPRET=1`` was set before
the import.
"""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

import torch
from torch import Tensor

from llave_kernels.backends import positives, tiles
from llave_kernels.backends.products import gain
from llave_kernels.backends.strip_gemm import gradients, strip_workspace
from llave_kernels.rules import HARDNESS_MODES, Rules

NAME = "triton"
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
INSTALLED = importlib.util.find_spec("triton") is not None
if INSTALLED:
    import triton

    from llave_kernels.backends import triton_kernels as kernels

SUPER_TILE = 16  # tiles along each side of what one program owns, where that still fills the GPU
PROGRAMS_PER_SM = 4
COMBINE_BLOCK = 128
# Given by name: TRITON_DEFAULT_FP_FUSION in the environment would change the numbers.
COMPILE = {"enable_fp_fusion": True}


def unavailable() -> str | None:
    """Why Triton cannot run on this machine, or None."""
    if not INSTALLED:
        return "triton is not installed; pip install triton"
    if not INTERPRETED and not torch.cuda.is_available():
        return "no GPU; TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, for tests"
    return None


def supports(query: Tensor, target: Tensor, rules: Rules) -> str | None:
    """Why these inputs cannot run here, or None."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16)
    if query.device.type == "cuda":
        dtypes += (torch.bfloat16,)
        if torch.version.cuda is None:
            return "no tiles for GPUs other than NVIDIA's; use backend='torch'"
        if torch.cuda.get_device_capability(query.device)[0] < 8:
            return "compute capability below 8.0; use backend='torch'"
    elif query.device.type != "cpu" or not INTERPRETED:
        return f"device {query.device} is not a GPU that Triton runs on; use backend='torch'"
    if query.dtype not in dtypes:
        names = ", ".join(str(d) for d in dtypes)
        return f"dtype {query.dtype} is not one of {names}; use backend='torch'"
    return None


def margin_limit(query: Tensor, target: Tensor, labels: Tensor, margin: float) -> Tensor:
    """``positives.margin_limit`` of this backend's products: the tensor cores read of float32 the
    bits that TF32 has."""
    truncates = query.dtype == torch.float32 and _precision() == "tf32"
    truncated = positives.truncated_tf32 if truncates else None
    return positives.margin_limit(query, target, labels, margin, truncated)


def forward(
    query: Tensor, target: Tensor, logit_scale: Tensor, rules: Rules
) -> tuple[Tensor, Tensor, Tensor]:
    """Positive logits (N,), n (N,), and n' (M,) or (0,), float32. ``logit_scale`` is 0-d
    float32."""
    call = _Forward(query, target, logit_scale, rules)
    rows, columns = call.run(call.tile())
    return call.positive * logit_scale, rows, columns


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
    upstream = (d_positive, d_query_lse, *([d_target_lse] if rules.symmetric else []))
    factor = gain(logit_scale, *upstream) if query.dtype == torch.float16 else None
    one = torch.ones((), device=query.device) if factor is None else factor
    call = _Backward(
        query, target, logit_scale, rules, positive / logit_scale,
        query_lse, target_lse, d_positive, d_query_lse, d_target_lse, one,
    )  # fmt: skip
    tile = call.tile()

    def fill(ds: Tensor, start: int, stop: int) -> None:
        call.fill(tile, ds, start, stop)

    return gradients(query, target, logit_scale, fill, factor, scale_gradient=scale_gradient)


def flags(rules: Rules) -> dict[str, Any]:
    """What the kernels are compiled for, tile apart."""
    return {
        "HARDNESS": HARDNESS_MODES.index(rules.hardness),
        "HAS_OWNERS": rules.owners is not None,
        "HAS_IDS": rules.query_ids is not None,
        "HAS_MARGIN": rules.margin is not None,
        "SYMMETRIC": rules.symmetric,
        "SAME_ALPHA": rules.alpha == rules.target_alpha,
        "PRECISION": _precision(),
    }


def _precision() -> str:
    """What float32 is multiplied as. The interpreter has no TF32."""
    exact = INTERPRETED or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


class _Call:
    """Arguments that the launches of one call share, and the tile for its kernel."""

    kernel: str

    def __init__(
        self, query: Tensor, target: Tensor, scale: Tensor, rules: Rules, positive: Tensor | None
    ) -> None:
        self.query, self.target, self.rules = query, target, rules
        n, (m, d) = len(query), target.shape
        self.sizes = (n, m, d, *query.stride(), *target.stride())
        labels = rules.labels.contiguous()
        self.positive = self._positive(labels) if positive is None else positive
        # An absent tensor's pointer is never read; labels stand in.
        row_limit = column_limit = labels
        if rules.margin is not None:
            row_limit = margin_limit(query, target, labels, rules.margin)
            column_limit = rules.column_limits(row_limit, m).contiguous()
        optional = (rules.owners, rules.query_ids, rules.target_ids)
        pointers = [labels if x is None else x.contiguous() for x in optional]
        self.inputs = (query, target, scale, labels, *pointers, row_limit, column_limit)
        self.flags = flags(rules)

    def options(self, tile: tiles.Tile) -> dict[str, Any]:
        """The kernel's constants and what it is compiled with."""
        shape = {"BM": tile.bm, "BN": tile.bn, "BK": tile.bk}
        launch = {"num_warps": tile.warps, "num_stages": tile.stages}
        return self.flags | shape | launch | COMPILE

    def tile(self) -> tiles.Tile:
        query, d = self.query, self.query.shape[1]
        if query.device.type != "cuda":
            return tiles.INTERPRETER
        major = torch.cuda.get_device_capability(query.device)[0]
        masked = self.rules.query_ids is not None or self.rules.margin is not None
        untimed = tiles.table(major, query.dtype, d, len(query), masked=masked)
        if not tiles.autotuning():
            return untimed
        key = self._key()
        if torch.cuda.is_current_stream_capturing():  # what is timed would join the graph
            return tiles.known(key) or untimed
        return tiles.tuned(key, tiles.candidates(major, query.dtype), self._time)

    def _key(self) -> str:
        """What a timing holds for."""
        n, m, d, *_ = self.sizes
        device = self.query.device
        major, minor = torch.cuda.get_device_capability(device)
        where = f"{torch.cuda.get_device_name(device)} {major}.{minor} triton {triton.__version__}"
        rules = " ".join(f"{name}={value}" for name, value in self.flags.items())
        sizes = f"D{d} N{tiles.size_class(n)} M{tiles.size_class(m)}"
        return f"{self.kernel} {where} {self.query.dtype} {sizes} {rules}"

    def _time(self, tile: tiles.Tile) -> float:
        """Milliseconds; infinite where the GPU has too little shared memory."""
        try:
            return float(triton.testing.do_bench(lambda: self.trial(tile), return_mode="median"))
        except triton.runtime.errors.OutOfResources:
            return math.inf

    def trial(self, tile: tiles.Tile) -> object:
        """One launch of the kernel, to be timed."""
        raise NotImplementedError

    def _positive(self, labels: Tensor) -> Tensor:
        n, m, d, *strides = self.sizes
        out = self.query.new_empty(n, dtype=torch.float32)
        block = 16
        kernels.positive_kernel[(triton.cdiv(n, block),)](
            self.query, self.target, labels, out, n, m, d, *strides, BM=block, BK=64, **COMPILE
        )
        return out


class _Forward(_Call):
    kernel = "forward"

    def __init__(self, query: Tensor, target: Tensor, scale: Tensor, rules: Rules) -> None:
        super().__init__(query, target, scale, rules, None)

    def run(self, tile: tiles.Tile) -> tuple[Tensor, Tensor]:
        """Log-sum-exps of the rows (N,) and of the columns (M,), or (0,) in one direction."""
        n, m = self.sizes[:2]
        rows, columns = _super_tile(
            triton.cdiv(n, tile.bm), triton.cdiv(m, tile.bn), self.query.device
        )
        grid = (triton.cdiv(n, tile.bm * rows), triton.cdiv(m, tile.bn * columns))
        row_shape = (grid[1], n)
        column_shape = (grid[0], m) if self.rules.symmetric else (0, 0)
        # Two tensors each: halves of one would not both start at a multiple of 16 bytes.
        row_max, row_sum, column_max, column_sum = (
            self.query.new_empty(shape, dtype=torch.float32)
            for shape in (row_shape, row_shape, column_shape, column_shape)
        )
        kernels.forward_kernel[grid](
            *self.inputs, row_max, row_sum, column_max, column_sum, *self.sizes,
            self.rules.alpha, self.rules.target_alpha, rows, columns, **self.options(tile),
        )  # fmt: skip
        return _combine(row_max, row_sum), _combine(column_max, column_sum)

    trial = run


class _Backward(_Call):
    kernel = "backward"

    def __init__(
        self,
        query: Tensor,
        target: Tensor,
        scale: Tensor,
        rules: Rules,
        positive: Tensor,
        *upstream: Tensor,
    ) -> None:
        super().__init__(query, target, scale, rules, positive)
        self.upstream = upstream  # both log-sum-exps, the gradients of the outputs, the gain

    def fill(self, tile: tiles.Tile, ds: Tensor, start: int, stop: int) -> None:
        grid = (triton.cdiv(stop - start, tile.bm) * triton.cdiv(len(self.target), tile.bn),)
        kernels.strip_kernel[grid](
            *self.inputs, *self.upstream, ds, start, stop, *self.sizes[1:], ds.stride(0),
            self.rules.alpha, self.rules.target_alpha, **self.options(tile), GROUP=8,
        )  # fmt: skip

    def trial(self, tile: tiles.Tile) -> None:
        ds = strip_workspace(self.query, self.target)
        self.fill(tile, ds, 0, len(ds))


def _super_tile(n_m: int, n_n: int, device: torch.device) -> tuple[int, int]:
    """Tiles per program along rows and columns: as many as leave enough programs to fill the
    GPU."""
    cuda = device.type == "cuda"
    sms = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 1
    rows, columns = min(SUPER_TILE, n_m), min(SUPER_TILE, n_n)
    while rows * columns > 1 and -(-n_m // rows) * -(-n_n // columns) < PROGRAMS_PER_SM * sms:
        rows, columns = (-(-rows // 2), columns) if rows >= columns else (rows, -(-columns // 2))
    return rows, columns


def _combine(maximum: Tensor, total: Tensor) -> Tensor:
    count, length = maximum.shape
    lse = maximum.new_empty(length)
    if length:
        kernels.combine_kernel[(triton.cdiv(length, COMBINE_BLOCK),)](
            maximum, total, lse, count, length, BLOCK=COMBINE_BLOCK, **COMPILE
        )
    return lse
