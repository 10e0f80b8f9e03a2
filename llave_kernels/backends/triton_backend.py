"""The ``triton`` backend: launches of the kernels in ``triton_kernels``.

float32 inputs follow ``torch.set_float32_matmul_precision``. "highest" gives IEEE products, the
other settings TF32. On CPU tensors the kernels run in Triton's interpreter, if
``TRITON_INTERPRET=1`` was set before the import.
"""

from __future__ import annotations

import importlib.util
import math
import os
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llave_kernels.backends import positives, strip_gemm, tiles
from llave_kernels.backends.products import factors, gain
from llave_kernels.backends.protocol import Gradients, LogSumExps, Sums
from llave_kernels.backends.rows import ROW_BYTES, aligned
from llave_kernels.backends.strip_gemm import ALIGNMENT, strip_workspace
from llave_kernels.precision import float32_matmul
from llave_kernels.rules import Rules, biased

NAME = "triton"
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
INSTALLED = importlib.util.find_spec("triton") is not None
if INSTALLED:
    import triton

    from llave_kernels.backends import triton_kernels as kernels
    from llave_kernels.backends import triton_loss as loss
    from llave_kernels.backends.triton_tile import Pairs

SUPER_TILE = 16  # most tiles per program along each side; fewer if the GPU would not be full
PROGRAMS_PER_SM = 4
COMBINE_BLOCK = 128
SUM_TILE = 64 * 128  # pairs of the largest tile that sums the scale's gradient; larger ones spill
LOSS_BLOCK = 1024
# Set here, because TRITON_DEFAULT_FP_FUSION in the environment would change the results.
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


def margin_limit(query: Tensor, target: Tensor, labels: Tensor | None, margin: float) -> Tensor:
    """``positives.margin_limit`` for this backend's products.

    With TF32, the tensor cores cut off the low bits of float32.
    """
    truncates = query.dtype == torch.float32 and _precision(query) == "tf32"
    truncated = positives.truncated_tf32 if truncates else None
    return positives.margin_limit(query, target, labels, margin, truncated)


def kept_shape(query: Tensor, target: Tensor, rules: Rules) -> tuple[int, ...]:
    """As ``Backend.kept_shape``."""
    return strip_gemm.kept_shape(query, target)


def forward(
    query: Tensor, target: Tensor, logit_scale: Tensor, rules: Rules, kept: Tensor
) -> LogSumExps:
    """The log-sum-exps, in float32."""
    call = _Forward(query, target, logit_scale, rules)
    lse = call.log_sum_exps()
    call.run(call.tile(), lse, kept)
    positive = rules.add_biases(call.positive_similarity().mul_(logit_scale))
    rows, columns = lse.unbind()
    # An operator's outputs may not share memory.
    columns = columns[: len(target)].clone() if rules.symmetric else rows.new_empty(0)
    return LogSumExps(positive, rows[: len(query)], columns)


def total_loss(
    query: Tensor,
    target: Tensor,
    scale: float | Tensor,
    rules: Rules,
    weight: float,
    *,
    keep: bool,
) -> tuple[Tensor, tuple[Tensor, ...], None]:
    """As ``FusedLoss.total_loss``. It saves the results, as ``loss_kernel`` lays them out."""
    n, m = query.shape[0], target.shape[0]
    call = _Forward(query, target, scale, rules)
    results = call.log_sum_exps(7)
    length = results.shape[1]
    total = query.new_empty((), dtype=torch.float32)
    kept = strip_gemm.new_kept(query, target) if keep else None
    pairs = call.pairs
    call.run(call.tile(), results[1:3], kept)
    loss.loss_kernel[(1,)](
        call.positive_similarity(), scale, pairs.label, pairs.query_bias, pairs.target_bias,
        results, total, length, weight, n, m,
        SYMMETRIC=rules.symmetric, BLOCK=LOSS_BLOCK, num_warps=8, **COMPILE,
    )  # fmt: skip
    return total, (results,) if kept is None else (results, kept), None


