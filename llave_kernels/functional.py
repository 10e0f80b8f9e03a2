"""The public functions: defaults, and the losses composed from the log-sum-exps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from llave_kernels import checks, dispatch, losses, ops, transforms
from llave_kernels.precision import accumulation_dtype, autocast
from llave_kernels.rules import HARDNESS_MODES, RuleArguments, Rules, at_labels, default_owners

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
    rules = Rules(
        labels, owners, query_ids, target_ids, None, alpha, target_alpha, hardness, margin,
        symmetric,
    )  # fmt: skip
    rules = checks.rule_tensors(rules, query, target)
    if owners is None:
        rules = rules._replace(owners=default_owners(n, m, device))
    return scale, rules


def shows_rules(function: Function) -> Function:
    """Show the rules and their defaults in the signature of a function that takes ``**rules``."""
    own, taken = (inspect.signature(f) for f in (function, resolve))
    *shown, _ = own.parameters.values()
    shown += [x for x in taken.parameters.values() if x.kind is x.KEYWORD_ONLY]
    function.__signature__ = own.replace(parameters=shown)  # type: ignore[attr-defined]
    return function


@shows_rules
def contrastive_logsumexp(
    query: Tensor,
    target: Tensor,
    *,
    logit_scale: float | Tensor = 50.0,
    backend: str = "auto",
    **rules: Unpack[RuleArguments],
) -> ContrastiveLogits:
    """Positive logits and both directions' log-sum-exps over the hardness-weighted negatives.

    The differentiable primitive: gradients reach ``query``, ``target`` and ``logit_scale``. The
    arguments are those of ``hardness_weighted_contrastive_loss``, which states them and what they
    raise.
    """
    query, target = autocast(query, target)
    scale, resolved = resolve(query, target, logit_scale, **rules)
    name = dispatch.choose(backend, query, target, resolved)
    return logsumexp(query, target, scale, resolved, name)


@shows_rules
def hardness_weighted_contrastive_loss(
    query: Tensor,
    target: Tensor,
    *,
    logit_scale: float | Tensor = 50.0,
    reduction: str = "mean",
    backend: str = "auto",
    **rules: Unpack[RuleArguments],
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
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (a loss per row).
        backend: ``"auto"`` or a name from ``available_backends()``.
        rules: which pairs count, and how they weigh: ``alpha``, ``hardness``, ``symmetric``,
            ``target_alpha``, ``false_negative_margin``, ``labels``, ``owners``, ``query_ids``,
            ``target_ids``. ``RuleArguments`` states them.

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
    scale, resolved = resolve(query, target, logit_scale, **rules)
    name = dispatch.choose(backend, query, target, resolved)
    if _takes_one_direction(name, query, target, scale, resolved, reduction):
        total = ops.one_direction_loss(query, target, scale, name, *resolved)[0]
        return total / len(query) if reduction == "mean" else total
    logits = logsumexp(query, target, scale, resolved, name)
    target_lse = logits.target
    if target_lse is not None:
        target_lse = at_labels(target_lse, resolved.labels, len(query))
    loss = losses.loss_of_rows(logits.positive, logits.query, target_lse)
    return losses.reduce(loss, reduction)


def _takes_one_direction(
    name: str, query: Tensor, target: Tensor, scale: Tensor, rules: Rules, reduction: str
) -> bool:
    """Whether gradients are worth making along with the loss: the upstream one is a scalar."""
    if rules.symmetric or reduction == "none" or transforms.active():
        return False
    learns = any(x.requires_grad for x in (query, target, scale))
    merges = dispatch.one_direction(name, query) is not None
    return learns and torch.is_grad_enabled() and merges


def logsumexp(
    query: Tensor, target: Tensor, scale: Tensor, rules: Rules, backend: str
) -> ContrastiveLogits:
    """``contrastive_logsumexp`` of what ``resolve`` returned, on the named backend."""
    positive, rows, columns, _ = ops.contrastive_logsumexp(query, target, scale, backend, *rules)
    return ContrastiveLogits(positive, rows, columns if rules.symmetric else None)
