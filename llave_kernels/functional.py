"""The public functions: defaults, and the losses composed from the log-sum-exps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from llave_kernels import autograd, checks, dispatch, logits, losses, matryoshka, ops, transforms
from llave_kernels.logits import ContrastiveLogits, Logits
from llave_kernels.precision import accumulation_dtype, autocast, scale_tensor
from llave_kernels.rules import (
    HARDNESS_MODES,
    RuleArguments,
    Rules,
    at_labels,
    biases_of,
    default_owners,
)

Function = TypeVar("Function", bound=Callable[..., Any])


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
    owners: Tensor | range | None = None,
    query_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    query_bias: Tensor | None = None,
    target_bias: Tensor | None = None,
    false_negative_margin: float | None = None,
    **unknown: object,
) -> tuple[float | Tensor, Rules]:
    """Check the arguments. Return the scale, a number or a tensor (), and the rules."""
    if unknown:
        wrong, taken = ", ".join(map(repr, unknown)), ", ".join(RuleArguments.__annotations__)
        raise TypeError(f"unexpected keyword argument {wrong}; the rules are {taken}")
    checks.embeddings(query, target)
    n, m, device = query.shape[0], target.shape[0], query.device
    dtype = accumulation_dtype(query.dtype)
    alpha = checks.strength("alpha", alpha, dtype)
    if target_alpha is None:
        target_alpha = alpha
    target_alpha = checks.strength("target_alpha", target_alpha, dtype)
    checks.one_of("hardness", hardness, HARDNESS_MODES)
    symmetric = checks.flag("symmetric", symmetric)
    margin = checks.margin(false_negative_margin, dtype)
    scale = checks.logit_scale(logit_scale, max(alpha, target_alpha), dtype, device)
    found: Tensor | None = None
    if isinstance(owners, range):
        checks.every_column("owners", owners, m)
    else:
        found = owners
    labels, found = checks.rule_tensors(
        query, target, labels=labels, owners=found, query_ids=query_ids, target_ids=target_ids,
        query_bias=query_bias, target_bias=target_bias, symmetric=symmetric,
    )  # fmt: skip
    if owners is None:
        found = default_owners(n, m, device)
    # In one go: torch 2.8 cannot trace _replace.
    rules = Rules(
        labels, found, query_ids, target_ids, None, None, query_bias, target_bias, alpha,
        target_alpha, hardness, margin, symmetric,
    )  # fmt: skip
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

    This is the differentiable primitive. Gradients reach ``query``, ``target``, ``logit_scale`` and
    the biases. Arguments and errors are as in ``hardness_weighted_contrastive_loss``.
    """
    found = logits_of(query, target, logit_scale=logit_scale, backend=backend, **rules)
    return ContrastiveLogits(found.positive, found.query, found.target)


@shows_rules
def matryoshka_logsumexp(
    query: Tensor,
    target: Tensor,
    dims: Sequence[int],
    *,
    logit_scale: float | Tensor = 50.0,
    within: Sequence[str] = (),
    backend: str = "auto",
    **rules: Unpack[RuleArguments],
) -> ContrastiveLogits:
    """``contrastive_logsumexp`` of the first ``dims[k]`` columns of the embeddings, for each k.

    The truncated rows are divided by their length, as ``torch.nn.functional.normalize`` does. The
    ``torch`` backend computes one matrix product for all dims. The others compute dim after dim.

    Args:
        dims: K different lengths from 1 to D, in any order.
        query, target, logit_scale, within, backend, rules: as in
            ``hardness_weighted_contrastive_loss``. ``false_negative_margin`` is compared with the
            cosines of each dim. With ``within`` the ``torch`` backend computes dim after dim too.

    Returns:
        The same with a first dimension of K, in the order of ``dims``.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``hardness_weighted_contrastive_loss``.
    """
    if dims is None:
        raise TypeError("dims must be a list or tuple of numbers, got None")
    found = logits_of(query, target, logit_scale=logit_scale, dims=dims, backend=backend, **rules)
    return ContrastiveLogits(found.positive, found.query, found.target)


def logits_of(
    query: Tensor,
    target: Tensor,
    *,
    logit_scale: float | Tensor,
    backend: str,
    within: Sequence[str] = (),
    dims: Sequence[int] | None = None,
    **rules: Unpack[RuleArguments],
) -> Logits:
    """``contrastive_logsumexp``, or with ``dims`` ``matryoshka_logsumexp``, and those within."""
    query, target = autocast(query, target)
    scale, resolved = resolve(query, target, logit_scale, **rules)
    sides = checks.sides("within", within, resolved)
    nested = matryoshka.checked(dims, None, query.shape[1])
    name = dispatch.choose(backend, query, target, resolved)
    found = logits.logsumexp(query, target, scale, resolved, name, nested and nested.dims, sides)
    if nested is None or dims is None:
        return found
    order = [nested.dims.index(int(d)) for d in dims]
    positive, rows, *others = found
    others = [None if x is None else x[order] for x in others]
    return Logits(positive[order], rows[order], *others)


