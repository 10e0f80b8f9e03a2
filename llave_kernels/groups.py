"""Groups of rows and columns, and what a loss needs of their pairs.

A row and a column of one group are a positive pair. Nothing here stores the N x M pairs, and no sum
depends on the order in which threads run.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from llave_kernels import transforms


class Groups(NamedTuple):
    """Groups numbered from 0 to M - 1: a number is the group's first place in ``order``.

    Attributes:
        rows: (N,) int64, the number of each row's group. M for a group without a column.
        columns: (M,) the same of each column.
        order: (M,) the columns, group after group.
        row_counts: (N,) how many columns each row's group has.
        column_counts: (M,) how many rows each column's group has.
    """

    rows: Tensor
    columns: Tensor
    order: Tensor
    row_counts: Tensor
    column_counts: Tensor


def numbered(query_groups: Tensor, target_groups: Tensor) -> Groups:
    """The groups of rows (N,) and columns (M,), any int64. Nothing is read on the host."""
    query_groups, target_groups = query_groups.contiguous(), target_groups.contiguous()
    ordered, order = target_groups.sort(stable=True)
    columns = torch.searchsorted(ordered, target_groups)
    begin = torch.searchsorted(ordered, query_groups)
    row_counts = torch.searchsorted(ordered, query_groups, right=True) - begin
    rows = torch.where(row_counts > 0, begin, len(order))
    in_order = rows.sort().values
    end = torch.searchsorted(in_order, columns, right=True)
    column_counts = end - torch.searchsorted(in_order, columns)
    return Groups(rows, columns, order, row_counts, column_counts)


@torch.library.custom_op(
    "llave::sum_groups", mutates_args=(), schema="(Tensor x, Tensor numbers, SymInt size) -> Tensor"
)
def sum_groups(x: Tensor, numbers: Tensor, size: int) -> Tensor:
    """(size, D) sums of the rows of x (N, D) that have each number (N,). 0 without a row."""
    ordered, order = numbers.sort(stable=True)
    places = torch.arange(size, device=x.device)
    return embedding_bag(order, x, torch.searchsorted(ordered, places), mode="sum")


@torch.library.custom_op(
    "llave::take_groups", mutates_args=(), schema="(Tensor sums, Tensor numbers) -> Tensor"
)
def take_groups(sums: Tensor, numbers: Tensor) -> Tensor:
    """(N, D) the row of ``sums`` (size, D) of each number. Its gradient is ``sum_groups``."""
    return sums[numbers]


@sum_groups.register_fake
def _(x: Tensor, numbers: Tensor, size: int) -> Tensor:
    return x.new_empty((size, x.shape[1]))


@take_groups.register_fake
def _(sums: Tensor, numbers: Tensor) -> Tensor:
    return sums.new_empty((numbers.shape[0], sums.shape[1]))


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward_sum(ctx: Any, d_sums: Tensor) -> tuple[Tensor | None, ...]:
    return take_groups(d_sums, *ctx.saved_tensors), None, None


def _setup_take(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.size = inputs[0].shape[0]


def _backward_take(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return sum_groups(gradient, *ctx.saved_tensors, ctx.size), None


transforms.support(sum_groups, _setup_sum, _backward_sum)
transforms.support(take_groups, _setup_take, _backward_take)


def logsumexp_of_groups(x: Tensor, numbers: Tensor, size: int) -> Tensor:
    """(size,) log-sum-exps of the values (N,) that have each number. -inf without a value."""
    known = x.detach()
    top = known.new_full((size,), -math.inf).scatter_reduce(0, numbers, known, "amax")
    top = top.masked_fill(top == -math.inf, 0.0)
    sums = sum_groups((x - top[numbers]).exp()[:, None], numbers, size)
    return top + sums.squeeze(1).log()


def positive_sums(
    query: Tensor, target: Tensor, rows: Tensor, columns: Tensor, size: int, own: Tensor | None
) -> Tensor:
    """(N,) sums of the similarities of each row and the columns of its group.

    ``q_i . (sum of the group's t_j)`` takes N + M products instead of N x M.

    Args:
        query, target: (N, D), (M, D) in the accumulation dtype.
        rows, columns: (N,), (M,) the numbers of their groups, below ``size``.
        own: (N,) a column to leave out of each row's sum. ``ELSEWHERE`` for none.
    """
    near = take_groups(sum_groups(target, columns, size), rows)
    if own is not None:
        left_out = take_groups(target, own.clamp(min=0))
        near = near - torch.where(own[:, None] >= 0, left_out, 0.0)
    return (query * near).sum(1)
