"""The ``torch`` backend: strips of the similarity matrix through torch's GEMM, reduced in place.

Any device, any float dtype; the fast path of the CPU.

    forward        2NMD  one GEMM per strip, reduced over its rows and columns before the next strip
    backward       6NMD  the strip again, then dQ_strip = dS T and dT += dS^T Q_strip
                         (4NMD where the similarities fit ``KEEP_BUDGET``: the forward kept them)
    one_direction  6NMD  loss and gradients together: a row's log-sum-exp is complete within its
                         strip, so the gradient GEMMs run while the strip is at hand

Half precision is computed in float32: a GEMM that rounds similarities to bfloat16 loses three
digits of the logits, and float16 GEMMs are hundreds of times slower than float32 on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llave_kernels.rules import Rules

NAME = "torch"
STRIP_BUDGET = 16 << 20  # bytes of one strip; up to three are alive
KEEP_BUDGET = 64 << 20  # bytes of similarities that the forward may keep for the backward
INF = math.inf
# Largest |z| for which exponentials, and sums of 2^30 of them, stay normal float32 numbers.
SAFE_EXPONENT = 66.0


def unavailable() -> str | None:
    """None: torch runs everywhere."""
    return None


def supports(query: Tensor, target: Tensor, rules: Rules) -> str | None:
    """None: every device and dtype."""
    return None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kept_shape(query: Tensor, target: Tensor) -> tuple[int, int]:
    """Shape of the similarities the forward keeps; (0, 0) where they exceed ``KEEP_BUDGET``."""
    n, m = len(query), len(target)
    size = n * m * accumulation_dtype(query.dtype).itemsize
    return (n, m) if size <= KEEP_BUDGET else (0, 0)


class _Strips:
    """The similarity matrix of one call, ``rows`` rows at a time."""

    def __init__(
        self, query: Tensor, target: Tensor, scale: Tensor, rules: Rules, kept: Tensor
    ) -> None:
        self.dtype = accumulation_dtype(query.dtype)
        self.query, self.target = query, target.to(self.dtype)
        self.scale, self.rules, self.kept = scale.to(self.dtype), rules, kept
        n, m = len(query), len(target)
        self.rows = min(n, max(1, STRIP_BUDGET // (m * self.dtype.itemsize)))
        self.positive = self._positive_similarity()
        self.bounded = self._bounded()
        self.column_limit = self.positive.new_full((m,), INF)
        if rules.margin is not None and rules.symmetric:
            self.column_limit[rules.labels] = self.positive + rules.margin

    def buffer(self) -> Tensor:
        """A fresh (rows, M) strip."""
        return self.query.new_empty((self.rows, len(self.target)), dtype=self.dtype)

    def __iter__(self) -> Iterator[slice]:
        for start in range(0, len(self.query), self.rows):
            yield slice(start, min(start + self.rows, len(self.query)))

    def queries(self, strip: slice) -> Tensor:
        return self.query[strip].to(self.dtype)

    def _positive_similarity(self) -> Tensor:
        pairs = (
            torch.linalg.vecdot(self.queries(s), self.target[self.rules.labels[s]]) for s in self
        )
        return torch.cat(list(pairs))

    def _bounded(self) -> bool:
        """Whether no logit can leave the range in which exponentials need no maximum subtracted.

        By Cauchy-Schwarz from the row norms. Only asked on a CPU, where looking at a value is free.
        """
        if self.query.device.type != "cpu":
            return False
        norms = [
            torch.linalg.vector_norm(x, dim=1, dtype=self.dtype) for x in (self.query, self.target)
        ]
        strength = self.scale + max(self.rules.alpha, self.rules.target_alpha)
        return bool(strength * norms[0].max() * norms[1].max() <= SAFE_EXPONENT)

    def similarity(self, strip: slice, out: Tensor) -> Tensor:
        """(rows, M) similarities of the strip, computed into ``out`` unless they were kept."""
        if self.kept.numel():
            return self.kept[strip]
        out = out[: strip.stop - strip.start]
        return torch.mm(self.queries(strip), self.target.T, out=out)

    def logits(self, strip: slice, similarity: Tensor, out: Tensor, *, columns: bool) -> Tensor:
        """(rows, M) logits of one direction, -inf where the pair is not a valid negative."""
        rules, labels = self.rules, self.rules.labels[strip]
        plain = self.scale
        weighted = plain + (rules.target_alpha if columns else rules.alpha)
        own = None if rules.owners is None else labels[:, None] == rules.owners
        if own is None or rules.hardness == "all":
            factor = plain if rules.hardness == "hard_negatives" else weighted
        elif rules.hardness == "in_batch":
            factor = torch.where(own, plain, weighted)
        else:
            factor = torch.where(own, weighted, plain)
        z = torch.mul(similarity, factor, out=out[: len(similarity)])
        if rules.margin is not None:
            limit = self.column_limit if columns else (self.positive[strip] + rules.margin)[:, None]
            suspect = similarity > limit
            z.masked_fill_(suspect if own is None else suspect & ~own, -INF)
        if rules.query_ids is not None and rules.target_ids is not None:
            z.masked_fill_(rules.query_ids[strip, None] == rules.target_ids, -INF)
        return z.scatter_(1, labels[:, None], -INF)


def _finite(shift: Tensor) -> Tensor:
    """0 in place of -inf, so that (-inf) - shift stays -inf where nothing is summed."""
    return shift.masked_fill(shift == -INF, 0.0)


def _row_exponentials(strips: _Strips, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In place ``e = exp(z - shift)``, its row sums (rows, 1), and the shift."""
    shift = z.new_zeros(()) if strips.bounded else _finite(z.amax(1, keepdim=True))
    e = (z if strips.bounded else z.sub_(shift)).exp_()
    return e, e.sum(1, keepdim=True), shift


