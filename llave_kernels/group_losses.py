"""The losses of rows with any number of positives, from groups of rows and columns.

The kernels compute log-sum-exps in which a row has one positive. Their content ids and owners
express the rest. The sum of a row's positive logits is a product with the sum of its positives.

A process computes a ``Block`` of the pairs. Without other processes it holds all of them, and
nothing is exchanged.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from llave_kernels import checks, dispatch, exchange, logits
from llave_kernels.backends import torch_backend
from llave_kernels.exchange import combined, gathered, summed
from llave_kernels.grid import Block, Side
from llave_kernels.groups import (
    Groups,
    logsumexp_of_groups,
    numbered,
    positive_sums,
    take_groups,
)
from llave_kernels.losses import direction_loss
from llave_kernels.positive_pairs import pair_losses
from llave_kernels.precision import accumulation_dtype, scale_tensor, widened
from llave_kernels.rules import ELSEWHERE, Rules, plain_rules

DENOMINATORS = ("all", "negatives", "pair")


class GroupLosses(NamedTuple):
    """Losses of the rows, or of the columns.

    Attributes:
        losses: (N,) the mean over the row's positive pairs. 0 without one.
        counts: (N,) the number of its positives, in the dtype of the losses.
    """

    losses: Tensor
    counts: Tensor


class Call(NamedTuple):
    """Checked arguments of ``group_losses``.

    Attributes:
        own: (N,) a column that is neither positive nor negative of the row, ``ELSEWHERE`` for none.
            None: no row has one.
    """

    query: Tensor
    target: Tensor
    query_groups: Tensor
    target_groups: Tensor
    own: Tensor | None
    scale: Tensor
    alpha: float
    denominator: str
    symmetric: bool
    backend: str


def resolve(
    query: Tensor,
    target: Tensor,
    query_groups: Tensor,
    target_groups: Tensor | None,
    own: Tensor | None,
    *,
    logit_scale: float | Tensor,
    alpha: float,
    denominator: str,
    symmetric: bool,
    backend: str,
) -> Call:
    """Check the arguments, which are as in ``supervised_contrastive_loss``."""
    checks.embeddings(query, target)
    device, dtype = query.device, accumulation_dtype(query.dtype)
    checks.int64("query_groups", query_groups, query.shape[0], device)
    if target_groups is None:
        raise ValueError("target_groups must be given with target, got None; groups make the pairs")
    checks.int64("target_groups", target_groups, target.shape[0], device)
    alpha = checks.strength("alpha", alpha, dtype)
    scale = scale_tensor(checks.logit_scale(logit_scale, alpha, dtype, device), query)
    checks.one_of("denominator", denominator, DENOMINATORS)
    backend = dispatch.known(backend)
    return Call(
        query, target, query_groups, target_groups, own, scale, alpha, denominator, symmetric,
        backend,
    )  # fmt: skip


def group_losses(call: Call, block: Block | None = None) -> list[GroupLosses]:
    """The losses of this process's rows, and with ``symmetric`` those of its columns.

    Args:
        block: the part of the pairs of all processes that this process computes. Default: there
            are no other processes.
    """
    if block is None:
        sizes = [call.query.shape[0]], [call.target.shape[0]]
        block = Block(Side(None, sizes[0], 0), Side(None, sizes[1], 0), False)
    query, target = exchange.Inputs(call.query, call.target, block).result()
    query_groups = gathered(call.query_groups, block.rows)
    target_groups = gathered(call.target_groups, block.columns)
    own = call.own
    if own is not None:
        own = torch.where(own >= 0, own + block.columns.start, ELSEWHERE)
        if block.rows.shared:  # the others' own columns are in other blocks
            whole = own.new_full((query.shape[0],), ELSEWHERE)
            block.rows.own(whole).copy_(own)
            own = whole

    groups = numbered(query_groups, target_groups)
    counts = groups.row_counts
    if own is not None:
        counts = counts - (own >= 0).long()
    if call.denominator == "all":
        rules = _all_pairs(call, groups, counts, own)
    else:
        rules = _negatives(call, query_groups, target_groups)
    name = dispatch.choose(call.backend, query, target, rules)
    if name == torch_backend.NAME and query.device.type == "cpu":
        # The parts of a gradient cancel near convergence. In float32 they are added before they are
        # rounded to half precision. The rows are widened on a CPU anyway.
        query, target = widened(query, target)
    found = logits.logsumexp(query, target, call.scale, rules, name)
    size = groups.columns.shape[0] + 1
    directions = [
        _Direction(query, target, groups.rows, groups.columns, size, counts, found.query, own)
    ]
    sides = [block.rows, block.columns]
    if found.target is not None:
        directions.append(
            _Direction(
                target, query, groups.columns, groups.rows, size, groups.column_counts,
                found.target, None,
            )
        )  # fmt: skip
    both = list(zip(directions, sides, strict=False))
    if call.denominator == "pair":
        return [direction.pair(call.scale, side) for direction, side in both]
    if call.denominator == "negatives":
        return [direction.decoupled(call.scale, side) for direction, side in both]
    aside = [_aside_of_rows(found.positive, rules, own)]
    if call.symmetric:
        aside.append(_aside_of_columns(aside[0], groups))
    return [
        direction.all(call.scale, side, positive)
        for (direction, side), positive in zip(both, aside, strict=True)
    ]


def _negatives(call: Call, query_groups: Tensor, target_groups: Tensor) -> Rules:
    """The rules of sums over the negatives: the groups are content ids."""
    labels = torch.full_like(query_groups, ELSEWHERE)
    return plain_rules(
        labels=labels, query_ids=query_groups, target_ids=target_groups, alpha=call.alpha,
        target_alpha=call.alpha, hardness="all", symmetric=call.symmetric,
    )  # fmt: skip


def _all_pairs(call: Call, groups: Groups, counts: Tensor, own: Tensor | None) -> Rules:
    """The rules of sums over all pairs, in which only negatives are weighted.

    The positive of a row is its group's first column. The sum leaves it out, so that a row with one
    positive keeps its digits near convergence. The ``_aside`` functions say what to add.
    """
    m = groups.order.shape[0]
    first = groups.order[groups.rows.clamp(max=m - 1)]
    query_ids = target_ids = owners = None
    if own is not None:
        # In a group of two, each takes the other. The first row of a larger group takes itself.
        second = groups.order[(groups.rows + 1).clamp(max=m - 1)]
        first = torch.where((first == own) & (counts == 1), second, first)
        query_ids, target_ids = own, torch.arange(m, device=own.device)
    if call.alpha:
        owners = groups.order[groups.columns]
    return plain_rules(
        labels=torch.where(counts > 0, first, ELSEWHERE), owners=owners, query_ids=query_ids,
        target_ids=target_ids, alpha=call.alpha, target_alpha=call.alpha,
        hardness="in_batch" if call.alpha else "all", symmetric=call.symmetric,
    )  # fmt: skip


def _aside_of_rows(positive: Tensor, rules: Rules, own: Tensor | None) -> Tensor:
    """(N,) the positive's logit that the sums of ``_all_pairs`` leave out, -inf for none."""
    labels = rules.labels_of(positive)
    aside = labels >= 0 if own is None else (labels >= 0) & (labels != own)
    return torch.where(aside, positive, -math.inf)


