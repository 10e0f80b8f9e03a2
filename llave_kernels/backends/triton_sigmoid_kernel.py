"""The Triton kernel of the sigmoid loss. Names are as in ``triton_kernels``."""

from __future__ import annotations

import triton
import triton.language as tl

from llave_kernels.backends.triton_tile import (
    INF,
    LOG2E,
    NOWHERE,
    labels,
    load_scale,
    log1p,
    similarity,
)


@triton.jit(do_not_specialize=["START", "STOP", "M", "D", "s_q", "s_t", "TILES"])
def sigmoid_kernel(
    p_q, p_t, p_scale, p_bias, p_label, p_query_id, p_target_id, p_weight, p_gain,
    p_ds, p_loss, p_sums,
    START, STOP, M, D, s_q, s_t, s_ds, TILES,
    PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The loss of rows START to STOP, and dS times a gain unless ``p_ds`` is None.

    One program owns TILES tiles, down a column of tiles and on to the next. ``p_loss`` takes the
    sum of each row over each column of tiles, (columns of tiles, rows). ``p_sums`` takes each
    program's parts of the gradients of scale and bias, (programs, 2). dS is stored as in
    ``strip_kernel``. ``p_weight``, if given, has the upstream gradients of the rows' losses.
    """
    BM: tl.constexpr = TILE.bm
    BN: tl.constexpr = TILE.bn
    n_m = tl.cdiv(STOP - START, BM)
    first = tl.program_id(0) * TILES
    last = tl.minimum(first + TILES, n_m * tl.cdiv(M, BN))
    scale, bias = load_scale(p_scale), load_scale(p_bias)
    gain = scale
    if p_gain is not None:
        gain = tl.load(p_gain) * scale
    b_scale_sum = tl.zeros((BM,), tl.float32)
    b_bias_sum = tl.zeros((BM,), tl.float32)
    for i in range(first, last):
        o_n = i // n_m * BN + tl.arange(0, BN)
        o_m = START + i % n_m * BM + tl.arange(0, BM)
        m_m, m_n = o_m < STOP, o_n < M
        b_label = labels(p_label, o_m, STOP, M)
        b_s = similarity(p_q, p_t, o_m, o_n, STOP, M, D, s_q, s_t, TILE, PRECISION)
        # The loss of a pair is softplus(b_z). Its derivative is sigmoid(b_z), with a sign.
        positive = b_label[:, None] == o_n[None, :]
        counts = m_m[:, None] & m_n[None, :]
        if p_query_id is not None:
            b_query_id = tl.load(p_query_id + o_m, mask=m_m, other=0)
            b_target_id = tl.load(p_target_id + o_n, mask=m_n, other=0)
            counts = counts & (positive | (b_query_id[:, None] != b_target_id[None, :]))
        b_z = b_s * scale + bias
        b_z = tl.where(counts, tl.where(positive, -b_z, b_z), -INF)
        b_e = tl.exp2(-tl.abs(b_z) * LOG2E)
        b_loss = tl.sum(tl.where(b_z > 0, b_z, 0.0) + log1p(b_e), 1)
        b_loss = tl.where(b_label == NOWHERE, float("nan"), b_loss)
        p_part = p_loss + tl.cast(i // n_m, tl.int64) * (STOP - START) + (o_m - START)
        tl.store(p_part, b_loss, mask=m_m)
        if p_ds is not None:
            b_dz = tl.where(b_z < 0, b_e, 1.0) / (1.0 + b_e)
            b_dz = tl.where(positive, -b_dz, b_dz)
            b_scale_row = tl.sum(tl.where(counts, b_dz * b_s, 0.0), 1)
            b_bias_row = tl.sum(b_dz, 1)
            b_factor = tl.zeros((BM,), tl.float32) + gain
            if p_weight is not None:
                b_weight = tl.load(p_weight + o_m, mask=m_m, other=0.0)
                b_scale_row *= b_weight
                b_bias_row *= b_weight
                b_factor *= b_weight
            b_scale_sum += b_scale_row
            b_bias_sum += b_bias_row
            b_ds = b_dz * b_factor[:, None]
            p = p_ds + (o_m - START).to(tl.int64)[:, None] * s_ds + o_n[None, :]
            tl.store(p, b_ds.to(p_ds.dtype.element_ty), mask=m_m[:, None] & (o_n < s_ds)[None, :])
    if p_ds is not None:
        tl.store(p_sums + 2 * tl.program_id(0), tl.sum(b_scale_sum, 0))
        tl.store(p_sums + 2 * tl.program_id(0) + 1, tl.sum(b_bias_sum, 0))
