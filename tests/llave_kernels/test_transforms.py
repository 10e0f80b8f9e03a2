"""``torch.func`` transforms, forward-mode differentiation and tracing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from llave_kernels import (
    HardnessWeightedContrastiveLoss,
    contrastive_logsumexp,
    hardness_weighted_contrastive_loss,
    ops,
)
from llave_kernels.reference import reference_loss
from tests.helpers import embeddings, relative_error

Loss = Callable[..., Tensor]
N = 6
LABELS = torch.arange(N)


def operator(query: Tensor, target: Tensor, **_: Any) -> Tensor:
    """The symmetric loss, computed with the operator alone."""
    rules = LABELS, *[None] * 7, 9.0, 9.0, "in_batch", None, True
    scale = torch.tensor(50.0, dtype=query.dtype)
    logsumexp = torch.ops.llave.contrastive_logsumexp
    positive, rows, columns, _ = logsumexp(query, target, scale, "torch", *rules)
    return torch.nn.functional.logsigmoid(2 * positive - rows - columns).mean()


def module(query: Tensor, target: Tensor, **settings: Any) -> Tensor:
    return HardnessWeightedContrastiveLoss(**settings)(query, target)


def primitive(query: Tensor, target: Tensor, **settings: Any) -> Tensor:
    return contrastive_logsumexp(query, target, **settings).query.sum()


EVERY = [hardness_weighted_contrastive_loss, module, primitive, operator]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_transforms_of_the_first_derivative_equal_the_reference(
    symmetric: bool, reduction: str
) -> None:
    query, target = embeddings(N, N, 4, torch.float64)
    batch = torch.stack([query, query.flip(0)])
    scale = torch.tensor(20.0, dtype=torch.float64)
    settings: dict[str, Any] = {"symmetric": symmetric, "reduction": reduction}

    def by(loss: Loss) -> list[Tensor]:
        def value(query: Tensor, target: Tensor = target, scale: Any = scale) -> Tensor:
            return loss(query, target, logit_scale=scale, **settings)

        total = lambda *inputs: value(*inputs).sum()  # noqa: E731
        outputs, pull = vjp(value, query, target, scale)
        return [
            *grad(total, argnums=(0, 1, 2))(query, target, scale),
            *pull(torch.ones_like(outputs)),
            jacrev(value)(query),
            vmap(value)(batch),
            vmap(grad(total))(batch),
            vmap(lambda k: value(query, target, k))(torch.stack([scale, scale / 2])),
            make_fx(grad(total))(query)(batch[1]),
            torch.compile(grad(total), backend="aot_eager", fullgraph=True)(query),
            torch.autograd.functional.jacobian(value, query, vectorize=True),
        ]

    ours, truth = by(hardness_weighted_contrastive_loss), by(reference_loss)
    for found, expected in zip(ours, truth, strict=True):
        assert relative_error(found, expected) < 1e-10


def test_vmap_takes_batched_rules_and_operators() -> None:
    query, target = embeddings(N, 2 * N, 4)
    labels = torch.stack([torch.randperm(2 * N)[:N] for _ in range(3)])
    loss = partial(hardness_weighted_contrastive_loss, query, target, owners=torch.arange(2 * N))
    found = vmap(lambda labels: loss(labels=labels))(labels)
    assert relative_error(found, torch.stack([loss(labels=x) for x in labels])) < 1e-6
    queries = torch.stack([query, -query])
    expected = torch.stack([operator(x, target[:N]) for x in queries])
    assert relative_error(vmap(operator, (0, None))(queries, target[:N]), expected) < 1e-6


@pytest.mark.parametrize("symmetric", [True, False])
def test_functional_call_differentiates_the_scale(symmetric: bool) -> None:
    loss = HardnessWeightedContrastiveLoss(20.0, learnable=True, symmetric=symmetric)
    pair = embeddings(N, N, 4)
    parameters = {name: x.detach() for name, x in loss.named_parameters()}
    found = grad(lambda p: functional_call(loss, p, pair))(parameters)["log_logit_scale"]
    loss(*pair).backward()
    assert relative_error(found, loss.log_logit_scale.grad) < 1e-5


def dual(loss: Loss, query: Tensor, *, requires_grad: bool = False) -> Any:
    with forward_ad.dual_level():
        x = query.clone().requires_grad_(requires_grad)
        return loss(forward_ad.make_dual(x, torch.ones_like(query)))


FORWARD: dict[str, Callable[[Loss, Tensor], Any]] = {
    "jvp": lambda f, q: jvp(f, (q,), (q,)),
    "linearize": lambda f, q: torch.func.linearize(f, q),
    "jacfwd": lambda f, q: jacfwd(f)(q),
    "hessian": lambda f, q: hessian(f)(q),
    "dual numbers": dual,
    "dual numbers that require grad": partial(dual, requires_grad=True),
    "no_grad": lambda f, q: torch.no_grad()(dual)(f, q),
    "gradcheck": lambda f, q: torch.autograd.gradcheck(
        f, q.double().requires_grad_(), check_forward_ad=True, check_backward_ad=False
    ),
    "compiled": lambda f, q: dual(torch.compile(f, backend="eager"), q),
}


@pytest.mark.parametrize("loss", EVERY, ids=lambda f: f.__name__)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("mode", FORWARD)
def test_forward_mode_is_refused(mode: str, symmetric: bool, loss: Loss) -> None:
    query, target = embeddings(N, N, 4)
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative: .*torch\.func\.grad"):
        FORWARD[mode](lambda q: loss(q, target.to(q.dtype), symmetric=symmetric), query)


@pytest.mark.parametrize("loss", EVERY, ids=lambda f: f.__name__)
@pytest.mark.parametrize("symmetric", [True, False])
def test_second_derivatives_are_refused_under_transforms(symmetric: bool, loss: Loss) -> None:
    query, target = embeddings(N, N, 4)

    def value(query: Tensor) -> Tensor:
        return loss(query, target, symmetric=symmetric)

    for second in (
        lambda: grad(lambda q: grad(value)(q).square().sum())(query),
        lambda: jacrev(jacrev(value))(query),
        lambda: torch.autograd.functional.hessian(value, query),
    ):
        with pytest.raises(RuntimeError, match="no second derivative"):
            second()


def test_a_scales_tangent_is_refused_and_a_level_without_tangents_is_none() -> None:
    pair = embeddings(N, N, 4)
    with forward_ad.dual_level():
        value = hardness_weighted_contrastive_loss(*pair)
        scale = forward_ad.make_dual(torch.tensor(50.0), torch.tensor(1.0))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            hardness_weighted_contrastive_loss(*pair, logit_scale=scale)
    assert torch.equal(value, hardness_weighted_contrastive_loss(*pair))


def test_the_operator_of_one_direction_names_the_one_to_take() -> None:
    query, target = embeddings(N, N, 4)
    rules = LABELS, *[None] * 7, 9.0, 9.0, "in_batch", None, False
    scale = torch.tensor(50.0)
    with pytest.raises(RuntimeError, match=r"take torch\.ops\.llave\."):
        grad(lambda q: ops.one_direction_loss(q, target, scale, "torch", *rules)[0])(query)
