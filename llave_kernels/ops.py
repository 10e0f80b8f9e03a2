"""The ``torch.library`` operators: what autograd, ``torch.compile`` and fake tensors see.

``llave::contrastive_logsumexp`` is the differentiable primitive; ``llave::one_direction_loss``
makes the gradients along with the loss where the upstream gradient can only be a scalar.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llave_kernels import checks, transforms
from llave_kernels.backends import torch_strips
from llave_kernels.backends.protocol import LogSumExps
from llave_kernels.backends.products import accumulation_dtype
from llave_kernels.dispatch import BACKENDS
from llave_kernels.rules import HARDNESS_MODES, SCHEMA, TENSORS, Rules

# An operator's schema holds only tensors and scalars: the rules come flat, in the order of their
# fields.
INPUTS = "Tensor query, Tensor target, Tensor logit_scale"
GRADIENTS = "Tensor d_query, Tensor d_target, Tensor d_logit_scale"


@torch.library.custom_op(
    "llave::contrastive_logsumexp",
    mutates_args=(),
    schema=f"({INPUTS}, str backend, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def contrastive_logsumexp(
    query: Tensor, target: Tensor, logit_scale: Tensor, backend: str, *given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positive logits (N,), n (N,), n' (M,) or (0,), and what the backward of ``backend`` keeps."""
    rules = _checked(query, target, logit_scale, given)
    module = _named(backend)
    if (reason := module.supports(query, target, rules)) is not None:
        raise ValueError(f"backend={backend!r} does not support this call: {reason}")
    with _on(query, target, logit_scale):
        if backend == torch_strips.NAME:
            return torch_strips.forward(query, target, logit_scale, rules)
        rules = _plain(rules, query)
        outputs = module.forward(query, target, logit_scale, rules, query.new_empty(0))
        return (*outputs, query.new_empty((len(target), 0), dtype=torch.float32))


@contrastive_logsumexp.register_fake
def _(query: Tensor, target: Tensor, logit_scale: Tensor, backend: str, *rules: Any) -> Any:
    symmetric = rules[-1]
    dtype = accumulation_dtype(query.dtype)
    n, m = query.shape[0], target.shape[0]
    keeps = symmetric and backend == torch_strips.NAME
    kept = torch_strips.kept_shape(query, target) if keeps else (m, 0)
    shapes = ((n,), (n,), (m if symmetric else 0,), kept)
    return tuple(query.new_empty(shape, dtype=dtype) for shape in shapes)


