"""torch's demands on an operator: opcheck, compile, autocast, fake tensors, one derivative."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from llave_kernels import (
    HardnessWeightedContrastiveLoss,
    hardness_weighted_contrastive_loss,
    ops,  # noqa: F401  (registers torch.ops.llave)
)
from llave_kernels.reference import reference_loss
from tests.helpers import embeddings, relative_error


def arguments(n: int = 6, m: int = 10, *, symmetric: bool = True) -> tuple[object, ...]:
    query, target = (x.requires_grad_() for x in embeddings(n, m, 5))
    scale = torch.tensor(20.0, requires_grad=True)
    owners = torch.arange(m) % n
    return (
        query,
        target,
        scale,
        torch.arange(n),
        owners,
        None,
        None,
        None,
        None,
        torch.randn(n, requires_grad=True),
        torch.randn(m, requires_grad=True),
        9.0,
        9.0,
        "in_batch",
        None,
        symmetric,
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck_logsumexp(symmetric: bool, backend: str) -> None:
    query, target, scale, *rules = arguments(symmetric=symmetric)
    op = torch.ops.llave.contrastive_logsumexp
    torch.library.opcheck(op, (query, target, scale, backend, *rules))


def test_opcheck_one_direction() -> None:
    query, target, scale, *rules = arguments(symmetric=False)
    op = torch.ops.llave.one_direction_loss
    torch.library.opcheck(op, (query, target, scale, "torch", *rules))


@pytest.mark.parametrize(
    ("symmetric", "dynamic"),
    [
        (True, True),
        (False, False),
        pytest.param(True, False, marks=pytest.mark.long),
        pytest.param(False, True, marks=pytest.mark.long),
    ],
)
def test_compile_without_a_break(symmetric: bool, dynamic: bool) -> None:
    def step(query: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        query, target = (torch.nn.functional.normalize(x, dim=1) for x in (query, target))
        return hardness_weighted_contrastive_loss(query, target, symmetric=symmetric)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for n in (8, 11):
        pair = [x.requires_grad_() for x in embeddings(n, n, 6, unit=False)]
        eager, traced = step(*pair), compiled(*pair)
        assert relative_error(traced, eager) < 1e-6
        for a, b in zip(
            torch.autograd.grad(traced, pair), torch.autograd.grad(eager, pair), strict=True
        ):
            assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_graph_serves_batches_of_every_size(symmetric: bool) -> None:
    """Some sizes have room to keep every similarity, some do not, some have mined negatives."""
    torch._dynamo.reset()
    counters.clear()

    def step(query: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return hardness_weighted_contrastive_loss(query, target, symmetric=symmetric)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    sizes = [(n, m) for n in (5, 16, 33, 64, 100, 127, 256, 300) for m in (n + 1, 3 * n)]
    for n, m in [*sizes, (3000, 9000)]:
        pair = [x.requires_grad_() for x in embeddings(n, m, 40)]
        traced, eager = compiled(*pair), step(*pair)
        assert relative_error(traced, eager) < 1e-6
        found, expected = (torch.autograd.grad(x, pair) for x in (traced, eager))
        for a, b in zip(found, expected, strict=True):
            assert relative_error(a, b) < 1e-6
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_module_with_learnable_scale() -> None:
    module = HardnessWeightedContrastiveLoss(20.0, learnable=True)
    compiled = torch.compile(module, fullgraph=True)
    query, target = embeddings(8, 8, 6)
    compiled(query, target).backward()
    assert module.log_logit_scale is not None
    traced = module.log_logit_scale.grad
    module.log_logit_scale.grad = None
    module(query, target).backward()
    assert relative_error(traced, module.log_logit_scale.grad) < 1e-5
    with torch.no_grad():
        module.log_logit_scale.fill_(5.0)  # above the bound
    compiled(query, target)
    assert float(module.logit_scale.detach()) == pytest.approx(100.0, rel=1e-6)
    assert float(module.log_logit_scale.detach()) < 4.7


def test_autocast_casts_embeddings_and_keeps_float32_sums() -> None:
    query, target = (x.requires_grad_() for x in embeddings(32, 32, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = hardness_weighted_contrastive_loss(query, target)
    rounded = [x.detach().bfloat16() for x in (query, target)]
    assert loss.dtype == torch.float32
    assert torch.equal(loss, hardness_weighted_contrastive_loss(*rounded))
    loss.backward()
    assert query.grad is not None
    assert query.grad.dtype == torch.float32


@pytest.mark.parametrize("symmetric", [True, False])
def test_double_backward_is_refused(symmetric: bool) -> None:
    query, target = (x.requires_grad_() for x in embeddings(6, 6, 4))

    def second_derivative() -> None:
        loss = hardness_weighted_contrastive_loss(query, target, symmetric=symmetric)
        (gradient,) = torch.autograd.grad(loss, query, create_graph=True)
        gradient.square().sum().backward()

    with pytest.raises(RuntimeError, match="no second derivative"):
        second_derivative()


def test_only_needed_gradients() -> None:
    query, target = embeddings(6, 6, 4)
    query.requires_grad_()
    hardness_weighted_contrastive_loss(query, target).backward()
    assert query.grad is not None
    assert target.grad is None


def test_no_grad_and_inference_mode() -> None:
    query, target = embeddings(6, 6, 4)
    expected = reference_loss(query.double(), target.double())
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            value = hardness_weighted_contrastive_loss(query, target)
        assert relative_error(value, expected) < 2e-6


def test_gradient_dtype_and_layout_follow_the_inputs() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        query, target = (x.requires_grad_() for x in embeddings(6, 6, 4, dtype))
        hardness_weighted_contrastive_loss(query, target).backward()
        assert query.grad is not None
        assert query.grad.dtype == dtype
