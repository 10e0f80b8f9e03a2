"""The sigmoid loss of SigLIP (arXiv 2303.15343)."""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from llave_kernels import autograd, checks, dispatch, sigmoid_ops, transforms
from llave_kernels.precision import accumulation_dtype, autocast, scale_tensor
from llave_kernels.rules import Rules, plain_rules


class SigmoidPairs(TypedDict, total=False):
    """What the sigmoid losses know of the pairs of queries (N, D) and targets (M, D).

    Attributes:
        labels: (N,) integer, column of each row's positive. Default: ``arange(N)``.
        query_ids: (N,) int64 content ids. A pair of equal ids that is no positive is left out.
            Needs ``target_ids``. Default: none.
        target_ids: (M,) int64 content ids. Needs ``query_ids``.
    """

    labels: Tensor | None
    query_ids: Tensor | None
    target_ids: Tensor | None


def sigmoid_contrastive_loss(
    query: Tensor,
    target: Tensor,
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    reduction: str = "mean",
    backend: str = "auto",
    **pairs: Unpack[SigmoidPairs],
) -> Tensor:
    """Sigmoid loss of SigLIP (arXiv 2303.15343), fused.

    Every pair is a yes-or-no question. The logit of query i and target j is
    ``z_ij = kappa q_i . t_j + b``. The loss of a row is the sum of ``softplus(-z_ij)`` for its
    positive and of ``softplus(z_ij)`` for every other column.

    A large N x M matrix is never stored. One pass computes the loss and all gradients of ``"mean"``
    and ``"sum"``. Rows are not normalised. Pass rows of unit length for cosine similarity.

    Args:
        query: (N, D) float32, bfloat16, float16 or float64 (``torch`` backend), any strides.
        target: (M, D), same dtype and device. Without ``labels``, M must be at least N.
        logit_scale: kappa, a positive number or a tensor of one element, which may require grad.
            SigLIP starts at 10.
        logit_bias: b, a finite number or a tensor of one element, which may require grad. SigLIP
            starts at -10.
        reduction: ``"mean"`` is the sum over all pairs divided by N, as in the paper. ``"sum"`` is
            not divided. ``"none"`` gives the sum of each row.
        backend: ``"auto"`` or a name from ``available_backends()``.
        pairs: which pairs are positive and which are left out: ``labels``, ``query_ids``,
            ``target_ids``. See ``SigmoidPairs``.

    Returns:
        0-d tensor, or (N,) with ``reduction="none"``. float32, or float64 for float64 inputs.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``hardness_weighted_contrastive_loss``.

    Example:
        >>> query, target = (torch.nn.functional.normalize(torch.randn(8, 32), dim=1) for _ in "qt")
        >>> loss = sigmoid_contrastive_loss(query, target, logit_scale=10.0, logit_bias=-10.0)
    """
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    query, target = autocast(query, target)
    call = resolve(query, target, logit_scale, logit_bias, backend, **pairs)
    if reduction == "none":
        return rows(call)
    total = losses_and_sum(call)[0]
    return total / query.shape[0] if reduction == "mean" else total


class Call(NamedTuple):
    """Checked arguments. Scale and bias are tensors ()."""

    query: Tensor
    target: Tensor
    scale: Tensor
    bias: Tensor
    rules: Rules
    backend: str


def _flat(call: Call) -> tuple[Any, ...]:
    """The arguments of the operators."""
    rules = call.rules
    inputs = call.query, call.target, call.scale, call.bias
    return *inputs, rules.labels, rules.query_ids, rules.target_ids, call.backend


def resolve(
    query: Tensor,
    target: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    backend: str,
    *,
    labels: Tensor | None = None,
    query_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
) -> Call:
    """Check the arguments and choose the backend."""
    checks.embeddings(query, target)
    dtype, device = accumulation_dtype(query.dtype), query.device
    scale = checks.logit_scale(logit_scale, 0.0, dtype, device)
    bias = checks.logit_bias(logit_bias, dtype, device)
    labels, _ = checks.rule_tensors(
        query, target, labels=labels, owners=None, query_ids=query_ids, target_ids=target_ids,
        symmetric=False,
    )  # fmt: skip
    rules = plain_rules(labels=labels, query_ids=query_ids, target_ids=target_ids)
    name = dispatch.choose_sigmoid(backend, query, target, rules)
    return Call(query, target, scale_tensor(scale, query), scale_tensor(bias, query), rules, name)


def rows(call: Call) -> Tensor:
    """(N,) losses of the rows. Each has an upstream gradient of its own."""
    losses_of_rows: Tensor = sigmoid_ops.sigmoid_rows(*_flat(call))
    return losses_of_rows


def losses_and_sum(call: Call) -> tuple[Tensor, Tensor]:
    """The sum of the rows' losses (), and these (N,) without a gradient.

    If a gradient is asked for, it is computed along with the loss.
    """
    inputs = call.query, call.target, call.scale, call.bias
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if not learns or transforms.active():
        found = rows(call)
        return found.sum(), found.detach()
    if autograd.serves(*inputs):
        total, found = sigmoid_ops.EagerLoss.apply(*call)
    else:
        total, found = sigmoid_ops.sigmoid_loss(*_flat(call))[:2]
    return total, found
