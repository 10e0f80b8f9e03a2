"""Losses over prefixes of the embeddings, against the dense loop over dims in float64."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llave_kernels import (
    HardnessWeightedContrastiveLoss,
    hardness_weighted_contrastive_loss,
    matryoshka_logsumexp,
)
from llave_kernels.distributed import distributed_contrastive_loss
from llave_kernels.reference import reference_logsumexp, reference_loss, reference_matryoshka
from llave_kernels.rules import plain_rules
from tests.helpers import BIASES, bounds, draw_rules, embeddings, loss_and_gradients, relative_error
from tests.llave_kernels.test_memory import measured
from tests.processes import cases, run

KINDS: list[tuple[str, ...]] = [
    (),
    ("labels",),
    ("owners",),
    ("ids",),
    ("margin",),
    ("target_alpha",),
    ("biases",),
    ("labels", "owners", "ids", "margin", "target_alpha", "biases"),
]


def assert_close(
    query: Tensor, target: Tensor, scale: float, bound: float, **rules: Any
) -> list[Tensor]:
    """Compare the loss and its gradients with float64. Return ours."""
    backend = rules.pop("backend", "auto")
    wide = query.double(), target.double()
    truth = loss_and_gradients(reference_matryoshka, *wide, scale, **rules)
    loss = hardness_weighted_contrastive_loss
    found = loss_and_gradients(loss, query, target, scale, backend=backend, **rules)
    names = ("loss", "dQ", "dT", "d logit_scale", *(x for x in BIASES if x in rules))
    for name, a, b in zip(names, found, truth, strict=True):
        # A query's bias has no gradient in one direction, which then is only rounding.
        close = relative_error(a, b) < bound or float((a - b).norm()) < bound * 1e-2
        assert close, (name, relative_error(a, b))
    return found


@pytest.mark.parametrize("hardness", ["in_batch", "hard_negatives", "all"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kinds", KINDS, ids=lambda x: "+".join(x) or "plain")
def test_every_rule_equals_the_loop_over_dims(
    kinds: tuple[str, ...], symmetric: bool, hardness: str
) -> None:
    """With scale 200 the exponentials are shifted by the maximum."""
    query, target = embeddings(13, 29, 11, torch.float64, unit=False)
    rules = draw_rules(13, 29, kinds) | {"symmetric": symmetric, "hardness": hardness}
    rules |= {"matryoshka_dims": (3, 10, 7, 1), "matryoshka_weights": (1, 0.5, 0, 2)}
    for reduction, scale in itertools.product(("mean", "sum", "none"), (20.0, 200.0)):
        assert_close(query, target, scale, 1e-10, reduction=reduction, **rules)


def draw(generator: random.Random) -> tuple[int, int, int, dict[str, Any]]:
    """Random sizes and arguments."""
    n, d = generator.randint(1, 30), generator.randint(2, 40)
    m = n * generator.randint(1, 3) + generator.randint(0, 4)
    kinds = [
        x for x in ("labels", "owners", "ids", "margin", "target_alpha") if generator.random() < 0.3
    ]
    dims = generator.sample(range(2, d + 1), generator.randint(1, min(d - 1, 7)))
    rules = draw_rules(n, m, kinds) | {
        "matryoshka_dims": dims,
        "matryoshka_weights": [generator.choice((0, 0.5, 1, 3)) for _ in dims],
        "symmetric": generator.random() < 0.5,
        "hardness": generator.choice(("in_batch", "hard_negatives", "all")),
        "alpha": generator.choice((0.0, 9.0)),
        "reduction": generator.choice(("mean", "sum", "none")),
    }
    return n, m, d, rules


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_random_settings(count: int) -> None:
    generator = random.Random(count)
    for _ in range(count):
        n, m, d, rules = draw(generator)
        query, target = embeddings(n, m, d, torch.float64, unit=generator.random() < 0.5)
        assert_close(query, target, generator.choice((1.0, 20.0, 100.0)), 1e-9, **rules)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_narrow_types_are_summed_in_float32(symmetric: bool, dtype: torch.dtype) -> None:
    """Strips of some rows, dims that are multiples of nothing, rows of every length."""
    query, target = embeddings(150, 333, 67, dtype)
    lengths = torch.logspace(-3, 3, 150)[:, None]
    loss, gradient = bounds(dtype, 29.0)
    rules = {"symmetric": symmetric, "matryoshka_dims": (5, 33, 67)}
    found = assert_close((query * lengths).to(dtype), target, 20.0, max(loss, gradient), **rules)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_add_the_parts_of_within_in_float32(dtype: torch.dtype) -> None:
    query, target = embeddings(60, 60, 40, dtype)
    rules = {"symmetric": False, "alpha": 0.0, "within": ("query", "target")}
    _, gradient = bounds(dtype, 20.0)
    assert_close(query, target, 20.0, gradient, matryoshka_dims=(8, 24, 40), **rules)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("within", [(), ("target",)])
def test_ties_of_prefixes_under_a_margin(dtype: torch.dtype, within: tuple[str, ...]) -> None:
    """Column i + 16 ties with row i's positive. A margin of 0 keeps it, one below 0 does not."""
    query, target = (torch.randn(16, 32).to(dtype) for _ in range(2))
    target = torch.cat([target, target])
    settings: dict[str, Any] = {"logit_scale": 10.0, "alpha": 0.0, "symmetric": False}
    settings |= {"owners": range(32), "matryoshka_dims": (8, 20), "within": within}
    for margin in (0.0, -1e-7):
        found, wide = (
            hardness_weighted_contrastive_loss(
                *pair, reduction="none", false_negative_margin=margin, **settings
            )
            for pair in ((query, target), (query.float(), target.float()))
        )
        assert relative_error(found, wide) < 1e-6
    assert (found < 0.999 * hardness_weighted_contrastive_loss(
        query, target, reduction="none", false_negative_margin=0.0, **settings
    )).all()  # fmt: skip


