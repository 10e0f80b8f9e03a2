"""The Triton kernels.

Names: ``p_`` pointer, ``b_`` block of values, ``o_`` offsets, ``m_`` mask, ``i_`` index.

``forward_kernel``   makes one tiled pass over S = Q T^T. Each tile is masked, weighted and reduced
                     in registers to a running (max, sum) per row and per column
``combine_kernel``   turns partial (max, sum) pairs into log-sum-exps
``strip_kernel``     computes a tile again, or reads what the forward kept, and writes its gradient
                     dS to a workspace, for the gradient GEMMs
``positive_kernel``  computes the positives' similarities s_{i, l_i}

An argument is None if the call does not use its rule, direction or factor. The kernel is then
compiled without it.

Logits keep base e until the maximum is subtracted. Changing the base first would round large ones.
Logits near a shift that is a power of two change the base in one fused multiply-add.

Rows of inputs start at multiples of 16 bytes and are as long. The width ``D`` and the strides
``s_q`` and ``s_t`` count units of 16 bytes. From the factor the compiler knows that a load may take
16 bytes. By itself Triton only finds out whether a number is a multiple of 16.

Sizes are ``do_not_specialize``. Otherwise a batch of another size could compile again, because it
is or is not a multiple of 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llave_kernels.backends.triton_tile import (
    INF,
    LOG2E,
    NOWHERE,
    Pairs,
    exp,
    finite,
    labels,
    load_scale,
    logits,
    negatives,
    similarity,
)

# Where both directions have the same logits, a tile takes one exponential per pair if all of its
# logits or log-sum-exps lie within this distance of a shift. Each sum then keeps float32's relative
# precision. Merging sums of different tiles loses at most exp(60 - 87) of one.
WINDOW = tl.constexpr(60.0)
# Whether the forward does so for calls with rules. In triton 3.4 that spills 254 times.
RULES_TOO = tl.constexpr(tuple(int(x) for x in triton.__version__.split(".")[:2]) >= (3, 6))


@triton.jit
def _running(b_max, b_sum, b_tile_max, b_tile_sum):
    """Merge two (max, sum) pairs."""
    b_new = tl.maximum(b_max, b_tile_max)
    b_shift = finite(b_new)
    return b_new, b_sum * exp(b_max - b_shift) + b_tile_sum * exp(b_tile_max - b_shift)


@triton.jit
def _sums(b_z, counts, AXIS: tl.constexpr):
    """(max, sum) of the logits that count, along an axis."""
    b_z = tl.where(counts, b_z, -INF)
    b_max = tl.max(b_z, AXIS)
    return b_max, tl.sum(exp(b_z - tl.expand_dims(finite(b_max), AXIS)), AXIS)


@triton.jit
def _power_of_two(x):
    """The nearest power of two with the sign of ``x``. Its product with LOG2E is exact."""
    bits = tl.cast(x, tl.int32, bitcast=True)
    return tl.cast((bits + (1 << 22)) & (-1 << 23), tl.float32, bitcast=True)


@triton.jit
def _shifted(b_sum, shift):
    """Sums of exponentials less ``shift``, as (max, sum). Nothing counted in a sum of 0."""
    return tl.where(b_sum == 0, -INF, shift), b_sum


@triton.jit
def _merged(p_max, p_sum, o, m, b_max, b_sum):
    """(max, sum) pairs together with those in memory, which has them where ``m``."""
    b_before = tl.load(p_max + o, mask=m, other=-INF)
    b_total = tl.load(p_sum + o, mask=m, other=0.0)
    return _running(b_before, b_total, b_max, b_sum)


@triton.jit
def _write(p_max, p_sum, o, m, b_max, b_sum):
    tl.debug_barrier()  # every thread has read before any writes
    tl.store(p_max + o, b_max, mask=m)
    tl.store(p_sum + o, b_sum, mask=m)
    tl.debug_barrier()  # written before any thread reads again


@triton.jit
def _sum_each(
    b_s, b_z, b_label, pairs, scale, o_m, o_n, N, M, HARDNESS: tl.constexpr,
    p_column_max, p_column_sum, o_column, n_known,
):  # fmt: skip
    """(max, sum) of a tile's rows. Those of its columns are merged into memory.

    Memory has (max, sum) pairs of columns below ``n_known``. Each direction takes its own
    exponentials, shifted by the maximum of the row or the column.
    """
    in_row, in_column = negatives(b_s, b_label, pairs, o_m, o_n, N, M, HARDNESS)
    b_max, b_sum = _sums(b_z, in_row, 1)
    if p_column_max is not None:
        if pairs.target_alpha is not None:
            b_z = logits(b_s, b_label, pairs, scale, pairs.target_alpha, o_m, o_n, N, M, HARDNESS)
        b_column_max, b_column_sum = _sums(b_z, in_column, 0)
        b_column_max, b_column_sum = _merged(
            p_column_max, p_column_sum, o_column, o_n < n_known, b_column_max, b_column_sum
        )
        _write(p_column_max, p_column_sum, o_column, o_n < M, b_column_max, b_column_sum)
    return b_max, b_sum


@triton.jit
def _fits(b_spread, b_label, i_first, BN: tl.constexpr, PLAIN: tl.constexpr):
    """Whether a tile takes one exponential for both directions. ``b_spread``: see ``WINDOW``.

    A plain call takes it without masks. A tile with a positive needs one.
    """
    if PLAIN:
        positive = (b_label >= i_first) & (b_label < i_first + BN)
        b_spread = tl.where(positive, INF, b_spread)
    return tl.max(b_spread, 0) <= WINDOW


@triton.jit(do_not_specialize=["N", "M", "D", "s_q", "s_t"])
def positive_kernel(
    p_q, p_t, p_label, p_similarity, N, M, D, s_q, s_t,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    b_label = labels(p_label, o_m, N, M)
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


@triton.jit
def _kept(p_similarity, o_m, o_n, s_s):
    """Where a tile's similarities are kept."""
    return p_similarity + o_m.to(tl.int64)[:, None] * s_s + o_n[None, :]


