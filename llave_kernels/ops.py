"""The ``torch.library`` operators, which autograd, ``torch.compile`` and fake tensors see.

``llave::contrastive_logsumexp`` is the differentiable primitive. ``llave::one_direction_loss``
computes the gradients along with the loss. Its upstream gradient is a scalar.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llave_kernels import checks, dispatch, transforms
from llave_kernels.backends.protocol import Backend, Gradients, LogSumExps
from llave_kernels.precision import accumulation_dtype
from llave_kernels.rules import ELSEWHERE, HARDNESS_MODES, SCHEMA, TENSORS, WITHIN, Rules

# An operator's schema takes only tensors and scalars. So the rules are passed flat, field by field.
INPUTS = "Tensor query, Tensor target, Tensor logit_scale"
CALL = f"{INPUTS}, str backend, {SCHEMA}"
OUTPUTS = "Tensor positive, Tensor query_lse, Tensor target_lse"
UPSTREAM = "Tensor d_positive, Tensor d_query_lse, Tensor d_target_lse"
GRADIENTS = "Tensor d_query, Tensor d_target, Tensor d_logit_scale"
WITH_BIASES = f"{GRADIENTS}, Tensor d_query_bias, Tensor d_target_bias"
ASKED = "bool scale_gradient, bool bias_gradients"


@torch.library.custom_op(
    "llave::contrastive_logsumexp",
    mutates_args=(),
    schema=f"({CALL}) -> ({OUTPUTS}, Tensor kept)",
)
def contrastive_logsumexp(
    query: Tensor, target: Tensor, logit_scale: Tensor, backend: str, *given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backend's ``LogSumExps``, and the tensor that it keeps for its backward."""
    rules = checked(query, target, logit_scale, given)
    module = dispatch.supporting(backend, query, target, rules)
    transforms.refuse_tangents(query, target, logit_scale)
    with dispatch.running_on(query):
        outputs, kept = forward(module, query, target, logit_scale, rules)
        return *outputs, kept


def forward(
    backend: Backend,
    query: Tensor,
    target: Tensor,
    scale: Tensor,
    rules: Rules,
    *,
    keep: bool = True,
) -> tuple[LogSumExps, Tensor]:
    """The log-sum-exps, and the tensor that the backend keeps for its backward.

    It keeps nothing without ``keep``.
    """
    shape = backend.kept_shape(query, target, rules) if keep else (0,)
    kept = query.new_empty(shape, dtype=accumulation_dtype(query.dtype))
    return backend.forward(query, target, scale, rules, kept), kept


@contrastive_logsumexp.register_fake
def _(query: Tensor, target: Tensor, logit_scale: Tensor, backend: str, *given: Any) -> Any:
    return fake_logsumexp(query, target, backend, *given)


def fake_logsumexp(query: Tensor, target: Tensor, backend: str, *given: Any) -> Any:
    """Empty outputs of ``contrastive_logsumexp``."""
    rules, n, m = Rules(*given), query.shape[0], target.shape[0]
    kept = dispatch.named(backend).kept_shape(query, target, rules)
    shapes = (n,), (n,), (m if rules.symmetric else 0,), kept
    dtype = accumulation_dtype(query.dtype)
    return tuple(query.new_empty(shape, dtype=dtype) for shape in shapes)


@torch.library.custom_op(
    "llave::contrastive_logsumexp_backward",
    mutates_args=(),
    schema=f"({UPSTREAM}, {OUTPUTS}, Tensor kept, {ASKED}, {CALL}) -> ({WITH_BIASES})",
)
def contrastive_logsumexp_backward(
    d_positive: Tensor,
    d_query_lse: Tensor,
    d_target_lse: Tensor,
    positive: Tensor,
    query_lse: Tensor,
    target_lse: Tensor,
    kept: Tensor,
    scale_gradient: bool,
    bias_gradients: bool,
    query: Tensor,
    target: Tensor,
    logit_scale: Tensor,
    backend: str,
    *given: Any,
) -> tuple[Tensor, ...]:
    """The backend's ``Gradients``. The scale's is any number unless ``scale_gradient``."""
    rules = checked(query, target, logit_scale, given)
    module = dispatch.named(backend)
    upstream = like_outputs(rules, query, target, "d_", d_positive, d_query_lse, d_target_lse)
    outputs = like_outputs(rules, query, target, "", positive, query_lse, target_lse)
    expect("kept", kept, module.kept_shape(query, target, rules), query)
    transforms.refuse_tangents(query, target, logit_scale)
    with dispatch.running_on(query):
        found = module.backward(
            upstream, query, target, logit_scale, outputs, kept, rules,
            scale_gradient=scale_gradient, bias_gradients=bias_gradients,
        )  # fmt: skip
        return as_tensors(found)


