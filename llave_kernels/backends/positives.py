"""The positives' similarities, and where a margin leaves negatives out.

A margin compares each similarity with its positive's. A matrix product rounds otherwise than the
sum of one pair's terms, and two equal columns of it may differ in the last bit: without an
allowance, duplicates of the positive would be left out at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from llave_kernels.precision import accumulation_dtype
from llave_kernels.rules import inside

AT_A_TIME = 1 << 21  # numbers of each side: 8 MiB of float32
PARTS = 8  # of a sum, after each of which its size is looked at
TF32_BITS = 13  # of a float32's mantissa that TF32 lacks


def positive_similarity(query: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
    """(N,) ``s_{i, l_i}``, float32 or float64, without a gradient; NaN where a label is outside."""
    return _of_pairs(torch.linalg.vecdot, query, target, labels)


def margin_limit(
    query: Tensor,
    target: Tensor,
    labels: Tensor | None,
    margin: float,
    multiplicands: Callable[[Tensor], Tensor] | None = None,
    rounding: float = 0.0,
) -> Tensor:
    """(N,) the similarity above which the margin leaves a negative out; NaN for a label outside.

    ``s_{i, l_i} + margin``, the margin at least as far from 0 as an allowance for the rounding of
    sums in float32, or float64. Of a pair's terms ``q_k t_k`` let ``a`` be the sum of sizes;
    ``r`` their norm and ``c`` the largest of the partial sums after each eighth of them, both over
    ``a``. The allowance is ``eps a (2 sqrt(D (r^2 + c^2)) + D c^2 / 4)``: errors that average out,
    and errors that add up where the partial sums grow steadily.

    Args:
        multiplicands: what the products make of float32 before they multiply.
        rounding: relative error of a term where that is not known.
    """
    d = query.shape[1]
    numbers = torch.finfo(accumulation_dtype(query.dtype))

    def limit(q: Tensor, t: Tensor) -> Tensor:
        terms = q * t if multiplicands is None else multiplicands(q) * multiplicands(t)
        size = terms.abs().sum(1)
        shares = terms / size.clamp(min=numbers.tiny)[:, None]
        parts = (part.sum(1) for part in shares.tensor_split(PARTS, dim=1))
        steady = torch.stack(list(accumulate(parts))).abs().amax(0).square()
        average = 2 * (d * (shares.square().sum(1) + steady)).sqrt()
        allowance = (numbers.eps * (average + d * steady / 4) + rounding) * size
        pushed = allowance.clamp(min=margin) if margin >= 0 else (-allowance).clamp(max=margin)
        return terms.sum(1) + pushed

    return _of_pairs(limit, query, target, labels)


def nearest_tf32(x: Tensor) -> Tensor:
    """float32 rounded to TF32, to even where two are as near."""
    bits = x.view(torch.int32)
    half = (1 << TF32_BITS - 1) - 1 + (bits >> TF32_BITS & 1)
    return torch.where(x.isfinite(), truncated_tf32((bits + half).view(torch.float32)), x)


def truncated_tf32(x: Tensor) -> Tensor:
    """float32 without the bits that TF32 lacks."""
    bits = x.view(torch.int32)
    return (bits >> TF32_BITS << TF32_BITS).view(torch.float32)


def _of_pairs(
    function: Callable[[Tensor, Tensor], Tensor],
    query: Tensor,
    target: Tensor,
    labels: Tensor | None,
) -> Tensor:
    """(N,) a function of rows and their positives, which get some rows of both at a time, in the
    accumulation dtype. NaN where a label is outside."""
    dtype = accumulation_dtype(query.dtype)
    query, target = query.detach(), target.detach()
    known, safe = (None, None) if labels is None else inside(labels, len(target))
    step = max(1, AT_A_TIME // query.shape[1])
    values = []
    for start in range(0, len(query), step):
        rows = slice(start, min(start + step, len(query)))
        positives = target[rows if safe is None else safe[rows]]
        values.append(function(query[rows].to(dtype), positives.to(dtype)))
    found = values[0] if len(values) == 1 else torch.cat(values)
    return found if known is None else torch.where(known, found, math.nan)