def test_each_backend_gives_the_same(backend: str) -> None:
    """The other backends compute dim after dim."""
    rules = draw_rules(9, 20, ("owners", "ids", "biases")) | {"matryoshka_dims": (8, 24)}
    query, target = embeddings(9, 20, 24)
    bound = 2e-3 if backend == "cuda" else 2e-5  # TF32
    for more in ({"symmetric": False}, {"reduction": "none"}):
        assert_close(query, target, 20.0, bound, backend=backend, **rules, **more)


def test_one_dim_is_the_loss_of_normalised_rows() -> None:
    query, target = embeddings(20, 33, 9, torch.float64, unit=False)
    rows = [torch.nn.functional.normalize(x[:, :6], dim=1) for x in (query, target)]
    expected = reference_loss(*rows)
    found = hardness_weighted_contrastive_loss(query, target, matryoshka_dims=[6])
    assert relative_error(found, expected) < 1e-12


def test_the_primitive_keeps_the_order_of_dims() -> None:
    query, target = embeddings(6, 10, 8, torch.float64)
    found = matryoshka_logsumexp(query, target, (8, 2, 5), logit_scale=20.0)
    for k, d in enumerate((8, 2, 5)):
        rows = [torch.nn.functional.normalize(x[:, :d], dim=1) for x in (query, target)]
        for a, b in zip(found[:3], reference_logsumexp(*rows, logit_scale=20.0), strict=True):
            assert relative_error(a[k], b) < 1e-12
    one_way = matryoshka_logsumexp(query, target, [3], symmetric=False)
    assert one_way.target is None
    assert one_way.query.shape == (1, 6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_edges(symmetric: bool) -> None:
    """One row, rows and prefixes of zeros, seven dims, columns beyond the longest dim."""
    dims = (1, 2, 3, 4, 5, 6, 7)
    rules = {"symmetric": symmetric, "matryoshka_dims": dims}
    (query, target) = embeddings(1, 1, 9, torch.float64)
    alone = assert_close(query, target, 20.0, 1e-10, **rules)
    assert all(not x.any() for x in alone)
    query, target = embeddings(5, 12, 9, torch.float64)
    query[1], query[2, :3], target[3, :2], target[7] = 0, 0, 0, 0
    found = assert_close(query, target, 20.0, 1e-10, **rules)
    assert not found[1][:, 7:].any()
    for x in (query, target):  # shorter than the least length, which then has no gradient
        x *= 1e-14
    assert_close(query, target, 20.0, 1e-10, **rules)


def test_a_nan_reaches_the_loss_and_other_columns_do_not() -> None:
    query, target = embeddings(8, 8, 6)
    query[2, 4] = torch.nan
    losses = [
        hardness_weighted_contrastive_loss(query, target, matryoshka_dims=x, reduction="none")
        for x in ((2, 4), (2, 5))
    ]
    assert losses[0].isfinite().all()
    assert losses[1].isnan().all()  # both directions


@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck_and_compile(symmetric: bool) -> None:
    query, target = (x.requires_grad_() for x in embeddings(6, 10, 5))
    scale = torch.tensor(20.0, requires_grad=True)
    owners = torch.arange(10) % 6
    biases = [torch.randn(n, requires_grad=True) for n in (6, 10)]
    rules = None, owners, None, None, None, None, *biases, 9.0, 2.0, "in_batch", 0.1, symmetric
    operator = torch.ops.llave.matryoshka_logsumexp
    torch.library.opcheck(operator, (query, target, scale, [2, 5], *rules))

    def step(query: Tensor, target: Tensor) -> Tensor:
        settings: dict[str, Any] = {"symmetric": symmetric, "matryoshka_dims": (2, 5)}
        return hardness_weighted_contrastive_loss(query, target, **settings)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (8, 11):
        pair = [x.requires_grad_() for x in embeddings(n, n, 6)]
        eager, traced = step(*pair), compiled(*pair)
        values = [traced, *torch.autograd.grad(traced, pair)]
        for a, b in zip(values, [eager, *torch.autograd.grad(eager, pair)], strict=True):
            assert relative_error(a, b) < 1e-5


def test_transforms_and_derivatives_that_are_refused() -> None:
    query, target = embeddings(6, 6, 4, torch.float64)

    def value(loss: Any, query: Tensor) -> Tensor:
        return loss(query, target, matryoshka_dims=(2, 4))

    for transform in (torch.func.grad, torch.func.jacrev):
        found = transform(lambda q: value(hardness_weighted_contrastive_loss, q))(query)
        expected = transform(lambda q: value(reference_matryoshka, q))(query)
        assert relative_error(found, expected) < 1e-10
    batch = torch.stack([query, query.flip(0)])
    found = torch.func.vmap(lambda q: value(hardness_weighted_contrastive_loss, q))(batch)
    assert relative_error(found[1], value(reference_matryoshka, batch[1])) < 1e-10
    query.requires_grad_()
    loss = value(hardness_weighted_contrastive_loss, query)
    (gradient,) = torch.autograd.grad(loss, query, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(
            lambda q: value(hardness_weighted_contrastive_loss, q), (batch[0],), (batch[1],)
        )


def test_equal_bits_in_every_run() -> None:
    query, target = embeddings(100, 200, 24)
    runs = [
        loss_and_gradients(
            hardness_weighted_contrastive_loss, query, target, 20.0, matryoshka_dims=(5, 24)
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_autocast() -> None:
    pair = embeddings(32, 32, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = hardness_weighted_contrastive_loss(*pair, matryoshka_dims=(4, 16))
    rounded = [x.bfloat16() for x in pair]
    assert torch.equal(loss, hardness_weighted_contrastive_loss(*rounded, matryoshka_dims=(4, 16)))


def test_the_module_holds_the_settings() -> None:
    settings: dict[str, Any] = {"matryoshka_dims": [2, 8], "matryoshka_weights": [1, 0.5]}
    module = HardnessWeightedContrastiveLoss(20.0, learnable=True, **settings).double()
    query, target = embeddings(6, 6, 8, torch.float64)
    expected = reference_matryoshka(query, target, logit_scale=20.0, **settings)
    assert relative_error(module(query, target), expected) < 1e-6
    assert "matryoshka_dims=(2, 8), matryoshka_weights=(1, 0.5)" in repr(module)
    assert "matryoshka" not in repr(HardnessWeightedContrastiveLoss())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"matryoshka_dims": ()}, ValueError, r"different lengths, got \(\)"),
        ({"matryoshka_dims": (2, 2)}, ValueError, r"different lengths, got \(2, 2\)"),
        ({"matryoshka_dims": (2, 9)}, ValueError, r"matryoshka_dims\[1\] .* <= 8, got 9"),
        ({"matryoshka_dims": (0, 2)}, ValueError, r"matryoshka_dims\[0\] .* >= 1"),
        ({"matryoshka_dims": (2.5,)}, ValueError, "must be an integer"),
        ({"matryoshka_dims": 4}, TypeError, "matryoshka_dims must be a list or tuple"),
        ({"matryoshka_weights": (1.0,)}, ValueError, "needs matryoshka_dims"),
        ({"matryoshka_dims": (2, 4), "matryoshka_weights": (1,)}, ValueError, "2 finite numbers"),
        (
            {"matryoshka_dims": (2,), "matryoshka_weights": (float("nan"),)},
            ValueError,
            "1 finite numbers",
        ),
        ({"matryoshka_dims": (2,), "matryoshka_weights": ("a",)}, TypeError, "must be a float"),
    ],
)
def test_mistakes_are_refused(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        hardness_weighted_contrastive_loss(*embeddings(4, 4, 8), **settings)
    if "<=" not in message:
        with pytest.raises(error, match=message):
            HardnessWeightedContrastiveLoss(**settings)


def test_operators_refuse_dims_that_do_not_ascend() -> None:
    rules = plain_rules(symmetric=True)
    operator = torch.ops.llave.matryoshka_logsumexp
    with pytest.raises(ValueError, match=r"dims must ascend, got \[4, 2\]; sort them"):
        operator(*embeddings(4, 4, 8), torch.tensor(20.0), [4, 2], *rules)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("symmetric", [True, pytest.param(False, marks=pytest.mark.long)])
def test_extra_memory(symmetric: bool) -> None:
    """The N x M matrix would take 268 MB. Rows, gradients and parts take 38 MB."""
    settings = f"symmetric={symmetric}, matryoshka_dims=(32, 64, 192)"
    assert measured(8192, 192, f"loss(query, target, {settings})") < 160


def across() -> tuple[dict[tuple[Any, ...], Tensor], str]:
    """Loss and gradients of this process's rows for every case; what differing dims say."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {case: cases.outcome(case, None, rank, world, **NESTED) for case in CASES}
    dims, pair = (2, 4 + rank), embeddings(4, 4, 9)
    return found, cases.said(lambda: distributed_contrastive_loss(*pair, matryoshka_dims=dims))


NESTED: dict[str, Any] = {"matryoshka_dims": (4, 2, 5), "matryoshka_weights": (1.0, 0.5, 2.0)}
CASES = [
    (kinds, True, symmetric, "all")
    for kinds in ((), ("labels", "ids", "margin", "target_alpha", "mined"))
    for symmetric in (True, False)
]


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.long), 4])
def test_processes_compute_the_global_batch(world: int) -> None:
    """Four processes form a grid of 2 x 2. Their averages are those of one process."""
    by_rank = run(__name__, "across", world)
    for case in CASES:
        average = torch.stack([found[case] for found, _ in by_rank]).mean(0)
        truth = cases.of_one_process(world, case, reference_matryoshka, **NESTED)
        for name, part in cases.PARTS.items():
            assert relative_error(average[part], truth[part]) < 1e-9, (case, name)
    assert "matryoshka_dims is (2, 5) on rank 1 and (2, 4) here" in by_rank[0][1]
    assert "matryoshka_dims is (2, 4) on rank 0 and (2, 5) here" in by_rank[1][1]
