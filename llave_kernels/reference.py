"""The loss written densely, to be read beside the paper (arXiv 2503.04812).

The tests compare with it. It stores the N x M matrix, and autograd differentiates it. It works in
any float dtype. Run it in float64. It is not a backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

INF = float("inf")


def reference_logsumexp(
    query: Tensor, target: Tensor, **rules: object
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The logits of positives (N,), and the log-sum-exps of rows (N,) and of columns (M,).

    The last is None if not symmetric. ``rules`` are as in ``similarity_logsumexp``.
    """
    allowance = tie_allowance(query, target, rules.get("labels"))  # type: ignore[arg-type]
    return similarity_logsumexp(query @ target.T, allowance=allowance, **rules)  # type: ignore[arg-type]


def reference_within(query: Tensor, target: Tensor, **rules: object) -> Tensor:
    """(N,) log-sum-exps of the negatives within the sides. ``rules``: see ``within_logits``."""
    z = within_logits(query, target, **rules)  # type: ignore[arg-type]
    empty = (z == -INF).all(1)  # stays finite, or autograd would return NaN
    return torch.where(empty, -INF, z.masked_fill(empty[:, None], 0.0).logsumexp(1))


def within_logits(
    query: Tensor,
    target: Tensor,
    *,
    within: Sequence[str],
    logit_scale: float | Tensor = 50.0,
    labels: Tensor | None = None,
    owners: Tensor | range | None = None,
    query_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    false_negative_margin: float | None = None,
    **_: object,
) -> Tensor:
    """(N, K) logits of each row's pairs within the sides: N of queries, then M of targets.

    They carry no weight. A pair that does not count is -inf.
    """
    n, m = len(query), len(target)
    each = torch.arange(max(n, m), device=query.device)
    if owners is None or isinstance(owners, range):
        owners = each[:m] % (n if owners is None else m)
    rows = each[:n] if labels is None else labels
    positive = target[rows]
    limit = query.new_full((n, 1), INF)
    if false_negative_margin is not None:
        s, allowance = (query * positive).sum(1).detach(), tie_allowance(query, target, labels)
        limit = margin_limits(s, allowance, false_negative_margin)[:, None]
    blocks: list[tuple[Tensor, Tensor, Tensor | None, Any]] = []
    if "query" in within:
        blocks.append((query @ query.T, each[:n, None] == each[:n], query_ids, slice(n)))
    if "target" in within:
        own_columns = (rows[:, None] == owners) | (rows[:, None] == each[:m])
        blocks.append((positive @ target.T, own_columns, target_ids, rows))
    logits = []
    for s, left_out, ids, own in blocks:
        left_out = left_out | (s > limit)
        if ids is not None:
            left_out = left_out | (ids[own, None] == ids)
        logits.append((logit_scale * s).masked_fill(left_out, -INF))
    return torch.cat(logits, 1)


def margin_limits(positive: Tensor, allowance: Tensor, margin: float) -> Tensor:
    """(N,) similarities above which the margin leaves a negative out.

    The margin is at least the allowance away from 0. So all ties are treated alike.
    """
    pushed = torch.full_like(positive, margin)
    pushed = torch.where(pushed < 0, pushed.clamp(max=-allowance), pushed.clamp(min=allowance))
    return positive + pushed


def tie_allowance(query: Tensor, target: Tensor, labels: Tensor | None = None) -> Tensor:
    """(N,) bound on the difference that rounding makes between two equal similarities.

    It depends on the positive pair's terms ``q_k t_k``. ``a`` is the sum of their absolute values.
    ``r`` is their norm over ``a``. ``c`` is the largest absolute partial sum over ``a``, taken
    after each eighth of the terms. The allowance is
    ``eps a (2 sqrt(D (r^2 + c^2)) + D c^2 / 4)``. The first part is for errors that average out.
    The second is for errors that add up, where the partial sums grow steadily.
    """
    terms = (query * target[: len(query)] if labels is None else query * target[labels]).detach()
    d, numbers = terms.shape[1], torch.finfo(terms.dtype)
    a = terms.abs().sum(1)
    shares = terms / a.clamp(min=numbers.tiny)[:, None]
    partial = torch.stack([x.sum(1) for x in shares.tensor_split(8, dim=1)]).cumsum(0)
    c2, r2 = partial.abs().amax(0).square(), shares.square().sum(1)
    return numbers.eps * a * (2 * (d * (r2 + c2)).sqrt() + d * c2 / 4)


