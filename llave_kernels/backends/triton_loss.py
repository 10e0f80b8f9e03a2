"""The Triton kernel of the loss itself. ``triton_kernels`` makes the log-sum-exps that it reads."""

from __future__ import annotations

import triton
import triton.language as tl

from llave_kernels.backends import products
from llave_kernels.backends.triton_tile import INF, LOG2E, exp, labels, load_scale, log1p

LN2_HIGH = tl.constexpr(0.693145751953125)  # log(2) = LN2_HIGH + LN2_LOW, the first with few bits
LN2_LOW = tl.constexpr(1.42860677e-06)
LARGEST = tl.constexpr(products.LARGEST)
SMALLEST = tl.constexpr(2.0**products.SMALLEST)


@triton.jit
def _softplus_and_slope(x):
    """``log(1 + exp(x))`` and its derivative. NaN stays NaN."""
    b_size = tl.abs(x)
    b_size = tl.where(b_size > 200.0, 200.0, b_size)  # exp(-200) is 0 in float32
    # exp(-size) = 2^-whole exp(-rest). Rounding size * LOG2E would cost its last digits.
    b_whole = tl.floor(b_size * LOG2E)
    b_rest = (b_size - b_whole * LN2_HIGH) - b_whole * LN2_LOW
    b = tl.exp2(-b_whole) * exp(-b_rest)
    b_slope = tl.where(x < 0, b, 1.0) / (1.0 + b)
    return tl.where(x > 0, x, 0.0) + log1p(b), b_slope


@triton.jit
def _largest(x):
    """The largest size of what is finite in a block."""
    b = tl.abs(x)
    return tl.max(tl.where(b < INF, b, 0.0), 0)


@triton.jit(do_not_specialize=["N", "M"])
def loss_kernel(
    p_similarity, p_scale, p_label, p_query_bias, p_target_bias, p_lse, p_row_sum, LENGTH, weight,
    N, M,
    SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of all rows and its slopes, by one program, which sums in a fixed order.

    ``p_lse`` (7, LENGTH): the first row takes the positives' logits. The next two hold the
    log-sum-exps of rows and columns. Three rows take the slopes of these three. The last takes the
    gain that brings dS into the range of float16 (``products.gain``). ``p_row_sum`` () takes the
    weighted sum of the rows' losses.
    """
    p_positive = p_lse
    p_row = p_lse + LENGTH
    p_column = p_lse + 2 * LENGTH
    p_d_positive = p_lse + 3 * LENGTH
    p_d_row = p_lse + 4 * LENGTH
    p_d_column = p_lse + 5 * LENGTH
    p_gain = p_lse + 6 * LENGTH
    scale = load_scale(p_scale)
    o = tl.arange(0, BLOCK)
    if SYMMETRIC:
        for start in range(0, M, BLOCK):
            tl.store(p_d_column + start + o, tl.zeros((BLOCK,), tl.float32), mask=start + o < M)
        tl.debug_barrier()  # the zeros are written before the slopes
    b_loss = tl.zeros((BLOCK,), tl.float32)
    top_positive, top_row, top_column = 0.0, 0.0, 0.0
    for start in range(0, N, BLOCK):
        o_m = start + o
        m_m = o_m < N
        b_positive = tl.load(p_similarity + o_m, mask=m_m, other=0.0) * scale
        b_label = labels(p_label, o_m, N, M)
        m_label = m_m & (b_label >= 0) & (b_label < M)
        if p_query_bias is not None:
            b_positive += tl.load(p_query_bias + o_m, mask=m_m, other=0.0)
        if p_target_bias is not None:
            b_positive += tl.load(p_target_bias + b_label, mask=m_label, other=0.0)
        b_row = tl.load(p_row + o_m, mask=m_m, other=-INF) - b_positive
        b_term, b_slope = _softplus_and_slope(b_row)
        if SYMMETRIC:
            b_column = tl.load(p_column + b_label, mask=m_label, other=-INF) - b_positive
            b_term_column, b_slope_column = _softplus_and_slope(b_column)
            b_term = 0.5 * (b_term + b_term_column)
            b_slope *= 0.5 * weight
            b_slope_column *= 0.5 * weight
            tl.store(p_d_column + b_label, b_slope_column, mask=m_label)
            top_column = tl.maximum(top_column, _largest(b_slope_column))
            b_d_positive = -(b_slope + b_slope_column)
        else:
            b_slope *= weight
            b_d_positive = -b_slope
        b_loss += tl.where(m_m, b_term, 0.0)
        top_row = tl.maximum(top_row, _largest(b_slope))
        top_positive = tl.maximum(top_positive, _largest(b_d_positive))
        tl.store(p_positive + o_m, b_positive, mask=m_m)
        tl.store(p_d_positive + o_m, b_d_positive, mask=m_m)
        tl.store(p_d_row + o_m, b_slope, mask=m_m)
    bound = scale * (top_positive + top_row + top_column)
    bound = tl.minimum(tl.maximum(bound, SMALLEST), 1 / SMALLEST)
    tl.store(p_row_sum, weight * tl.sum(b_loss, 0))
    tl.store(p_gain, tl.exp2(tl.floor(-tl.log2(bound) + LARGEST)))
