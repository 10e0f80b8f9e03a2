"""The log-sum-exps of several prefixes of the embeddings, which share one matrix product.

Matryoshka representation learning (arXiv 2205.13147) trains the first d columns of the embeddings
for several d. Each prefix is normalised and has a loss of its own.

``llave::matryoshka_logsumexp`` is the operator, on the ``torch`` backend. Other backends compute
prefix after prefix (``functional``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import normalize

from llave_kernels import autograd, checks, dispatch, ops, transforms
from llave_kernels.backends import torch_backend, torch_matryoshka
from llave_kernels.backends.protocol import Gradients, LogSumExps
from llave_kernels.precision import accumulation_dtype, widened
from llave_kernels.rules import SCHEMA, TENSORS, Rules, biases_of

BACKEND = torch_backend.NAME
INPUTS = f"{ops.INPUTS}, int[] dims, {SCHEMA}"


class Matryoshka(NamedTuple):
    """Checked settings of a loss over prefixes.

    Attributes:
        dims: lengths of the K prefixes, ascending.
        weights: of their losses.
    """

    dims: tuple[int, ...]
    weights: tuple[float, ...]

    def summed(self, losses: Tensor) -> Tensor:
        """(...) the weighted sum of the losses (K, ...) of the prefixes."""
        weights = torch.tensor(self.weights, dtype=losses.dtype, device=losses.device)
        return (weights.view(-1, *[1] * (losses.dim() - 1)) * losses).sum(0)


def checked(dims: object, weights: object = None, width: int | None = None) -> Matryoshka | None:
    """``matryoshka_dims`` in any order and ``matryoshka_weights``. None without dims.

    Args:
        width: D of the embeddings, if it is known.

    Raises:
        TypeError: not sequences of numbers.
        ValueError: no dims, one below 1 or above D or twice; other than one finite weight for each.
    """
    if dims is None:
        if weights is not None:
            raise ValueError(
                f"matryoshka_weights={checks.short(weights)} needs matryoshka_dims; pass both"
            )
        return None
    limit = "" if width is None else ", the width of the embeddings is the most"
    found = [
        checks.count(f"matryoshka_dims[{i}]", d, 1, width, limit)
        for i, d in enumerate(_sequence("matryoshka_dims", dims))
    ]
    if not found or len({*found}) < len(found):
        raise ValueError(f"matryoshka_dims must be different lengths, got {checks.short(dims)}")
    given = [1.0] * len(found)
    if weights is not None:
        given = [
            checks.number(f"matryoshka_weights[{i}]", w, torch.float32)
            for i, w in enumerate(_sequence("matryoshka_weights", weights))
        ]
    if len(given) != len(found) or not all(abs(w) < float("inf") for w in given):
        raise ValueError(
            f"matryoshka_weights must be {len(found)} finite numbers, one for each of "
            f"matryoshka_dims, got {checks.short(weights)}"
        )
    pairs = sorted(zip(found, given, strict=True))
    return Matryoshka(tuple(d for d, _ in pairs), tuple(w for _, w in pairs))


def _sequence(name: str, value: Any) -> Iterable[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list or tuple of numbers, got {checks.typed(value)}")
    return value


def truncated(x: Tensor, dim: int) -> Tensor:
    """(R, dim) the first columns of the rows, divided by their length, in the dtype of ``x``."""
    return normalize(x[:, :dim].to(accumulation_dtype(x.dtype)), dim=1).to(x.dtype)


def margin_limits(
    query: Tensor, target: Tensor, rules: Rules, dims: Sequence[int], backend: str
) -> Tensor | None:
    """(K, N) ``rules.row_limits`` of each prefix, or None without a margin."""
    if rules.margin is None or rules.row_limit is not None:
        return rules.row_limit
    limit = dispatch.named(backend).margin_limit
    if backend == BACKEND:  # the others multiply prefixes that are rounded to the inputs' dtype
        query, target = widened(query, target)
    pairs = ([truncated(x.detach(), d) for x in (query, target)] for d in dims)
    return torch.stack([limit(q, t, rules.labels, rules.margin) for q, t in pairs])


def logsumexp(
    query: Tensor, target: Tensor, scale: Tensor, dims: Sequence[int], rules: Rules
) -> LogSumExps:
    """Differentiable (K, N), (K, N) and (K, M). ``target_lse`` is (K, 0) in one direction.

    The arguments are resolved, and ``dims`` ascend.
    """
    if autograd.serves(query, target, scale, *biases_of(rules)):
        return LogSumExps(*_LogSumExp.apply(query, target, scale, *biases_of(rules), dims, rules))
    return LogSumExps(*matryoshka_logsumexp(query, target, scale, dims, *rules))


@torch.library.custom_op(
    "llave::matryoshka_logsumexp", mutates_args=(), schema=f"({INPUTS}) -> ({ops.OUTPUTS})"
)
def matryoshka_logsumexp(
    query: Tensor, target: Tensor, logit_scale: Tensor, dims: Sequence[int], *given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``LogSumExps`` of every prefix."""
    rules = _checked(query, target, logit_scale, dims, given)
    transforms.refuse_tangents(query, target, logit_scale)
    return _forward(query, target, logit_scale, dims, rules)


@matryoshka_logsumexp.register_fake
def _(query: Tensor, target: Tensor, logit_scale: Tensor, dims: Sequence[int], *given: Any) -> Any:
    n, m = len(query), len(target) if Rules(*given).symmetric else 0
    dtype = accumulation_dtype(query.dtype)
    return tuple(query.new_empty((len(dims), size), dtype=dtype) for size in (n, n, m))