@torch.library.custom_op(
    "llave::contrastive_logsumexp_backward",
    mutates_args=(),
    schema=(
        "(Tensor d_positive, Tensor d_query_lse, Tensor d_target_lse, "
        f"{INPUTS}, Tensor positive, Tensor query_lse, Tensor target_lse, Tensor kept, "
        f"bool scale_gradient, str backend, {SCHEMA}) -> ({GRADIENTS})"
    ),
)
def contrastive_logsumexp_backward(
    d_positive: Tensor,
    d_query_lse: Tensor,
    d_target_lse: Tensor,
    query: Tensor,
    target: Tensor,
    logit_scale: Tensor,
    positive: Tensor,
    query_lse: Tensor,
    target_lse: Tensor,
    kept: Tensor,
    scale_gradient: bool,
    backend: str,
    *given: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query (N, D) and target (M, D), in their dtypes, and of logit_scale ().

    The last is NaN unless ``scale_gradient``, where a backend saves work by leaving it out.
    """
    rules = _checked(query, target, logit_scale, given)
    module = _named(backend)
    upstream = _like_outputs(rules, query, target, "d_", d_positive, d_query_lse, d_target_lse)
    lses = _like_outputs(rules, query, target, "", positive, query_lse, target_lse)
    _expect("kept", kept, (len(target), kept.shape[-1]), query)
    with _on(query, target, logit_scale):
        if backend == torch_strips.NAME:
            _, row_lse, column_lse = lses
            return torch_strips.backward(
                *upstream, query, target, logit_scale, row_lse, column_lse, kept, rules
            )
        return tuple(module.backward(
            LogSumExps(*upstream), query, target, logit_scale, LogSumExps(*lses), kept,
            _plain(rules, query), scale_gradient=scale_gradient
        ))


@contrastive_logsumexp_backward.register_fake
def _(
    d_positive: Tensor,
    d_query_lse: Tensor,
    d_target_lse: Tensor,
    query: Tensor,
    target: Tensor,
    logit_scale: Tensor,
    *rest: Any,
) -> Any:
    return _gradients_like(query, target, query.dtype)


@torch.library.custom_op(
    "llave::one_direction_loss",
    mutates_args=(),
    schema=f"({INPUTS}, {SCHEMA}) -> (Tensor loss, {GRADIENTS})",
)
def one_direction_loss(
    query: Tensor, target: Tensor, logit_scale: Tensor, *given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum over the rows of the query direction's loss (), with its dQ, dT and d logit_scale.

    In the accumulation dtype, which holds them whatever the upstream gradient makes of them.
    """
    rules = _checked(query, target, logit_scale, given)
    with _on(query, target, logit_scale):
        loss, dq, dt, d_scale = torch_strips.one_direction(query, target, logit_scale, rules)
        return loss.sum(), dq, dt, d_scale


@one_direction_loss.register_fake
def _(query: Tensor, target: Tensor, logit_scale: Tensor, *rules: Any) -> Any:
    dtype = accumulation_dtype(query.dtype)
    return query.new_empty((), dtype=dtype), *_gradients_like(query, target, dtype)


def _gradients_like(
    query: Tensor, target: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dt = (x.new_empty(x.shape, dtype=dtype) for x in (query, target))
    return dq, dt, query.new_empty((), dtype=accumulation_dtype(query.dtype))


def _checked(query: Tensor, target: Tensor, logit_scale: Tensor, given: tuple[Any, ...]) -> Rules:
    """The rules of a call whose arguments may be anyone's, with labels and owners as int64.

    Backends read what is passed as what ``Rules`` says it is.
    """
    rules = Rules(*given)
    checks.embeddings(query, target)
    n, m, device = len(query), len(target), query.device
    _expect("logit_scale", logit_scale, (), query)
    checks.one_of("hardness", rules.hardness, HARDNESS_MODES)
    checks.ids(rules.query_ids, rules.target_ids, n, m, device)
    if rules.column_limit is not None:
        _expect("column_limit", rules.column_limit, (m,), query)
    labels = checks.columns("labels", rules.labels, n, m, device, unique=rules.symmetric)
    owners = rules.owners
    if owners is not None:
        owners = checks.columns("owners", owners, m, m, device)
    return rules._replace(labels=labels, owners=owners)


def _plain(rules: Rules, query: Tensor) -> Rules:
    arange = torch.arange(len(query), device=query.device)
    return rules._replace(labels=None) if torch.equal(rules.labels, arange) else rules


def _named(backend: str) -> ModuleType:
    checks.one_of("backend", backend, tuple(BACKENDS))
    if (reason := BACKENDS[backend].unavailable()) is not None:
        raise RuntimeError(f"backend={backend!r} cannot run on this machine: {reason}")
    return BACKENDS[backend]


def _like_outputs(
    rules: Rules, query: Tensor, target: Tensor, prefix: str, *values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Values of the shapes of the forward's first outputs, checked, without gaps."""
    n = len(query)
    sizes = n, n, len(target) if rules.symmetric else 0
    names = "positive", "query_lse", "target_lse"
    for name, value, size in zip(names, values, sizes, strict=True):
        _expect(prefix + name, value, (size,), query)
    positive, query_lse, target_lse = (value.contiguous() for value in values)
    return positive, query_lse, target_lse


def _expect(name: str, value: Tensor, shape: tuple[int, ...], query: Tensor) -> None:
    """A tensor of this shape beside ``query``, in the dtype of its sums."""
    dtype = accumulation_dtype(query.dtype)
    if (value.shape, value.dtype, value.device) != (shape, dtype, query.device):
        raise ValueError(
            f"{name} must be {dtype} of shape {shape} on {query.device}, got {value.dtype} of "
            f"shape {tuple(value.shape)} on {value.device}"
        )


@contextmanager
def _on(query: Tensor, *others: Tensor) -> Iterator[None]:
    """On the inputs' device, without autocast: it has had its say on the inputs."""
    transforms.refuse_tangents(query, *others)
    kind = query.device.type
    device = torch.cuda.device_of(query)  # type: ignore[no-untyped-call]
    casts = torch.amp.is_autocast_available(kind)
    with device, torch.autocast(kind, enabled=False) if casts else nullcontext():
        yield


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _setup_logsumexp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, target, logit_scale, ctx.backend, *rules = inputs
    ctx.save_for_backward(query, target, logit_scale, *output, *rules[:TENSORS])
    ctx.scalars = rules[TENSORS:]
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)  # zeros as large as what was kept


def _backward_logsumexp(
    ctx: Any, d_positive: Tensor | None, d_query: Tensor | None, d_target: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    query, target, scale, positive, query_lse, target_lse, kept, *ids = ctx.saved_tensors
    upstream = (d_positive, positive), (d_query, query_lse), (d_target, target_lse)
    learnable = ctx.needs_input_grad[2]
    dq, dt, d_scale = contrastive_logsumexp_backward(
        *(torch.zeros_like(x) if d is None else d for d, x in upstream),
        *(query, target, scale, positive, query_lse, target_lse, kept, learnable, ctx.backend),
        *(*ids, *ctx.scalars),
    )
    return dq, dt, d_scale if learnable else None, *[None] * (1 + len(Rules._fields))


transforms.support(
    contrastive_logsumexp_backward, _setup_backward, transforms.refuse_second_derivative
)
transforms.support(contrastive_logsumexp, _setup_logsumexp, _backward_logsumexp)


def _setup_one_direction(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [x.dtype for x in inputs[:3]]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros as large as the gradients


def _backward_one_direction(
    ctx: Any, d_loss: Tensor | None, _dq: None, _dt: None, _dk: None
) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        transforms.refuse_second_derivative()
    if d_loss is None:
        return (None,) * (3 + len(Rules._fields))
    gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    return *((x * d_loss).to(dtype) for x, dtype in gradients), *[None] * len(Rules._fields)


one_direction_loss.register_autograd(_backward_one_direction, setup_context=_setup_one_direction)
# Its backward would be that of a second derivative: a transform keeps the graph of the first.
transforms.refuse(one_direction_loss, "take torch.ops.llave.contrastive_logsumexp")
