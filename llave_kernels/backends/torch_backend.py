"""The ``torch`` backend, for any device and float dtype. It is the fast path on a CPU.

torch's GEMM computes strips of the similarity matrix. They are reduced in place.

    forward        2NMD  one GEMM per strip, reduced over its rows and columns before the next strip
    backward       6NMD  the strip again, then dQ_strip = dS T and dT += dS^T Q_strip
                         (4NMD for the strips the forward kept, as many as fit ``KEEP_BUDGET``)
    one_direction  6NMD  loss and gradients together. A row's log-sum-exp is complete within its
                         strip, so the gradient GEMMs run on the strip right away

A strip is stored transposed, (M, rows). The libraries fill it, and sum dT from it, faster that way.

On a CPU, half precision is first widened to float32. There, float16 GEMMs are hundreds of times
slower than float32 ones. bfloat16 GEMMs with float32 results are no faster. For 512 x 8,192 from
D = 1,024 they take 18 ms, and float32 ones take 17 ms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llave_kernels.backends import torch_strips
from llave_kernels.backends.products import gain
from llave_kernels.backends.protocol import Gradients, LogSumExps, Sums
from llave_kernels.backends.torch_gradients import AddedGradients, StripGradients
from llave_kernels.backends.torch_strips import (
    INF,
    Strips,
    clamp,
    rounds_gradients,
    strip_rows,
)
from llave_kernels.losses import direction_loss
from llave_kernels.precision import accumulation_dtype
from llave_kernels.rules import Rules

NAME = "torch"
margin_limit = torch_strips.margin_limit
# Bytes for the gradients, one strip and the similarities that the forward keeps for the backward.
# It keeps as many similarities as fit.
KEEP_BUDGET = 96 << 20
WEIGHT_COLUMNS = 1024  # columns of dS weighted at a time, while they are in the cache
LOG2E = 1 / math.log(2)


def unavailable() -> str | None:
    """None: torch runs everywhere."""
    return None


def supports(query: Tensor, target: Tensor, rules: Rules) -> str | None:
    """None: every device and dtype is supported."""
    return None


def kept_shape(query: Tensor, target: Tensor, rules: Rules) -> tuple[int, ...]:
    """(M, K). The forward keeps the similarities of the first K rows, which are whole strips.

    In one direction it keeps none.
    """
    if not rules.symmetric:
        return len(target), 0
    n, (m, d) = query.shape[0], target.shape
    rows, itemsize = strip_rows(n, m, query.dtype), accumulation_dtype(query.dtype).itemsize
    budget = KEEP_BUDGET // itemsize - (n + m) * d - rows * m
    return m, clamp(budget // (rows * m) * rows, 0, n)


def _finite(shift: Tensor) -> Tensor:
    """0 in place of -inf, so that (-inf) - shift stays -inf where nothing is summed."""
    return shift.masked_fill(shift == -INF, 0.0)


def _exp_(x: Tensor) -> Tensor:
    """``exp`` in place. Three times faster than ``exp_`` on a CPU (9.5 and 3.1 G elements/s)."""
    return x.mul_(LOG2E).exp2_()


def _row_exponentials(strips: Strips, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``e = exp(z - shift)`` in place, its sum over each row (rows,), and the shift."""
    shift = z.new_zeros(()) if strips.bounded else _finite(z.amax(0))
    e = _exp_(z if strips.bounded else z.sub_(shift))
    return e, e.sum(0), shift


@dataclass
class ColumnSums:
    """Running maximum and sum of exponentials of each column, (M,)."""

    max: Tensor
    sum: Tensor

    @classmethod
    def of(cls, strips: Strips) -> ColumnSums:
        """Those of no strip yet."""
        zeros = strips.query.new_zeros(len(strips.target), dtype=strips.dtype)
        return cls(zeros if strips.bounded else torch.full_like(zeros, -INF), zeros.clone())

    def add(self, z: Tensor, *, bounded: bool) -> None:
        """Add the logits of a strip (M, rows). They are overwritten."""
        if bounded:
            self.sum += _exp_(z).sum(1)
            return
        new_max = torch.maximum(self.max, z.amax(1))
        shift = _finite(new_max)
        self.sum *= (self.max - shift).exp()
        self.sum += _exp_(z.sub_(shift[:, None])).sum(1)
        self.max = new_max

    def logsumexp(self) -> Tensor:
        return _finite(self.max) + self.sum.log()


def reduced(strips: Strips, strip: slice, similarity: Tensor, columns: ColumnSums) -> Tensor:
    """(rows,) log-sum-exps of the strip's rows. Adds to the columns' sums. Overwrites (M, rows)."""
    e, total, shift = _row_exponentials(strips, strips.row_logits(strip, similarity))
    if strips.together and strips.rules.symmetric:
        columns.sum += e.sum(1)
    elif strips.rules.symmetric:
        columns.add(strips.column_logits(strip, similarity), bounded=strips.bounded)
    return shift + total.log()


