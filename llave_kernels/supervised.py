"""The supervised contrastive loss: several positives a row, from groups of rows and columns.

The kernels compute log-sum-exps in which a row has one positive. Their content ids and owners
express the rest. The sum of a row's positive logits is a product with the sum of its positives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llave_kernels import checks, dispatch, functional
from llave_kernels.groups import (
    Groups,
    logsumexp_of_groups,
    numbered,
    positive_sums,
    take_groups,
)
from llave_kernels.losses import direction_loss
from llave_kernels.positive_pairs import pair_losses
from llave_kernels.precision import accumulation_dtype, autocast, scale_tensor
from llave_kernels.rules import ELSEWHERE, Rules, plain_rules

DENOMINATORS = ("all", "negatives", "pair")


class GroupLosses(NamedTuple):
    """Losses of the rows, or of the columns.

    Attributes:
        losses: (N,) the mean over the row's positive pairs. 0 without one.
        counts: (N,) int64, the number of its positives.
    """

    losses: Tensor
    counts: Tensor

    def mean(self) -> Tensor:
        """The mean over the rows with a positive, (). 0 if no row has one."""
        return self.losses.sum() / (self.counts > 0).sum().clamp(min=1)


def supervised_contrastive_loss(
    query: Tensor,
    target: Tensor | None = None,
    *,
    query_groups: Tensor,
    target_groups: Tensor | None = None,
    logit_scale: float | Tensor = 10.0,
    alpha: float = 0.0,
    denominator: str = "all",
    symmetric: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Contrastive loss with any number of positives a row (SupCon, arXiv 2004.11362), fused.

    Row i and column j are positives of each other if their groups are equal, else negatives. The
    loss of a row is the mean over its positives p of ``-log(exp(kappa s_ip) / denominator)``::

        z_ij = kappa s_ij + alpha sg(s_ij)                        j a negative of i
        n_i  = log of the sum of exp(z_ij) over the negatives
        "all"         log(exp(n_i) + sum over positives of exp(kappa s_ip)) - mean of kappa s_ip
        "negatives"   n_i - mean of kappa s_ip
        "pair"        mean of softplus(n_i - kappa s_ip)

    With one positive in each row, ``"all"`` and ``"pair"`` are both InfoNCE. With k positives,
    ``"all"`` is at least log k. ``"negatives"`` has no lower bound.

    Without ``target`` a batch stands against itself, and a row is not its own positive or negative.
    A large N x M matrix is never stored. Rows are not normalised.

    Args:
        query: (N, D) float32, bfloat16, float16 or float64 (``torch`` backend), any strides.
        target: (M, D), same dtype and device. Default: ``query``.
        query_groups: (N,) int64, any numbers: a class, the image of a caption.
        target_groups: (M,) int64. Needed with ``target``, and only then.
        logit_scale: kappa = 1 / temperature, a positive number or a tensor of one element, which
            may require grad.
        alpha: hardness strength of the negatives, >= 0. Positives carry no weight. Default: 0.
        denominator: ``"all"``: Khosla et al.'s ``L_out``. ``"negatives"``: decoupled, the positives
            are not in it. ``"pair"``: NT-Xent of each positive pair. It also computes the products
            of the positive pairs: few for small groups, N x M / 2 for two groups of equal size.
        symmetric: average with the same loss of the columns over the rows. Needs ``target``.
        reduction: ``"mean"`` over the rows with a positive, ``"sum"``, or ``"none"``: (N,) a loss
            per row, with ``symmetric=False``.
        backend: ``"auto"`` or a name from ``available_backends()``.

    Returns:
        0-d tensor, or (N,) with ``reduction="none"``. float32, or float64 for float64 inputs. A row
        without a positive has no loss: 0, and it does not count in the mean. Without a negative,
        the loss of ``"negatives"`` and ``"pair"`` is 0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: wrong shape, device or value.
        RuntimeError: as in ``hardness_weighted_contrastive_loss``.

    Note:
        On a GPU ``"pair"`` reads the groups' places, and the host waits for them. It cannot be
        captured in a CUDA graph.
    """
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    symmetric = checks.flag("symmetric", symmetric)
    if symmetric and reduction == "none":
        raise ValueError(
            'reduction="none" gives a loss per row and needs symmetric=False; swap the sides for '
            "the losses of the columns"
        )
    if target is None and (symmetric or target_groups is not None):
        name = "symmetric=True" if symmetric else "target_groups"
        raise ValueError(
            f"{name} needs target; without it the batch stands against itself, and both "
            "directions are the same"
        )
    query, other = autocast(query, query if target is None else target)
    own = None
    if target is None:
        other, target_groups = query, query_groups
        own = torch.arange(query.shape[0], device=query.device)
    found = group_losses(
        query, other, query_groups, target_groups, own=own, logit_scale=logit_scale, alpha=alpha,
        denominator=denominator, symmetric=symmetric, backend=backend,
    )  # fmt: skip
    if reduction == "none":
        return found[0].losses
    totals = [x.mean() if reduction == "mean" else x.losses.sum() for x in found]
    return totals[0] if len(totals) == 1 else (totals[0] + totals[1]) / 2