@triton.jit(do_not_specialize=["N", "M", "D", "s_q", "s_t", "ROWS", "COLUMNS"])
def forward_kernel(
    p_q, p_t, p_scale,
    p_label, p_owner, p_query_id, p_target_id, p_row_limit, p_column_limit,
    p_query_bias, p_target_bias, alpha, target_alpha,
    p_row_max, p_row_sum, p_column_max, p_column_sum, p_similarity,
    N, M, D, s_q, s_t, s_s, ROWS, COLUMNS,
    HARDNESS: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program owns ROWS x COLUMNS tiles. It goes down the rows, then to the next column.

    A column's (max, sum) stays in registers along its tiles, as sums over pairs of rows. Threads
    are added up once, at the end. The (max, sum) of a row goes to the program's own line of the
    partial buffer. The program reads it again for its next column of tiles.

    The column is derived from ``i``. In a loop of its own its offsets would stay in registers.

    Neighbouring programs have the same rows and share them in the L2 cache. For N = M = 16,384 and
    132 programs at a time, 37 of the 264 blocks of a step are different, as counted. The 32 blocks
    of columns among them stay for the next step.

    ``p_similarity`` takes the similarities, if the backward is to read them.
    """
    pairs = Pairs(
        p_label, p_owner, p_query_id, p_target_id, p_row_limit, p_column_limit,
        p_query_bias, p_target_bias, alpha, target_alpha,
    )  # fmt: skip
    BM: tl.constexpr = TILE.bm
    BN: tl.constexpr = TILE.bn
    PLAIN: tl.constexpr = (
        p_query_id is None and p_row_limit is None and (p_owner is None or HARDNESS == "all")
    )
    SHARED: tl.constexpr = (
        p_column_max is not None and target_alpha is None and (PLAIN or RULES_TOO)
    )
    i_columns, i_rows = tl.program_id(0), tl.program_id(1)
    scale = load_scale(p_scale)
    shift = 0.0
    n_known = 0
    b_parts = tl.zeros((BM // 16, 8, BN), tl.float32)
    for i in range(0, ROWS * COLUMNS):
        r, c = i % ROWS, i // ROWS
        o_m = (i_rows * ROWS + r) * BM + tl.arange(0, BM)
        i_first = (i_columns * COLUMNS + c) * BN
        o_n = i_first + tl.arange(0, BN)
        m_m, m_n = o_m < N, o_n < M
        o_column = i_rows.to(tl.int64) * M + o_n
        b_label = labels(pairs.label, o_m, N, M)
        b_s = similarity(p_q, p_t, o_m, o_n, N, M, D, s_q, s_t, TILE, PRECISION)
        if p_similarity is not None:
            p_kept = _kept(p_similarity, o_m, o_n, s_s)
            tl.store(p_kept, b_s, mask=m_m[:, None] & (o_n < s_s)[None, :])
        b_z = logits(b_s, b_label, pairs, scale, alpha, o_m, o_n, N, M, HARDNESS)
        if SHARED:
            if i == 0:  # one shift per program, near its first logits
                shift = _power_of_two(tl.sum(b_z) / (BM * BN))
            b_spread = tl.max(tl.abs(b_z - shift), 1)  # also of pairs that do not count
            inner = True
            if PLAIN:  # edges need masks
                b_spread = tl.where(m_m, b_spread, INF)
                inner = i_first + BN <= M
            if _fits(b_spread, b_label, i_first, BN, PLAIN) & inner:
                b_e = tl.exp2(b_z * LOG2E - shift * LOG2E)
                b_e_column = b_e
                if not PLAIN:
                    in_row, in_column = negatives(b_s, b_label, pairs, o_m, o_n, N, M, HARDNESS)
                    b_e_column = tl.where(in_column, b_e, 0.0)
                    b_e = tl.where(in_row, b_e, 0.0)
                b_max, b_sum = _shifted(tl.sum(b_e, 1), shift)
                # Rows i and i + 8 of an accumulator are in one thread.
                b_parts += tl.sum(tl.reshape(b_e_column, (BM // 16, 2, 8, BN)), 1)
            else:
                b_max, b_sum = _sum_each(
                    b_s, b_z, b_label, pairs, scale, o_m, o_n, N, M, HARDNESS,
                    p_column_max, p_column_sum, o_column, n_known,
                )  # fmt: skip
                n_known = M
        else:
            b_max, b_sum = _sum_each(
                b_s, b_z, b_label, pairs, scale, o_m, o_n, N, M, HARDNESS,
                p_column_max, p_column_sum, o_column, tl.where(r > 0, M, 0),
            )  # fmt: skip
        b_sum = tl.where(b_label == NOWHERE, float("nan"), b_sum)
        o_row = i_columns.to(tl.int64) * N + o_m
        m_known = o_m < tl.where(c > 0, N, 0)
        b_max, b_sum = _merged(p_row_max, p_row_sum, o_row, m_known, b_max, b_sum)
        _write(p_row_max, p_row_sum, o_row, m_m, b_max, b_sum)
        if SHARED:  # noqa: SIM102 - a constant decides what is compiled
            if r == ROWS - 1:
                b_column_max, b_column_sum = _shifted(
                    tl.sum(tl.reshape(b_parts, (BM // 2, BN)), 0), shift
                )
                if n_known > 0:
                    b_column_max, b_column_sum = _merged(
                        p_column_max, p_column_sum, o_column, m_n, b_column_max, b_column_sum
                    )
                _write(p_column_max, p_column_sum, o_column, m_n, b_column_max, b_column_sum)
                b_parts = tl.zeros((BM // 16, 8, BN), tl.float32)
                n_known = 0


@triton.jit(do_not_specialize=["ROW_PARTS", "COLUMN_PARTS", "N", "M", "LENGTH"])
def combine_kernel(
    p_row_max, p_row_sum, p_column_max, p_column_sum, p_lse, ROW_PARTS, COLUMN_PARTS, N, M, LENGTH,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(ROW_PARTS, N) and (COLUMN_PARTS, M) partial (max, sum) to log-sum-exps, in a fixed order.

    ``p_lse`` (2, LENGTH) takes those of the rows, then those of the columns.
    """
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) == 0:
        _combine(p_row_max, p_row_sum, p_lse, o, ROW_PARTS, N, BLOCK)
    elif p_column_max is not None:
        _combine(p_column_max, p_column_sum, p_lse + LENGTH, o, COLUMN_PARTS, M, BLOCK)


