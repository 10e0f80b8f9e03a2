"""The supervised contrastive loss against its dense float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from llave_kernels import (
    groups,
    hardness_weighted_contrastive_loss,
    positive_pairs,
    supervised_contrastive_loss,
)
from llave_kernels.group_losses import DENOMINATORS
from llave_kernels.reference import reference_supervised_loss
from tests.helpers import embeddings, loss_and_gradients, relative_error

HUGE = 2**62


def draw(most: int = 20) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Embeddings and settings of a random call. A batch may stand against itself."""
    n, m, d, kinds = (int(x) for x in torch.randint(1, most, (4,)))
    itself = torch.rand(()) < 0.4
    query, target = embeddings(n, n if itself else m, d, torch.float64)
    settings: dict[str, Any] = {
        "query_groups": torch.randint(kinds, (n,)) * (HUGE // kinds) - HUGE // 2,
        "denominator": DENOMINATORS[int(torch.randint(3, ()))],
        "alpha": float(torch.randint(3, ())) * 4.5,
        "reduction": ("mean", "sum", "none")[int(torch.randint(3, ()))],
    }
    if itself:
        return query, query, settings
    settings["target_groups"] = torch.randint(kinds, (m,)) * (HUGE // kinds) - HUGE // 2
    settings["symmetric"] = settings["reduction"] != "none" and bool(torch.randint(2, ()))
    return query, target, settings


def results(function: Any, query: Tensor, target: Tensor, **settings: Any) -> list[Tensor]:
    """[loss, dQ, dT, d logit_scale]. Without ``target_groups`` the batch stands against itself."""

    def loss(query: Tensor, target: Tensor, **rest: Any) -> Tensor:
        sides = (query, target) if "target_groups" in rest else (query,)
        found: Tensor = function(*sides, **rest)
        return found + 0 * sum(x.sum() for x in (query, target, rest["logit_scale"]))

    return loss_and_gradients(loss, query, target, 20.0, **settings)


def assert_equal(query: Tensor, target: Tensor, bound: float, **settings: Any) -> None:
    """Errors are relative to the batch's gradients, or to terms of them that may cancel."""
    backend = settings.pop("backend", "auto")
    truth = results(reference_supervised_loss, query.double(), target.double(), **settings)
    found = results(supervised_contrastive_loss, query, target, backend=backend, **settings)
    for name, a, b in zip(("loss", "dQ", "dT", "d logit_scale"), found, truth, strict=True):
        error = float((a.double() - b).norm())
        assert error <= bound * max(float(b.norm()), 2.0), (name, error, settings)


@pytest.mark.parametrize("draws", [60, pytest.param(1000, marks=pytest.mark.long)])
def test_random_settings_equal_the_reference(draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positive_pairs, "ROWS", 3)
    monkeypatch.setattr(positive_pairs, "COLUMNS", 5)
    for _ in range(draws):
        query, target, settings = draw()
        assert_equal(query, target, 1e-10, **settings)
        assert_equal(query.float(), target.float(), 2e-5, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_every_backend(backend: str, dtype: torch.dtype, denominator: str) -> None:
    """Rules, strides and sizes that are multiples of nothing."""
    bound = 2e-5 if dtype == torch.float32 else 2e-3
    if torch.get_float32_matmul_precision() != "highest":
        bound = 5e-3
    query, target = (x.T.contiguous().T for x in embeddings(37, 41, 19, dtype))
    query_groups, target_groups = torch.randint(30, (37,)), torch.randint(30, (41,))
    for alpha in (0.0, 9.0):
        settings = {"denominator": denominator, "alpha": alpha, "backend": backend}
        assert_equal(query, query, bound, query_groups=query_groups, **settings)
        settings |= {"query_groups": query_groups, "target_groups": target_groups}
        assert_equal(query, target, bound, symmetric=True, **settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_half_precision_keeps_gradients_near_convergence(
    denominator: str, dtype: torch.dtype
) -> None:
    """The parts of a gradient cancel there. Their sum is rounded once."""
    query_groups = torch.arange(256) // 8
    centres = normalize(torch.randn(32, 128), dim=1)[query_groups]
    query = normalize(centres + 0.2 * torch.randn(256, 128) / 128**0.5, dim=1).to(dtype)
    settings = {"query_groups": query_groups, "denominator": denominator}
    truth, dense, found = (
        results(function, x, x, **settings)[1].double()
        for function, x in (
            (reference_supervised_loss, query.double()),
            (reference_supervised_loss, query.float()),
            (supervised_contrastive_loss, query),
        )
    )
    rounded = relative_error(dense.to(dtype).double(), truth)
    assert relative_error(found, truth) < 1.1 * rounded + 1e-5


@pytest.mark.parametrize("query", [[[1.0]], torch.tensor(1.0), torch.ones(1, 1, dtype=torch.int64)])
def test_rows_that_are_none_are_named(query: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="query must"):
        supervised_contrastive_loss(query, query_groups=torch.arange(1))


@pytest.mark.parametrize("denominator", ["all", "pair"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 9.0])
def test_one_positive_a_row_is_the_contrastive_loss(
    denominator: str, symmetric: bool, alpha: float
) -> None:
    query, target = embeddings(12, 12, 7, torch.float64)
    order = torch.randperm(12)
    expected = loss_and_gradients(
        hardness_weighted_contrastive_loss, query, target, 20.0, labels=order, alpha=alpha,
        owners=range(12), symmetric=symmetric,
    )  # fmt: skip
    found = loss_and_gradients(
        supervised_contrastive_loss, query, target, 20.0, query_groups=order,
        target_groups=torch.arange(12), alpha=alpha, symmetric=symmetric, denominator=denominator,
    )  # fmt: skip
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("denominator", ["all", "pair"])
@pytest.mark.parametrize("itself", [True, False])
def test_converged_rows_with_one_positive_keep_their_digits(denominator: str, itself: bool) -> None:
    """The losses are around 1e-10. Two views of a row stand beside each other, or on two sides."""
    query = normalize(torch.eye(8) + 0.02 * torch.randn(8, 8), dim=1)
    target = normalize(torch.eye(8) + 0.02 * torch.randn(8, 8), dim=1)
    names = torch.randperm(8)
    settings: dict[str, Any] = {"denominator": denominator, "query_groups": names}
    if itself:
        query = target = torch.cat([query, target])
        settings["query_groups"] = names.repeat(2)
    else:
        settings |= {"target_groups": names, "symmetric": True}
    truth = results(reference_supervised_loss, query.double(), target.double(), **settings)
    found = results(supervised_contrastive_loss, query, target, **settings)
    assert 1e-9 < truth[0] < 1e-6
    for a, b in zip(found, truth, strict=True):
        assert relative_error(a, b) < 2e-5


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize(
    "names",
    [
        torch.zeros(9, dtype=torch.int64),  # no negative
        torch.arange(9),  # no positive
        torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 1]),
        torch.tensor([-(2**63), 2**63 - 1] * 4 + [-1]),
    ],
)
def test_edges(denominator: str, names: Tensor) -> None:
    query, target = embeddings(9, 9, 4, torch.float64)
    for alpha in (0.0, 9.0):
        settings = {"query_groups": names, "denominator": denominator, "alpha": alpha}
        assert_equal(query, query, 1e-11, **settings)
        assert_equal(query, target, 1e-11, **settings, target_groups=names, symmetric=True)
        apart = names.roll(4) + (names == 0)  # some rows and columns have no partner
        assert_equal(query, target, 1e-11, **settings, target_groups=apart, symmetric=True)


def test_no_positive_at_all_is_zero() -> None:
    for size in (1, 5):
        query, _ = embeddings(size, 1, 4)
        query.requires_grad_()
        loss = supervised_contrastive_loss(query, query_groups=torch.arange(size))
        loss.backward()
        assert loss == 0
        assert not query.grad.any()


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_nan_in_nan_out(denominator: str) -> None:
    query, target = embeddings(8, 10, 4)
    query_groups, target_groups = torch.arange(8) // 2, torch.arange(10) // 2
    for side, row in ((query, 3), (target, 9)):
        clean = side[row].clone()
        side[row] = torch.nan
        loss = supervised_contrastive_loss(
            query, target, query_groups=query_groups, target_groups=target_groups,
            denominator=denominator,
        )  # fmt: skip
        assert loss.isnan()
        side[row] = clean


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_float16_keeps_its_range(denominator: str) -> None:
    """Of a mean over many rows, single gradients would underflow."""
    query, _ = embeddings(600, 1, 8, torch.float16)
    names = torch.arange(600) // 3
    truth = results(
        reference_supervised_loss, query.double(), query.double(), query_groups=names,
        denominator=denominator,
    )  # fmt: skip
    found = results(
        supervised_contrastive_loss, query, query, query_groups=names, denominator=denominator
    )
    assert found[1].dtype == torch.float16
    assert relative_error(found[0], truth[0]) < 1e-4
    assert relative_error(found[1], truth[1]) < 3e-3


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_two_runs_are_equal_bit_for_bit(denominator: str) -> None:
    query, target = embeddings(700, 900, 16)
    names = torch.randint(5, (700,)), torch.randint(5, (900,))
    first, second = (
        results(
            supervised_contrastive_loss, query, target, query_groups=names[0], symmetric=True,
            target_groups=names[1], denominator=denominator, alpha=9.0,
        )
        for _ in range(2)
    )  # fmt: skip
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("compiler", "itself"),
    [
        ("aot_eager", False),
        pytest.param("aot_eager", True, marks=pytest.mark.long),
        pytest.param("inductor", False, marks=pytest.mark.long),
    ],
)
def test_compile_without_a_break(compiler: str, itself: bool) -> None:
    denominators = DENOMINATORS if compiler == "aot_eager" else DENOMINATORS[:1]

    def step(query: Tensor, target: Tensor, names: Tensor, others: Tensor) -> Tensor:
        losses = []
        for denominator in denominators:
            settings: dict[str, Any] = {"denominator": denominator, "query_groups": names}
            if not itself:
                settings |= {"target": target, "target_groups": others, "symmetric": True}
            losses.append(supervised_contrastive_loss(query, alpha=9.0, **settings))
        return torch.stack(losses)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    for n, m in ((8, 11), (13, 9)):
        pair = [x.requires_grad_() for x in embeddings(n, m, 6)]
        names = torch.randint(4, (n,)), torch.randint(4, (m,))
        traced, eager = compiled(*pair, *names), step(*pair, *names)
        assert relative_error(traced, eager) < 1e-6
        found, expected = (
            torch.autograd.grad(x.sum(), pair[: 2 - itself]) for x in (traced, eager)
        )
        for a, b in zip(found, expected, strict=True):
            assert relative_error(a, b) < 2e-6


def test_opcheck() -> None:
    query, target = (x.requires_grad_() for x in embeddings(6, 9, 5))
    names, others = torch.randint(4, (6,)), torch.randint(4, (9,))
    torch.library.opcheck(groups.sum_groups, (query, names, 5))
    torch.library.opcheck(groups.take_groups, (query, others))
    scale = torch.tensor(20.0, requires_grad=True)
    lse = torch.randn(6, requires_grad=True)
    for own in (None, torch.arange(6)):
        call = query, target, scale, lse, names, others, own
        torch.library.opcheck(positive_pairs.pair_losses, call)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_first_derivatives_of_transforms_and_no_second(denominator: str) -> None:
    query, _ = embeddings(8, 1, 4, torch.float64)
    names = torch.arange(8) // 2

    def loss(query: Tensor) -> Tensor:
        return supervised_contrastive_loss(query, query_groups=names, denominator=denominator)

    leaf = query.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert relative_error(torch.func.grad(loss)(query), expected) < 1e-12
    batch = torch.stack([query, query.flip(0)])
    assert relative_error(torch.func.vmap(torch.func.grad(loss))(batch)[0], expected) < 1e-12
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss(leaf), leaf, create_graph=True)[0].sum().backward()