def group_losses(
    query: Tensor,
    target: Tensor,
    query_groups: Tensor,
    target_groups: Tensor | None,
    *,
    own: Tensor | None,
    logit_scale: float | Tensor,
    alpha: float,
    denominator: str,
    symmetric: bool,
    backend: str,
) -> list[GroupLosses]:
    """The losses of the rows, and with ``symmetric`` those of the columns.

    Args:
        own: (N,) a column that is neither positive nor negative of the row. ``ELSEWHERE`` for none.
            It needs ``symmetric=False``.
    """
    checks.embeddings(query, target)
    device, dtype = query.device, accumulation_dtype(query.dtype)
    checks.int64("query_groups", query_groups, query.shape[0], device)
    if target_groups is None:
        raise ValueError("target_groups must be given with target, got None; groups make the pairs")
    checks.int64("target_groups", target_groups, target.shape[0], device)
    alpha = checks.strength("alpha", alpha, dtype)
    scale = scale_tensor(checks.logit_scale(logit_scale, alpha, dtype, device), query)
    checks.one_of("denominator", denominator, DENOMINATORS)

    groups = numbered(query_groups, target_groups)
    counts = groups.row_counts
    if own is not None:
        counts = counts - (own >= 0).long()
    if denominator == "all":
        rules = _all_pairs(groups, counts, own, alpha, symmetric)
    else:
        rules = _negatives(query_groups, target_groups, alpha, symmetric)
    name = dispatch.choose(backend, query, target, rules)
    logits = functional.logsumexp(query, target, scale, rules, name)
    size = len(groups.columns) + 1
    sides = [_Side(query, target, groups.rows, groups.columns, size, counts, logits.query, own)]
    if logits.target is not None:
        counts = groups.column_counts
        sides.append(
            _Side(target, query, groups.columns, groups.rows, size, counts, logits.target, None)
        )
    if denominator == "pair":
        return [side.pair(scale) for side in sides]
    if denominator == "negatives":
        return [side.decoupled(scale) for side in sides]
    return [
        side.all(scale, *aside)
        for side, aside in zip(sides, _aside(logits.positive, rules, groups, own), strict=False)
    ]


def _negatives(query_groups: Tensor, target_groups: Tensor, alpha: float, symmetric: bool) -> Rules:
    """The rules of sums over the negatives: the groups are content ids."""
    labels = torch.full_like(query_groups, ELSEWHERE)
    return plain_rules(
        labels=labels, query_ids=query_groups, target_ids=target_groups, alpha=alpha,
        target_alpha=alpha, hardness="all", symmetric=symmetric,
    )  # fmt: skip


