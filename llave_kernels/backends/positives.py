"""The similarities of positives, and the limits above which a margin leaves negatives out.

A margin compares each similarity with the positive's. A matrix product rounds differently from the
sum of one pair's terms. Even two equal columns may differ in the last bit. Without an allowance,
duplicates of the positive would be left out at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from llave_kernels.precision import accumulation_dtype
from llave_kernels.rules import inside

AT_A_TIME = 1 << 21  # numbers of each side at a time: 8 MiB of float32
PARTS = 8  # a sum's terms are split into this many parts
TF32_BITS = 13  # mantissa bits of float32 that TF32 lacks


def positive_similarity(query: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
    """(N,) ``s_{i, l_i}``, float32 or float64, without a gradient. NaN for a label outside."""
    return _of_pairs(torch.linalg.vecdot, query, target, labels)


def margin_limit(
    query: Tensor,
    target: Tensor,
    labels: Tensor | None,
    margin: float,
    multiplicands: Callable[[Tensor], Tensor] | None = None,
    rounding: float = 0.0,
) -> Tensor:
    """(N,) the similarity above which the margin leaves a negative out. NaN for a label outside.

    It is ``s_{i, l_i} + margin``. The margin is kept at least an allowance away from 0. The
    allowance covers the rounding of sums in float32, or float64 for float64 inputs.

    It depends on the positive pair's terms ``q_k t_k``. ``a`` is the sum of their absolute values.
    ``r`` is their norm over ``a``. ``c`` is the largest absolute partial sum over ``a``, taken
    after each eighth of the terms. The allowance is
    ``eps a (2 sqrt(D (r^2 + c^2)) + D c^2 / 4)``. The first part is for errors that average out.
    The second is for errors that add up, where the partial sums grow steadily.

    Args:
        multiplicands: how the products round float32 before they multiply.
        rounding: relative error of a term, if that rounding is not known.
    """
    d = query.shape[1]
    numbers = torch.finfo(accumulation_dtype(query.dtype))

    def limit(q: Tensor, t: Tensor) -> Tensor:
        terms = q * t if multiplicands is None else multiplicands(q) * multiplicands(t)
        size = terms.abs().sum(1)
        shares = terms / size.clamp(min=numbers.tiny)[:, None]
        # A list, because torch 2.8 cannot trace accumulate over a generator.
        parts = [part.sum(1) for part in shares.tensor_split(PARTS, dim=1)]
        steady = torch.stack(list(accumulate(parts))).abs().amax(0).square()
        average = 2 * (d * (shares.square().sum(1) + steady)).sqrt()
        allowance = (numbers.eps * (average + d * steady / 4) + rounding) * size
        pushed = allowance.clamp(min=margin) if margin >= 0 else (-allowance).clamp(max=margin)
        return terms.sum(1) + pushed

    return _of_pairs(limit, query, target, labels)


def nearest_tf32(x: Tensor) -> Tensor:
    """float32 rounded to the nearest TF32, ties to even."""
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
    """(N,) values of a function of rows and their positives. NaN for a label outside.

    The function gets some rows of both at a time, in the accumulation dtype.
    """
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