@shows_rules
def hardness_weighted_contrastive_loss(
    query: Tensor,
    target: Tensor,
    *,
    logit_scale: float | Tensor = 50.0,
    within: Sequence[str] = (),
    reduction: str = "mean",
    backend: str = "auto",
    matryoshka_dims: Sequence[int] | None = None,
    matryoshka_weights: Sequence[float] | None = None,
    **rules: Unpack[RuleArguments],
) -> Tensor:
    """Hardness-weighted contrastive loss of LLaVE (arXiv 2503.04812, eq. 4-6), fused.

    The similarity of query i and target j is ``s_ij = q_i . t_j``. A valid negative has the logit
    ``kappa s_ij + alpha h_ij sg(s_ij)``. ``h_ij`` is 1 if the negative carries the hardness weight,
    else 0. ``sg`` stops the gradient. The positive has the logit ``p_i = kappa s_{i,l_i}``. Biases
    of the row and of the column are added to both. The loss of a row is ``L_i = softplus(logsumexp
    of the negatives - p_i)``. The symmetric loss averages it with the same loss over the positive's
    column.

    A large N x M matrix is never stored. Rows are not normalised. Pass rows of unit length for
    cosine similarity.

    Args:
        query: (N, D) float32, bfloat16, float16 or float64 (``torch`` backend), any strides.
        target: (M, D), same dtype and device. By default the first N rows are the positives, and
            blocks of N mined negatives follow. Row i's are then in rows ``i + k N``. Without
            ``labels``, M must be at least N.
        logit_scale: kappa = 1 / temperature, a positive number or a tensor of one element, which
            may require grad. kappa, alpha and their sum must be finite in the dtype of the loss.
        within: sides whose own pairs are negatives too, of ``"query"`` and ``"target"``
            (Qwen3-Embedding: both). Each direction's sum then also has, for row i,

            - ``"query"``: query i with every query that has another id.
            - ``"target"``: row i's positive with every target that has another id, but not with
              those that it owns: itself and row i's mined negatives.

            These pairs carry no hardness weight. The margin leaves one out if its similarity
            exceeds that of row i's positive by more. Default: none.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (a loss per row).
        backend: ``"auto"`` or a name from ``available_backends()``.
        matryoshka_dims: different lengths from 1 to D, such as ``(64, 256, 768)``, in any order.
            The loss is then the weighted sum of the losses of the first 64, 256, 768 columns. They
            are normalised for each. Default: the loss of the rows as they are.
        matryoshka_weights: a number for each of ``matryoshka_dims``. Default: 1 each.
        rules: which pairs count and how they are weighted: ``alpha``, ``hardness``, ``symmetric``,
            ``target_alpha``, ``false_negative_margin``, ``labels``, ``owners``, ``query_ids``,
            ``target_ids``, ``query_bias``, ``target_bias``. See ``RuleSettings`` and
            ``RuleTensors``.

    Returns:
        0-d tensor, or (N,) with ``reduction="none"``. float32, or float64 for float64 inputs. A row
        without a valid negative has loss 0 and gradient 0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: wrong shape, device or value, or a named backend that does not support the
            call. On a GPU, the values of index tensors, of biases and of a tensor ``logit_scale``
            are not checked, because that would synchronise.
        RuntimeError: a named backend cannot run on this machine; a second derivative;
            forward-mode differentiation (``torch.func.jvp``, dual numbers). ``torch.func.grad``,
            ``vjp``, ``jacrev``, ``vmap`` and ``functional_call`` work.

    Note:
        A similarity, a logit or a sum of losses may exceed the range of float32 (float64 for
        float64 inputs). The loss is then infinite or NaN. Only a value known on the host raises an
        error.
    """
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    query, target = autocast(query, target)
    scale, resolved = resolve(query, target, logit_scale, **rules)
    sides = checks.sides("within", within, resolved)
    nested = matryoshka.checked(matryoshka_dims, matryoshka_weights, query.shape[1])
    name = dispatch.choose(backend, query, target, resolved)
    if reduction != "none" and not sides:
        weight = 1 / query.shape[0] if reduction == "mean" else 1.0
        total = _total(query, target, scale, resolved, name, nested, weight)
        if total is not None:
            return total
    found = logits.logsumexp(query, target, scale, resolved, name, nested and nested.dims, sides)
    target_lse = found.target
    if target_lse is not None:
        target_lse = at_labels(target_lse, resolved.labels, len(query))
    loss = losses.loss_of_rows(found.positive, found.query, target_lse, found.within)
    if nested is not None:
        loss = nested.summed(loss)
    return losses.reduce(loss, reduction)


def _total(
    query: Tensor,
    target: Tensor,
    scale: float | Tensor,
    rules: Rules,
    backend: str,
    nested: matryoshka.Matryoshka | None,
    weight: float,
) -> Tensor | None:
    """``weight`` times the sum of the rows' losses (), or None where there is no shorter way."""
    merges = _merges_gradients(backend, query, target, scale, rules)
    if autograd.serves(query, target, scale, *biases_of(rules)):
        if nested is None:
            run = autograd.one_direction_loss if merges else autograd.total_loss
            return run(query, target, scale, dispatch.named(backend), rules, weight)
        if merges and backend == matryoshka.BACKEND:
            merging = matryoshka.OneDirection(nested)
            return autograd.one_direction_loss(query, target, scale, merging, rules, weight)
    elif merges and nested is None:
        scale = scale_tensor(scale, query)
        return weight * ops.one_direction_loss(query, target, scale, backend, *rules)[0]
    return None


def _merges_gradients(
    name: str, query: Tensor, target: Tensor, scale: float | Tensor, rules: Rules
) -> bool:
    """Whether gradients are computed along with a total loss, as ``OneDirection`` does."""
    if rules.symmetric or transforms.active() or not torch.is_grad_enabled():
        return False
    inputs = query, target, scale, *biases_of(rules)
    learns = any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
    return learns and dispatch.one_direction(name, query) is not None
