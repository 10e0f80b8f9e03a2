"""The sigmoid loss as ``torch.library`` operators, and its eager calls as an autograd function.

``llave::sigmoid_loss`` computes the gradients along with the loss. Its upstream gradient is a
scalar. ``llave::sigmoid_rows`` computes the rows' losses alone. Its backward takes an upstream
gradient for each row, and computes the similarities once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from llave_kernels import checks, dispatch, transforms
from llave_kernels.backends.protocol import SigmoidGradients
from llave_kernels.ops import apply_upstream, expect, setup_nothing
from llave_kernels.precision import accumulation_dtype
from llave_kernels.rules import ELSEWHERE, Rules, plain_rules

INPUTS = "Tensor query, Tensor target, Tensor logit_scale, Tensor logit_bias"
CALL = f"{INPUTS}, Tensor? labels, Tensor? query_ids, Tensor? target_ids, str backend"
GRADIENTS = "Tensor d_query, Tensor d_target, Tensor d_logit_scale, Tensor d_logit_bias"
LEARNED = 4  # inputs that may require a gradient
CONSTANTS = 4


@torch.library.custom_op(
    "llave::sigmoid_loss",
    mutates_args=(),
    schema=f"({CALL}) -> (Tensor loss, Tensor rows, {GRADIENTS})",
)
def sigmoid_loss(query: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """The sum of the rows' losses (), these (N,), and the gradients of the sum.

    All are in the accumulation dtype. The upstream gradient is not applied yet.
    """
    rows, gradients = _run(query, *given, weights=None, gradients=True)
    assert gradients is not None
    return rows.sum(), rows, *gradients


@sigmoid_loss.register_fake
def _(query: Tensor, target: Tensor, *rest: Any) -> Any:
    dtype = accumulation_dtype(query.dtype)
    loss, rows = (query.new_empty(shape, dtype=dtype) for shape in ((), (query.shape[0],)))
    return loss, rows, *_gradients_like(query, target, dtype)


@torch.library.custom_op("llave::sigmoid_rows", mutates_args=(), schema=f"({CALL}) -> Tensor")
def sigmoid_rows(query: Tensor, *given: Any) -> Tensor:
    """The rows' losses (N,) in the accumulation dtype."""
    return _run(query, *given, weights=None, gradients=False)[0]


@sigmoid_rows.register_fake
def _(query: Tensor, *rest: Any) -> Tensor:
    return query.new_empty(query.shape[0], dtype=accumulation_dtype(query.dtype))


@torch.library.custom_op(
    "llave::sigmoid_rows_backward",
    mutates_args=(),
    schema=f"(Tensor d_rows, {CALL}) -> ({GRADIENTS})",
)
def sigmoid_rows_backward(d_rows: Tensor, query: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """The gradients, from those of the rows' losses (N,). They have the inputs' dtypes."""
    expect("d_rows", d_rows, (len(query),), query)
    gradients = _run(query, *given, weights=d_rows.contiguous(), gradients=True)[1]
    assert gradients is not None
    pairs = zip(gradients, (query, *given), strict=False)
    return tuple(x.to(like.dtype) for x, like in pairs)


@sigmoid_rows_backward.register_fake
def _(d_rows: Tensor, query: Tensor, target: Tensor, *rest: Any) -> Any:
    return _gradients_like(query, target, query.dtype)


def _run(
    query: Tensor,
    target: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    labels: Tensor | None,
    query_ids: Tensor | None,
    target_ids: Tensor | None,
    backend: str,
    *,
    weights: Tensor | None,
    gradients: bool,
) -> tuple[Tensor, SigmoidGradients | None]:
    """Run an operator. Anyone may call it directly, so its arguments are checked."""
    checks.embeddings(query, target)
    for name, value in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        expect(name, value, (), query)
    labels, _ = checks.rule_tensors(
        query, target, labels=labels, owners=None, query_ids=query_ids, target_ids=target_ids,
        symmetric=False, least_label=ELSEWHERE,
    )  # fmt: skip
    transforms.refuse_tangents(query, target, logit_scale, logit_bias)
    rules = plain_rules(labels=labels, query_ids=query_ids, target_ids=target_ids)
    dispatch.supporting(backend, query, target, rules)
    with dispatch.running_on(query):
        return dispatch.SIGMOID[backend].sigmoid_loss(
            query, target, logit_scale, logit_bias, rules, weights, gradients=gradients
        )


def _gradients_like(query: Tensor, target: Tensor, dtype: torch.dtype) -> SigmoidGradients:
    dq, dt = (x.new_empty(x.shape, dtype=dtype) for x in (query, target))
    sums = (query.new_empty((), dtype=accumulation_dtype(query.dtype)) for _ in range(2))
    return SigmoidGradients(dq, dt, *sums)


def _setup_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.dtypes = [x.dtype for x in inputs[:LEARNED]]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # avoids zeros as large as the gradients


def _backward_loss(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    nothing = [None] * CONSTANTS
    if d_loss is None:
        return *[None] * LEARNED, *nothing
    return *apply_upstream(d_loss, ctx.saved_tensors, ctx.dtypes), *nothing


sigmoid_loss.register_autograd(_backward_loss, setup_context=_setup_loss)
# As for llave::one_direction_loss.
transforms.refuse(sigmoid_loss, "take torch.ops.llave.sigmoid_rows")


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward_rows(ctx: Any, d_rows: Tensor) -> tuple[Tensor | None, ...]:
    gradients = sigmoid_rows_backward(d_rows, *ctx.saved_tensors, ctx.backend)
    return *gradients, *[None] * CONSTANTS


transforms.support(sigmoid_rows_backward, setup_nothing, transforms.refuse_second_derivative)
transforms.support(sigmoid_rows, _setup_rows, _backward_rows)


class EagerLoss(Function):
    """``llave::sigmoid_loss`` without torch's machinery around an operator."""

    jvp = staticmethod(transforms.refuse_forward_mode)

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        target: Tensor,
        scale: Tensor,
        bias: Tensor,
        rules: Rules,
        name: str,
    ) -> tuple[Tensor, Tensor]:
        with dispatch.running_on(query):
            rows, gradients = dispatch.SIGMOID[name].sigmoid_loss(
                query, target, scale, bias, rules, None, gradients=True
            )
        assert gradients is not None
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [x.dtype for x in (query, target, scale, bias)]
        ctx.mark_non_differentiable(rows)
        return rows.sum(), rows

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *apply_upstream(d_total, ctx.saved_tensors, ctx.dtypes), None, None
