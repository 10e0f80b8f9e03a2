"""A margin of 0 drops negatives more similar than the positive and keeps those that tie."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llave_kernels.backends import positives, products, torch_strips
from llave_kernels.dispatch import named
from llave_kernels.reference import reference_loss, similarity_loss
from llave_kernels.rules import Rules
from tests.helpers import fused, loss_and_gradients, multiplicands, relative_error, rounding
from tests.llave_kernels.test_numerics import DTYPES

WIDTHS = (1, 2, 3, 5, 17, 64, 100, 384, 1000, 3000, 4096)


@pytest.fixture
def restored() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def exact_similarity(query: Tensor, target: Tensor) -> Tensor:
    """(N, M) similarities in float64. Pairs of equal rows have equal bits."""
    (q, i), (t, j) = (x.double().unique(dim=0, return_inverse=True) for x in (query, target))
    return (q @ t.T)[i][:, j]


def exact_loss(query: Tensor, target: Tensor, **rules: Any) -> Tensor:
    similarity = query @ target.T
    exact = exact_similarity(query.detach(), target.detach())
    return similarity_loss(similarity + (exact - similarity).detach(), **rules)


def rows(kind: str, n: int, d: int) -> Tensor:
    if kind == "constant":  # each addition rounds the same way
        return torch.ones(n, d, dtype=torch.float64) * torch.rand(n, 1, dtype=torch.float64)
    if kind == "one large":
        small = 0.01 * torch.randn(n, d, dtype=torch.float64)
        small[:, 0] = 1.0
        return small
    return torch.randn(n, d, dtype=torch.float64)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_ties_stay_and_what_exceeds_goes(backend: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31 - 1)))
    dtype = data.draw(st.sampled_from(DTYPES[backend]))
    widths = [d for d in WIDTHS if d <= 384 or backend != "triton"]  # the interpreter is slow
    n, d = data.draw(st.integers(1, 9)), data.draw(st.sampled_from(widths))
    m = n + data.draw(st.integers(0, 2 * n))
    kinds = st.sampled_from(["normal", "constant", "one large"])
    pair = [rows(data.draw(kinds), k, d) for k in (n, m)]
    if data.draw(st.booleans()):
        pair = [torch.nn.functional.normalize(x, dim=1) for x in pair]
    # Rows repeat on each side, in random order.
    query, target = (x[torch.randint(len(x), (len(x),))].to(dtype) for x in pair)
    size = data.draw(st.sampled_from([1.0, 1e-3, 30.0]))
    query = query * size
    symmetric = data.draw(st.booleans())
    labels = torch.randperm(m)[:n] if symmetric else torch.randint(m, (n,))
    # The TF32 kernels round their inputs. Ties are those of the rounded inputs.
    read = [multiplicands(x) if backend == "cuda" else x for x in (query, target)]
    exact = exact_similarity(*read)
    positive = exact.gather(1, labels[:, None])
    over = torch.stack([exact[:, labels] - x for x in (positive, positive.T)])
    over = torch.cat([over.flatten(), (exact - positive).flatten()])
    assume(not bool(((over > 0) & (over < 4 * rounding(*read))).any()))
    largest = [float(x.double().norm(dim=1).max()) for x in (query, target)]
    scale = data.draw(st.sampled_from([1.0, 4.0])) / (largest[0] * largest[1])
    rules: dict[str, Any] = {
        "labels": labels,
        "owners": torch.arange(m) if data.draw(st.booleans()) else labels[torch.randint(n, (m,))],
        "symmetric": symmetric,
        "hardness": data.draw(st.sampled_from(["in_batch", "hard_negatives", "all"])),
        "alpha": data.draw(st.sampled_from([0.0, 2.0])) * scale,
        "false_negative_margin": 0.0,
        "reduction": "sum",
    }
    wide = [x.double() for x in read]
    truth = loss_and_gradients(exact_loss, *wide, scale, **rules)
    # A gradient may be too large for float16, for example with queries of size 1e-3.
    assume(all(float(x.abs().max()) <= torch.finfo(dtype).max for x in truth[1:3]))
    dense = loss_and_gradients(reference_loss, *wide, scale, **rules)
    found = fused(query, target, scale, backend=backend, **rules)
    sizes = [float(truth[0]), *(n * scale * x for x in reversed(largest))]
    for name, ours, reference, expected, size in zip(
        ("loss", "dQ", "dT"), found, dense, truth, sizes, strict=False
    ):
        share = 1e-3 if name == "loss" else 2e-2  # dS is rounded to the inputs' type
        assert float((ours.double() - expected).norm()) <= share * size, name
        assert float((reference - expected).norm()) <= 1e-6 * size, name


def negatives_that_count(
    query: Tensor, target: Tensor, backend: str, margin: float = 0.0
) -> Tensor:
    """The number of negatives of each row, then of each column, under a margin: (N + M,).

    Each row owns only its own column.
    """
    n, m = len(query), len(target)
    dtype = torch.promote_types(query.dtype, torch.float32)
    rules = Rules(torch.arange(n), torch.arange(m), *[None] * 6, 0.0, 0.0, "in_batch", margin, True)
    scale = torch.tensor(1e-6, dtype=dtype)  # each negative adds exp(0)
    outputs = torch.ops.llave.contrastive_logsumexp(query, target, scale, backend, *rules)
    return torch.cat(outputs[1:3]).exp().round()


def test_ties_stay_where_every_addition_rounds_the_same_way(backend: str) -> None:
    n = 5
    for dtype in DTYPES[backend]:
        for d in (100, 384, *([] if backend == "triton" else [1000, 3000, 4096])):
            query = torch.full((n, d), d**-0.5, dtype=dtype)
            for sign, margin in itertools.product((1, -1), (0.0, 1e-12, -1e-12)):
                counted = negatives_that_count(query, sign * query, backend, margin)
                assert bool((counted == (n - 1 if margin >= 0 else 0)).all()), (dtype, d, margin)


def test_ties_stay_where_the_halves_cancel(backend: str) -> None:
    """The partial sums of a similarity are large and cancel in the end."""
    for dtype in DTYPES[backend]:
        for d in (64, 384, *([] if backend == "triton" else [3000, 4096])):
            query = torch.randn(4, d, dtype=torch.float64).repeat(2, 1).to(dtype)
            target = torch.cat([query[:, : d // 2], -query[:, d // 2 :]], dim=1)
            counted = negatives_that_count(multiplicands(query), multiplicands(target), backend)
            assert bool((counted >= 1).all()), (dtype, d)


def test_a_margin_beyond_rounding_is_taken_as_it_is(backend: str) -> None:
    query, target = multiplicands(torch.randn(9, 33)), multiplicands(torch.randn(9, 33))
    positive = (query.double() * target.double()).sum(1)
    for margin in (0.05, -0.05):
        limit = named(backend).margin_limit(query, target, torch.arange(9), margin)
        assert relative_error(limit, positive + margin) < 1e-6


def test_the_directions_judge_alike_wherever_a_column_is_known(backend: str) -> None:
    """Column sums over parts of the rows add up when each part has all columns' limits."""
    n, d = 24, 48
    query = torch.randn(n, d).repeat_interleave(2, 0)[:n]
    target = torch.randn(n, d).repeat_interleave(3, 0)[:n]
    scale = torch.tensor(0.3)
    labels = torch.randperm(n)
    rows = named(backend).margin_limit(query, target, labels, 0.0)
    limit = torch.empty(n).index_put((labels,), rows)

    def columns(part: slice, limit: Tensor | None) -> Tensor:
        given = labels[part], None, None, None, None, limit, None, None
        rules = Rules(*given, 0.1, 0.1, "in_batch", 0.0, True)
        return torch.ops.llave.contrastive_logsumexp(query[part], target, scale, backend, *rules)[2]

    whole = columns(slice(None), None)
    parts = [columns(part, limit) for part in (slice(0, 7), slice(7, None))]
    assert torch.equal(columns(slice(None), limit), whole)
    assert relative_error(torch.logaddexp(*parts), whole) < 1e-5


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_ties_stay_where_float32_is_multiplied_in_a_smaller_type(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The simulated device rounds to TF32 or bfloat16, to the nearest or towards zero."""
    n, d = 40, 64
    smaller = torch.bfloat16 if precision == "medium" else torch.float32
    eps = 2.0**-7 if precision == "medium" else 2.0**-10
    torch.set_float32_matmul_precision(precision)
    monkeypatch.setattr(products, "_cpu_rounds", lambda precision: True)
    for rounded in (positives.nearest_tf32, positives.truncated_tf32):

        def product(a: Tensor, b: Tensor, rounded: Any = rounded) -> Tensor:
            a, b = (rounded(x).to(smaller).float() for x in (a, b))
            return a @ b

        monkeypatch.setattr(torch_strips, "product", product)
        query, target = torch.randn(n, d), torch.randn(2, d).repeat(n // 2, 1)
        counted = negatives_that_count(query, target, "torch")[:n]
        assert bool((counted >= n / 2 - 1).all())  # at least the copies of its positive
    query = torch.randn(n, d)
    assert products.rounding(query) == 2 * eps
    assert products.rounding(query.double()) == products.rounding(query.bfloat16()) == 0.0


@pytest.mark.usefixtures("restored")
def test_what_this_cpu_multiplies_is_tried() -> None:
    for precision in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(precision)
        x = torch.ones(256, 256)
        exact = bool((products.product(x * (1 + 2.0**-12), x) == 256 * (1 + 2.0**-12)).all())
        assert (products.rounding(x) == 0.0) == exact


def test_tf32_of_what_is_not_finite_and_of_halves() -> None:
    x = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, -1 - 2.0**-11, torch.inf, -torch.inf])
    nearest = [1.0, 1 + 2.0**-9, -1.0, torch.inf, -torch.inf]
    assert positives.nearest_tf32(x).tolist() == nearest
    assert positives.truncated_tf32(x)[:3].tolist() == [1.0, 1 + 2.0**-10, -1.0]
    nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert bool(positives.nearest_tf32(nan).isnan().all())