@contrastive_logsumexp_backward.register_fake
def _(*arguments: Any) -> Any:
    bias_gradients, query, target = arguments[8:11]
    of_biases = Rules(*arguments[13:]).bias_gradients(bias_gradients)
    return as_tensors(gradients_like(query, target, query.dtype, *of_biases))


@torch.library.custom_op(
    "llave::one_direction_loss", mutates_args=(), schema=f"({CALL}) -> (Tensor loss, {WITH_BIASES})"
)
def one_direction_loss(
    query: Tensor, target: Tensor, logit_scale: Tensor, backend: str, *given: Any
) -> tuple[Tensor, ...]:
    """The query direction's loss summed over the rows (), and the ``Gradients`` of that sum.

    All are in the accumulation dtype. The upstream gradient is not applied yet, and without it the
    gradients may not fit the inputs' dtype. Those of the biases are computed if there are biases.
    """
    rules = checked(query, target, logit_scale, given)
    module = dispatch.one_direction(backend, query)
    if module is None or rules.symmetric:
        raise ValueError(
            f"backend={backend!r} does not make gradients along with the loss of this call; take "
            "torch.ops.llave.contrastive_logsumexp"
        )
    transforms.refuse_tangents(query, target, logit_scale)
    with dispatch.running_on(query):
        loss, gradients = module.one_direction(
            query, target, logit_scale, rules, bias_gradients=True
        )
        return loss.sum(), *as_tensors(gradients)


@one_direction_loss.register_fake
def _(query: Tensor, target: Tensor, scale: Tensor, backend: str, *given: Any) -> Any:
    dtype = accumulation_dtype(query.dtype)
    gradients = gradients_like(query, target, dtype, *Rules(*given).bias_gradients(True))
    return query.new_empty((), dtype=dtype), *as_tensors(gradients)


def gradients_like(
    query: Tensor, target: Tensor, dtype: torch.dtype, *of_biases: Tensor | None
) -> Gradients:
    dq, dt = (x.new_empty(x.shape, dtype=dtype) for x in (query, target))
    d_scale = query.new_empty((), dtype=accumulation_dtype(query.dtype))
    return Gradients(dq, dt, d_scale, *of_biases)


def as_tensors(gradients: Gradients) -> tuple[Tensor, ...]:
    """An operator returns tensors only. (0,) stands for None."""
    return tuple(gradients.query.new_empty(0) if x is None else x for x in gradients)


def checked(
    query: Tensor,
    target: Tensor,
    logit_scale: Tensor,
    given: tuple[Any, ...],
    *,
    prefixes: tuple[int, ...] = (),
) -> Rules:
    """Check the arguments. Return the rules, with labels and owners as int64.

    Anyone may call an operator directly. Backends do not check what ``Rules`` promises.

    Args:
        prefixes: (K,) if the limits and the outputs are those of K prefixes.
    """
    rules = Rules(*given)
    checks.embeddings(query, target)
    expect("logit_scale", logit_scale, (), query)
    checks.one_of("hardness", rules.hardness, (*HARDNESS_MODES, WITHIN))
    if rules.row_limit is not None:
        expect("row_limit", rules.row_limit, (*prefixes, len(query)), query)
    if rules.column_limit is not None:
        expect("column_limit", rules.column_limit, (*prefixes, len(target)), query)
    # A column has one limit, but a log-sum-exp over the negatives of any number of positive rows.
    unique = rules.symmetric and rules.margin is not None
    labels, owners = checks.rule_tensors(
        query, target, labels=rules.labels, owners=rules.owners, query_ids=rules.query_ids,
        target_ids=rules.target_ids, query_bias=rules.query_bias, target_bias=rules.target_bias,
        symmetric=unique, least_label=ELSEWHERE,
    )  # fmt: skip
    return rules._replace(labels=labels, owners=owners)


