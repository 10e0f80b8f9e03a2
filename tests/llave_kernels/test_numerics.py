"""The numerical contract of every backend that can run here. The reference is in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from llave_kernels import (
    contrastive_logsumexp,
    hardness_weighted_contrastive_loss,
    within,
)
from llave_kernels.backends import products, strip_gemm, torch_backend, torch_strips
from llave_kernels.reference import reference_logsumexp, similarity_loss
from tests.conftest import BACKENDS
from tests.helpers import (
    assert_contract,
    dense_errors,
    draw_rules,
    embeddings,
    fused,
    multiplicands,
    reference,
    relative_error,
)

KINDS = ("labels", "owners", "ids", "margin", "target_alpha", "biases", "within")
MOST = [
    tuple(k for k in KINDS if k != left) for left in ("biases", "within")
]  # one excludes the other
DTYPES = {
    "torch": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    # Triton's interpreter cannot multiply bfloat16.
    "triton": (torch.float32, torch.float16) + (torch.bfloat16,) * torch.cuda.is_available(),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


@pytest.fixture(params=["few strips", "many strips"])
def strip_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many strips":  # few rows a strip, no similarities kept
        monkeypatch.setattr(strip_gemm, "WORKSPACE", 1 << 15)
        monkeypatch.setattr(torch_strips, "STRIP_BUDGET", 256)
        monkeypatch.setattr(torch_backend, "KEEP_BUDGET", 0)
        monkeypatch.setattr(products, "ONEDNN_WORK", 0)
        monkeypatch.setattr(products, "SUM_COLUMNS", 3)
        monkeypatch.setattr(within, "strip_rows", lambda n, device: min(n, 5))


@pytest.mark.parametrize("hardness", ["in_batch", "hard_negatives", "all"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "kinds",
    [c for r in (0, 1, 2) for c in itertools.combinations(KINDS, r)]
    + [KINDS[:-1], KINDS[:5] + KINDS[6:]],
    ids="+".join,
)
@pytest.mark.usefixtures("strip_rows")
def test_every_rule_on_torch(hardness: str, symmetric: bool, kinds: tuple[str, ...]) -> None:
    n, m, d = 13, 31, 7
    rules = draw_rules(n, m, kinds) | {"hardness": hardness, "symmetric": symmetric}
    for dtype, reduction in itertools.product((torch.float64, torch.float32), ("mean", "none")):
        query, target = embeddings(n, m, d, dtype)
        assert_contract(query, target, 20.0, backend="torch", reduction=reduction, **rules)


@pytest.mark.parametrize("hardness", ["in_batch", "hard_negatives", "all"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kinds", [(), *((k,) for k in KINDS), *MOST], ids="+".join)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "torch"], indirect=True)
@pytest.mark.usefixtures("strip_rows")
def test_every_rule_on_kernels(
    backend: str, hardness: str, symmetric: bool, kinds: tuple[str, ...]
) -> None:
    """The sizes give several tiles each way. The interpreter's tiles are smaller."""
    n, m, d = (13, 31, 7) if backend == "triton" else (150, 300, 7)
    query, target = embeddings(n, m, d)
    rules = draw_rules(n, m, kinds) | {"hardness": hardness, "symmetric": symmetric}
    assert_contract(query, target, 20.0, backend=backend, **rules)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 2, 3), (2, 2, 1), (5, 5, 65), (33, 70, 129), (65, 65, 40)]
)
def test_shapes(backend: str, shape: tuple[int, int, int]) -> None:
    for dtype in DTYPES[backend]:
        assert_contract(*embeddings(*shape, dtype), 50.0, backend=backend)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "shape", [(70, 150, 64), pytest.param((129, 129, 33), marks=pytest.mark.long)]
)
def test_half_precision_is_no_worse_than_dense(
    backend: str, shape: tuple[int, int, int], symmetric: bool
) -> None:
    """The root mean square of a few draws is compared. In one draw dense may be right by luck."""
    for dtype in (dtype for dtype in DTYPES[backend] if dtype.itemsize == 2):
        squares = torch.zeros(2, 4, dtype=torch.float64)
        for _ in range(4):
            query, target = embeddings(*shape, dtype)
            truth = reference(query, target, 50.0, symmetric=symmetric)
            ours = fused(query, target, 50.0, symmetric=symmetric, backend=backend)
            plain = dense_errors(query, target, 50.0, truth, symmetric=symmetric)
            errors = [float((x.double() - y).norm()) for x, y in zip(ours, truth, strict=True)]
            squares += torch.tensor([errors, plain], dtype=torch.float64).square()
        assert bool((squares[0] <= squares[1]).all()), (dtype, squares.sqrt())


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_contract_property(backend: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31 - 1)))
    n = data.draw(st.integers(1, 24))
    m = n + data.draw(st.integers(0, 2 * n))
    d = data.draw(st.integers(1, 40))
    dtype = data.draw(st.sampled_from(DTYPES[backend]))
    query, target = embeddings(n, m, d, dtype, unit=data.draw(st.booleans()))
    layout = data.draw(st.sampled_from(["plain", "transposed", "every second", "offset"]))
    if layout == "transposed":
        query, target = query.T.contiguous().T, target.T.contiguous().T
    elif layout == "every second":
        query = query.repeat_interleave(2, 1)[:, ::2]
    elif layout == "offset":
        query, target = torch.cat([query, query])[n:], torch.cat([target, target], 1)[:, d:]
    kinds = data.draw(st.sets(st.sampled_from(KINDS)))
    rules = draw_rules(n, m, kinds) | {
        "hardness": data.draw(st.sampled_from(["in_batch", "hard_negatives", "all"])),
        "symmetric": data.draw(st.booleans()),
        "alpha": data.draw(st.sampled_from([0.0, 1.0, 9.0])),
        "reduction": data.draw(st.sampled_from(["mean", "sum", "none"])),
    }
    scale = data.draw(st.sampled_from([1.0, 14.3, 50.0, 100.0]))
    assert_contract(query, target, scale, backend=backend, **rules)


