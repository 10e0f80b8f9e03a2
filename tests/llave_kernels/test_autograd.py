"""Eager calls: the same results as the operators, with few launches, and what autograd demands."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from llave_kernels import (
    autograd,
    contrastive_logsumexp,
    hardness_weighted_contrastive_loss,
)
from llave_kernels.backends import cuda, triton_backend
from llave_kernels.rules import Rules
from tests.helpers import draw_rules, embeddings, relative_error
from tests.llave_kernels import accounting

KINDS: list[set[str]] = [set(), {"labels", "owners"}, {"ids", "margin", "target_alpha"}]


class Watching(TorchDispatchMode):
    """A mode that changes nothing. Calls under it take the operators."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def results(query: Tensor, target: Tensor, scale: Any, upstream: float, **rules: Any) -> list[Any]:
    """The loss, and the gradients of query, target and a scale that requires one."""
    inputs = [query.clone().requires_grad_(), target.clone().requires_grad_()]
    loss = hardness_weighted_contrastive_loss(*inputs, logit_scale=scale, **rules)
    if isinstance(scale, Tensor) and scale.requires_grad:
        inputs.append(scale)
    return [loss.detach(), *torch.autograd.grad(loss, inputs, torch.full_like(loss, upstream))]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_eager_call_equals_the_operators(backend: str, reduction: str, symmetric: bool) -> None:
    for number, kinds in enumerate(KINDS):
        dtype = (torch.float32, torch.float16)[(number + symmetric) % 2]
        query, target = embeddings(37, 90, 24, dtype)
        rules = draw_rules(37, 90, kinds) | {"symmetric": symmetric, "reduction": reduction}
        for scale in (20.0, torch.tensor(20.0, requires_grad=True)):
            eager = results(query, target, scale, -0.7, backend=backend, **rules)
            with Watching():
                graph = results(query, target, scale, -0.7, backend=backend, **rules)
            bound = 2e-6 if dtype == torch.float32 else 2e-3
            for name, a, b in zip(("loss", "dQ", "dT", "dk"), eager, graph, strict=False):
                assert relative_error(a, b) < (2e-6 if name == "loss" else bound), name


def test_a_number_and_a_tensor_give_equal_bits(backend: str) -> None:
    query, target = embeddings(70, 300, 8)  # some tiles have no positive and no edge
    number = results(query, target, 30.0, 1.0, backend=backend)
    tensor = results(query, target, torch.tensor(30.0), 1.0, backend=backend)
    for a, b in zip(number, tensor, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("upstream", [0.0, 1e-30, -3.0, 65536.0, 1e30, math.inf, math.nan])
def test_upstream_gradients_of_every_size(backend: str, upstream: float) -> None:
    """The gradients are the unit ones times the upstream gradient, in the range of the dtype."""
    for dtype in (torch.float32, torch.float16):
        query, target = embeddings(9, 20, 8, dtype)
        scale = torch.tensor(10.0, requires_grad=True)
        unit = results(query.float(), target.float(), scale, 1.0, backend="torch")[1:]
        found = results(query, target, scale, upstream, backend=backend)[1:]
        for x, one in zip(found, unit, strict=True):
            expected = (one.double() * upstream).to(x.dtype)
            finite = expected.isfinite()
            if finite.all() and float(expected.double().norm()) > 100 * torch.finfo(x.dtype).tiny:
                assert relative_error(x, expected) < (1e-2 if dtype == torch.float16 else 1e-4)
            if not finite.any():
                assert not x.isfinite().any()


def test_a_backward_may_run_twice(backend: str) -> None:
    query, target = (x.requires_grad_() for x in embeddings(12, 12, 8))
    loss = hardness_weighted_contrastive_loss(query, target, backend=backend)
    first = torch.autograd.grad(loss, (query, target), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, (query, target)), strict=True):
        assert torch.equal(a, b)


def test_a_loss_may_be_changed_in_place(backend: str) -> None:
    query, target = (x.requires_grad_() for x in embeddings(6, 6, 4))
    loss = hardness_weighted_contrastive_loss(query, target, backend=backend)
    expected = torch.autograd.grad(loss / 4, (query, target), retain_graph=True)
    loss /= 4  # as loops do that accumulate gradients
    for a, b in zip(torch.autograd.grad(loss, (query, target)), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inputs_changed_in_place_are_noticed(backend: str, reduction: str) -> None:
    query, target = embeddings(6, 6, 4)
    query.requires_grad_()
    loss = hardness_weighted_contrastive_loss(query, target, backend=backend, reduction=reduction)
    target.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_saved_tensors_may_move(backend: str) -> None:
    """Hooks on saved tensors, and activation checkpoints, change no gradient."""
    query, target = (x.requires_grad_() for x in embeddings(14, 30, 8))

    def loss(query: Tensor, target: Tensor) -> Tensor:
        return hardness_weighted_contrastive_loss(query, target, backend=backend)

    def grad(value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, (query, target))

    plain = grad(loss(query, target))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
        hooked = loss(query, target)
    for found in (grad(hooked), grad(checkpoint(loss, query, target, use_reentrant=False))):
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_only_plain_eager_calls_skip_the_operators() -> None:
    x = torch.zeros(2, 2)
    assert autograd.serves(x, torch.nn.Parameter(x), 3.0)
    assert not autograd.serves(x, x.to("meta"))
    assert not torch.func.vmap(lambda y: torch.tensor(autograd.serves(y)))(x).any()
    with Watching():
        assert not autograd.serves(x)
    with torch.autograd.forward_ad.dual_level():
        assert not autograd.serves(x)


def test_log_sum_exps_without_an_upstream_gradient(backend: str) -> None:
    query, target = (x.requires_grad_() for x in embeddings(7, 9, 4))
    outputs = contrastive_logsumexp(query, target, backend=backend)
    for output in outputs[:3]:
        assert output is not None
        eager = torch.autograd.grad(output.sum(), (query, target), retain_graph=True)
        with Watching():
            again = contrastive_logsumexp(query, target, backend=backend)
            (same,) = (x for x, y in zip(again, outputs, strict=True) if y is output)
            graph = torch.autograd.grad(same.sum(), (query, target))
        for a, b in zip(eager, graph, strict=True):
            assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize(
    ("backend", "scale", "forward", "backward"),
    [
        ("cuda", 50.0, "forward loss", "backward mm mm"),
        ("cuda", None, "forward loss", "backward sum mm mm"),
        (
            "triton",
            50.0,
            "forward_kernel combine_kernel positive_kernel loss_kernel",
            "strip_kernel mm mm",
        ),
        (
            "triton",
            None,
            "forward_kernel combine_kernel positive_kernel loss_kernel",
            "strip_kernel sum mm mm",
        ),
    ],
)
def test_launches_of_a_small_call(
    backend: str,
    scale: float | None,
    forward: str,
    backward: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At most 8. ``cuda``'s forward launches two kernels."""
    accounts = accounting.pretend(monkeypatch, backend)
    query, target = (
        torch.empty(1000, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for _ in range(2)
    )
    kappa: Any = torch.empty((), device="meta", requires_grad=True) if scale is None else scale
    rules = Rules(*[None] * 8, 9.0, 9.0, "in_batch", None, True)
    module = {"cuda": cuda, "triton": triton_backend}[backend]
    d_total = torch.empty((), device="meta")
    with accounts:
        total = autograd.total_loss(query, target, kappa, module, rules, 1 / 1000)
        assert " ".join(accounts.launches) == forward
        accounts.launches.clear()
        total.backward(d_total)
    assert " ".join(accounts.launches) == backward
