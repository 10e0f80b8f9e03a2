"""The sigmoid loss of every backend that can run here. The reference is in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llave_kernels import dispatch, sigmoid_contrastive_loss
from llave_kernels.backends import products, strip_gemm, torch_gradients, torch_strips
from llave_kernels.reference import reference_sigmoid_loss
from llave_kernels.rules import ELSEWHERE, plain_rules
from tests.helpers import embeddings, relative_error
from tests.llave_kernels.sigmoid import (
    NAMES,
    assert_contract,
    draw_pairs,
    limits,
    outcome,
    truth,
)
from tests.llave_kernels.test_numerics import DTYPES

# Multiples of nothing, edges, fewer targets than queries, and several tiles.
SHAPES = [(1, 1, 1), (1, 9, 3), (7, 11, 5), (13, 3, 33), (70, 145, 20), (150, 131, 17)]


@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_contract(backend: str, reduction: str, n: int, m: int, d: int) -> None:
    for dtype, ids in itertools.product(DTYPES[backend], (False, True)):
        query, target = embeddings(n, m, d, dtype)
        pairs = draw_pairs(n, m, labels=ids or m < n, ids=ids)
        assert_contract(query, target, 10.0, -10.0, backend=backend, reduction=reduction, **pairs)


@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (100.0, -16.0), (3e3, 40.0), (9e3, -80.0)])
def test_logits_of_every_size(backend: str, scale: float, bias: float) -> None:
    """|z| reaches 1e4."""
    for dtype in DTYPES[backend]:
        query, target = embeddings(35, 40, 12, dtype)
        target[:35] = query  # similarities of 1 at the positives
        for reduction in ("mean",) if dtype == torch.float16 else ("sum", "none"):
            assert_contract(query, target, scale, bias, backend=backend, reduction=reduction)


@pytest.mark.parametrize(("few", "many"), [(40, 100), (3, 7)])
def test_many_strips(backend: str, few: int, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strip_gemm, "WORKSPACE", 16 * 176 * 4)
    monkeypatch.setattr(torch_strips, "STRIP_BUDGET", 16 * 176 * 4)
    for dtype in DTYPES[backend]:
        query, target = embeddings(few, many, 9, dtype)
        for reduction in ("mean", "none"):
            assert_contract(query, target, 10.0, -5.0, backend=backend, reduction=reduction)


def test_a_small_loss_keeps_its_digits(backend: str) -> None:
    """Each pair has a loss of about 1e-10, and float16 gradients far below its smallest number."""
    query = target = torch.eye(20, 32)
    for dtype in DTYPES[backend]:
        pair = query.to(dtype), target.to(dtype)
        exact = truth(*pair, 46.0, -23.0)
        assert 1e-10 < float(exact[0]) / 20 < 2e-10
        found = outcome(sigmoid_contrastive_loss, *pair, 46.0, -23.0, backend=backend)
        assert relative_error(found[0], exact[0]) < 1e-5
        half = dtype.itemsize == 2
        # The gradients are divided by N, and float16 keeps no more digits of them.
        if dtype == torch.float16:
            continue
        for value, right in zip(found[1:], exact[1:], strict=True):
            assert relative_error(value, right) < (torch.finfo(dtype).eps if half else 1e-5)


def test_gradients_of_float16_do_not_vanish(backend: str) -> None:
    """At SigLIP's start sigmoid(z) is 4.5e-5. Half of float16's digits are gone there."""
    if torch.float16 not in DTYPES[backend]:
        pytest.skip("no float16")
    query, target = embeddings(50, 60, 24, torch.float16)
    labels = torch.full((50,), 59)

    def scaled(function: Any) -> Any:
        return lambda *rows, **given: 4096 * function(*rows, reduction="sum", **given)

    for bias in (-10.0, -13.0):
        found = outcome(
            scaled(sigmoid_contrastive_loss), query, target, 1.0, bias,
            labels=labels, backend=backend,
        )  # fmt: skip
        pair = query.double(), target.double()
        exact = outcome(scaled(reference_sigmoid_loss), *pair, 1.0, bias, labels=labels)
        # dT of columns that are nobody's positive comes from dS of this size alone.
        assert relative_error(found[2][:59], exact[2][:59]) < 1e-3


def test_nan_in_nan_out(backend: str) -> None:
    for dtype in DTYPES[backend]:
        query, target = embeddings(40, 50, 8, dtype)
        query[3] = math.nan
        found = outcome(
            sigmoid_contrastive_loss, query, target, 10.0, -10.0, reduction="none", backend=backend
        )
        assert bool(found[0][3].isnan())
        assert bool(found[0].isnan().sum() == 1)
        assert bool(found[1][3].isnan().all())
        keep = [i for i in range(40) if i != 3]
        exact = truth(query[keep], target, 10.0, -10.0, reduction="none", labels=torch.tensor(keep))
        assert relative_error(found[0][keep], exact[0]) < 1e-4
        assert bool(found[2].isnan().all())


@pytest.mark.parametrize("label", [-2, 99])
def test_a_label_that_is_no_column_makes_its_row_nan(backend: str, label: int) -> None:
    """On a GPU labels are not checked. A positive elsewhere is no mistake."""
    query, target = embeddings(40, 45, 8)
    labels = torch.arange(40)
    labels[5], labels[6] = label, ELSEWHERE
    numbers = torch.tensor(10.0), torch.tensor(-10.0)
    rules = plain_rules(labels=labels)
    loss, gradients = dispatch.SIGMOID[backend].sigmoid_loss(
        query, target, *numbers, rules, None, gradients=True
    )
    assert loss.isnan().nonzero().flatten().tolist() == [5]
    negatives = torch.nn.functional.softplus(10.0 * query[6].double() @ target.double().T - 10.0)
    assert relative_error(loss[6], negatives.sum()) < 1e-5
    assert gradients is not None
    slope = torch.sigmoid(10.0 * query[6].double() @ target.double().T - 10.0) * 10.0
    assert relative_error(gradients.query[6], slope @ target.double()) < 1e-5


def test_same_bits_each_time(backend: str) -> None:
    for dtype, reduction in itertools.product(DTYPES[backend], ("mean", "none")):
        query, target = embeddings(90, 140, 12, dtype)
        settings = {"reduction": reduction, "backend": backend}
        first, second = (
            outcome(sigmoid_contrastive_loss, query, target, 10.0, -10.0, **settings)
            for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strided_inputs(backend: str) -> None:
    wide = embeddings(21, 23, 26)
    query, target = (x[:, ::2] for x in wide)
    assert_contract(query, target, 10.0, -10.0, backend=backend)
    assert_contract(query.T.contiguous().T, target, 10.0, -10.0, backend=backend)


def test_loss_without_a_gradient_is_the_same(backend: str) -> None:
    for dtype, reduction in itertools.product(DTYPES[backend], ("mean", "sum", "none")):
        query, target = embeddings(33, 50, 7, dtype)
        settings = {"reduction": reduction, "backend": backend}
        with torch.no_grad():
            plain = sigmoid_contrastive_loss(
                query, target, logit_scale=10.0, logit_bias=-10.0, **settings
            )
        found = outcome(sigmoid_contrastive_loss, query, target, 10.0, -10.0, **settings)[0]
        assert relative_error(plain, found) < 1e-6


def host(query: Tensor, target: Tensor, **settings: Tensor) -> Tensor:
    open_clip = pytest.importorskip("open_clip")
    return open_clip.loss.SigLipLoss()(query, target, *settings.values())  # type: ignore[no-any-return]


@pytest.mark.parametrize("count", [100, pytest.param(900, marks=pytest.mark.long)])
def test_random_settings_equal_the_hosts_class(count: int) -> None:
    """OpenCLIP's class, with rows of any length, in float32 as ours and in float64."""
    for _ in range(count):
        n, d = (int(x) for x in torch.randint(1, 40, (2,)))
        scale, bias = float(torch.rand(()) * 30 + 0.1), float(torch.randn(()) * 10)
        query, target = embeddings(n, n, d, unit=bool(torch.rand(()) < 0.5))
        exact = outcome(host, query.double(), target.double(), scale, bias)
        ours = outcome(sigmoid_contrastive_loss, query, target, scale, bias)
        most = limits(query, target, scale, bias, exact)
        for name, found, right, limit in zip(NAMES, ours, exact, most, strict=True):
            error = float((found.double() - right).norm())
            assert error <= limit, (name, n, d, scale, bias)


def test_products_of_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """6NMD for loss and gradients, 2NMD without."""
    counted: list[int] = []

    def counting(original: object) -> object:
        def call(*tensors: Tensor) -> object:
            a, b = tensors[-2:]
            counted.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
            return original(*tensors)  # type: ignore[operator]

        return call

    for module, name in (
        (torch_strips, "product"),
        (torch_gradients, "product"),
        (torch_gradients, "add_product"),
    ):
        monkeypatch.setattr(module, name, counting(getattr(products, name)))
    monkeypatch.setattr(torch_strips, "STRIP_BUDGET", 30 * 8 * 4)
    query, target = embeddings(20, 30, 6)
    sigmoid_contrastive_loss(query, target, logit_scale=10.0, logit_bias=-10.0)
    assert sum(counted) == 2 * 20 * 30 * 6
    counted.clear()
    outcome(sigmoid_contrastive_loss, query, target, 10.0, -10.0)
    assert sum(counted) == 6 * 20 * 30 * 6
