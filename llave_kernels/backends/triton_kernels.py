"""The Triton kernels.

Names: ``p_`` pointer, ``b_`` block of values, ``o_`` offsets, ``m_`` mask, ``i_`` index.

``forward_kernel``   makes one tiled pass over S = Q T^T. Each tile is masked, weighted and reduced
                     in registers to a running (max, sum) per row and per column
``combine_kernel``   turns partial (max, sum) pairs into log-sum-exps
``strip_kernel``     computes a tile again and writes its gradient dS to a workspace, for the
                     gradient GEMMs
``positive_kernel``  computes the positives' similarities s_{i, l_i}

An argument is None if the call does not use its rule, direction or factor. The kernel is then
compiled without it.

Logits keep base e until the maximum is subtracted. Changing the base first would round large ones.

Rows of inputs start at multiples of 16 bytes and are as long. The width ``D`` and the strides
``s_q`` and ``s_t`` count units of 16 bytes. From the factor the compiler knows that a load may take
16 bytes. By itself Triton only finds out whether a number is a multiple of 16.

Sizes are ``do_not_specialize``. Otherwise a batch of another size could compile again, because it
is or is not a multiple of 16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))
GROUP = tl.constexpr(8)  # row blocks that run together and share target blocks in the L2 cache
# These replace a label and an owner that are no column. They equal no column and not each other.
NOWHERE = tl.constexpr(-1)
NOBODY = tl.constexpr(-2)


class Pairs(NamedTuple):
    """Which pairs count and how they are weighted, as pointers and numbers made from ``Rules``.

    A kernel takes them as flat arguments in this order. Its helpers take this tuple.
    """

    label: Any  # (N,), or None: row i's positive is column i
    owner: Any  # (M,), or None: every column is its own owner
    query_id: Any  # (N,)
    target_id: Any  # (M,)
    row_limit: Any  # (N,) the similarity above which a negative of the row is left out
    column_limit: Any  # (M,) the same in the target -> query direction
    alpha: Any
    target_alpha: Any  # None: the same as alpha


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def _scale(p_scale):
    """The logit scale, from a pointer or as the number that it is."""
    scale = tl.to_tensor(p_scale)
    if scale.dtype.is_ptr():
        scale = tl.load(scale)
    return scale


@triton.jit
def _finite(x):
    """0 in place of -inf, so that (-inf) - x stays -inf where nothing is summed."""
    return tl.where(x == -INF, 0.0, x)


@triton.jit
def _columns(p, o, m, M, OUTSIDE: tl.constexpr):
    """The int64 columns at ``p + o``, as int32. ``OUTSIDE`` replaces those that do not exist."""
    b = tl.load(p + o, mask=m, other=-1)
    return tl.where((b >= 0) & (b < M), b, OUTSIDE).to(tl.int32)


@triton.jit
def _similarity(
    p_q, p_t, o_m, o_n, N, M, D, s_q, s_t,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(BM, BN) float32 similarities. Those beyond the edges of the matrix are arbitrary."""
    BM: tl.constexpr = TILE.bm  # triton before 3.7 takes no field as a part of a shape
    BN: tl.constexpr = TILE.bn
    UNIT: tl.constexpr = 128 // p_q.dtype.element_ty.primitive_bitwidth
    b_s = tl.zeros((BM, BN), tl.float32)
    # Rows and columns beyond the edges read the last one again. Masks on these loads would take
    # registers through the whole epilogue.
    p_rows = p_q + tl.minimum(o_m, N - 1).to(tl.int64)[:, None] * (tl.cast(s_q, tl.int64) * UNIT)
    p_columns = p_t + tl.minimum(o_n, M - 1).to(tl.int64)[None, :] * (tl.cast(s_t, tl.int64) * UNIT)
    for k in range(0, D * UNIT, TILE.bk):
        o_k = k + tl.arange(0, TILE.bk)
        m_k = o_k < D * UNIT
        b_q = tl.load(p_rows + o_k[None, :], mask=m_k[None, :], other=0.0)
        b_t = tl.load(p_columns + o_k[:, None], mask=m_k[:, None], other=0.0)
        b_s = tl.dot(b_q, b_t, b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def _labels(p_label, o_m, N, M):
    """The columns of the rows' positives. ``NOWHERE`` for a label outside.

    A row beyond the edge has any column.
    """
    b_label = o_m
    if p_label is not None:
        b_label = _columns(p_label, o_m, o_m < N, M, NOWHERE)
    return b_label


@triton.jit
def _factor(own, pairs, scale, alpha, HARDNESS: tl.constexpr):
    """The factor from similarities to logits. Where no row owns a negative, it is a number."""
    if HARDNESS == "all":
        factor = scale + alpha
    elif pairs.owner is None:
        factor = scale + alpha if HARDNESS == "in_batch" else scale
    elif HARDNESS == "in_batch":
        factor = tl.where(own, scale, scale + alpha)
    else:
        factor = tl.where(own, scale + alpha, scale)
    return factor


@triton.jit
def _logits(b_s, b_label, pairs, scale, o_m, o_n, N, M, HARDNESS: tl.constexpr):
    """(BM, BN) logits of rows and of columns, -inf where a pair does not count as a negative."""
    m_m, m_n = o_m < N, o_n < M
    positive = b_label[:, None] == o_n[None, :]
    if pairs.owner is None:
        own = positive
    else:
        own = b_label[:, None] == _columns(pairs.owner, o_n, m_n, M, NOBODY)[None, :]
    counts = m_m[:, None] & m_n[None, :] & ~positive
    if pairs.query_id is not None:
        b_query_id = tl.load(pairs.query_id + o_m, mask=m_m, other=0)
        b_target_id = tl.load(pairs.target_id + o_n, mask=m_n, other=0)
        counts = counts & (b_query_id[:, None] != b_target_id[None, :])
    in_row, in_column = counts, counts
    if pairs.row_limit is not None:
        b_limit = tl.load(pairs.row_limit + o_m, mask=m_m, other=INF)
        in_row = counts & (own | ~(b_s > b_limit[:, None]))
    if pairs.column_limit is not None:
        b_limit = tl.load(pairs.column_limit + o_n, mask=m_n, other=INF)
        in_column = counts & (own | ~(b_s > b_limit[None, :]))
    b_z = b_s * _factor(own, pairs, scale, pairs.alpha, HARDNESS)
    b_row = tl.where(in_row, b_z, -INF)
    if pairs.target_alpha is not None:
        b_z = b_s * _factor(own, pairs, scale, pairs.target_alpha, HARDNESS)
    return b_row, tl.where(in_column, b_z, -INF)


@triton.jit
def _running(b_max, b_sum, b_tile_max, b_tile_sum):
    """Merge two (max, sum) pairs."""
    b_new = tl.maximum(b_max, b_tile_max)
    b_shift = _finite(b_new)
    return b_new, b_sum * _exp(b_max - b_shift) + b_tile_sum * _exp(b_tile_max - b_shift)


@triton.jit(do_not_specialize=["N", "M", "D", "s_q", "s_t"])
def positive_kernel(
    p_q, p_t, p_label, p_similarity, N, M, D, s_q, s_t,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    b_label = _labels(p_label, o_m, N, M)
    m_label = (o_m < N) & (b_label >= 0) & (b_label < M)
    b_sum = tl.zeros((BM,), tl.float32)
    UNIT: tl.constexpr = 128 // p_q.dtype.element_ty.primitive_bitwidth
    p_rows = p_q + o_m.to(tl.int64)[:, None] * (tl.cast(s_q, tl.int64) * UNIT)
    p_columns = p_t + b_label.to(tl.int64)[:, None] * (tl.cast(s_t, tl.int64) * UNIT)
    for k in range(0, D * UNIT, BK):
        o_k = k + tl.arange(0, BK)
        m = m_label[:, None] & (o_k < D * UNIT)[None, :]
        b_q = tl.load(p_rows + o_k[None, :], mask=m, other=0.0)
        b_t = tl.load(p_columns + o_k[None, :], mask=m, other=0.0)
        b_sum += tl.sum(b_q.to(tl.float32) * b_t.to(tl.float32), 1)
    tl.store(p_similarity + o_m, tl.where(m_label, b_sum, float("nan")), mask=o_m < N)


@triton.jit(do_not_specialize=["N", "M", "D", "s_q", "s_t", "ROWS", "COLUMNS"])
def forward_kernel(
    p_q, p_t, p_scale,
    p_label, p_owner, p_query_id, p_target_id, p_row_limit, p_column_limit, alpha, target_alpha,
    p_row_max, p_row_sum, p_column_max, p_column_sum,
    N, M, D, s_q, s_t, ROWS, COLUMNS,
    HARDNESS: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program owns ROWS x COLUMNS tiles.

    The (max, sum) of a row stays in registers along a line of tiles. The (max, sum) of a column
    goes to the program's own line of the partial buffer. The program reads it again for its next
    line of tiles.
    """
    pairs = Pairs(
        p_label, p_owner, p_query_id, p_target_id, p_row_limit, p_column_limit, alpha, target_alpha
    )
    BM: tl.constexpr = TILE.bm
    BN: tl.constexpr = TILE.bn
    i_rows, i_columns = tl.program_id(0), tl.program_id(1)
    scale = _scale(p_scale)
    for r in range(0, ROWS):
        o_m = (i_rows * ROWS + r) * BM + tl.arange(0, BM)
        m_m = o_m < N
        b_label = _labels(pairs.label, o_m, N, M)
        b_row_max = tl.full((BM,), -INF, tl.float32)
        b_row_sum = tl.where(b_label == NOWHERE, float("nan"), 0.0)
        for c in range(0, COLUMNS):
            o_n = (i_columns * COLUMNS + c) * BN + tl.arange(0, BN)
            m_n = o_n < M
            b_s = _similarity(p_q, p_t, o_m, o_n, N, M, D, s_q, s_t, TILE, PRECISION)
            b_z, b_z_column = _logits(b_s, b_label, pairs, scale, o_m, o_n, N, M, HARDNESS)
            b_max = tl.max(b_z, 1)
            b_sum = tl.sum(_exp(b_z - _finite(b_max)[:, None]), 1)
            b_row_max, b_row_sum = _running(b_row_max, b_row_sum, b_max, b_sum)
            if p_column_max is not None:
                b_max = tl.max(b_z_column, 0)
                b_sum = tl.sum(_exp(b_z_column - _finite(b_max)[None, :]), 0)
                o_partial = i_rows.to(tl.int64) * M + o_n
                seen = m_n & (r > 0)
                b_before = tl.load(p_column_max + o_partial, mask=seen, other=-INF)
                b_total = tl.load(p_column_sum + o_partial, mask=seen, other=0.0)
                b_max, b_sum = _running(b_before, b_total, b_max, b_sum)
                tl.debug_barrier()  # every thread has read before any writes
                tl.store(p_column_max + o_partial, b_max, mask=m_n)
                tl.store(p_column_sum + o_partial, b_sum, mask=m_n)
                tl.debug_barrier()  # written before the next line of tiles reads
        o_partial = i_columns.to(tl.int64) * N + o_m
        tl.store(p_row_max + o_partial, b_row_max, mask=m_m)
        tl.store(p_row_sum + o_partial, b_row_sum, mask=m_m)


@triton.jit(do_not_specialize=["PARTS", "LENGTH"])
def combine_kernel(p_max, p_sum, p_lse, PARTS, LENGTH, BLOCK: tl.constexpr):
    """(PARTS, LENGTH) partial (max, sum) to (LENGTH,) log-sum-exps, in a fixed order."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < LENGTH
    b_max = tl.full((BLOCK,), -INF, tl.float32)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, PARTS):
        o_part = tl.cast(part, tl.int64) * LENGTH + o
        b_max, b_sum = _running(
            b_max,
            b_sum,
            tl.load(p_max + o_part, mask=m, other=-INF),
            tl.load(p_sum + o_part, mask=m, other=0.0),
        )
    tl.store(p_lse + o, _finite(b_max) + tl.log(b_sum), mask=m)


@triton.jit(do_not_specialize=["START", "STOP", "M", "D", "s_q", "s_t"])
def strip_kernel(
    p_q, p_t, p_scale,
    p_label, p_owner, p_query_id, p_target_id, p_row_limit, p_column_limit, alpha, target_alpha,
    p_d_positive, p_query_lse, p_d_query_lse, p_target_lse, p_d_target_lse, p_gain, p_ds,
    START, STOP, M, D, s_q, s_t, s_ds,
    HARDNESS: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dS of rows START to STOP, times a gain (a power of two that keeps float16 in range).

    Stores go to the end of the workspace's rows. Their width ``s_ds`` is a multiple of 16, so the
    stores are wide for every M.
    """
    pairs = Pairs(
        p_label, p_owner, p_query_id, p_target_id, p_row_limit, p_column_limit, alpha, target_alpha
    )
    BM: tl.constexpr = TILE.bm
    BN: tl.constexpr = TILE.bn
    n_m, n_n = tl.cdiv(STOP - START, BM), tl.cdiv(M, BN)
    per_group = GROUP * n_n
    i_first = tl.program_id(0) // per_group * GROUP
    n_rows = tl.minimum(n_m - i_first, GROUP)
    i_m = i_first + tl.program_id(0) % per_group % n_rows
    i_n = tl.program_id(0) % per_group // n_rows
    o_m = START + i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    m_m, m_n = o_m < STOP, o_n < M
    scale = _scale(p_scale)
    gain = scale
    if p_gain is not None:
        gain = tl.load(p_gain) * scale
    b_label = _labels(pairs.label, o_m, STOP, M)
    b_s = _similarity(p_q, p_t, o_m, o_n, STOP, M, D, s_q, s_t, TILE, PRECISION)
    b_z, b_z_column = _logits(b_s, b_label, pairs, scale, o_m, o_n, STOP, M, HARDNESS)
    b_lse = _finite(tl.load(p_query_lse + o_m, mask=m_m, other=0.0))
    b_d = tl.load(p_d_query_lse + o_m, mask=m_m, other=0.0)
    b_ds = b_d[:, None] * _exp(b_z - b_lse[:, None])
    if p_target_lse is not None:
        b_lse = _finite(tl.load(p_target_lse + o_n, mask=m_n, other=0.0))
        b_d = tl.load(p_d_target_lse + o_n, mask=m_n, other=0.0)
        b_ds += b_d[None, :] * _exp(b_z_column - b_lse[None, :])
    b_d = tl.load(p_d_positive + o_m, mask=m_m, other=0.0)
    b_ds = tl.where(b_label[:, None] == o_n[None, :], b_d[:, None], b_ds) * gain
    p = p_ds + (o_m - START).to(tl.int64)[:, None] * s_ds + o_n[None, :]
    tl.store(p, b_ds.to(p_ds.dtype.element_ty), mask=m_m[:, None] & (o_n < s_ds)[None, :])
