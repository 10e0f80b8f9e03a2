"""Negatives within a side: log-sum-exps over query-query and target-target pairs.

For row i they are its query with every other query, and its positive with every target but those
that belong to it. A square block is symmetric. So it is computed in strips of rows, each from its
own first column on. A strip's row sums are of its own rows, its column sums are of later rows:

    S strips   (S + 1) / 2S of the pairs, in both directions of a call
    forward    NMD for many strips, where one call takes 2NMD
    backward   3NMD instead of 6NMD

Targets beyond the first N, and all targets where ``labels`` are given, are computed whole.

The query-target block and these are one operator. All gradients of a side are added in one buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from llave_kernels import autograd, dispatch, ops, transforms
from llave_kernels.backends.products import gain
from llave_kernels.backends.protocol import Backend, Gradients, LogSumExps, Sums
from llave_kernels.checks import SIDES
from llave_kernels.rules import SCHEMA, TENSORS, WITHIN, Rules, inside

MOST_STRIPS = 8  # leaves 9/16 of the pairs
# Least rows of a strip. On a GPU a strip of 2,048 rows fills 132 processors at least twice with
# tiles of 128 x 128, but for the last one. In waves of such tiles, counted: N = 4,096 takes 8 in
# one call and 6 in two strips, N = 8,192 takes 32 and 20 in four, N = 16,384 takes 125 and 71 in
# eight. N = 2,048 takes 2 either way. On a CPU a strip need only be worth a call.
LEAST_ROWS = {"cpu": 256}
LEAST_ROWS_ON_A_GPU = 2048

Limit = Callable[[Tensor, Tensor, "Tensor | None", float], Tensor]


class Block(NamedTuple):
    """The pairs within a side: each row's query or positive, and all of that side.

    Attributes:
        query: (N, D) the rows' own.
        target: (M, D) those of the side. Without ``labels``, row i's own is column i.
        rules: of one direction, with ``WITHIN``.
    """

    query: Tensor
    target: Tensor
    rules: Rules


def blocks(
    query: Tensor, target: Tensor, rules: Rules, sides: Sequence[str], limit: Limit
) -> list[Block]:
    """The blocks of the sides. ``limit``: a backend's ``margin_limit``."""
    n, ids = len(query), rules.target_ids
    found = []
    own = rules._replace(
        row_limit=rules.row_limits(query, target, limit), column_limit=None,
        alpha=0.0, target_alpha=0.0, hardness=WITHIN, symmetric=False,
    )  # fmt: skip
    if "query" in sides:
        queries = own._replace(labels=None, owners=None, target_ids=rules.query_ids)
        found.append(Block(query, query, queries))
    if "target" in sides:
        rows: Any = slice(n) if rules.labels is None else inside(rules.labels, len(target))[1]
        targets = own._replace(query_ids=None if ids is None else ids[rows])
        found.append(Block(target[rows], target, targets))
    return found