def forward(
    query: Tensor, target: Tensor, logit_scale: Tensor, rules: Rules
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positive logits (N,), n (N,), n' (M,) or (0,), and the kept similarities (N, M) or (0, 0).

    All in the accumulation dtype. ``logit_scale`` is 0-d.
    """
    m = len(target)
    shape = kept_shape(query, target) if rules.symmetric else (0, 0)
    strips = _Strips(query, target, logit_scale, rules, kept=query.new_empty((0, 0)))
    kept = query.new_empty(shape, dtype=strips.dtype)
    buffer, work = (strips.buffer() if not kept.numel() else kept), strips.buffer()
    rows = query.new_empty(len(query), dtype=strips.dtype)
    column_max = rows.new_full((m,), 0.0 if strips.bounded else -INF)
    column_sum = rows.new_zeros(m)
    for strip in strips:
        similarity = strips.similarity(strip, kept[strip] if kept.numel() else buffer)
        e, total, shift = _row_exponentials(
            strips, strips.logits(strip, similarity, work, columns=False)
        )
        rows[strip] = (shift + total.log()).squeeze(1)
        if not rules.symmetric:
            continue
        if strips.bounded and rules.shared_logits:
            column_sum += e.sum(0)
            continue
        z = strips.logits(strip, similarity, work, columns=True)
        if strips.bounded:
            column_sum += z.exp_().sum(0)
            continue
        new_max = torch.maximum(column_max, z.amax(0))
        shift = _finite(new_max)
        column_sum *= (column_max - shift).exp()
        column_sum += z.sub_(shift).exp_().sum(0)
        column_max = new_max
    columns = _finite(column_max) + column_sum.log()
    return (
        strips.positive * strips.scale,
        rows,
        columns if rules.symmetric else rows.new_empty(0),
        kept,
    )


def backward(
    d_positive: Tensor,
    d_query_lse: Tensor,
    d_target_lse: Tensor,
    query: Tensor,
    target: Tensor,
    logit_scale: Tensor,
    query_lse: Tensor,
    target_lse: Tensor,
    kept: Tensor,
    rules: Rules,
) -> tuple[Tensor, Tensor]:
    """dQ (N, D) and dT (M, D) in the inputs' dtypes, given those of ``forward``'s outputs."""
    strips = _Strips(query, target, logit_scale, rules, kept)
    gradients = _Gradients(strips)
    buffer = strips.buffer() if not kept.numel() else kept
    work, other = strips.buffer(), strips.buffer()
    row_shift, row_factor = _finite(query_lse), d_query_lse * strips.scale
    column_shift, column_factor = _finite(target_lse), d_target_lse * strips.scale
    # Where one exponential serves both directions, dS = exp(z) (row factor + column factor).
    together = strips.bounded and rules.shared_logits and rules.symmetric
    if together:
        row_factor = row_factor * torch.exp(-row_shift)
        column_factor = column_factor * torch.exp(-column_shift)
    for strip in strips:
        similarity = strips.similarity(strip, buffer)
        z = strips.logits(strip, similarity, work, columns=False)
        factor = row_factor[strip, None]
        if together:
            weights = torch.add(factor, column_factor, out=other[: len(z)])
            ds = z.exp_().mul_(weights)
        else:
            ds = z.sub_(row_shift[strip, None]).exp_().mul_(factor)
            if rules.symmetric:
                z = strips.logits(strip, similarity, other, columns=True)
                ds += z.sub_(column_shift).exp_().mul_(column_factor)
        gradients.add(strip, ds, d_positive[strip] * strips.scale)
    return gradients.result()


def one_direction(
    query: Tensor, target: Tensor, logit_scale: Tensor, rules: Rules
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row loss (N,) of the query direction, with dQ and dT of its sum over the rows."""
    strips = _Strips(query, target, logit_scale, rules, kept=query.new_empty((0, 0)))
    gradients = _Gradients(strips)
    buffer, work = strips.buffer(), strips.buffer()
    loss = query.new_empty(len(query), dtype=strips.dtype)
    for strip in strips:
        similarity = strips.similarity(strip, buffer)
        e, total, shift = _row_exponentials(
            strips, strips.logits(strip, similarity, work, columns=False)
        )
        gap = strips.positive[strip] * strips.scale - (shift + total.log()).squeeze(1)
        loss[strip] = -logsigmoid(gap)
        slope = torch.sigmoid(-gap) * strips.scale
        factor = slope / total.squeeze(1).masked_fill(total.squeeze(1) == 0, 1.0)
        gradients.add(strip, e.mul_(factor[:, None]), -slope)
    return (loss, *gradients.result())


class _Gradients:
    """dQ and dT, accumulated from strips of dS in the accumulation dtype."""

    def __init__(self, strips: _Strips) -> None:
        self.strips = strips
        self.d_query = torch.empty_like(strips.query, memory_format=torch.contiguous_format)
        self.d_target = strips.target.new_zeros(strips.target.shape)

    def add(self, strip: slice, ds: Tensor, d_positive: Tensor) -> None:
        """Complete ``ds`` (rows, M) with the positives' gradient, then run both GEMMs."""
        ds.scatter_(1, self.strips.rules.labels[strip, None], d_positive[:, None])
        if self.d_query.dtype == ds.dtype:
            torch.mm(ds, self.strips.target, out=self.d_query[strip])
        else:
            self.d_query[strip] = ds @ self.strips.target
        self.d_target.addmm_(ds.T, self.strips.queries(strip))

    def result(self) -> tuple[Tensor, Tensor]:
        return self.d_query, self.d_target.to(self.strips.query.dtype)
