"""Strips of the similarity matrix of one call, for the ``torch`` backend."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from llave_kernels.backends import positives
from llave_kernels.backends.products import multiplies_halves, product, rounding
from llave_kernels.precision import accumulation_dtype
from llave_kernels.rules import ELSEWHERE, WITHIN, Rules, biases_of, inside

STRIP_BUDGET = 8 << 20  # bytes of one strip; up to two are alive
NOBODY = -3  # replaces an owner that is no column, so that it does not equal ELSEWHERE
INF = math.inf
# Up to this |z|, exponentials and sums of 2^30 of them are normal float32 numbers.
SAFE_EXPONENT = 66.0


def rounds_gradients(query: Tensor) -> bool:
    """Whether dS is rounded to the inputs' half precision. Its products then use tensor cores."""
    return query.dtype.itemsize == 2 and multiplies_halves(query.device.type)


def margin_limit(query: Tensor, target: Tensor, labels: Tensor | None, margin: float) -> Tensor:
    """``positives.margin_limit`` for this backend's products."""
    return positives.margin_limit(query, target, labels, margin, rounding=rounding(query))


def strip_rows(n: int, m: int, dtype: torch.dtype) -> int:
    """Rows of a strip. Similarities are float32, or float64 for float64 inputs."""
    fit = STRIP_BUDGET // (m * accumulation_dtype(dtype).itemsize)
    return clamp(fit, 1, n)


def clamp(x: int, low: int, high: int) -> int:
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
        bound = bound + sum(x.abs().max() for x in biases_of(self.rules) if x is not None)
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
