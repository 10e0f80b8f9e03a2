"""The losses of single positive pairs, summed over each row's positives.

Rows and columns are sorted by group. The positives of a strip of rows are then in one range of
columns, and only the products of that range are made: few for small groups, half of N x M for two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llave_kernels import dispatch, transforms
from llave_kernels.backends.products import product
from llave_kernels.precision import accumulation_dtype

ROWS, COLUMNS = 128, 4096  # of a block. It takes 2 MiB in float32

INPUTS = "Tensor query, Tensor target, Tensor logit_scale, Tensor lse, Tensor rows, Tensor columns"


class _Blocks:
    """The blocks of the sorted pairs that have positives. See ``pair_losses`` for the arguments."""

    def __init__(
        self,
        query: Tensor,
        target: Tensor,
        scale: Tensor,
        lse: Tensor,
        rows: Tensor,
        columns: Tensor,
        own: Tensor | None,
    ) -> None:
        self.query, self.target, self.scale, self.lse = query, target, scale, lse
        self.rows, self.columns, self.own = rows, columns, own
        in_order, self.row_order = rows.sort(stable=True)
        columns_in_order, self.column_order = columns.sort(stable=True)
        first = in_order[::ROWS].contiguous()
        last = torch.cat([in_order[ROWS - 1 :: ROWS], in_order[-1:]])[: len(first)]
        begin = torch.searchsorted(columns_in_order, first)
        end = torch.searchsorted(columns_in_order, last, right=True)
        self.ranges = torch.stack([begin, end], 1).tolist()  # the only values that the host reads

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows and the columns of each block."""
        for strip, (begin, end) in enumerate(self.ranges):
            rows = self.row_order[strip * ROWS : (strip + 1) * ROWS]
            for start in range(begin, end, COLUMNS):
                yield rows, self.column_order[start : min(start + COLUMNS, end)]

    def gaps(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, columns) logit of each pair minus its row's ``lse``, and whether it counts."""
        z = product(self.query[rows], self.target[columns].T) * self.scale
        counts = self.rows[rows, None] == self.columns[columns]
        if self.own is not None:
            counts &= self.own[rows, None] != columns
        return z - self.lse[rows, None], counts


@torch.library.custom_op(
    "llave::pair_losses",
    mutates_args=(),
    schema=f"({INPUTS}, Tensor? own) -> (Tensor losses, Tensor slopes)",
)
def pair_losses(
    query: Tensor,
    target: Tensor,
    logit_scale: Tensor,
    lse: Tensor,
    rows: Tensor,
    columns: Tensor,
    own: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(N,) sums over each row's positives of ``softplus(lse_i - kappa s_ij)``.

    On a GPU the host waits once, to read where the groups are.

    Args:
        query, target: (N, D), (M, D).
        logit_scale: kappa, () in the accumulation dtype.
        lse: (N,) log-sum-exp of each row over its negatives.
        rows, columns: (N,), (M,) int64. Column j is row i's positive if their numbers are equal.
        own: (N,) int64, a column that is not the row's positive. ``ELSEWHERE`` for none.

    Returns:
        The sums, and their derivatives with respect to ``lse``, which have no gradient themselves.
    """
    losses, slopes = torch.zeros_like(lse), torch.zeros_like(lse)
    with dispatch.running_on(query):
        blocks = _Blocks(query, target, logit_scale, lse, rows, columns, own)
        for i, j in blocks:
            gaps, counts = blocks.gaps(i, j)
            losses[i] -= torch.where(counts, logsigmoid(gaps), 0.0).sum(1)
            slopes[i] += torch.where(counts, torch.sigmoid(-gaps), 0.0).sum(1)
    return losses, slopes


@torch.library.custom_op(
    "llave::pair_losses_backward",
    mutates_args=(),
    schema=f"(Tensor d_losses, {INPUTS}, Tensor? own) -> (Tensor, Tensor, Tensor)",
)
def pair_losses_backward(
    d_losses: Tensor,
    query: Tensor,
    target: Tensor,
    logit_scale: Tensor,
    lse: Tensor,
    rows: Tensor,
    columns: Tensor,
    own: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query (N, D), target (M, D) and logit_scale ()."""
    dtype = accumulation_dtype(query.dtype)
    dq, dt = (torch.zeros_like(x, dtype=dtype) for x in (query, target))
    with dispatch.running_on(query):
        blocks = _Blocks(query, target, logit_scale, lse, rows, columns, own)
        for i, j in blocks:
            gaps, counts = blocks.gaps(i, j)
            ds = torch.where(counts, torch.sigmoid(-gaps) * -d_losses[i, None], 0.0)
            dq[i] += product(ds, target[j].to(dtype))
            dt[j] += product(ds.T, query[i].to(dtype))
        d_scale = (query.to(dtype) * dq).sum()
    return (dq * logit_scale).to(query.dtype), (dt * logit_scale).to(target.dtype), d_scale


@pair_losses.register_fake
def _(query: Tensor, target: Tensor, logit_scale: Tensor, lse: Tensor, *rest: Any) -> Any:
    return torch.empty_like(lse), torch.empty_like(lse)


@pair_losses_backward.register_fake
def _(d_losses: Tensor, query: Tensor, target: Tensor, logit_scale: Tensor, *rest: Any) -> Any:
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (query, target, logit_scale)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_losses: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    slopes, *inputs = ctx.saved_tensors
    if d_losses is None:
        return (None,) * len(inputs)
    dq, dt, d_scale = pair_losses_backward(d_losses, *inputs)
    return dq, dt, d_scale, d_losses * slopes, None, None, None


def _no_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


transforms.support(pair_losses_backward, _no_setup, transforms.refuse_second_derivative)
transforms.support(pair_losses, _setup, _backward)
