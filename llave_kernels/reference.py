"""The loss written densely, to be read beside the paper (arXiv 2503.04812).

The truth of every test.
It materialises the N x M matrix, is differentiable by autograd and works in any float dtype; run
it in float64. It is not a backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

INF = float("inf")


def reference_logsumexp(
    query: Tensor, target: Tensor, **rules: object
) -> tuple[Tensor, Tensor, Tensor | None]:
    """p (N,), n (N,) and n' (M,), which is None if not symmetric; ``rules`` as below."""
    allowance = tie_allowance(query, target, rules.get("labels"))  # type: ignore[arg-type]
    return similarity_logsumexp(query @ target.T, allowance=allowance, **rules)  # type: ignore[arg-type]


def tie_allowance(query: Tensor, target: Tensor, labels: Tensor | None = None) -> Tensor:
    """(N,) how far rounding may lift a similarity that equals the positive's above it.

    ``eps (2 sqrt(D) sum_k |q_k t_k| + D |sum_k q_k t_k| / 4)`` of the positive pair: errors that
    average out, and errors that add up where the partial sums grow steadily.
    """
    terms = (query * target[: len(query)] if labels is None else query * target[labels]).detach()
    d = terms.shape[1]
    spread, steady = 2 * d**0.5 * terms.abs().sum(1), d / 4 * terms.sum(1).abs()
    return torch.finfo(terms.dtype).eps * (spread + steady)


def similarity_logsumexp(
    s: Tensor,
    *,
    logit_scale: float | Tensor = 50.0,
    alpha: float = 9.0,
    hardness: str = "in_batch",
    symmetric: bool = True,
    target_alpha: float | None = None,
    labels: Tensor | None = None,
    owners: Tensor | None = None,
    query_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    false_negative_margin: float | None = None,
    allowance: float | Tensor = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same of similarities (N, M). ``allowance``: (N,), see ``tie_allowance``."""
    n, m = s.shape
    labels = torch.arange(n, device=s.device) if labels is None else labels
    owners = torch.arange(m, device=s.device) % n if owners is None else owners
    positive = s.gather(1, labels[:, None]).squeeze(1)

    is_positive = labels[:, None] == torch.arange(m, device=s.device)
    own = labels[:, None] == owners
    weighted = {"in_batch": ~own, "hard_negatives": own, "all": torch.ones_like(own)}[hardness]
    valid = ~is_positive
    if query_ids is not None and target_ids is not None:
        valid = valid & (query_ids[:, None] != target_ids)
    row_valid = column_valid = valid
    if false_negative_margin is not None:
        rows_limit = positive.detach() + allowance + false_negative_margin
        columns_limit = s.new_full((m,), INF).index_put((labels,), rows_limit)
        row_valid = valid & ~(~own & (s > rows_limit[:, None]))
        column_valid = valid & ~(~own & (s > columns_limit))

    def logsumexp(alpha: float, valid: Tensor, dim: int) -> Tensor:
        z = logit_scale * s + alpha * weighted * s.detach()
        empty = ~valid.any(dim, keepdim=True)  # a finite stand-in keeps autograd free of NaN
        z = z.masked_fill(~valid & ~empty, -INF)
        return torch.where(empty.squeeze(dim), -INF, z.logsumexp(dim))

    target_alpha = alpha if target_alpha is None else target_alpha
    rows = logsumexp(alpha, row_valid, 1)
    columns = logsumexp(target_alpha, column_valid, 0) if symmetric else None
    return logit_scale * positive, rows, columns


def reference_loss(query: Tensor, target: Tensor, **rules: object) -> Tensor:
    """The hardness-weighted contrastive loss; ``rules`` as in ``similarity_loss``."""
    allowance = tie_allowance(query, target, rules.get("labels"))  # type: ignore[arg-type]
    return similarity_loss(query @ target.T, allowance=allowance, **rules)  # type: ignore[arg-type]


def similarity_loss(s: Tensor, *, reduction: str = "mean", **rules: object) -> Tensor:
    """The same of similarities (N, M); ``rules`` as in ``similarity_logsumexp``."""
    positive, rows, columns = similarity_logsumexp(s, **rules)  # type: ignore[arg-type]
    loss = -torch.nn.functional.logsigmoid(positive - rows)
    if columns is not None:
        labels = rules.get("labels")
        own = columns[: len(s)] if labels is None else columns[labels]  # type: ignore[index]
        loss = (loss - torch.nn.functional.logsigmoid(positive - own)) / 2
    return {"mean": loss.mean(), "sum": loss.sum(), "none": loss}[reduction]
