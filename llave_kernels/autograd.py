"""Eager calls of a backend, each as one ``torch.autograd.Function``.

``ops`` has the operators that graphs, fake tensors and transforms need. In an eager call, torch's
machinery around an operator takes longer on the host than a small batch takes on a GPU
(benchmarks/host_time.py).
"""

from __future__ import annotations

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
    TotalLoss,
)
from llave_kernels.precision import accumulation_dtype, scale_tensor
from llave_kernels.rules import TENSORS, Rules

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
    return LogSumExps(*_LogSumExp.apply(query, target, scale_tensor(scale, query), backend, rules))


def total_loss(
    query: Tensor,
    target: Tensor,
    scale: float | Tensor,
    backend: Backend,
    rules: Rules,
    weight: float,
) -> Tensor:
    """``weight`` times the sum of the rows' losses, (). The rules are resolved."""
    total: Tensor = _TotalLoss.apply(query, target, scale, backend, rules, weight)
    return total


def one_direction_loss(
    query: Tensor,
    target: Tensor,
    scale: float | Tensor,
    backend: Backend,
    rules: Rules,
    weight: float,
) -> Tensor:
    """``total_loss`` of a backend that has ``OneDirection``."""
    scale, merging = scale_tensor(scale, query), cast(OneDirection, backend)
    total: Tensor = _OneDirectionLoss.apply(query, target, scale, merging, rules)
    return total * weight


def _fused(backend: Backend) -> FusedLoss | None:
    """The backend if it computes the loss itself, or None."""
    return cast(FusedLoss, backend) if hasattr(backend, "total_loss") else None


def _forward(
    query: Tensor, target: Tensor, scale: Tensor, backend: Backend, rules: Rules
) -> tuple[LogSumExps, Tensor]:
    """The log-sum-exps, and the tensor that the backend keeps."""
    shape = backend.kept_shape(query, target, rules)
    kept = query.new_empty(shape, dtype=accumulation_dtype(query.dtype))
    with dispatch.running_on(query):
        return backend.forward(query, target, scale, rules, kept), kept


def _backward(
    upstream: LogSumExps,
    query: Tensor,
    target: Tensor,
    scale: float | Tensor,
    outputs: LogSumExps,
    kept: Tensor,
    rules: Rules,
    backend: Backend,
    *,
    scale_gradient: bool,
) -> Gradients:
    """The gradients of the log-sum-exps, by the operator if something traces or transforms them.

    The operator also refuses a second derivative.
    """
    scale = scale_tensor(scale, query)
    if transforms.of_backward(*upstream):
        return Gradients(*ops.contrastive_logsumexp_backward(
            *upstream, *outputs, kept, scale_gradient, query, target, scale, backend.NAME, *rules
        ))  # fmt: skip
    with dispatch.running_on(query):
        return backend.backward(
            upstream, query, target, scale, outputs, kept, rules, scale_gradient=scale_gradient
        )


class _LogSumExp(Function):
    jvp = staticmethod(transforms.refuse_forward_mode)

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, target: Tensor, scale: Tensor, backend: Backend, rules: Rules
    ) -> tuple[Tensor, ...]:
        outputs, kept = _forward(query, target, scale, backend, rules)
        ctx.save_for_backward(query, target, scale, *outputs, kept, *rules[:TENSORS])
        ctx.backend, ctx.settings = backend, rules[TENSORS:]
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        query, target, scale, *saved = ctx.saved_tensors
        outputs, learnable = LogSumExps(*saved[:3]), ctx.needs_input_grad[2]
        pairs = zip(given, outputs, strict=True)
        upstream = (torch.zeros_like(x) if d is None else d.contiguous() for d, x in pairs)
        dq, dt, d_scale = _backward(
            LogSumExps(*upstream), query, target, scale, outputs, saved[3],
            Rules(*saved[4:], *ctx.settings), ctx.backend, scale_gradient=learnable,
        )  # fmt: skip
        return dq, dt, d_scale if learnable else None, None, None


class _TotalLoss(Function):
    jvp = staticmethod(transforms.refuse_forward_mode)

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        target: Tensor,
        scale: float | Tensor,
        backend: Backend,
        rules: Rules,
        weight: float,
    ) -> Tensor:
        if (fused := _fused(backend)) is not None:
            with dispatch.running_on(query):
                total, outputs, slopes, kept = fused.total_loss(query, target, scale, rules, weight)
        else:
            outputs, kept = _forward(query, target, scale_tensor(scale, query), backend, rules)
            total, slopes = losses.total_and_slopes(outputs, rules.labels, weight)
        ctx.number, tensor = (None, scale) if isinstance(scale, Tensor) else (scale, None)
        ctx.save_for_backward(query, target, tensor, *outputs, *slopes, kept, *rules[:TENSORS])
        ctx.backend, ctx.settings = backend, rules[TENSORS:]
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        query, target, scale, *saved = ctx.saved_tensors
        scale = ctx.number if scale is None else scale
        outputs, slopes, kept = LogSumExps(*saved[:3]), LogSumExps(*saved[3:6]), saved[6]
        rules, learnable = Rules(*saved[7:], *ctx.settings), ctx.needs_input_grad[2]
        fused = _fused(ctx.backend)
        if fused is None or transforms.of_backward(d_total):
            upstream = LogSumExps(*(slope * d_total for slope in slopes))
            found = _backward(
                upstream, query, target, scale, outputs, kept, rules, ctx.backend,
                scale_gradient=learnable,
            )  # fmt: skip
        else:
            with dispatch.running_on(query):
                found = fused.total_gradients(
                    d_total, query, target, scale, TotalLoss(d_total, outputs, slopes, kept), rules,
                    scale_gradient=learnable,
                )  # fmt: skip
        dq, dt, d_scale = found
        return dq, dt, d_scale if learnable else None, None, None, None


class _OneDirectionLoss(Function):
    jvp = staticmethod(transforms.refuse_forward_mode)

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, target: Tensor, scale: Tensor, backend: OneDirection, rules: Rules
    ) -> Tensor:
        with dispatch.running_on(query):
            loss, gradients = backend.one_direction(query, target, scale, rules)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [x.dtype for x in (query, target, scale)]
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        return *ops.apply_upstream(d_total, ctx.saved_tensors, ctx.dtypes), None, None
