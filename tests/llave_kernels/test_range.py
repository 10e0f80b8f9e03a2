"""The range of half precision, NaN rows, loss scaling, and how sharp the contract is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from llave_kernels import hardness_weighted_contrastive_loss
from llave_kernels.reference import reference_loss
from tests.conftest import BACKENDS
from tests.helpers import (
    allowed_errors,
    bounds,
    embeddings,
    loss_and_gradients,
    reference,
    relative_error,
)
from tests.llave_kernels.test_numerics import DTYPES

HALF = (torch.float16, torch.bfloat16)


def half_types(backend: str) -> list[torch.dtype]:
    return [dtype for dtype in HALF if dtype in DTYPES[backend]]


def test_a_row_of_nan_leaves_the_others_as_they_are(backend: str) -> None:
    """This holds in one direction. In two, each column's sum includes the row."""
    n, m, d, odd = 40, 70, 16, 3
    for dtype in DTYPES[backend]:
        query, target = embeddings(n, m, d, dtype)
        query[odd] = float("nan")
        settings: dict[str, Any] = {
            "logit_scale": 20.0,
            "symmetric": False,
            "reduction": "sum",
            "labels": torch.arange(n),
            "owners": torch.arange(m),
        }
        query.requires_grad_()
        hardness_weighted_contrastive_loss(query, target, backend=backend, **settings).backward()
        assert query.grad is not None
        settings["labels"] = keep = torch.cat([torch.arange(odd), torch.arange(odd + 1, n)])
        rest = query.detach()[keep].double().requires_grad_()
        reference_loss(rest, target.double(), **settings).backward()
        assert relative_error(query.grad[keep], rest.grad) < max(1e-4, torch.finfo(dtype).eps)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e4, 1e9, 1e30])