@pytest.mark.parametrize("symmetric", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, 1),
        pytest.param(torch.float32, 2, marks=pytest.mark.long),
        pytest.param(torch.bfloat16, 1, marks=pytest.mark.long),
    ],
)
def test_products_of_some_size(dtype: torch.dtype, layout: int, symmetric: bool) -> None:
    """The sizes reach the CPU's other GEMM library and several strips, some of them kept."""
    query, target = embeddings(701, 1500, 131 * layout, dtype)
    query, target = (x[:, ::layout] for x in (query, target))
    assert_contract(query, target, 50.0, backend="torch", symmetric=symmetric)


def test_logsumexp_is_the_reference_for_every_column(backend: str) -> None:
    query, target = embeddings(9, 20, 6)
    ours = contrastive_logsumexp(query, target, backend=backend)
    positive, rows, columns = reference_logsumexp(query.double(), target.double())
    assert relative_error(ours.positive, positive) < 2e-6
    assert relative_error(ours.query, rows) < 2e-6
    assert ours.target is not None
    assert columns is not None
    assert relative_error(ours.target, columns) < 2e-6


@pytest.mark.parametrize("direction", ["query", "target"])
def test_a_tile_that_counts_for_nothing(backend: str, direction: str) -> None:
    """In row (or column) 0 the first half are duplicates.

    Their terms would be exp(118) times those of the second half.
    """
    n = 256
    signs = torch.ones(n, 1)
    signs[n // 2 :] = -1.0
    one, half = torch.where(torch.arange(n) == 0, 1, 2), torch.where(signs[:, 0] > 0, 1, 0)
    pairs, ids = [torch.ones(n, 1), signs], [one, half]
    if direction == "target":
        pairs, ids = pairs[::-1], ids[::-1]
    rules = {"query_ids": ids[0], "target_ids": ids[1], "hardness": "all"}
    ours = contrastive_logsumexp(*pairs, backend=backend, **rules)
    _, *truth = reference_logsumexp(*(x.double() for x in pairs), **rules)
    for found, expected in zip((ours.query, ours.target), truth, strict=True):
        assert relative_error(found, expected) < 2e-6
    assert float(truth[direction == "target"][0]) < -50


def test_large_logits(backend: str) -> None:
    query, target = embeddings(40, 40, 16, unit=False)
    assert_contract(4 * query, 4 * target, 16.0, backend=backend)  # |z| near 1e4
    assert_contract(query, target, 500.0, backend=backend)


def test_converged_batch_keeps_its_digits(backend: str) -> None:
    n = 1024 if backend == "torch" else 128
    torch.manual_seed(1)
    target, _ = embeddings(n, 1, 384)
    query = multiplicands(target + 1e-3 * torch.randn_like(target) / 384**0.5)
    exact = reference(query, target, 50.0, alpha=0.0)
    ours = fused(query, target, 50.0, alpha=0.0, backend=backend)
    plain = cross_entropy(50.0 * query @ target.T, torch.arange(n))
    assert float(plain) == 0.0
    assert float(exact[0]) > 0
    assert relative_error(ours[0], exact[0]) < 5e-4
    assert max(relative_error(a, b) for a, b in zip(ours[1:], exact[1:], strict=True)) < 1e-3


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_scales_gradient_where_its_terms_cancel(backend: str, symmetric: bool) -> None:
    """At the best scale for a batch, the terms add up to 0. They are not rounded before."""
    query, target = embeddings(60, 100, 24, torch.float16)
    target[:60] = (target[:60] + query) / 2
    s = (query.double() @ target.double().T).requires_grad_()

    def terms(scale: float) -> torch.Tensor:
        loss = similarity_loss(s, logit_scale=scale, symmetric=symmetric, alpha=0.0)
        return torch.autograd.grad(loss, s)[0] * s.detach() / scale

    low, high = 0.1, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(terms(middle).sum()) < 0 else (low, middle)
    # A scale that float32 holds, and a batch in which each row has the weight 1 / N.
    scale = torch.tensor(middle, requires_grad=True)
    exact = terms(float(scale.detach()))
    size = float(exact.abs().sum())
    assert abs(float(exact.sum())) < 1e-6 * size
    loss = hardness_weighted_contrastive_loss(
        query, target, logit_scale=scale, symmetric=symmetric, alpha=0.0, backend=backend
    )
    (found,) = torch.autograd.grad(loss, scale)
    # Rounding dS to float16 costs 1e-6 to 1e-5 here.
    assert abs(float(found) - float(exact.sum())) < 1e-7 * size


def test_rows_without_negatives_have_no_loss_and_no_gradient(backend: str) -> None:
    for n, ids in ((1, None), (4, torch.zeros(4, dtype=torch.int64))):
        query, target = embeddings(n, n, 5)
        values = fused(query, target, 50.0, query_ids=ids, target_ids=ids, backend=backend)
        assert all(float(v.abs().sum()) == 0.0 for v in values)


@pytest.mark.parametrize("where", ["query", "target", "logit_scale"])
def test_nan_in_nan_out(backend: str, where: str) -> None:
    query, target = embeddings(6, 9, 5)
    scale = float("nan") if where == "logit_scale" else 50.0
    if where != "logit_scale":
        {"query": query, "target": target}[where][2, 1] = float("nan")
    loss, d_query, d_target, _ = fused(query, target, scale, backend=backend)
    assert loss.isnan()
    assert d_query.isnan().any()
    assert d_target.isnan().any()


def test_infinite_input_is_not_silent(backend: str) -> None:
    query, target = embeddings(6, 6, 5)
    target[:, 0].abs_()  # gives inf - inf in both directions with any signs
    query[3, 0] = float("inf")
    assert not fused(query, target, 50.0, backend=backend)[0].isfinite()


def test_deterministic(backend: str) -> None:
    query, target = embeddings(70, 90, 33)
    first, second = (fused(query, target, 50.0, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_alpha_zero_is_cross_entropy(backend: str) -> None:
    query, target = embeddings(33, 33, 12)
    logits = 50.0 * query @ target.T
    labels = torch.arange(33)
    expected = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    value = hardness_weighted_contrastive_loss(query, target, alpha=0.0, backend=backend)
    assert relative_error(value, expected) < 5e-6


@pytest.mark.usefixtures("strip_rows")
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradcheck(symmetric: bool) -> None:
    """alpha is 0, because finite differences do not see that the weight is detached."""
    query, target = (x.requires_grad_() for x in embeddings(5, 9, 3, torch.float64))
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)

    def loss(*inputs: torch.Tensor) -> torch.Tensor:
        return hardness_weighted_contrastive_loss(
            *inputs[:2], logit_scale=inputs[2], alpha=0.0, symmetric=symmetric, backend="torch"
        )

    assert torch.autograd.gradcheck(loss, (query, target, scale))