@torch.library.custom_op(
    "llave::matryoshka_logsumexp_backward",
    mutates_args=(),
    schema=f"({ops.UPSTREAM}, {ops.OUTPUTS}, bool bias_gradients, {INPUTS}) -> ({ops.WITH_BIASES})",
)
def matryoshka_logsumexp_backward(
    d_positive: Tensor,
    d_query_lse: Tensor,
    d_target_lse: Tensor,
    positive: Tensor,
    query_lse: Tensor,
    target_lse: Tensor,
    bias_gradients: bool,
    query: Tensor,
    target: Tensor,
    logit_scale: Tensor,
    dims: Sequence[int],
    *given: Any,
) -> tuple[Tensor, ...]:
    """The ``Gradients``."""
    rules = _checked(query, target, logit_scale, dims, given)
    count = len(dims)
    upstream = ops.like_outputs(
        rules, query, target, "d_", d_positive, d_query_lse, d_target_lse, prefixes=(count,)
    )
    outputs = ops.like_outputs(
        rules, query, target, "", positive, query_lse, target_lse, prefixes=(count,)
    )
    transforms.refuse_tangents(query, target, logit_scale)
    found = _backward(upstream, outputs, query, target, logit_scale, dims, rules, bias_gradients)
    return ops.as_tensors(found)


@matryoshka_logsumexp_backward.register_fake
def _(*arguments: Any) -> Any:
    bias_gradients, query, target = arguments[6:9]
    of_biases = Rules(*arguments[11:]).bias_gradients(bias_gradients)
    return ops.as_tensors(ops.gradients_like(query, target, query.dtype, *of_biases))


class OneDirection:
    """The backend's ``OneDirection`` of the weighted sum over prefixes."""

    def __init__(self, nested: Matryoshka) -> None:
        self.nested = nested

    def merges_gradients(self, query: Tensor) -> bool:
        return torch_backend.merges_gradients(query)

    def one_direction(
        self,
        query: Tensor,
        target: Tensor,
        logit_scale: Tensor,
        rules: Rules,
        *,
        bias_gradients: bool = False,
    ) -> tuple[Tensor, Gradients]:
        limits = margin_limits(query, target, rules, self.nested.dims, BACKEND)
        own = rules._replace(row_limit=limits)
        return torch_matryoshka.one_direction(
            query, target, logit_scale, self.nested, own, bias_gradients=bias_gradients
        )


def _checked(
    query: Tensor, target: Tensor, scale: Tensor, dims: Sequence[int], given: tuple[Any, ...]
) -> Rules:
    rules = ops.checked(query, target, scale, given, prefixes=(len(dims),))
    known = checked(list(dims), None, query.shape[1])
    if known is None or known.dims != tuple(dims):
        raise ValueError(f"dims must ascend, got {checks.short(dims)}; sort them")
    return rules


def _forward(
    query: Tensor, target: Tensor, scale: Tensor, dims: Sequence[int], rules: Rules
) -> LogSumExps:
    with dispatch.running_on(query):
        rules = rules._replace(row_limit=margin_limits(query, target, rules, dims, BACKEND))
        return torch_matryoshka.forward(query, target, scale, dims, rules)


def _backward(
    upstream: LogSumExps,
    outputs: LogSumExps,
    query: Tensor,
    target: Tensor,
    scale: Tensor,
    dims: Sequence[int],
    rules: Rules,
    bias_gradients: bool,
) -> Gradients:
    with dispatch.running_on(query):
        rules = rules._replace(row_limit=margin_limits(query, target, rules, dims, BACKEND))
        return torch_matryoshka.backward(
            upstream, outputs, query, target, scale, dims, rules, bias_gradients=bias_gradients
        )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, target, scale, ctx.dims, *rules = inputs
    ctx.save_for_backward(*output, query, target, scale, *rules[:TENSORS])
    ctx.settings = rules[TENSORS:]


def _gradients(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
    """The gradients that a graph or a transform sees."""
    *outputs, query, target, scale = ctx.saved_tensors[:6]
    rules = *ctx.saved_tensors[6:], *ctx.settings
    biased = any(ctx.needs_input_grad[3:])
    return matryoshka_logsumexp_backward(
        *upstream, *outputs, biased, query, target, scale, ctx.dims, *rules
    )


def _backward_of_operator(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    return ops.of_inputs(ctx, _gradients(ctx, *upstream))


transforms.support(
    matryoshka_logsumexp_backward, ops.setup_nothing, transforms.refuse_second_derivative
)
transforms.support(matryoshka_logsumexp, _setup, _backward_of_operator)


class _LogSumExp(Function):
    """The operator for eager calls, which do without torch's machinery around operators."""

    jvp = staticmethod(transforms.refuse_forward_mode)

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        target: Tensor,
        scale: Tensor,
        query_bias: Tensor | None,
        target_bias: Tensor | None,
        dims: Sequence[int],
        rules: Rules,
    ) -> LogSumExps:
        outputs = _forward(query, target, scale, dims, rules)
        _setup(ctx, (query, target, scale, dims, *rules), outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if transforms.of_backward(*upstream):
            return autograd.needed(ctx, _gradients(ctx, *upstream))
        *outputs, query, target, scale = ctx.saved_tensors[:6]
        rules = Rules(*ctx.saved_tensors[6:], *ctx.settings)
        given = (LogSumExps(*(d.contiguous() for d in upstream)), LogSumExps(*outputs))
        biased = any(ctx.needs_input_grad[3:])
        found = _backward(*given, query, target, scale, ctx.dims, rules, biased)
        return autograd.needed(ctx, found)