def strip_rows(n: int, device: str) -> int:
    """Rows of a strip of a block with ``n`` rows. They are a multiple of 128, or all."""
    strips = min(MOST_STRIPS, n // LEAST_ROWS.get(device, LEAST_ROWS_ON_A_GPU))
    return n if strips < 2 else -(-n // (128 * strips)) * 128


def _strips(block: Block) -> Iterator[tuple[int, int, Block]]:
    """(start, stop, the block of these rows and the columns from ``start`` on)."""
    query, target, rules = block
    n = len(query)
    rows = strip_rows(n, query.device.type) if rules.labels is None else n
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        later = stop < n
        limit, column_limit = rules.row_limit, None
        if limit is not None and later:
            column_limit = limit.new_full((len(target),), torch.inf)
            column_limit[:n] = limit
            column_limit = column_limit[start:]
        owners, query_ids, target_ids = rules.owners, rules.query_ids, rules.target_ids
        part = rules._replace(
            owners=None if owners is None else owners[start:] - start,
            query_ids=None if query_ids is None else query_ids[start:stop],
            target_ids=None if target_ids is None else target_ids[start:],
            row_limit=None if limit is None else limit[start:stop],
            column_limit=column_limit,
            symmetric=later,
        )
        yield start, stop, Block(query[start:stop], target[start:], part)


def _log_sum_exp(backend: Backend, block: Block, scale: Tensor) -> Tensor:
    """(N,) log-sum-exps of a block's rows, -inf without a pair."""
    n = len(block.query)
    total = scale.new_full((n,), -torch.inf)
    for start, stop, strip in _strips(block):
        found = backend.forward(strip.query, strip.target, scale, strip.rules, _nothing(scale))
        _add(total[start:stop], found.query_lse)
        if strip.rules.symmetric:
            _add(total[stop:], found.target_lse[stop - start : n - start])
    return total


def _add(total: Tensor, lse: Tensor) -> None:
    torch.logaddexp(total, lse, out=total)


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _add_gradients(
    backend: Backend,
    block: Block,
    scale: Tensor,
    lse: Tensor,
    d_lse: Tensor,
    sums: Sums,
) -> None:
    """Add the gradients of a block. ``lse`` (N,) is over all blocks, so it has their shares."""
    n = len(block.query)
    for start, stop, strip in _strips(block):
        column_lse = d_column = _nothing(lse)
        if strip.rules.symmetric:
            # The strip's own rows are complete, and columns beyond N are nobody's row: 0. Their
            # exponentials must not overflow. No logit exceeds the largest log-sum-exp.
            m = len(strip.target)
            column_lse, d_column = lse.amax().repeat(m), lse.new_zeros(m)
            column_lse[: n - start] = lse[start:]
            d_column[stop - start : n - start] = d_lse[stop:]
        zeros = lse.new_zeros(stop - start)
        backend.backward(
            LogSumExps(zeros, d_lse[start:stop], d_column),
            strip.query,
            strip.target,
            scale,
            LogSumExps(zeros, lse[start:stop], column_lse),
            _nothing(lse),
            strip.rules,
            scale_gradient=False,
            sums=Sums(sums.query[start:stop], sums.target[start:], sums.gain),
        )


def forward(
    backend: Backend,
    query: Tensor,
    target: Tensor,
    scale: Tensor,
    rules: Rules,
    sides: Sequence[str],
) -> tuple[LogSumExps, Tensor, Tensor]:
    """The backend's log-sum-exps, those within the sides (N,), and what it keeps."""
    outputs, kept = ops.forward(backend, query, target, scale, rules)
    total = outputs.query_lse.new_full((len(query),), -torch.inf)
    for block in blocks(query, target, rules, sides, backend.margin_limit):
        _add(total, _log_sum_exp(backend, block, scale))
    return outputs, total, kept


def gradients(
    backend: Backend,
    upstream: LogSumExps,
    d_within: Tensor,
    query: Tensor,
    target: Tensor,
    scale: Tensor,
    outputs: LogSumExps,
    within: Tensor,
    kept: Tensor,
    rules: Rules,
    sides: Sequence[str],
    *,
    scale_gradient: bool,
) -> Gradients:
    """The gradients of all blocks. The scale's is uninitialised unless ``scale_gradient``."""
    d_query, d_target = (torch.zeros_like(x, dtype=within.dtype) for x in (query, target))
    # A pair of a square block has the gradient of two rows.
    sums = Sums(d_query, d_target, gain(scale, *upstream, d_within, d_within))
    backend.backward(
        upstream, query, target, scale, outputs, kept, rules, scale_gradient=False, sums=sums
    )
    found = blocks(query, target, rules, sides, backend.margin_limit)
    for side, block in zip(sides, found, strict=True):
        whole = d_query if side == "query" else d_target
        rows = whole[: len(query)] if block.rules.labels is None else torch.zeros_like(d_query)
        _add_gradients(backend, block, scale, within, d_within, Sums(rows, whole, sums.gain))
        if block.rules.labels is not None:
            _add_rows(whole, inside(block.rules.labels, len(whole))[1], rows)
    (dq, products), (dt, more) = (
        _finished(x, total, sums.gain, learns=scale_gradient)
        for x, total in ((query, d_query), (target, d_target))
    )
    # s has a gradient only through kappa s. Each pair is in two of these products.
    return Gradients(dq, dt, (products + more) / (2 * scale))


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """``total[index] += rows`` in a fixed order. Rows may share an index."""
    if total.is_cuda:
        total.index_put_((index,), rows, accumulate=True)  # sorts the index
    else:
        total.index_add_(0, index, rows)


def _finished(x: Tensor, total: Tensor, gain: Tensor, *, learns: bool) -> tuple[Tensor, Tensor]:
    """``total / gain`` in the dtype of ``x``, and the sum () of its products with ``x``.

    The products are summed only if the scale ``learns``. ``total`` is overwritten.
    """
    if total.dtype == x.dtype:
        total.div_(gain)
        return total, torch.linalg.vecdot(x, total).sum() if learns else gain
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.div(total, gain, out=out)  # before the division it may not fit the dtype
    return out, total.mul_(x).sum().div_(gain) if learns else gain


FLAGS = "bool within_query, bool within_target"
INPUTS = f"{ops.INPUTS}, str backend, {FLAGS}, {SCHEMA}"


def _sides(*flags: bool) -> list[str]:
    return [side for side, flag in zip(SIDES, flags, strict=True) if flag]


@torch.library.custom_op(
    "llave::within_logsumexp",
    mutates_args=(),
    schema=f"({INPUTS}) -> ({ops.OUTPUTS}, Tensor within_lse, Tensor kept)",
)
def operator(
    query: Tensor, target: Tensor, scale: Tensor, backend: str, *given: Any
) -> tuple[Tensor, ...]:
    """``contrastive_logsumexp`` with the log-sum-exps within the sides (N,) before ``kept``."""
    flags, rules = given[:2], ops.checked(query, target, scale, given[2:])
    module = dispatch.supporting(backend, query, target, rules)
    transforms.refuse_tangents(query, target, scale)
    with dispatch.running_on(query):
        outputs, within, kept = forward(module, query, target, scale, rules, _sides(*flags))
        return *outputs, within, kept


@operator.register_fake
def _(query: Tensor, target: Tensor, scale: Tensor, backend: str, *given: Any) -> Any:
    *outputs, kept = ops.fake_logsumexp(query, target, backend, *given[2:])
    return *outputs, outputs[1].new_empty(outputs[1].shape), kept


@torch.library.custom_op(
    "llave::within_logsumexp_backward",
    mutates_args=(),
    schema=f"({ops.UPSTREAM}, Tensor d_within_lse, {ops.OUTPUTS}, Tensor within_lse, Tensor kept, "
    f"bool scale_gradient, {INPUTS}) -> (Tensor d_query, Tensor d_target, Tensor d_logit_scale)",
)
def backward_operator(*given: Any) -> tuple[Tensor, ...]:
    """The gradients of query, target and scale. Unless ``scale_gradient``, that is any number."""
    *upstream, d_within = given[:4]
    *outputs, within, kept, learns = given[4:10]
    query, target, scale, backend, *flags = given[10:16]
    rules = ops.checked(query, target, scale, given[16:])
    module = dispatch.named(backend)
    transforms.refuse_tangents(query, target, scale)
    d_outputs = ops.like_outputs(rules, query, target, "d_", *upstream)
    with dispatch.running_on(query):
        found = gradients(
            module, d_outputs, d_within.contiguous(), query, target, scale,
            LogSumExps(*outputs), within, kept, rules, _sides(*flags), scale_gradient=learns,
        )  # fmt: skip
        return found[:3]


@backward_operator.register_fake
def _(*given: Any) -> Any:
    query, target = given[10:12]
    return ops.gradients_like(query, target, query.dtype)[:3]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, target, scale, *settings = inputs
    ctx.settings, rules = settings[:3], settings[3:]
    ctx.save_for_backward(*output, query, target, scale, *rules[:TENSORS])
    ctx.constants = rules[TENSORS:]
    ctx.mark_non_differentiable(output[4])
    ctx.set_materialize_grads(False)  # avoids zeros as large as ``kept``


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    outputs, learns = saved[:4], ctx.needs_input_grad[2]
    dq, dt, d_scale = backward_operator(
        *(torch.zeros_like(x) if d is None else d for d, x in zip(upstream, outputs, strict=False)),
        *saved[:5], learns, *saved[5:8], *ctx.settings, *saved[8:], *ctx.constants,
    )  # fmt: skip
    return dq, dt, d_scale if learns else None, *[None] * (3 + len(Rules._fields))


transforms.support(backward_operator, ops.setup_nothing, transforms.refuse_second_derivative)
transforms.support(operator, _setup, _backward)


class _Eager(Function):
    """The operator without torch's machinery around it."""

    jvp = staticmethod(transforms.refuse_forward_mode)
    setup_context = staticmethod(_setup)
    backward = staticmethod(_backward)

    @staticmethod
    def forward(
        query: Tensor, target: Tensor, scale: Tensor, backend: str, *given: Any
    ) -> tuple[Tensor, ...]:
        rules = Rules(*given[2:])
        with dispatch.running_on(query):
            outputs, within, kept = forward(
                dispatch.named(backend), query, target, scale, rules, _sides(*given[:2])
            )
        return *outputs, within, kept


def within_logsumexp(
    query: Tensor, target: Tensor, scale: Tensor, backend: str, rules: Rules, sides: Sequence[str]
) -> tuple[LogSumExps, Tensor]:
    """The differentiable log-sum-exps, and those within the sides (N,)."""
    flags = [side in sides for side in SIDES]
    run = _Eager.apply if autograd.serves(query, target, scale) else operator
    *outputs, within, _ = run(query, target, scale, backend, *flags, *rules)
    return LogSumExps(*outputs), within