def _outputs(results: Tensor, n: int, m: int, rules: Rules) -> LogSumExps:
    """The log-sum-exps, or their slopes, in three rows of the results."""
    positive, rows, columns = results[:3].unbind()
    return LogSumExps(positive[:n], rows[:n], columns[: m if rules.symmetric else 0])


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
    factor = gain(logit_scale, *upstream) if query.dtype == torch.float16 else None
    if sums is not None:
        factor = sums.gain
    call = _Backward(query, target, logit_scale, rules, outputs, upstream, factor, kept)
    if sums is not None:
        return strip_gemm.add_gradients(
            query, target, partial(call.fill, call.tile(), sums=False), sums
        )
    fill = partial(call.fill, call.tile(), sums=scale_gradient)
    return strip_gemm.gradients(
        query, target, logit_scale, fill, factor, rules.bias_gradients(bias_gradients),
        scale_gradient=scale_gradient,
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
    results, *kept = saved
    n, m = query.shape[0], target.shape[0]
    outputs, slopes = (_outputs(x, n, m, rules) for x in (results, results[3:]))
    factor, divisor = factors(query.dtype, results[6, 0], d_total)
    similarities = kept[0] if kept else None
    call = _Backward(query, target, scale, rules, outputs, slopes, factor, similarities)
    fill = partial(call.fill, call.tile(), sums=scale_gradient)
    return strip_gemm.gradients(
        query, target, scale, fill, divisor, rules.bias_gradients(bias_gradients),
        scale_gradient=scale_gradient,
    )  # fmt: skip


def pairs(query: Tensor, target: Tensor, rules: Rules) -> Pairs:
    """The rules as the kernels take them. Rules that this call does not use are None."""
    row_limit = rules.row_limits(query, target, margin_limit)
    column_limit = None
    if row_limit is not None and rules.symmetric:
        column_limit = rules.column_limits(row_limit, len(target))
    one_alpha = not rules.symmetric or rules.alpha == rules.target_alpha
    return Pairs(
        label=_contiguous(rules.labels),
        owner=_contiguous(rules.owners),
        query_id=_contiguous(rules.query_ids),
        target_id=_contiguous(rules.target_ids),
        row_limit=_contiguous(row_limit),
        column_limit=_contiguous(column_limit),
        query_bias=_contiguous(rules.query_bias),
        target_bias=_contiguous(rules.target_bias),
        alpha=rules.alpha,
        target_alpha=None if one_alpha else rules.target_alpha,
    )


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _precision(query: Tensor) -> str:
    """The precision of float32 products. The interpreter has no TF32."""
    exact = INTERPRETED or float32_matmul(query.device.type) == "highest"
    return "ieee" if exact else "tf32"


class _Call:
    """Arguments that the launches of one call share, and the tile for its kernel."""

    kernel: str

    def __init__(self, query: Tensor, target: Tensor, scale: float | Tensor, rules: Rules) -> None:
        self.pairs = pairs(query, target, rules)
        self.query, self.target, self.rules = aligned(query), aligned(target), rules
        n, (m, d) = len(query), self.target.shape
        rows = (d, self.query.stride(0), self.target.stride(0))
        self.sizes = (n, m, *(x * query.itemsize // ROW_BYTES for x in rows))
        self.inputs = (self.query, self.target, scale, *self.pairs)

    def options(self, tile: tiles.Tile) -> dict[str, Any]:
        """The kernel's constants and its launch and compile options."""
        constants = {"PRECISION": _precision(self.query)}
        launch = {"num_warps": tile.warps, "num_stages": tile.stages}
        return constants | {"TILE": tile} | launch | COMPILE

    @property
    def hardness(self) -> dict[str, str]:
        """The constant of the kernels that weigh pairs."""
        return {"HARDNESS": self.rules.hardness}

    @property
    def masked(self) -> bool:
        """Whether the largest tile would spill registers."""
        rules = self.rules
        ids, margin = rules.query_ids is not None, rules.margin is not None
        return tiles.masked(self.query.dtype, ids=ids, margin=margin, biases=biased(rules))

    def tile(self) -> tiles.Tile:
        query, d = self.query, self.query.shape[1]
        if query.device.type != "cuda":
            return tiles.INTERPRETER
        major = torch.cuda.get_device_capability(query.device)[0]
        untimed = tiles.table(major, query.dtype, d, len(query), masked=self.masked)
        if not tiles.autotuning():
            return untimed
        key = self._key()
        if torch.cuda.is_current_stream_capturing():  # timed launches would join the graph
            return tiles.known(key) or untimed
        return tiles.tuned(key, tiles.CANDIDATES[tiles.kind(major, query.dtype)], self._time)

    def _key(self) -> str:
        """The class of calls that a timing holds for."""
        n, m = self.sizes[:2]
        d = self.query.shape[1]
        device = self.query.device
        major, minor = torch.cuda.get_device_capability(device)
        where = f"{torch.cuda.get_device_name(device)} {major}.{minor} triton {triton.__version__}"
        given = [name for name, value in self.pairs._asdict().items() if value is not None]
        directions = "both directions" if self.rules.symmetric else "one direction"
        rules = f"{self.rules.hardness} {directions} {' '.join(given)}"
        sizes = f"D{d} N{tiles.size_class(n)} M{tiles.size_class(m)}"
        dtype = f"{self.query.dtype} {_precision(self.query)}"
        return f"{self.kernel} {where} {dtype} {sizes} {rules}"

    def _time(self, tile: tiles.Tile) -> float:
        """Milliseconds. Infinite if the GPU has too little shared memory."""
        try:
            return float(triton.testing.do_bench(lambda: self.trial(tile), return_mode="median"))
        except triton.runtime.errors.OutOfResources:
            return math.inf

    def trial(self, tile: tiles.Tile) -> object:
        """One launch of the kernel, to be timed."""
        raise NotImplementedError


class _Forward(_Call):
    kernel = "forward"

    def positive_similarity(self) -> Tensor:
        """(N,) similarities of the positives."""
        n = len(self.query)
        out = self.query.new_empty(n, dtype=torch.float32)
        block = 16
        kernels.positive_kernel[(triton.cdiv(n, block),)](
            self.query, self.target, self.pairs.label, out, *self.sizes,
            BM=block, BK=64, **COMPILE,
        )  # fmt: skip
        return out

    def log_sum_exps(self, rows: int = 2) -> Tensor:
        """(rows, length) uninitialised, for log-sum-exps of the rows and of the columns."""
        length = -(-max(self.sizes[:2]) // ALIGNMENT) * ALIGNMENT  # so that every row is aligned
        return self.query.new_empty((rows, length), dtype=torch.float32)

    def run(self, tile: tiles.Tile, lse: Tensor, kept: Tensor | None) -> None:
        """Fill the log-sum-exps (2, length), and ``kept`` if there is room in it."""
        n, m = self.sizes[:2]
        rows, columns = _super_tile(
            triton.cdiv(n, tile.bm), triton.cdiv(m, tile.bn), self.query.device
        )
        grid = (triton.cdiv(m, tile.bn * columns), triton.cdiv(n, tile.bm * rows))
        by_row = self._partial(grid[0], n)
        symmetric = self.rules.symmetric
        by_column = self._partial(grid[1], m) if symmetric else (None, None)
        kept, pitch = _kept(kept)
        kernels.forward_kernel[grid](
            *self.inputs, *by_row, *by_column, kept, *self.sizes, pitch, rows, columns,
            **self.hardness, **self.options(tile),
        )  # fmt: skip
        blocks = triton.cdiv(max(n, m) if symmetric else n, COMBINE_BLOCK)
        kernels.combine_kernel[(blocks, 2 if symmetric else 1)](
            *by_row, *by_column, lse, *grid, n, m, lse.shape[1], BLOCK=COMBINE_BLOCK, **COMPILE
        )

    def _partial(self, parts: int, length: int) -> tuple[Tensor, Tensor]:
        """Maxima and sums, (parts, length) each and uninitialised.

        Halves of one tensor would not both start at a multiple of 16 bytes.
        """
        maximum, total = (
            self.query.new_empty((parts, length), dtype=torch.float32) for _ in range(2)
        )
        return maximum, total

    def trial(self, tile: tiles.Tile) -> None:
        self.run(tile, self.log_sum_exps(), None)


class _Backward(_Call):
    kernel = "backward"

    def __init__(
        self,
        query: Tensor,
        target: Tensor,
        scale: float | Tensor,
        rules: Rules,
        outputs: LogSumExps,
        upstream: LogSumExps,
        gain: Tensor | None,
        kept: Tensor | None,
    ) -> None:
        super().__init__(query, target, scale, rules)
        target_lse, d_target_lse = outputs.target_lse, upstream.target_lse
        by_column = (target_lse, d_target_lse) if rules.symmetric else (None, None)
        self.gradients = (
            upstream.positive, outputs.query_lse, upstream.query_lse, *by_column, gain,
            _kept(kept)[0],
        )  # fmt: skip

    def fill(
        self, tile: tiles.Tile, ds: Tensor, start: int, stop: int, *, sums: bool
    ) -> Tensor | None:
        """Fill a strip of dS. With ``sums``, return its part of the scale's gradient (), if the
        tile can sum it.
        """
        n_m, n_n = triton.cdiv(stop - start, tile.bm), triton.cdiv(len(self.target), tile.bn)
        tiles_each = math.prod(_super_tile(n_m, n_n, self.query.device))
        programs = triton.cdiv(n_m * n_n, tiles_each)
        sums = sums and tile.bm * tile.bn <= SUM_TILE
        parts = ds.new_empty(programs, dtype=torch.float32) if sums else None
        kernels.strip_kernel[(programs,)](
            *self.inputs, *self.gradients, ds, parts, start, stop, *self.sizes[1:], ds.stride(0),
            tiles_each, **self.hardness, **self.options(tile),
        )  # fmt: skip
        return None if parts is None else parts.sum()

    def trial(self, tile: tiles.Tile) -> None:
        ds = strip_workspace(self.query, self.target)
        self.fill(tile, ds, 0, len(ds), sums=False)


def _super_tile(n_m: int, n_n: int, device: torch.device) -> tuple[int, int]:
    """Tiles per program along rows and columns. They leave enough programs to fill the GPU."""
    cuda = device.type == "cuda"
    sms = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 1
    rows, columns = min(SUPER_TILE, n_m), min(SUPER_TILE, n_n)
    while rows * columns > 1 and -(-n_m // rows) * -(-n_n // columns) < PROGRAMS_PER_SM * sms:
        rows, columns = (rows, -(-columns // 2)) if columns >= rows else (-(-rows // 2), columns)
    return rows, columns


def _kept(kept: Tensor | None) -> tuple[Tensor | None, int]:
    """The kept similarities and their pitch. (None, 0) without any."""
    return (None, 0) if kept is None or not kept.numel() else (kept, kept.stride(0))