def _all_pairs(
    groups: Groups, counts: Tensor, own: Tensor | None, alpha: float, symmetric: bool
) -> Rules:
    """The rules of sums over all pairs, in which only negatives are weighted.

    The positive of a row is its group's first column. The sum leaves it out, so that a row with one
    positive keeps its digits near convergence. ``_aside`` says what to add.
    """
    m = len(groups.order)
    first = groups.order[groups.rows.clamp(max=m - 1)]
    query_ids = target_ids = owners = None
    if own is not None:
        # In a group of two, each takes the other. The first row of a larger group takes itself.
        second = groups.order[(groups.rows + 1).clamp(max=m - 1)]
        first = torch.where((first == own) & (counts == 1), second, first)
        query_ids, target_ids = own, torch.arange(m, device=own.device)
    if alpha:
        owners = groups.order[groups.columns]
    return plain_rules(
        labels=torch.where(counts > 0, first, ELSEWHERE), owners=owners, query_ids=query_ids,
        target_ids=target_ids, alpha=alpha, target_alpha=alpha,
        hardness="in_batch" if alpha else "all", symmetric=symmetric,
    )  # fmt: skip


def _aside(
    positive: Tensor, rules: Rules, groups: Groups, own: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the sums of ``_all_pairs`` leave out: in which rows, and its log-sum-exp (N,).

    Then the same of the columns. The first column of a group lacks the group's rows.
    """
    labels = rules.labels_of(positive)
    aside = labels >= 0 if own is None else (labels >= 0) & (labels != own)
    positive = torch.where(aside, positive, 0.0)  # it is NaN for a label elsewhere
    yield aside, positive
    sums = logsumexp_of_groups(positive, groups.rows, len(groups.order) + 1)
    places = torch.arange(len(groups.order), device=positive.device)
    aside = (groups.order[groups.columns] == places) & (groups.column_counts > 0)
    yield aside, torch.where(aside, take_groups(sums[:, None], groups.columns).squeeze(1), 0.0)


class _Side(NamedTuple):
    """The rows of one direction. In the other direction the columns take their place.

    Attributes:
        query, target: (N, D), (M, D).
        rows, columns: (N,), (M,) the numbers of their groups, below ``size``.
        counts: (N,) numbers of positives.
        lse: (N,) log-sum-exps.
        own: as in ``group_losses``.
    """

    query: Tensor
    target: Tensor
    rows: Tensor
    columns: Tensor
    size: int
    counts: Tensor
    lse: Tensor
    own: Tensor | None

    def all(self, scale: Tensor, aside: Tensor, positive: Tensor) -> GroupLosses:
        """The log-sum-exp over all pairs minus the mean logit of the positives.

        Args:
            aside: (N,) in which rows ``lse`` lacks positives.
            positive: (N,) the log-sum-exp of these.
        """
        mean = self._mean_logit(scale)
        several = torch.where(self.counts > 1, positive - mean, 0.0)
        losses = torch.where(aside, direction_loss(positive, self.lse) + several, self.lse - mean)
        return self._known(losses)

    def decoupled(self, scale: Tensor) -> GroupLosses:
        """The log-sum-exp over the negatives minus the mean logit of the positives."""
        empty = self.lse == -math.inf
        losses = self.lse.masked_fill(empty, 0.0) - self._mean_logit(scale)
        return self._known(losses.masked_fill(empty, 0.0))

    def pair(self, scale: Tensor) -> GroupLosses:
        """The mean loss of the positive pairs against the negatives."""
        sums, _ = pair_losses(
            self.query, self.target, scale, self.lse, self.rows, self.columns, self.own
        )
        return self._known(sums / self.counts.clamp(min=1))

    def _mean_logit(self, scale: Tensor) -> Tensor:
        query, target = (x.to(scale.dtype) for x in (self.query, self.target))
        sums = positive_sums(query, target, self.rows, self.columns, self.size, self.own)
        return scale * sums / self.counts.clamp(min=1)

    def _known(self, losses: Tensor) -> GroupLosses:
        return GroupLosses(torch.where(self.counts > 0, losses, 0.0), self.counts)