def test_autocast_casts_embeddings_and_keeps_float32_sums() -> None:
    query, _ = embeddings(12, 1, 8)
    names = torch.arange(12) // 3
    for denominator in DENOMINATORS:
        settings: dict[str, Any] = {"query_groups": names, "denominator": denominator}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = supervised_contrastive_loss(query, **settings)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, supervised_contrastive_loss(query.bfloat16(), **settings))


GROUPS = torch.arange(4)


@pytest.mark.parametrize(
    ("error", "message", "wrong"),
    [
        (TypeError, "query_groups must be int64, got torch.int32", {"query_groups": GROUPS.int()}),
        (ValueError, r"query_groups must have shape \(4,\)", {"query_groups": GROUPS[:3]}),
        (TypeError, "query_groups must be a torch.Tensor, got list", {"query_groups": [0, 1]}),
        (ValueError, r"target_groups must have shape \(6,\)", {"target_groups": GROUPS}),
        (ValueError, "target_groups must be given with target", {"target_groups": None}),
        (ValueError, "target_groups needs target", {"target": None}),
        (
            ValueError,
            "symmetric=True needs target",
            {"target": None, "target_groups": None, "symmetric": True},
        ),
        (ValueError, "needs symmetric=False", {"reduction": "none", "symmetric": True}),
        (ValueError, "denominator must be one of all, neg", {"denominator": "positives"}),
        (ValueError, "alpha must be >= 0", {"alpha": -1.0}),
        (ValueError, "logit_scale must be positive", {"logit_scale": 0.0}),
        (ValueError, "reduction must be one of", {"reduction": "avg"}),
        (TypeError, "symmetric must be True or False", {"symmetric": 1}),
        (ValueError, "backend='fast' is not a backend", {"backend": "fast"}),
        (ValueError, "query is empty", {"query": torch.randn(0, 5)}),
        (TypeError, "unexpected keyword", {"false_negative_margin": 0.1}),
    ],
)
def test_mistakes_are_named(error: type[Exception], message: str, wrong: dict[str, Any]) -> None:
    call = {
        "query": torch.randn(4, 5),
        "target": torch.randn(6, 5),
        "query_groups": GROUPS,
        "target_groups": torch.arange(6),
    }
    with pytest.raises(error, match=message):
        supervised_contrastive_loss(**(call | wrong))