def _aside_of_columns(rows: Tensor, groups: Groups) -> Tensor:
    """(M,) the same of the columns. The first column of a group lacks all rows of the group."""
    m = groups.order.shape[0]
    finite = torch.where(groups.row_counts > 0, rows, 0.0)
    sums = logsumexp_of_groups(finite, groups.rows, m + 1)
    places = torch.arange(m, device=rows.device)
    aside = (groups.order[groups.columns] == places) & (groups.column_counts > 0)
    return torch.where(aside, take_groups(sums[:, None], groups.columns).squeeze(1), -math.inf)


class _Direction(NamedTuple):
    """The rows of a block in one direction. In the other the columns take their place.

    Attributes:
        query, target: (N, D), (M, D).
        rows, columns: (N,), (M,) the numbers of their groups, below ``size``.
        counts: (N,) numbers of positives in the block.
        lse: (N,) log-sum-exps over the block.
        own: as in ``Call``.
    """

    query: Tensor
    target: Tensor
    rows: Tensor
    columns: Tensor
    size: int
    counts: Tensor
    lse: Tensor
    own: Tensor | None

    def all(self, scale: Tensor, side: Side, positive: Tensor) -> GroupLosses:
        """The log-sum-exp over all pairs minus the mean logit of the positives.

        Args:
            positive: (N,) log-sum-exp of the positives that ``lse`` lacks, -inf for none.
        """
        counts, mean = self._mean_logit(scale, side)
        lse, positive = combined(self.lse, side), combined(positive, side)
        aside = positive != -math.inf
        positive = torch.where(aside, positive, 0.0)
        several = torch.where(counts > 1, positive - mean, 0.0)
        losses = torch.where(aside, direction_loss(positive, lse) + several, lse - mean)
        return _known(losses, counts)

    def decoupled(self, scale: Tensor, side: Side) -> GroupLosses:
        """The log-sum-exp over the negatives minus the mean logit of the positives."""
        counts, mean = self._mean_logit(scale, side)
        lse = combined(self.lse, side)
        empty = lse == -math.inf
        losses = lse.masked_fill(empty, 0.0) - mean
        return _known(losses.masked_fill(empty, 0.0), counts)

    def pair(self, scale: Tensor, side: Side) -> GroupLosses:
        """The mean loss of the positive pairs against the negatives."""
        lse = exchange.regathered(combined(self.lse, side), side)
        sums, _ = pair_losses(
            self.query, self.target, scale, lse, self.rows, self.columns, self.own
        )
        counts = self._counts(side)
        return _known(summed(sums, side) / counts.clamp(min=1), counts)

    def _counts(self, side: Side) -> Tensor:
        return summed(self.counts.to(self.lse.dtype), side)

    def _mean_logit(self, scale: Tensor, side: Side) -> tuple[Tensor, Tensor]:
        """(N,) numbers of positives and the mean of their logits, for this process's rows."""
        query, target = (x.to(scale.dtype) for x in (self.query, self.target))
        sums = positive_sums(query, target, self.rows, self.columns, self.size, self.own)
        counts = self._counts(side)
        return counts, scale * summed(sums, side) / counts.clamp(min=1)


def _known(losses: Tensor, counts: Tensor) -> GroupLosses:
    return GroupLosses(torch.where(counts > 0, losses, 0.0), counts)
