"""What the Triton kernels know of a tile of pairs: similarities, rules and logits.

Names: ``p_`` pointer, ``b_`` block of values, ``o_`` offsets, ``m_`` mask, ``i_`` index.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from llave_kernels import rules

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))
ELSEWHERE = tl.constexpr(rules.ELSEWHERE)
# These replace a label and an owner that are no column. They equal no column, not each other and
# not the label of a positive that is elsewhere.
NOWHERE = tl.constexpr(-3)
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
    query_bias: Any  # (N,) added to each logit of the row
    target_bias: Any  # (M,) the same for the column
    alpha: Any
    target_alpha: Any  # None: the same as alpha


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1, with the relative error of a few roundings.

    The fast logarithm is accurate relative to 1, and a small loss is not. The polynomial is the
    best one of its degree for log(1 + x) / x.
    """
    b_sum = x * 0.00523268804 - 0.0295052137
    b_sum = b_sum * x + 0.0782259107
    b_sum = b_sum * x - 0.136632428
    b_sum = b_sum * x + 0.191060051
    b_sum = b_sum * x - 0.24842982
    b_sum = b_sum * x + 0.333190978
    b_sum = b_sum * x - 0.499994934
    b_sum = b_sum * x + 0.99999994
    return x * b_sum


@triton.jit
def load_scale(p_scale):
    """The logit scale, from a pointer or as the number that it is."""
    scale = p_scale
    if hasattr(p_scale, "dtype"):  # noqa: SIM102 - the interpreter passes a number as it is
        if p_scale.dtype.is_ptr():
            scale = tl.load(p_scale)
    return scale


@triton.jit
def finite(x):
    """0 in place of -inf, so that (-inf) - x stays -inf where nothing is summed."""
    return tl.where(x == -INF, 0.0, x)


@triton.jit
def _columns(p, o, m, M, LEAST: tl.constexpr, OUTSIDE: tl.constexpr):
    """The int64 columns at ``p + o``, as int32. ``OUTSIDE`` replaces those not in LEAST to M."""
    b = tl.load(p + o, mask=m, other=-1)
    return tl.where((b >= LEAST) & (b < M), b, OUTSIDE).to(tl.int32)


@triton.jit
def similarity(
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
def labels(p_label, o_m, N, M):
    """The columns of the rows' positives. -1 for one elsewhere, ``NOWHERE`` for a label outside.

    A row beyond the edge has any column.
    """
    b_label = o_m
    if p_label is not None:
        b_label = _columns(p_label, o_m, o_m < N, M, ELSEWHERE, NOWHERE)
    return b_label


@triton.jit
def _own(b_label, pairs, o_n, M):
    """Where the column goes with the row's positive."""
    if pairs.owner is None:
        own = b_label[:, None] == o_n[None, :]
    else:
        own = b_label[:, None] == _columns(pairs.owner, o_n, o_n < M, M, 0, NOBODY)[None, :]
    return own


@triton.jit
def logits(b_s, b_label, pairs, scale, alpha, o_m, o_n, N, M, HARDNESS: tl.constexpr):
    """Logits of similarities. Where no row owns a negative, the factor is a number.

    Beyond the edges, the last bias is added again, as in ``similarity``.
    """
    if HARDNESS == "all" or HARDNESS == "within":
        factor = scale + alpha
    elif pairs.owner is None:
        factor = scale + alpha if HARDNESS == "in_batch" else scale
    elif HARDNESS == "in_batch":
        factor = tl.where(_own(b_label, pairs, o_n, M), scale, scale + alpha)
    else:
        factor = tl.where(_own(b_label, pairs, o_n, M), scale + alpha, scale)
    b_z = b_s * factor
    if pairs.query_bias is not None:
        b_z += tl.load(pairs.query_bias + tl.minimum(o_m, N - 1))[:, None]
    if pairs.target_bias is not None:
        b_z += tl.load(pairs.target_bias + tl.minimum(o_n, M - 1))[None, :]
    return b_z


@triton.jit
def negatives(b_s, b_label, pairs, o_m, o_n, N, M, HARDNESS: tl.constexpr):
    """Where a pair counts as a negative of its row, and of its column."""
    m_m, m_n = o_m < N, o_n < M
    counts = m_m[:, None] & m_n[None, :] & (b_label[:, None] != o_n[None, :])
    if pairs.query_id is not None:
        b_query_id = tl.load(pairs.query_id + o_m, mask=m_m, other=0)
        b_target_id = tl.load(pairs.target_id + o_n, mask=m_n, other=0)
        counts = counts & (b_query_id[:, None] != b_target_id[None, :])
    if HARDNESS == "within":  # noqa: SIM102 - a constant decides what is compiled
        if pairs.owner is not None:
            counts = counts & ~_own(b_label, pairs, o_n, M)
    in_row, in_column = counts, counts
    if pairs.row_limit is not None:
        b_limit = tl.load(pairs.row_limit + o_m, mask=m_m, other=INF)
        own = _own(b_label, pairs, o_n, M)
        in_row = counts & (own | ~(b_s > b_limit[:, None]))
    if pairs.column_limit is not None:
        b_limit = tl.load(pairs.column_limit + o_n, mask=m_n, other=INF)
        own = _own(b_label, pairs, o_n, M)
        in_column = counts & (own | ~(b_s > b_limit[None, :]))
    return in_row, in_column