@triton.jit
def _combine(p_max, p_sum, p_lse, o, PARTS, LENGTH, BLOCK: tl.constexpr):
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
    tl.store(p_lse + o, finite(b_max) + tl.log(b_sum), mask=m)


@triton.jit
def _above(b_lse, shift):
    """Log-sum-exps less ``shift``. 0 where nothing is summed."""
    return tl.where(b_lse == -INF, 0.0, b_lse - shift)


@triton.jit
def _softmax(b_z, counts, b_lse, AXIS: tl.constexpr):
    """Shares of the logits that count, of the sums along an axis."""
    return exp(tl.where(counts, b_z, -INF) - tl.expand_dims(finite(b_lse), AXIS))


@triton.jit
def _each_direction(
    b_s, b_z, b_label, pairs, scale, gain, o_m, o_n, N, M, HARDNESS: tl.constexpr,
    b_lse, b_d, b_d_positive, p_target_lse, p_d_target_lse,
):  # fmt: skip
    """A tile's dS. Each direction takes its own exponentials."""
    in_row, in_column = negatives(b_s, b_label, pairs, o_m, o_n, N, M, HARDNESS)
    b_ds = b_d[:, None] * _softmax(b_z, in_row, b_lse, 1)
    if p_target_lse is not None:
        if pairs.target_alpha is not None:
            b_z = logits(b_s, b_label, pairs, scale, pairs.target_alpha, o_m, o_n, N, M, HARDNESS)
        m_n = o_n < M
        b_lse_column = tl.load(p_target_lse + o_n, mask=m_n, other=0.0)
        b_d_column = tl.load(p_d_target_lse + o_n, mask=m_n, other=0.0) * gain
        b_ds += b_d_column[None, :] * _softmax(b_z, in_column, b_lse_column, 0)
    return tl.where(b_label[:, None] == o_n[None, :], b_d_positive[:, None], b_ds)


