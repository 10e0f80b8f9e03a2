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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llave_kernels.backends import positives
from llave_kernels.backends.products import (
    add_product,
    gain,
    multiplies_halves,
    product,
    rounding,
)
from llave_kernels.backends.protocol import Gradients, LogSumExps, Sums
from llave_kernels.losses import direction_loss
from llave_kernels.precision import accumulation_dtype
from llave_kernels.rules import ELSEWHERE, WITHIN, Rules, inside

NAME = "torch"
STRIP_BUDGET = 8 << 20  # bytes of one strip; up to two are alive
# Bytes for the gradients, one strip and the similarities that the forward keeps for the backward.
# It keeps as many similarities as fit.
KEEP_BUDGET = 96 << 20
WEIGHT_COLUMNS = 1024  # columns of dS weighted at a time, while they are in the cache
NOBODY = -3  # replaces an owner that is no column, so that it does not equal ELSEWHERE
INF = math.inf
LOG2E = 1 / math.log(2)
# Up to this |z|, exponentials and sums of 2^30 of them are normal float32 numbers.
SAFE_EXPONENT = 66.0


def unavailable() -> str | None:
    """None: torch runs everywhere."""
    return None


def supports(query: Tensor, target: Tensor, rules: Rules) -> str | None:
    """None: every device and dtype is supported."""
    return None


def rounds_gradients(query: Tensor) -> bool:
    """Whether dS is rounded to the inputs' half precision. Its products then use tensor cores."""
    return query.dtype.itemsize == 2 and multiplies_halves(query.device.type)


def margin_limit(query: Tensor, target: Tensor, labels: Tensor | None, margin: float) -> Tensor:
    """``positives.margin_limit`` for this backend's products."""
    return positives.margin_limit(query, target, labels, margin, rounding=rounding(query))


def strip_rows(n: int, m: int, dtype: torch.dtype) -> int:
    """Rows of a strip. Similarities are float32, or float64 for float64 inputs."""
    fit = STRIP_BUDGET // (m * accumulation_dtype(dtype).itemsize)
    return _clamp(fit, 1, n)


