"""The log-sum-exps of checked arguments, from which all losses are composed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llave_kernels import autograd, dispatch, losses, matryoshka, ops
from llave_kernels.precision import scale_tensor, widened
from llave_kernels.rules import Rules, biases_of
from llave_kernels.within import blocks, within_logsumexp


class ContrastiveLogits(NamedTuple):
    """The values that every loss is composed from. float32, or float64 for float64 inputs.

    Attributes:
        positive: (N,) logit of each row's positive, ``kappa s_{i,l_i}`` plus its biases.
        query: (N,) log-sum-exp of each row over its valid negatives, -inf without any.
        target: (M,) log-sum-exp of each column over its valid negatives, the rows whose positive it
            is not. None when not symmetric. The loss reads it at ``labels`` only.
    """

    positive: Tensor
    query: Tensor
    target: Tensor | None


class Logits(NamedTuple):
    """``ContrastiveLogits``, and what a call with ``within`` has besides.

    With K prefixes, each has K rows.

    Attributes:
        positive, query, target: as there.
        within: (N,) log-sum-exp of each row's negatives within the sides, -inf without any. None
            without ``within``.
    """

    positive: Tensor
    query: Tensor
    target: Tensor | None
    within: Tensor | None = None


def logsumexp(
    query: Tensor,
    target: Tensor,
    scale: float | Tensor,
    rules: Rules,
    backend: str,
    dims: tuple[int, ...] | None = None,
    sides: Sequence[str] = (),
) -> Logits:
    """The logits on the named backend.

    Args:
        dims: lengths of prefixes, which ascend. Default: the rows as they are.
        sides: the sides within which pairs count too.
    """
    scale = scale_tensor(scale, query)
    within = None
    if dims is not None and backend != matryoshka.BACKEND:
        return _prefix_by_prefix(query, target, scale, rules, backend, dims, sides)
    if dims is not None and sides:
        query, target = widened(query, target)  # so that gradients are added in float32
    if dims is not None:
        outputs = matryoshka.logsumexp(query, target, scale, dims, rules)
        if sides:
            within = _within_prefixes(query, target, scale, rules, backend, dims, sides)
    elif sides:
        outputs, within = within_logsumexp(query, target, scale, backend, rules, sides)
    elif autograd.serves(query, target, scale, *biases_of(rules)):
        outputs = autograd.logsumexp(query, target, scale, dispatch.named(backend), rules)
    else:
        outputs = ops.contrastive_logsumexp(query, target, scale, backend, *rules)[:3]
    positive, rows, columns = outputs
    return Logits(positive, rows, columns if rules.symmetric else None, within)


def _within_prefixes(
    query: Tensor,
    target: Tensor,
    scale: Tensor,
    rules: Rules,
    backend: str,
    dims: tuple[int, ...],
    sides: Sequence[str],
) -> Tensor:
    """(K, N) log-sum-exps within the sides, from one product of each side."""
    rules = rules._replace(row_limit=margin_limits(query, target, rules, backend, dims))
    found = blocks(query, target, rules, sides, dispatch.named(backend).margin_limit)
    return losses.joined(
        *(logsumexp(x.query, x.target, scale, x.rules, backend, dims).query for x in found)
    )


def margin_limits(
    query: Tensor,
    target: Tensor,
    rules: Rules,
    backend: str,
    dims: tuple[int, ...] | None,
) -> Tensor | None:
    """(N,) ``rules.row_limits``, or (K, N) for the prefixes of ``dims``. None without a margin."""
    if dims is not None:
        return matryoshka.margin_limits(query, target, rules, dims, backend)
    return rules.row_limits(query, target, dispatch.named(backend).margin_limit)


def _prefix_by_prefix(
    query: Tensor,
    target: Tensor,
    scale: float | Tensor,
    rules: Rules,
    backend: str,
    dims: tuple[int, ...],
    sides: Sequence[str],
) -> Logits:
    """The logits of prefixes on a backend that computes one prefix at a time."""
    positives, rows, columns, within = [], [], [], []
    wide = widened(query, target)  # so that gradients are added in float32
    for k, d in enumerate(dims):
        q, t = (matryoshka.truncated(x, d).to(query.dtype) for x in wide)
        found = logsumexp(q, t, scale, rules.of_prefix(k), backend, sides=sides)
        positives.append(found.positive)
        rows.append(found.query)
        if found.target is not None:
            columns.append(found.target)
        if found.within is not None:
            within.append(found.within)
    return Logits(
        torch.stack(positives),
        torch.stack(rows),
        torch.stack(columns) if columns else None,
        torch.stack(within) if within else None,
    )