def similarity_logsumexp(
    s: Tensor,
    *,
    logit_scale: float | Tensor = 50.0,
    alpha: float = 9.0,
    hardness: str = "in_batch",
    symmetric: bool = True,
    target_alpha: float | None = None,
    labels: Tensor | None = None,
    owners: Tensor | range | None = None,
    query_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    query_bias: Tensor | None = None,
    target_bias: Tensor | None = None,
    false_negative_margin: float | None = None,
    allowance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``reference_logsumexp`` of similarities (N, M). ``allowance`` (N,): see ``tie_allowance``."""
    n, m = s.shape
    labels = torch.arange(n, device=s.device) if labels is None else labels
    if owners is None or isinstance(owners, range):
        owners = torch.arange(m, device=s.device) % (n if owners is None else m)
    positive = s.gather(1, labels[:, None]).squeeze(1)
    bias = torch.zeros_like(s)
    if query_bias is not None:
        bias = bias + query_bias[:, None]
    if target_bias is not None:
        bias = bias + target_bias

    is_positive = labels[:, None] == torch.arange(m, device=s.device)
    own = labels[:, None] == owners
    weighted = {"in_batch": ~own, "hard_negatives": own, "all": torch.ones_like(own)}[hardness]
    valid = ~is_positive
    if query_ids is not None and target_ids is not None:
        valid = valid & (query_ids[:, None] != target_ids)
    row_valid = column_valid = valid
    if false_negative_margin is not None:
        allowance = torch.zeros_like(positive) if allowance is None else allowance
        rows_limit = margin_limits(positive.detach(), allowance, false_negative_margin)
        columns_limit = s.new_full((m,), INF).index_put((labels,), rows_limit)
        row_valid = valid & ~(~own & (s > rows_limit[:, None]))
        column_valid = valid & ~(~own & (s > columns_limit))

    def logsumexp(alpha: float, valid: Tensor, dim: int) -> Tensor:
        z = logit_scale * s + alpha * weighted * s.detach() + bias
        empty = ~valid.any(dim, keepdim=True)  # stays finite, or autograd would return NaN
        z = z.masked_fill(~valid & ~empty, -INF)
        return torch.where(empty.squeeze(dim), -INF, z.logsumexp(dim))

    target_alpha = alpha if target_alpha is None else target_alpha
    rows = logsumexp(alpha, row_valid, 1)
    columns = logsumexp(target_alpha, column_valid, 0) if symmetric else None
    return logit_scale * positive + bias.gather(1, labels[:, None]).squeeze(1), rows, columns


def reference_loss(
    query: Tensor, target: Tensor, *, within: Sequence[str] = (), **rules: object
) -> Tensor:
    """The hardness-weighted contrastive loss. ``rules`` are as in ``similarity_loss``."""
    allowance = tie_allowance(query, target, rules.get("labels"))  # type: ignore[arg-type]
    more = reference_within(query, target, within=within, **rules) if within else None
    return similarity_loss(query @ target.T, allowance=allowance, within=more, **rules)  # type: ignore[arg-type]


def reference_matryoshka(
    query: Tensor,
    target: Tensor,
    *,
    matryoshka_dims: Sequence[int],
    matryoshka_weights: Sequence[float] | None = None,
    **rules: object,
) -> Tensor:
    """The weighted sum of the losses of the truncated, normalised rows (arXiv 2205.13147)."""
    weights = [1.0] * len(matryoshka_dims) if matryoshka_weights is None else matryoshka_weights
    losses = []
    for d, weight in zip(matryoshka_dims, weights, strict=True):
        q, t = (torch.nn.functional.normalize(x[:, :d], dim=1) for x in (query, target))
        losses.append(weight * reference_loss(q, t, **rules))  # type: ignore[arg-type]
    return torch.stack(losses).sum(0)


def similarity_loss(
    s: Tensor, *, reduction: str = "mean", within: Tensor | None = None, **rules: object
) -> Tensor:
    """``reference_loss`` of similarities (N, M). ``rules`` are as in ``similarity_logsumexp``.

    ``within`` (N,): see ``reference_within``.
    """

    def with_more(lse: Tensor) -> Tensor:
        if within is None:
            return lse
        # logaddexp has no derivative where both are -inf.
        empty = (lse == -INF) & (within == -INF)
        return torch.where(empty, -INF, torch.logaddexp(lse, within.masked_fill(empty, 0.0)))

    positive, rows, columns = similarity_logsumexp(s, **rules)  # type: ignore[arg-type]
    loss = -torch.nn.functional.logsigmoid(positive - with_more(rows))
    if columns is not None:
        labels = rules.get("labels")
        own = with_more(columns[: len(s)] if labels is None else columns[labels])  # type: ignore[index]
        loss = (loss - torch.nn.functional.logsigmoid(positive - own)) / 2
    return {"mean": loss.mean(), "sum": loss.sum(), "none": loss}[reduction]


def reference_sigmoid_loss(
    query: Tensor,
    target: Tensor,
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    labels: Tensor | None = None,
    query_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The sigmoid loss of SigLIP (arXiv 2303.15343). ``mean`` is over the rows."""
    z = logit_scale * query @ target.T + logit_bias
    labels = torch.arange(len(z), device=z.device) if labels is None else labels
    positive = labels[:, None] == torch.arange(z.shape[1], device=z.device)
    loss = -torch.nn.functional.logsigmoid(torch.where(positive, z, -z))
    if query_ids is not None and target_ids is not None:
        loss = loss.masked_fill(~positive & (query_ids[:, None] == target_ids), 0.0)
    rows = loss.sum(1)
    return {"mean": rows.mean(), "sum": rows.sum(), "none": rows}[reduction]


def reference_supervised_loss(
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
) -> Tensor:
    """``llave_kernels.supervised_contrastive_loss``, row by row."""
    own = torch.zeros(len(query), len(query if target is None else target), device=query.device)
    if target is None:
        target, own = query, own.fill_diagonal_(1)
    groups = query_groups if target_groups is None else target_groups
    s, equal = query @ target.T, query_groups[:, None] == groups
    positives = equal & (own == 0)

    def row(s: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        p = (logit_scale * s)[positives]
        z = (logit_scale * s + alpha * s.detach())[negatives]
        if not len(p) or (denominator != "all" and not len(z)):
            return 0.0 * s.sum()
        if denominator == "pair":
            return -torch.nn.functional.logsigmoid(p - z.logsumexp(0)).mean()
        return (torch.cat([p, z]) if denominator == "all" else z).logsumexp(0) - p.mean()

    sides = [(s, positives, ~equal)] + ([(s.T, positives.T, ~equal.T)] if symmetric else [])
    losses = [torch.stack([row(*x) for x in zip(*side, strict=True)]) for side in sides]
    if reduction == "none":
        return losses[0]
    counts = [side[1].any(1).sum().clamp(min=1) if reduction == "mean" else 1 for side in sides]
    return torch.stack([x.sum() / n for x, n in zip(losses, counts, strict=True)]).mean()
