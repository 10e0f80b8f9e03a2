"""The public functions: defaults, and the losses composed from the log-sum-exps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llave_kernels import checks, dispatch, ops, transforms
from llave_kernels.backends import torch_strips
from llave_kernels.precision import accumulation_dtype, autocast
from llave_kernels.rules import HARDNESS_MODES, Rules, at_labels, default_owners

Function = TypeVar("Function", bound=Callable[..., Any])


class ContrastiveLogits(NamedTuple):
    """What every loss is composed from; float32, or float64 for float64 inputs.

    Attributes:
        positive: (N,) logit of each row's positive, ``kappa s_{i,l_i}``.
        query: (N,) log-sum-exp of each row over its valid negatives, -inf where it has none.
        target: (M,) log-sum-exp of each column over the rows whose positive it is not; None when
            not symmetric. The loss reads it at ``labels`` only.
    """

    positive: Tensor
    query: Tensor
    target: Tensor | None


def contrastive_logsumexp(
    query: Tensor,
    target: Tensor,
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
    backend: str = "auto",
) -> ContrastiveLogits:
    """Positive logits and both directions' log-sum-exps over the hardness-weighted negatives.

    The differentiable primitive: gradients reach ``query``, ``target`` and ``logit_scale``. The
    arguments are those of ``hardness_weighted_contrastive_loss``, which states them and what they
    raise.
    """
    query, target = autocast(query, target)
    scale, rules = resolve(
        query, target, logit_scale, alpha=alpha, hardness=hardness, symmetric=symmetric,
        target_alpha=target_alpha, labels=labels, owners=owners, query_ids=query_ids,
        target_ids=target_ids, false_negative_margin=false_negative_margin,
    )  # fmt: skip
    name = dispatch.choose(backend, query, target, rules)
    return logsumexp(query, target, scale, rules, name)


def hardness_weighted_contrastive_loss(
    query: Tensor,
    target: Tensor,
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
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Hardness-weighted contrastive loss of LLaVE (arXiv 2503.04812, eq. 4-6), fused.

    With ``s_ij = q_i . t_j``, each valid negative has the logit ``kappa s_ij + alpha h_ij
    sg(s_ij)``, the positive ``p_i = kappa s_{i,l_i}``, and ``L_i = softplus(logsumexp of the
    negatives - p_i)``. The symmetric loss averages that with the same over each positive's column.
    The N x M matrix is never stored. Rows are not normalised: pass unit-length rows for cosine
    similarity.

    Args:
        query: (N, D) float32, bfloat16, float16 or float64 (``torch`` backend), any strides.
        target: (M, D) with M >= N, same dtype and device. By default N positives, then blocks of N
            mined negatives, row i's in rows ``i + k N``.
        logit_scale: kappa = 1 / temperature, a positive number or a tensor of one element, which
            may require grad. It and the strengths must fit the dtype of the loss.
        alpha: hardness strength, >= 0. 0 is InfoNCE; the paper uses 9.
        hardness: which negatives carry the weight. ``"in_batch"``: columns owned by other rows
            (paper); ``"hard_negatives"``: the row's own mined negatives (EmbeddingGemma, alpha 5);
            ``"all"``: both.
        symmetric: also compute the target -> query direction, and average.
        target_alpha: hardness strength of the target -> query direction. Default: ``alpha``.
        labels: (N,) integer, column of each row's positive. Default ``arange(N)``.
        owners: (M,) integer, for each column the column of the positive it goes with (itself, for a
            positive). Default ``arange(M) % N``.
        query_ids: (N,) int64 content ids. A negative with its row's id duplicates the positive and
            is left out. Needs ``target_ids``.
        target_ids: (M,) int64 content ids. Needs ``query_ids``.
        false_negative_margin: leave out negatives owned by other rows whose similarity exceeds
            that of the positive by more than this (Qwen3-Embedding: 0.1). In the target direction
            the positive is the column's own. A row's own mined negatives are never left out by it.
            What equals the positive is kept, to an allowance for rounding (docs/numerics.md).
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (a loss per row).
        backend: ``"auto"`` or a name from ``available_backends()``.

    Returns:
        0-d tensor, or (N,) with ``reduction="none"``. float32, or float64 for float64 inputs. A row
        without a valid negative has loss 0 and gradient 0.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shape, device or value, or a named backend that does not support the
            call. On a GPU values of index tensors and of a tensor ``logit_scale`` are not checked:
            that would synchronise.
        RuntimeError: a named backend that cannot run on this machine; a second derivative;
            forward-mode differentiation (``torch.func.jvp``, dual numbers). ``torch.func.grad``,
            ``vjp``, ``jacrev``, ``vmap`` and ``functional_call`` work.

    Note:
        A similarity, a logit or a sum of losses beyond the range of float32 (float64 for float64
        inputs) makes the loss infinite or NaN. Only what is known on the host is an error.
    """
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    query, target = autocast(query, target)
    scale, rules = resolve(
        query, target, logit_scale, alpha=alpha, hardness=hardness, symmetric=symmetric,
        target_alpha=target_alpha, labels=labels, owners=owners, query_ids=query_ids,
        target_ids=target_ids, false_negative_margin=false_negative_margin,
    )  # fmt: skip
    name = dispatch.choose(backend, query, target, rules)
    needs_gradient = torch.is_grad_enabled() and any(
        t.requires_grad for t in (query, target, scale)
    )
    scalar = not symmetric and reduction != "none" and needs_gradient and not transforms.active()
    if name == torch_strips.NAME and scalar and not torch_strips.rounds_gradients(query):
        total = ops.one_direction_loss(query, target, scale, *rules)[0]
        return total / len(query) if reduction == "mean" else total
    logits = logsumexp(query, target, scale, rules, name)
    loss = -logsigmoid(logits.positive - logits.query)
    if logits.target is not None:
        loss = (
            loss - logsigmoid(logits.positive - at_labels(logits.target, rules.labels, len(query)))
        ) / 2
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def resolve(
    query: Tensor,
    target: Tensor,
    logit_scale: float | Tensor,
    *,
    alpha: float = 9.0,
    hardness: str = "in_batch",
    symmetric: bool = True,
    target_alpha: float | None = None,
    labels: Tensor | None = None,
    owners: Tensor | None = None,
    query_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    false_negative_margin: float | None = None,
) -> tuple[Tensor, Rules]:
    """Checked arguments as (0-d scale tensor on the device, rules)."""
    checks.embeddings(query, target)
    n, m, device = len(query), len(target), query.device
    dtype = accumulation_dtype(query.dtype)
    alpha = checks.strength("alpha", alpha, dtype)
    if target_alpha is None:
        target_alpha = alpha
    target_alpha = checks.strength("target_alpha", target_alpha, dtype)
    checks.one_of("hardness", hardness, HARDNESS_MODES)
    symmetric = checks.flag("symmetric", symmetric)
    margin = checks.margin(false_negative_margin, dtype)
    scale = checks.logit_scale(logit_scale, max(alpha, target_alpha), dtype, device)
    if labels is None:
        if m < n:
            raise ValueError(
                f"target has {m} rows for {n} queries: every query needs its positive; pass labels "
                "where several queries share one"
            )
        resolved_labels = torch.arange(n, device=device)
    else:
        resolved_labels = checks.columns("labels", labels, n, m, device, unique=symmetric)
    if owners is None:
        resolved_owners = default_owners(n, m, device)
    else:
        resolved_owners = checks.columns("owners", owners, m, m, device)
    checks.ids(query_ids, target_ids, n, m, device)
    rules = Rules(
        resolved_labels, resolved_owners, query_ids, target_ids, None, alpha, target_alpha,
        hardness, margin, symmetric,
    )  # fmt: skip
    return scale, rules


def shows_rules(function: Function) -> Function:
    """Show the rules and their defaults in the signature of a function that takes ``**rules``."""
    own = inspect.signature(function)
    rules = [x for x in inspect.signature(resolve).parameters.values() if x.kind is x.KEYWORD_ONLY]
    shown = [x for x in own.parameters.values() if x.kind is not x.VAR_KEYWORD]
    function.__signature__ = own.replace(parameters=shown + rules)  # type: ignore[attr-defined]
    return function


def logsumexp(
    query: Tensor, target: Tensor, scale: Tensor, rules: Rules, backend: str
) -> ContrastiveLogits:
    """``contrastive_logsumexp`` of what ``resolve`` returned, on the named backend."""
    positive, rows, columns, _ = ops.contrastive_logsumexp(query, target, scale, backend, *rules)
    return ContrastiveLogits(positive, rows, columns if rules.symmetric else None)