@triton.jit(do_not_specialize=["START", "STOP", "M", "D", "s_q", "s_t", "TILES"])
def strip_kernel(
    p_q, p_t, p_scale,
    p_label, p_owner, p_query_id, p_target_id, p_row_limit, p_column_limit,
    p_query_bias, p_target_bias, alpha, target_alpha,
    p_d_positive, p_query_lse, p_d_query_lse, p_target_lse, p_d_target_lse, p_gain,
    p_similarity, p_ds, p_row_sum,
    START, STOP, M, D, s_q, s_t, s_ds, TILES,
    HARDNESS: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dS of rows START to STOP, times a gain (a power of two that keeps float16 in range).

    One program owns TILES tiles, down a column of tiles and on to the next. With one exponential,
    ``exp(z - n_i) dn_i + exp(z - n_j) dn_j`` is ``exp(z - shift)`` times the sum of a weight of the
    row and one of the column. The columns' weights stay in registers along a column of tiles.
    Programs share blocks in the L2 cache as in the forward.

    Stores go to the end of the workspace's rows. Their width ``s_ds`` is a multiple of 16, so the
    stores are wide for every M. What lies beyond the M-th column is arbitrary.

    ``p_similarity`` has what the forward kept, in rows of the same width, if it did.
    ``p_row_sum``, if the scale learns, takes each program's part of the scale's gradient: the sum
    of dS times s over its rows, over the scale.
    """
    pairs = Pairs(
        p_label, p_owner, p_query_id, p_target_id, p_row_limit, p_column_limit,
        p_query_bias, p_target_bias, alpha, target_alpha,
    )  # fmt: skip
    BM: tl.constexpr = TILE.bm
    BN: tl.constexpr = TILE.bn
    SHARED: tl.constexpr = p_target_lse is not None and target_alpha is None
    PLAIN: tl.constexpr = (
        p_query_id is None and p_row_limit is None and (p_owner is None or HARDNESS == "all")
    )
    n_m = tl.cdiv(STOP - START, BM)
    first = tl.program_id(0) * TILES
    last = tl.minimum(first + TILES, n_m * tl.cdiv(M, BN))
    scale = load_scale(p_scale)
    gain = scale
    if p_gain is not None:
        gain = tl.load(p_gain) * scale
    shift = 0.0
    column_spread = 0.0
    b_weight_column = tl.zeros((BN,), tl.float32)
    b_scale_sum = tl.zeros((BM,), tl.float32)
    for i in range(first, last):
        i_first = i // n_m * BN
        o_n = i_first + tl.arange(0, BN)
        o_m = START + i % n_m * BM + tl.arange(0, BM)
        m_m = o_m < STOP
        if SHARED:  # noqa: SIM102 - a constant decides what is compiled
            if (i == first) | (i % n_m == 0):
                m_n = o_n < M
                b_lse_column = tl.load(p_target_lse + o_n, mask=m_n, other=-INF)
                b_d_column = tl.load(p_d_target_lse + o_n, mask=m_n, other=0.0) * gain
                shift = _power_of_two(finite(tl.max(b_lse_column, 0)))
                b_above = _above(b_lse_column, shift)
                column_spread = tl.max(tl.abs(b_above), 0)
                b_weight_column = b_d_column * exp(-b_above)
        b_label = labels(pairs.label, o_m, STOP, M)
        if p_similarity is None:
            b_s = similarity(p_q, p_t, o_m, o_n, STOP, M, D, s_q, s_t, TILE, PRECISION)
        else:
            m_kept = m_m[:, None] & (o_n < s_ds)[None, :]
            b_s = tl.load(_kept(p_similarity, o_m, o_n, s_ds), mask=m_kept, other=0.0)
        b_z = logits(b_s, b_label, pairs, scale, alpha, o_m, o_n, STOP, M, HARDNESS)
        b_lse = tl.load(p_query_lse + o_m, mask=m_m, other=-INF)
        b_d = tl.load(p_d_query_lse + o_m, mask=m_m, other=0.0) * gain
        b_d_positive = tl.load(p_d_positive + o_m, mask=m_m, other=0.0) * gain
        if SHARED:
            b_above = _above(b_lse, shift)
            b_spread = tl.maximum(tl.abs(b_above), column_spread)
            b_weight = b_d * exp(-b_above)
            if _fits(b_spread, b_label, i_first, BN, PLAIN):
                b_weights = b_weight[:, None] + b_weight_column[None, :]
                if not PLAIN:
                    in_row, in_column = negatives(b_s, b_label, pairs, o_m, o_n, STOP, M, HARDNESS)
                    b_weights = tl.where(in_row, b_weight[:, None], 0.0)
                    b_weights += tl.where(in_column, b_weight_column[None, :], 0.0)
                b_ds = tl.exp2(b_z * LOG2E - shift * LOG2E) * b_weights
                if not PLAIN:  # the exponential of a pair that does not count may be infinite
                    b_ds = tl.where(in_row | in_column, b_ds, 0.0)
                    b_ds = tl.where(b_label[:, None] == o_n[None, :], b_d_positive[:, None], b_ds)
            else:
                b_ds = _each_direction(
                    b_s, b_z, b_label, pairs, scale, gain, o_m, o_n, STOP, M, HARDNESS,
                    b_lse, b_d, b_d_positive, p_target_lse, p_d_target_lse,
                )  # fmt: skip
        else:
            b_ds = _each_direction(
                b_s, b_z, b_label, pairs, scale, gain, o_m, o_n, STOP, M, HARDNESS,
                b_lse, b_d, b_d_positive, p_target_lse, p_d_target_lse,
            )  # fmt: skip
        if p_row_sum is not None:
            inside = m_m[:, None] & (o_n < M)[None, :]
            b_scale_sum += tl.sum(tl.where(inside, b_ds * b_s, 0.0), 1)
        p = p_ds + (o_m - START).to(tl.int64)[:, None] * s_ds + o_n[None, :]
        tl.store(p, b_ds.to(p_ds.dtype.element_ty), mask=m_m[:, None] & (o_n < s_ds)[None, :])
    if p_row_sum is not None:
        tl.store(p_row_sum + tl.program_id(0), tl.sum(b_scale_sum, 0) / scale)