def forward(
    query: Tensor, target: Tensor, logit_scale: Tensor, rules: Rules, kept: Tensor
) -> LogSumExps:
    """As ``Backend.forward``. ``kept`` (M, K) receives the similarities of the first K rows."""
    dtype = accumulation_dtype(query.dtype)
    strips = Strips(query, target, logit_scale, rules, kept)
    rows, columns = query.new_empty(len(query), dtype=dtype), ColumnSums.of(strips)
    for strip in strips:
        rows[strip] = reduced(strips, strip, strips.similarity(strip, fresh=True), columns)
    target_lse = columns.logsumexp() if rules.symmetric else rows.new_empty(0)
    return LogSumExps(strips.positive, strips.nan_outside(rows), target_lse)


class Slopes:
    """dS of one call, from the upstream gradients, times ``scale``."""

    def __init__(
        self, strips: Strips, upstream: LogSumExps, outputs: LogSumExps, scale: Tensor
    ) -> None:
        self.strips, self.together = strips, strips.together and strips.rules.symmetric
        self.positive, rows, columns = (d * scale for d in upstream)
        self.row_shift, self.column_shift = (_finite(x) for x in outputs[1:])
        if self.together:
            rows, columns = (
                rows * torch.exp(-self.row_shift),
                columns * torch.exp(-self.column_shift),
            )
        self.rows, self.columns = rows, columns

    def of(self, strip: slice, similarity: Tensor) -> Tensor:
        """(M, rows) dS of the negatives of a strip. Overwrites its similarities."""
        strips = self.strips
        z = strips.row_logits(strip, similarity)
        if self.together:
            ds = _exp_(z)
            for start in range(0, len(ds), WEIGHT_COLUMNS):
                part = slice(start, start + WEIGHT_COLUMNS)
                ds[part].mul_(self.columns[part, None] + self.rows[strip])
            return ds
        ds = _exp_(z.sub_(self.row_shift[strip])).mul_(self.rows[strip])
        if strips.rules.symmetric:
            z = strips.column_logits(strip, similarity)
            ds += _exp_(z.sub_(self.column_shift[:, None])).mul_(self.columns[:, None])
        return ds


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
    """As ``Backend.backward``. The scale's gradient is cheap and is always computed."""
    strips = Strips(query, target, logit_scale, rules, kept)
    # Used for float32 dS too, because exp(z) and the factors below have very different sizes.
    factor = gain(strips.scale, *upstream) if sums is None else sums.gain
    gradients = (
        StripGradients(strips, query.dtype, factor, bias_gradients=bias_gradients)
        if sums is None
        else AddedGradients(strips, sums)
    )
    scale = strips.scale * factor
    slopes = Slopes(strips, upstream, outputs, scale)
    for strip in strips:
        gradients.add(strip, slopes.of(strip, strips.similarity(strip)), slopes.positive[strip])
    return gradients.result()


def merges_gradients(query: Tensor) -> bool:
    """Whether gradients stay unrounded until the upstream gradient is known."""
    return not rounds_gradients(query)


def merged(
    strips: Strips, strip: slice, similarity: Tensor, positive: Tensor, weight: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of a strip's rows (rows,) in one direction, dS of the negatives and of the positives.

    Args:
        similarity: (M, rows). It is overwritten by dS of the negatives.
        positive: (rows,) logits of the positives.
        weight: of the loss.
    """
    e, total, shift = _row_exponentials(strips, strips.row_logits(strip, similarity))
    lse = shift + total.log()
    slope = torch.sigmoid(lse - positive) * strips.scale * weight
    ds = e.mul_(slope / total.masked_fill(total == 0, 1.0))
    return direction_loss(positive, lse) * weight, ds, -slope


def one_direction(
    query: Tensor,
    target: Tensor,
    logit_scale: Tensor,
    rules: Rules,
    *,
    bias_gradients: bool = False,
) -> tuple[Tensor, Gradients]:
    """As ``OneDirection.one_direction``."""
    dtype, m = accumulation_dtype(query.dtype), len(target)
    strips = Strips(query, target, logit_scale, rules, query.new_empty((m, 0), dtype=dtype))
    gradients = StripGradients(strips, dtype, None, bias_gradients=bias_gradients)
    loss = query.new_empty(len(query), dtype=dtype)

    def accumulate(strip: slice) -> None:  # a function, to free a strip before the next is made
        similarity = strips.similarity(strip)
        loss[strip], *slopes = merged(strips, strip, similarity, strips.positive[strip])
        gradients.add(strip, *slopes)

    for strip in strips:
        accumulate(strip)
    return loss, gradients.result()
