"""Eager calls of a backend, each as one ``torch.autograd.Function``.

``ops`` has the operators that graphs, fake tensors and transforms need. In an eager call, torch's
machinery around an operator takes longer on the host than a small batch takes on a GPU
(benchmarks/host_time.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from llave_kernels import dispatch, losses, ops, transforms
from llave_kernels.backends.protocol import (
    Backend,
    FusedLoss,
    Gradients,
    LogSumExps,
    OneDirection,
)
from llave_kernels.precision import scale_tensor
from llave_kernels.rules import TENSORS, Rules, biases_of

PLAIN = (Tensor, torch.nn.Parameter)


def serves(*inputs: object) -> bool:
    """Whether a call can do without the operators: nothing traces it, transforms it or watches it.

    Tensors of other types, such as fake tensors, and tensors without data take the operators too.
    """
    if torch.compiler.is_compiling() or transforms.active() or forward_ad._current_level >= 0:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    tensors = (x for x in inputs if isinstance(x, Tensor))
    return all(type(x) in PLAIN and x.device.type != "meta" for x in tensors)


def logsumexp(
    query: Tensor, target: Tensor, scale: float | Tensor, backend: Backend, rules: Rules
) -> LogSumExps:
    """The backend's differentiable ``LogSumExps``."""
    scale = scale_tensor(scale, query)
    return LogSumExps(*_LogSumExp.apply(query, target, scale, *biases_of(rules), backend, rules))


def total_loss(
    query: Tensor,
    target: Tensor,
    scale: float | Tensor,
    backend: Backend,
    rules: Rules,
    weight: float,
) -> Tensor:
    """``weight`` times the sum of the rows' losses, (). The rules are resolved."""
    inputs = query, target, scale, *biases_of(rules)
    total: Tensor = _TotalLoss.apply(*inputs, _fused(backend), rules, weight)
    return total


def one_direction_loss(
    query: Tensor,
    target: Tensor,
    scale: float | Tensor,
    backend: Backend | OneDirection,
    rules: Rules,
    weight: float,
) -> Tensor:
    """``total_loss`` of a backend that has ``OneDirection``."""
    scale, merging = scale_tensor(scale, query), cast(OneDirection, backend)
    total: Tensor = _OneDirectionLoss.apply(query, target, scale, *biases_of(rules), merging, rules)
    return total * weight


def _fused(backend: Backend) -> FusedLoss:
    """The backend if it computes the loss itself, else the loss composed from its outputs."""
    found = hasattr(backend, "total_loss")
    return cast(FusedLoss, backend) if found else _Composed(backend)


class _Composed:
    """The ``FusedLoss`` of a backend that has none."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.NAME = backend, backend.NAME

    def total_loss(
        self,
        query: Tensor,
        target: Tensor,
        scale: float | Tensor,
        rules: Rules,
        weight: float,
        *,
        keep: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...], None]:
        scale = scale_tensor(scale, query)
        outputs, kept = ops.forward(self.backend, query, target, scale, rules, keep=keep)
        total, slopes = losses.total_and_slopes(outputs, rules.labels, weight)
        return total, (*outputs, *slopes, kept), None

    def total_gradients(
        self,
        d_total: Tensor,
        query: Tensor,
        target: Tensor,
        scale: float | Tensor,
        saved: tuple[Tensor, ...],
        rules: Rules,
        prepared: object,
        *,
        scale_gradient: bool,
        bias_gradients: bool = False,
    ) -> Gradients:
        upstream = LogSumExps(*(slope * d_total for slope in saved[3:6]))
        return self.backend.backward(
            upstream, query, target, scale_tensor(scale, query), LogSumExps(*saved[:3]), saved[6],
            rules, scale_gradient=scale_gradient, bias_gradients=bias_gradients,
        )  # fmt: skip


def _asked(ctx: Any) -> dict[str, bool]:
    """Which gradients a backend is asked for, besides those of query and target."""
    _, _, learnable, *others = ctx.needs_input_grad
    return {"scale_gradient": learnable, "bias_gradients": any(others)}


def needed(ctx: Any, gradients: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of a function's arguments. None where none is needed."""
    given = zip_longest(gradients, ctx.needs_input_grad)
    return tuple(x if wanted else None for x, wanted in given)


