"""The ``triton`` backend: launches of the kernels in ``triton_kernels``.

float32 inputs follow ``torch.set_float32_matmul_precision``: "highest" is IEEE, the others TF32.
On CPU tensors the kernels run in Triton's interpreter when ``TRITON_INTERPRET=1`` was set before
the import.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from llave_kernels.backends import tiles
from llave_kernels.backends.products import gain
from llave_kernels.backends.strip_gemm import gradients
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
        if torch.version.cuda and torch.cuda.get_device_capability(query.device)[0] < 8:
            return "compute capability below 8.0; use backend='torch'"
    elif query.device.type != "cpu" or not INTERPRETED:
        return f"device {query.device} is not a GPU that Triton runs on; use backend='torch'"
    if query.dtype not in dtypes:
        names = ", ".join(str(d) for d in dtypes)
        return f"dtype {query.dtype} is not one of {names}; use backend='torch'"
    return None


def forward(
    query: Tensor, target: Tensor, logit_scale: Tensor, rules: Rules
) -> tuple[Tensor, Tensor, Tensor]:
    """Positive logits (N,), n (N,), and n' (M,) or (0,), float32. ``logit_scale`` is 0-d
    float32."""
    call = _Call(query, target, logit_scale, rules)
    rows, columns = call.forward(call.tile())
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
    call = _Call(query, target, logit_scale, rules, positive / logit_scale)
    upstream = (d_positive, d_query_lse, *([d_target_lse] if rules.symmetric else []))
    factor = gain(logit_scale, *upstream) if query.dtype == torch.float16 else None
    tile = call.tile()
    one = torch.ones((), device=query.device) if factor is None else factor

    def fill(ds: Tensor, start: int, stop: int) -> None:
        grid = (triton.cdiv(stop - start, tile.bm) * triton.cdiv(len(target), tile.bn),)
        kernels.strip_kernel[grid](
            *call.inputs, query_lse, target_lse, d_positive, d_query_lse, d_target_lse, one, ds,
            start, stop, *call.sizes[1:], ds.stride(0), rules.alpha, rules.target_alpha,
            **call.flags(tile), GROUP=8,
        )  # fmt: skip

    return gradients(query, target, logit_scale, fill, factor, scale_gradient=scale_gradient)


class _Call:
    """Arguments that the launches of one call share."""

    def __init__(
        self,
        query: Tensor,
        target: Tensor,
        scale: Tensor,
        rules: Rules,
        positive: Tensor | None = None,
    ) -> None:
        self.query, self.target, self.rules = query, target, rules
        n, (m, d) = len(query), target.shape
        self.sizes = (n, m, d, *query.stride(), *target.stride())
        labels = rules.labels.contiguous()
        self.positive = self._positive(labels) if positive is None else positive
        # An absent tensor's pointer is never read; labels stand in.
        row_limit = column_limit = labels
        if rules.margin is not None:
            row_limit, column_limit = rules.margin_limits(self.positive, m)
        optional = (rules.owners, rules.query_ids, rules.target_ids)
        pointers = [labels if x is None else x.contiguous() for x in optional]
        self.inputs = (query, target, scale, labels, *pointers, row_limit, column_limit)

    def flags(self, tile: tiles.Tile) -> dict[str, Any]:
        rules = self.rules
        exact = torch.get_float32_matmul_precision() == "highest"
        return {
            "HARDNESS": HARDNESS_MODES.index(rules.hardness),
            "HAS_OWNERS": rules.owners is not None,
            "HAS_IDS": rules.query_ids is not None,
            "HAS_MARGIN": rules.margin is not None,
            "SYMMETRIC": rules.symmetric,
            "SAME_ALPHA": rules.alpha == rules.target_alpha,
            "PRECISION": "ieee" if exact else "tf32",
            "BM": tile.bm,
            "BN": tile.bn,
            "BK": tile.bk,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }

    def tile(self) -> tiles.Tile:
        query, d = self.query, self.query.shape[1]
        if query.device.type != "cuda":
            return tiles.INTERPRETER
        if tiles.autotuning():
            return tiles.tuned(query.device, query.dtype, d, len(query), self._time)
        major = torch.cuda.get_device_capability(query.device)[0]
        masked = self.rules.query_ids is not None or self.rules.margin is not None
        return tiles.table(major, query.dtype, d, len(query), masked=masked)

    def _time(self, tile: tiles.Tile) -> float:
        return float(triton.testing.do_bench(lambda: self.forward(tile), return_mode="median"))

    def _positive(self, labels: Tensor) -> Tensor:
        n, _, d, *strides = self.sizes
        out = self.query.new_empty(n, dtype=torch.float32)
        block = 16
        kernels.positive_kernel[(triton.cdiv(n, block),)](
            self.query, self.target, labels, out, n, d, *strides, BM=block, BK=64
        )
        return out

    def forward(self, tile: tiles.Tile) -> tuple[Tensor, Tensor]:
        """Log-sum-exps of the rows (N,) and of the columns (M,), or (0,) in one direction."""
        n, m = self.sizes[:2]
        rows, columns = _super_tile(
            triton.cdiv(n, tile.bm), triton.cdiv(m, tile.bn), self.query.device
        )
        grid = (triton.cdiv(n, tile.bm * rows), triton.cdiv(m, tile.bn * columns))
        row_parts = self.query.new_empty((2, grid[1], n), dtype=torch.float32)
        column_shape = (2, grid[0], m) if self.rules.symmetric else (2, 0, 0)
        column_parts = row_parts.new_empty(column_shape)
        kernels.forward_kernel[grid](
            *self.inputs, *row_parts, *column_parts, *self.sizes,
            self.rules.alpha, self.rules.target_alpha, rows, columns, **self.flags(tile),
        )  # fmt: skip
        return _combine(row_parts), _combine(column_parts)


def _super_tile(n_m: int, n_n: int, device: torch.device) -> tuple[int, int]:
    """Tiles per program along rows and columns: as many as leave enough programs to fill the
    GPU."""
    cuda = device.type == "cuda"
    sms = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 1
    rows, columns = min(SUPER_TILE, n_m), min(SUPER_TILE, n_n)
    while rows * columns > 1 and -(-n_m // rows) * -(-n_n // columns) < PROGRAMS_PER_SM * sms:
        rows, columns = (-(-rows // 2), columns) if rows >= columns else (rows, -(-columns // 2))
    return rows, columns


def _combine(parts: Tensor) -> Tensor:
    _, count, length = parts.shape
    lse = parts.new_empty(length)
    if length:
        kernels.combine_kernel[(triton.cdiv(length, COMBINE_BLOCK),)](
            *parts, lse, count, length, BLOCK=COMBINE_BLOCK
        )
    return lse