def test_upstream_gradients_of_zero_give_gradients_of_zero(
    backend: str, symmetric: bool, scale: float
) -> None:
    """Of a row without negatives, and of a loss that its caller multiplies by 0."""
    for dtype in DTYPES[backend]:
        for n, factor in ((1, 1.0), (5, 0.0)):
            pair = [(x / 10).requires_grad_() for x in embeddings(n, n, 6, dtype)]
            settings: dict[str, Any] = {"alpha": 0.0, "symmetric": symmetric, "backend": backend}
            loss = hardness_weighted_contrastive_loss(
                *pair, logit_scale=scale, reduction="none", **settings
            )
            for gradient in torch.autograd.grad((loss * factor).sum(), pair):
                assert bool((gradient == 0).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_that_fit_arrive_whatever_the_unscaled_sum(
    backend: str, symmetric: bool, reduction: str
) -> None:
    """One negative is the nearest of every row. Its gradient sums to 100 N before the mean."""
    n, d = (150, 16) if backend == "triton" else (1500, 16)
    for dtype in half_types(backend):
        target = torch.randn(n, d, dtype=torch.float64)
        query = target[:1] + 0.1 * torch.randn(n, d, dtype=torch.float64)
        pair = [normalize(x, dim=1).to(dtype) for x in (query, target)]
        factor = 1e-4 if reduction == "sum" else 1.0 / n if reduction == "none" else 1.0

        def step(function: Any, pair: list[Tensor], factor: float = factor, **more: Any) -> Any:
            pair = [x.detach().requires_grad_() for x in pair]
            loss = function(
                *pair, logit_scale=100.0, symmetric=symmetric, reduction=reduction, **more
            )
            loss.backward(torch.full_like(loss, factor))
            return [x.grad for x in pair]

        truth = step(reference_loss, [x.double() for x in pair])
        found = step(hardness_weighted_contrastive_loss, pair, backend=backend)
        for a, b in zip(found, truth, strict=True):
            assert relative_error(a, b) < 2 * torch.finfo(dtype).eps, dtype


@pytest.mark.parametrize("symmetric", [True, False])
def test_small_gradients_arrive_through_loss_scaling(backend: str, symmetric: bool) -> None:
    """The batch is nearly converged. float16 holds its gradients only after loss scaling."""
    n, d = 60, 32
    for dtype in half_types(backend):
        target = normalize(torch.randn(n, d, dtype=torch.float64), dim=1)
        query = normalize(target + 0.02 * torch.randn(n, d, dtype=torch.float64), dim=1)
        pair = [x.to(dtype) for x in (query, target)]
        rules = {"logit_scale": 30.0, "symmetric": symmetric, "alpha": 0.0}
        gradients = []
        for function, dtypes in ((reference_loss, torch.float64), (None, dtype)):
            inputs = [x.to(dtypes).requires_grad_() for x in pair]
            call = function or hardness_weighted_contrastive_loss
            loss = call(*inputs, **rules, **({} if function else {"backend": backend}))
            (loss * 2.0**16).backward()
            gradients.append([x.grad for x in inputs])
        for a, b in zip(*reversed(gradients), strict=True):
            assert 0 < float(b.norm()) / 2**16 < 1e-4  # float16 alone would keep few digits
            assert relative_error(a, b) < 4 * torch.finfo(dtype).eps, dtype


@pytest.mark.parametrize("symmetric", [True, False])
def test_training_with_a_gradient_scaler_is_that_of_the_dense_loss(symmetric: bool) -> None:
    def train(loss_of: Any) -> list[float]:
        torch.manual_seed(0)
        batch = torch.randn(2, 64, 12)
        model = nn.Linear(12, 8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1000)
        losses = []
        for _ in range(20):
            pair = (normalize(model(x), dim=1).half() for x in batch)
            loss = loss_of(*pair, logit_scale=20.0, symmetric=symmetric)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        assert scaler.get_scale() == 2.0**16  # no step was skipped
        return losses

    def dense(query: Tensor, target: Tensor, **rules: Any) -> Tensor:
        return reference_loss(query.float(), target.float(), **rules)

    ours, theirs = train(hardness_weighted_contrastive_loss), train(dense)
    assert theirs[-1] < 0.95 * theirs[0]
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("strength", [(1.0, 0.0), (20.0, 9.0), (50.0, 9.0), (100.0, 9.0)])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if "cuda" not in b], indirect=True)
def test_float32_keeps_the_stated_bound_on_its_own(
    backend: str, strength: tuple[float, float]
) -> None:
    """The allowance for the error of dense float32 is left out."""
    scale, alpha = strength
    for _ in range(4):
        query, target = embeddings(70, 130, 48)
        truth = reference(query, target, scale, alpha=alpha)
        found = loss_and_gradients(
            hardness_weighted_contrastive_loss, query, target, scale, alpha=alpha, backend=backend
        )
        limits = bounds(torch.float32, scale + alpha)
        for i, (a, b) in enumerate(zip(found, truth, strict=True)):
            assert relative_error(a, b) <= limits[i > 0], i


@pytest.mark.parametrize("dtype", HALF)
def test_the_contract_notices_a_lost_lane_on_a_nearly_converged_batch(dtype: torch.dtype) -> None:
    """Every 32nd column is missing from the sums. Dense half precision's error would hide it."""
    n, d, scale = 256, 32, 30.0
    for _ in range(5):
        target = normalize(torch.randn(n, d, dtype=torch.float64), dim=1)
        noise = 0.5 * torch.randn(n, d, dtype=torch.float64) / d**0.5
        pair = [x.to(dtype) for x in (normalize(target + noise, dim=1), target)]
        truth = reference(*pair, scale)
        lost = {
            "query_ids": torch.ones(n, dtype=torch.int64),
            "target_ids": (torch.arange(n) % 32 == 5).long(),
        }
        limits = allowed_errors(*pair, scale, truth, 1.0)
        errors = [
            float((a - b).norm())
            for a, b in zip(reference(*pair, scale, **lost), truth, strict=True)
        ]
        assert any(error > limit for error, limit in zip(errors, limits, strict=True))