class _LogSumExp(Function):
    jvp = staticmethod(transforms.refuse_forward_mode)

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        target: Tensor,
        scale: Tensor,
        query_bias: Tensor | None,
        target_bias: Tensor | None,
        backend: Backend,
        rules: Rules,
    ) -> tuple[Tensor, ...]:
        with dispatch.running_on(query):
            outputs, kept = ops.forward(backend, query, target, scale, rules)
        ctx.save_for_backward(query, target, scale, *outputs, kept, *rules[:TENSORS])
        ctx.backend, ctx.settings = backend, rules[TENSORS:]
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        query, target, scale, *saved = ctx.saved_tensors
        outputs, kept, asked = LogSumExps(*saved[:3]), saved[3], _asked(ctx)
        rules = Rules(*saved[4:], *ctx.settings)
        pairs = zip(given, outputs, strict=True)
        upstream = LogSumExps(
            *(torch.zeros_like(x) if d is None else d.contiguous() for d, x in pairs)
        )
        if transforms.of_backward(*upstream):
            found = ops.contrastive_logsumexp_backward(
                *(*upstream, *outputs, kept, *asked.values(), query, target, scale),
                *(ctx.backend.NAME, *rules),
            )
        else:
            with dispatch.running_on(query):
                found = ctx.backend.backward(
                    upstream, query, target, scale, outputs, kept, rules, **asked
                )
        return needed(ctx, found)


class _TotalLoss(Function):
    jvp = staticmethod(transforms.refuse_forward_mode)

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        target: Tensor,
        scale: float | Tensor,
        query_bias: Tensor | None,
        target_bias: Tensor | None,
        backend: FusedLoss,
        rules: Rules,
        weight: float,
    ) -> Tensor:
        with dispatch.running_on(query):
            total, saved, prepared = backend.total_loss(
                query, target, scale, rules, weight, keep=any(ctx.needs_input_grad)
            )
        ctx.number, tensor = (None, scale) if isinstance(scale, Tensor) else (scale, None)
        ctx.save_for_backward(query, target, tensor, *rules[:TENSORS], *saved)
        ctx.backend, ctx.settings, ctx.weight = backend, rules[TENSORS:], weight
        ctx.prepared = (
            None if prepared is None else (prepared, query, target, tensor, *rules[:TENSORS])
        )
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        saved_tensors = ctx.saved_tensors
        query, target, scale, *rest = saved_tensors
        rules, saved = Rules(*rest[:TENSORS], *ctx.settings), rest[TENSORS:]
        # It is not kept beyond the first backward, which frees what is saved too.
        prepared, ctx.prepared = ctx.prepared, None
        if prepared is not None:
            prepared, *before = prepared
            same = zip(before, saved_tensors, strict=False)
            prepared = prepared if all(a is b for a, b in same) else None
        scale = ctx.number if scale is None else scale
        if transforms.of_backward(d_total):
            found = _graph_gradients(d_total, query, target, scale, ctx.backend, rules, ctx.weight)
        else:
            with dispatch.running_on(query):
                found = ctx.backend.total_gradients(
                    d_total, query, target, scale, saved, rules, prepared, **_asked(ctx)
                )
        return needed(ctx, found)


def _graph_gradients(
    d_total: Tensor,
    query: Tensor,
    target: Tensor,
    scale: float | Tensor,
    backend: FusedLoss,
    rules: Rules,
    weight: float,
) -> tuple[Tensor, ...]:
    """The gradients of ``total_loss``, which a graph or a transform sees.

    The operators compute the log-sum-exps once more. They refuse a second derivative.
    """
    scale = scale_tensor(scale, query)
    with torch.no_grad():
        *outputs, kept = ops.contrastive_logsumexp(query, target, scale, backend.NAME, *rules)
        slopes = losses.total_and_slopes(LogSumExps(*outputs), rules.labels, weight)[1]
    upstream = [slope * d_total for slope in slopes]
    found: tuple[Tensor, ...] = ops.contrastive_logsumexp_backward(
        *upstream, *outputs, kept, True, True, query, target, scale, backend.NAME, *rules
    )
    return found


class _OneDirectionLoss(Function):
    jvp = staticmethod(transforms.refuse_forward_mode)

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        target: Tensor,
        scale: Tensor,
        query_bias: Tensor | None,
        target_bias: Tensor | None,
        backend: OneDirection,
        rules: Rules,
    ) -> Tensor:
        biased = any(ctx.needs_input_grad[3:])
        with dispatch.running_on(query):
            loss, gradients = backend.one_direction(
                query, target, scale, rules, bias_gradients=biased
            )
        ctx.save_for_backward(*gradients)
        ctx.dtypes = ops.gradient_dtypes(query, target, scale)
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        return needed(ctx, ops.apply_upstream(d_total, ctx.saved_tensors, ctx.dtypes))