def kept_shape(query: Tensor, target: Tensor, rules: Rules) -> tuple[int, ...]:
    """(M, K). The forward keeps the similarities of the first K rows, which are whole strips.

    In one direction it keeps none.
    """
    if not rules.symmetric:
        return len(target), 0
    n, (m, d) = query.shape[0], target.shape
    rows, itemsize = strip_rows(n, m, query.dtype), accumulation_dtype(query.dtype).itemsize
    budget = KEEP_BUDGET // itemsize - (n + m) * d - rows * m
    return m, _clamp(budget // (rows * m) * rows, 0, n)


def _clamp(x: int, low: int, high: int) -> int:
    """``x`` between the bounds. Sizes may be symbolic, and one compiled graph serves them all."""
    if isinstance(x, int) and isinstance(high, int):  # 0.3 against 2.4 us
        return min(high, max(low, x))
    return torch.sym_min(high, torch.sym_max(low, x))


class Strips:
    """The similarity matrix of one call, ``rows`` rows at a time."""

    def __init__(
        self, query: Tensor, target: Tensor, scale: Tensor, rules: Rules, kept: Tensor
    ) -> None:
        self.dtype = accumulation_dtype(query.dtype)
        self.query = query
        widens = query.device.type == "cpu" and not rounds_gradients(query)
        self.target = target.to(self.dtype) if widens else target
        self.scale, self.rules, self.kept = scale.to(self.dtype), rules, kept
        self.rows = strip_rows(len(query), len(target), query.dtype)
        if rules.labels is not None:
            # A label outside names no column. The outputs of its row are NaN.
            self.inside, self.columns = inside(rules.labels, len(target))
        self.owners = rules.owners
        if self.owners is not None:
            self.owners = self.owners.masked_fill(self.owners < 0, NOBODY)
        self.bounded = self._bounded()
        self.row_limit = rules.row_limits(query, target, margin_limit)
        self.column_limit = None
        if self.row_limit is not None:
            self.column_limit = rules.column_limits(self.row_limit, len(target))
        # One exponential then serves both directions: dS = exp(z) (row factor + column factor).
        self.together = self.bounded and rules.shared_logits

    def __iter__(self) -> Iterator[slice]:
        for start in range(0, len(self.query), self.rows):
            yield slice(start, min(start + self.rows, len(self.query)))

    def queries(self, strip: slice) -> Tensor:
        return self.query[strip].to(self.target.dtype)

    @cached_property
    def positive(self) -> Tensor:
        """(N,) logits of the positives. Computed on demand, as a backward needs none."""
        found = positives.positive_similarity(self.query, self.target, self.rules.labels)
        return self.rules.add_biases(found * self.scale)

    def put_positives(self, strip: slice, matrix: Tensor, values: Tensor | float) -> None:
        """Overwrite the positives in ``matrix`` (M, rows) by values (rows,) or a number."""
        if self.rules.labels is None:
            diagonal = matrix.diagonal(-strip.start)
            diagonal.copy_(values) if isinstance(values, Tensor) else diagonal.fill_(values)
            return
        columns = self.columns[None, strip]
        values = torch.where(self.inside[strip], values, matrix.gather(0, columns))
        matrix.scatter_(0, columns, values)

    def nan_outside(self, rows: Tensor) -> Tensor:
        """Values of the rows (N,), with NaN for a label outside, other than ``ELSEWHERE``."""
        labels = self.rules.labels
        if labels is None:
            return rows
        return rows.masked_fill_(~self.inside & (labels != ELSEWHERE), math.nan)

    def _bounded(self) -> bool:
        """Whether all logits are small enough for exponentials without the maximum subtracted.

        The row norms (Cauchy-Schwarz) and the largest biases bound them. This is tested only on a
        CPU, where the host can read a value without waiting.
        """
        if self.query.device.type != "cpu":
            return False
        norms = [
            torch.linalg.vector_norm(x, dim=1, dtype=self.dtype) for x in (self.query, self.target)
        ]
        strength = self.scale + max(self.rules.alpha, self.rules.target_alpha)
        bound = strength * norms[0].max() * norms[1].max()
        bound = bound + sum(x.abs().max() for x in self.rules.biases if x is not None)
        return bool(bound <= SAFE_EXPONENT)

    def similarity(self, strip: slice, *, fresh: bool = False) -> Tensor:
        """(M, rows) similarities of the strip. The caller may overwrite them.

        They are copied from ``kept`` if the strip is there. With ``fresh`` they are computed, and
        stored in ``kept`` if there is room.
        """
        keeps = strip.stop <= self.kept.shape[-1]
        if keeps and not fresh:
            return self.kept[:, strip].clone()
        similarity = product(self.target, self.queries(strip).T)
        if keeps:
            self.kept[:, strip] = similarity
        return similarity

    def row_logits(self, strip: slice, similarity: Tensor) -> Tensor:
        """(M, rows) logits of the query direction, -inf where a pair is not a valid negative.

        Overwrites ``similarity``, unless the target direction needs it for its own logits.
        """
        limit = None if self.row_limit is None else self.row_limit[strip]
        out = None if self.rules.symmetric and not self.together else similarity
        return self._logits(strip, similarity, self.rules.alpha, limit, out)

    def column_logits(self, strip: slice, similarity: Tensor) -> Tensor:
        """The same for the target direction. Overwrites ``similarity``."""
        limit = None if self.column_limit is None else self.column_limit[:, None]
        return self._logits(strip, similarity, self.rules.target_alpha, limit, similarity)

    def _logits(
        self,
        strip: slice,
        similarity: Tensor,
        alpha: float,
        limit: Tensor | None,
        out: Tensor | None,
    ) -> Tensor:
        rules, plain = self.rules, self.scale
        weighted = plain + alpha
        own = None
        if self.owners is not None:
            own = self.owners[:, None] == rules.labels_of(self.query)[strip]
        if own is None or rules.hardness in ("all", WITHIN):
            factor = plain if rules.hardness == "hard_negatives" else weighted
        elif rules.hardness == "in_batch":
            factor = torch.where(own, plain, weighted)
        else:
            factor = torch.where(own, weighted, plain)
        suspect = None if limit is None else similarity > limit
        z = torch.mul(similarity, factor, out=out)
        if rules.query_bias is not None:
            z += rules.query_bias[strip]
        if rules.target_bias is not None:
            z += rules.target_bias[:, None]
        if suspect is not None:
            z.masked_fill_(suspect if own is None else suspect & ~own, -INF)
        if own is not None and rules.hardness == WITHIN:
            z.masked_fill_(own, -INF)
        if rules.query_ids is not None and rules.target_ids is not None:
            z.masked_fill_(rules.target_ids[:, None] == rules.query_ids[strip], -INF)
        self.put_positives(strip, z, -INF)
        return z


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
        _Gradients(strips, query.dtype, factor, bias_gradients=bias_gradients)
        if sums is None
        else _Added(strips, sums)
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
    gradients = _Gradients(strips, dtype, None, bias_gradients=bias_gradients)
    loss = query.new_empty(len(query), dtype=dtype)

    def accumulate(strip: slice) -> None:  # a function, to free a strip before the next is made
        similarity = strips.similarity(strip)
        loss[strip], *slopes = merged(strips, strip, similarity, strips.positive[strip])
        gradients.add(strip, *slopes)

    for strip in strips:
        accumulate(strip)
    return loss, gradients.result()


class _Gradients:
    """The gradients, summed over strips of ``factor * dS``. dQ and dT are in ``dtype``."""

    def __init__(
        self,
        strips: Strips,
        dtype: torch.dtype,
        factor: Tensor | None,
        *,
        bias_gradients: bool = False,
    ) -> None:
        self.strips, self.factor = strips, factor
        self.d_query = strips.query.new_empty(strips.query.shape, dtype=dtype)
        self.d_target = strips.target.new_zeros(strips.target.shape, dtype=strips.dtype)
        self.d_scales: list[Tensor] = []
        self.d_biases = strips.rules.bias_gradients(bias_gradients)

    def add(self, strip: slice, ds: Tensor, d_positive: Tensor) -> None:
        """Complete ``ds`` (M, rows) with the positives' gradient, then run both GEMMs."""
        strips, queries = self.strips, self.strips.queries(strip)
        strips.put_positives(strip, ds, d_positive)
        d_query_bias, d_target_bias = self.d_biases
        if d_query_bias is not None:
            d_query_bias[strip] = ds.sum(0)
        if d_target_bias is not None:
            d_target_bias += ds.sum(1)
        if rounds_gradients(strips.query):
            ds = ds.to(queries.dtype)
        d_query = product(ds.T, strips.target)
        add_product(self.d_target, ds, queries)
        # d logit_scale follows from dQ, because s has a gradient only through kappa s. It takes dQ
        # before that is rounded, because the terms cancel.
        self.d_scales.append(torch.linalg.vecdot(queries.to(strips.dtype), d_query).sum())
        self.d_query[strip] = d_query if self.factor is None else d_query.div_(self.factor)

    def result(self) -> Gradients:
        if self.factor is not None:
            self.d_target /= self.factor
        divisor = self.strips.scale if self.factor is None else self.strips.scale * self.factor
        d_scale = torch.stack(self.d_scales).sum() / divisor
        d_biases = (None if x is None else x / divisor for x in self.d_biases)
        return Gradients(self.d_query, self.d_target.to(self.d_query.dtype), d_scale, *d_biases)


class _Added:
    """As ``_Gradients``, added to ``sums``."""

    def __init__(self, strips: Strips, sums: Sums) -> None:
        self.strips, self.sums = strips, sums

    def add(self, strip: slice, ds: Tensor, d_positive: Tensor) -> None:
        strips, queries = self.strips, self.strips.queries(strip)
        strips.put_positives(strip, ds, d_positive)
        if rounds_gradients(strips.query):
            ds = ds.to(queries.dtype)
        add_product(self.sums.query[strip], ds.T, strips.target)
        add_product(self.sums.target, ds, queries)

    def result(self) -> Gradients:
        return Gradients(*self.sums)