def like_outputs(
    rules: Rules,
    query: Tensor,
    target: Tensor,
    prefix: str,
    *values: Tensor,
    prefixes: tuple[int, ...] = (),
) -> LogSumExps:
    """Check values against the shapes of the forward's ``LogSumExps``. Return them contiguous."""
    sizes = len(query), len(query), len(target) if rules.symmetric else 0
    for name, value, size in zip(LogSumExps._fields, values, sizes, strict=True):
        expect(prefix + name, value, (*prefixes, size), query)
    return LogSumExps(*(value.contiguous() for value in values))


def expect(name: str, value: Tensor, shape: tuple[int, ...], query: Tensor) -> None:
    """Check that a tensor has this shape, the device of ``query`` and its accumulation dtype."""
    dtype = accumulation_dtype(query.dtype)
    if (value.shape, value.dtype, value.device) != (shape, dtype, query.device):
        raise ValueError(
            f"{name} must be {dtype} of shape {shape} on {query.device}, got {value.dtype} of "
            f"shape {tuple(value.shape)} on {value.device}"
        )


def setup_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _setup_logsumexp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, target, logit_scale, ctx.backend, *rules = inputs
    ctx.save_for_backward(*output, query, target, logit_scale, *rules[:TENSORS])
    ctx.settings = rules[TENSORS:]
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)  # avoids zeros as large as ``kept``


def _backward_logsumexp(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    *outputs, kept, query, target, scale = ctx.saved_tensors[:7]
    tensors = ctx.saved_tensors[7:]
    learnable, biased = ctx.needs_input_grad[2], any(ctx.needs_input_grad[4:])
    given = zip(upstream[:3], outputs, strict=True)
    found = contrastive_logsumexp_backward(
        *(torch.zeros_like(x) if d is None else d for d, x in given),
        *(*outputs, kept, learnable, biased, query, target, scale, ctx.backend),
        *(*tensors, *ctx.settings),
    )
    return of_inputs(ctx, found)


def of_inputs(ctx: Any, found: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """An operator's gradients in the order of its arguments. None where none is needed."""
    dq, dt, d_scale, *d_biases = found
    places = (4 + Rules._fields.index(name) for name in Gradients._fields[3:])
    of = {0: dq, 1: dt, 2: d_scale, **dict(zip(places, d_biases, strict=True))}
    return tuple(of.get(i) if needed else None for i, needed in enumerate(ctx.needs_input_grad))


transforms.support(
    contrastive_logsumexp_backward, setup_nothing, transforms.refuse_second_derivative
)
transforms.support(contrastive_logsumexp, _setup_logsumexp, _backward_logsumexp)


def _setup_one_direction(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = gradient_dtypes(*inputs[:3])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # avoids zeros as large as the gradients


def _backward_one_direction(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * len(ctx.needs_input_grad)
    return of_inputs(ctx, apply_upstream(d_loss, ctx.saved_tensors, ctx.dtypes))


def gradient_dtypes(query: Tensor, target: Tensor, scale: Tensor) -> list[torch.dtype]:
    """The dtypes of ``Gradients``."""
    return [query.dtype, target.dtype, scale.dtype, scale.dtype, scale.dtype]


def apply_upstream(
    d_loss: Tensor, gradients: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]
) -> Iterator[Tensor | None]:
    """Gradients computed along with a loss, times its upstream gradient, in ``dtypes``."""
    if torch.is_grad_enabled():
        transforms.refuse_second_derivative()
    pairs = zip(gradients, dtypes, strict=True)
    return (None if x is None else (x * d_loss).to(dtype) for x, dtype in pairs)


one_direction_loss.register_autograd(_backward_one_direction, setup_context=_setup_one_direction)
# A transform runs the backward with create_graph=True. This backward takes that for a second
# derivative.
transforms.refuse(one_direction_loss, "take torch.ops.llave.contrastive_logsumexp")
