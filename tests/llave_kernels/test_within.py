"""Negatives within a side. The contract of every backend (test_numerics.py) draws them too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.functional import normalize

from llave_kernels import (
    HardnessWeightedContrastiveLoss,
    dispatch,
    hardness_weighted_contrastive_loss,
    within,
)
from llave_kernels.backends.protocol import LogSumExps
from llave_kernels.functional import logits_of
from llave_kernels.reference import (
    reference_logsumexp,
    reference_loss,
    reference_matryoshka,
    reference_within,
)
from llave_kernels.rules import TENSORS, Rules
from tests.helpers import (
    assert_contract,
    draw_rules,
    embeddings,
    fused,
    multiplicands,
    relative_error,
)
from tests.llave_kernels import accounting

BOTH = ("query", "target")
PLAIN = Rules(*[None] * TENSORS, 9.0, 9.0, "in_batch", None, True)


def strips_of(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(within, "strip_rows", lambda n, device: min(n, rows))


@pytest.mark.parametrize(("sides", "rows"), [(("query",), 1), (("target",), 4), (BOTH, 4)])
def test_edges(
    backend: str, rows: int, sides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row, two rows, strips of uneven length, mined negatives and all rules together."""
    strips_of(monkeypatch, rows)
    kinds = ("owners", "ids", "margin", "target_alpha")
    for n, m, d in ((1, 1, 3), (1, 3, 2), (2, 2, 5), (9, 22, 6)):
        for given in (kinds, ("labels", *kinds)):
            rules = draw_rules(n, m, given)
            symmetric = len(given) % 2 == 0
            pair = embeddings(n, m, d)
            assert_contract(
                *pair, 20.0, backend=backend, within=sides, symmetric=symmetric, **rules
            )


def test_every_row_sum_is_the_references(backend: str) -> None:
    query, target = embeddings(9, 20, 6)
    found = logits_of(query, target, logit_scale=50.0, within=BOTH, backend=backend)
    assert found.within is not None
    expected = reference_within(query.double(), target.double(), within=BOTH)
    assert relative_error(found.within, expected) < 2e-6
    plain = logits_of(query, target, logit_scale=50.0, backend=backend)
    assert plain.within is None


def test_queries_that_share_a_target(backend: str) -> None:
    """Their gradients are added to one row of the side, in a fixed order."""
    query, target = embeddings(40, 12, 8)
    rules: dict[str, Any] = {"labels": torch.randint(12, (40,)), "owners": range(12)}
    rules |= {"symmetric": False, "within": BOTH, "backend": backend}
    assert_contract(query, target, 20.0, **rules)
    first, second = (fused(query, target, 20.0, **rules) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strips_change_only_the_rounding(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = embeddings(50, 110, 16)
    found = []
    for rows in (50, 20):
        strips_of(monkeypatch, rows)
        found += [fused(*pair, 50.0, within=BOTH, backend=backend) for _ in range(2)]
    for i in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(*found[i : i + 2], strict=True))
    assert max(relative_error(a, b) for a, b in zip(found[0], found[2], strict=True)) < 5e-6


@pytest.mark.parametrize(
    ("n", "device", "strips"),
    [
        (511, "cpu", 1),
        (512, "cpu", 2),
        (5000, "cpu", 8),
        (4095, "cuda", 1),
        (4096, "cuda", 2),
        (8192, "cuda", 4),
        (100000, "cuda", 8),
    ],
)
def test_a_square_block_is_computed_once(n: int, device: str, strips: int) -> None:
    """Pairs are counted, with the strips of the device."""
    x = torch.empty(n, 1, device="meta")
    rows = within.strip_rows(n, device)
    assert -(-n // rows) == strips
    assert strips == 1 or rows % 128 == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(within, "strip_rows", lambda n, device: rows)
        parts = [part for _, _, part in within._strips(within.Block(x, x, PLAIN))]
    pairs = sum(len(part.query) * len(part.target) for part in parts)
    assert pairs <= n * (n + rows) / 2
    assert [part.rules.symmetric for part in parts] == [True] * (strips - 1) + [False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_of_a_gradient_are_added_before_they_are_rounded(
    backend: str, dtype: torch.dtype
) -> None:
    """The parts of dQ cancel here. Rounded, they would leave their own rounding."""
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cannot multiply bfloat16")
    x = normalize(torch.randn(64, 24) / 3 + torch.randn(24), dim=1).to(dtype)

    def d_query(*, less: float) -> Tensor:
        query = x.clone().requires_grad_()
        logits = logits_of(query, x, logit_scale=1.0, alpha=0.0, within=("query",), backend=backend)
        assert logits.target is not None
        assert logits.within is not None
        total = (logits.query + logits.target - less * logits.within).sum()
        return torch.autograd.grad(total, query)[0].double()

    part, rest = d_query(less=0.0), d_query(less=1.0)
    assert float(rest.norm()) < torch.finfo(dtype).eps / 8 * float(part.norm())


@pytest.mark.parametrize("sides", [("query",), BOTH])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_one_buffer_a_side(
    backend: str, sides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backward allocates dQ and dT once in float32, one strip of dS, and the results."""
    accounts = accounting.pretend(monkeypatch, backend)
    n, d = 8192, 256
    query, target = (torch.empty(n, d, dtype=torch.bfloat16, device="meta") for _ in range(2))
    vector, scale = torch.empty(n, device="meta"), torch.empty((), device="meta")
    outputs = LogSumExps(vector, vector, vector)
    module: Any = dispatch.named(backend)
    nothing = torch.empty(0, device="meta")
    with accounts:
        found = within.gradients(
            module, outputs, vector, query, target, scale, outputs, vector, nothing, PLAIN, sides,
            scale_gradient=False,
        )  # fmt: skip
    extra = accounts.peak(without=found[:2])
    bound = 2 * n * d * 4 + n * n * 2
    assert bound < extra < bound + 5e6


def test_values_that_are_not_numbers(backend: str) -> None:
    query, target = embeddings(9, 9, 5)
    query[2, 1] = float("nan")
    loss, d_query, d_target, _ = fused(query, target, 50.0, within=BOTH, backend=backend)
    assert loss.isnan()
    assert d_query.isnan().any()
    assert d_target.isnan().any()


def test_rows_without_negatives_have_no_loss_and_no_gradient(backend: str) -> None:
    for n, ids in ((1, None), (4, torch.zeros(4, dtype=torch.int64))):
        rules = {"query_ids": ids, "target_ids": ids, "within": BOTH, "backend": backend}
        values = fused(*embeddings(n, n, 5), 50.0, **rules)
        assert all(float(v.abs().sum()) == 0.0 for v in values)


def test_converged_batch_keeps_its_digits(backend: str) -> None:
    target, _ = embeddings(64, 1, 384)
    query = multiplicands(target + 1e-3 * torch.randn_like(target) / 384**0.5)
    assert_contract(query, target, 50.0, alpha=0.0, within=BOTH, backend=backend)
    exact = reference_loss(query.double(), target.double(), alpha=0.0, within=BOTH)
    found = hardness_weighted_contrastive_loss(
        query, target, alpha=0.0, within=BOTH, backend=backend
    )
    assert relative_error(found, exact) < 5e-4


def qwen3(query: Tensor, target: Tensor, ids: Tensor, tau: float) -> Tensor:
    """Qwen3-Embedding's loss of pairs, pair by pair, as the paper writes it."""
    n, total = len(query), query.new_zeros(())
    for i in range(n):
        positive = query[i] @ target[i]
        z = (positive / tau).exp()
        for j in range(n):
            for s in (query[i] @ query[j], target[i] @ target[j], query[i] @ target[j]):
                masked = bool(s > positive + 0.1) or bool(ids[i] == ids[j])
                if j != i and not masked:
                    z = z + (s / tau).exp()
        total = total - (positive / tau - z.log()) / n
    return total


def test_qwen3_embeddings_formula() -> None:
    query, target = embeddings(13, 13, 6, torch.float64)
    ids = torch.randint(9, (13,))
    pair = [x.requires_grad_() for x in (query, target)]
    expected = qwen3(*pair, ids, 0.05)
    found = hardness_weighted_contrastive_loss(
        *pair, logit_scale=20.0, alpha=0.0, symmetric=False, within=BOTH,
        false_negative_margin=0.1, query_ids=ids, target_ids=ids,
    )  # fmt: skip
    assert relative_error(found, expected) < 1e-12
    gradients = (torch.autograd.grad(x, pair) for x in (found, expected))
    for a, b in zip(*gradients, strict=True):
        assert relative_error(a, b) < 1e-11


def test_the_module_is_the_function() -> None:
    pair = embeddings(6, 12, 5)
    module = HardnessWeightedContrastiveLoss(30.0, within=["target", "query"])
    expected = hardness_weighted_contrastive_loss(*pair, logit_scale=30.0, within=BOTH)
    assert torch.equal(module(*pair), expected)
    assert "within=('query', 'target')" in repr(module)
    assert "within" not in repr(HardnessWeightedContrastiveLoss())


@pytest.mark.parametrize("wrong", ["query", ("rows",), ("query", 1), None, True])
def test_other_sides_are_refused(wrong: Any) -> None:
    message = r"within must be a tuple of 'query' and 'target', or \(\), got "
    with pytest.raises(ValueError, match=message):
        hardness_weighted_contrastive_loss(*embeddings(3, 3, 2), within=wrong)
    with pytest.raises(ValueError, match=message):
        HardnessWeightedContrastiveLoss(within=wrong)


def test_biases_are_refused() -> None:
    bias = torch.zeros(3)
    with pytest.raises(ValueError, match="does not go with query_bias or target_bias"):
        hardness_weighted_contrastive_loss(*embeddings(3, 3, 2), within=BOTH, query_bias=bias)


def test_prefixes_of_the_embeddings(backend: str) -> None:
    """They are computed one by one."""
    pair = embeddings(7, 14, 8)
    rules = {"matryoshka_dims": (3, 8), "within": BOTH, "symmetric": False}
    found = hardness_weighted_contrastive_loss(*pair, backend=backend, **rules)
    expected = reference_matryoshka(*(x.double() for x in pair), **rules)
    assert relative_error(found, expected) < (3e-4 if backend == "cuda" else 1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_opcheck(name: str, symmetric: bool) -> None:
    query, target = (x.requires_grad_() for x in embeddings(6, 10, 5))
    scale, owners = torch.tensor(20.0, requires_grad=True), torch.arange(10) % 6
    rules = PLAIN._replace(owners=owners, symmetric=symmetric)
    operator = torch.ops.llave.within_logsumexp
    torch.library.opcheck(operator, (query, target, scale, name, True, True, *rules))


@pytest.mark.skipif(
    torch.__version__.startswith("2.8."), reason="torch 2.8 cannot trace NamedTuple._replace"
)
def test_a_margin_over_prefixes_compiles_without_a_break() -> None:
    def step(query: Tensor, target: Tensor) -> Tensor:
        return hardness_weighted_contrastive_loss(
            query, target, within=BOTH, matryoshka_dims=(3, 8), false_negative_margin=0.1
        )

    pair = embeddings(6, 6, 8)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*pair), step(*pair))


def test_a_row_whose_positive_another_row_owns() -> None:
    """The positive is not a negative within the targets, whatever the owners say."""
    query, target = (x.double() for x in embeddings(2, 4, 5))
    settings: dict[str, Any] = {"labels": torch.tensor([3, 1]), "within": ("target",)}
    settings |= {"alpha": 0.0, "symmetric": False, "logit_scale": 5.0}
    found = hardness_weighted_contrastive_loss(query, target, **settings)
    assert relative_error(found, reference_loss(query, target, **settings)) < 1e-12


def test_compile_without_a_break() -> None:
    def step(query: Tensor, target: Tensor) -> Tensor:
        return hardness_weighted_contrastive_loss(query, target, within=BOTH)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (8, 11):
        pair = [x.requires_grad_() for x in embeddings(n, n + 4, 6)]
        eager, traced = step(*pair), compiled(*pair)
        assert relative_error(traced, eager) < 1e-6
        found = (torch.autograd.grad(x, pair) for x in (traced, eager))
        for a, b in zip(*found, strict=True):
            assert relative_error(a, b) < 1e-6


def test_first_derivatives_of_transforms_and_no_others() -> None:
    query, target = embeddings(6, 6, 4, torch.float64)

    def ours(query: Tensor) -> Tensor:
        return hardness_weighted_contrastive_loss(query, target, within=BOTH)

    def truth(query: Tensor) -> Tensor:
        return reference_loss(query, target, within=BOTH)

    batch = torch.stack([query, query.flip(0)])
    assert relative_error(grad(ours)(query), grad(truth)(query)) < 1e-10
    assert relative_error(vmap(ours)(batch), torch.stack([truth(x) for x in batch])) < 1e-10
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad(lambda q: grad(ours)(q).square().sum())(query)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(ours, (query,), (query,))
    leaf = query.clone().requires_grad_()
    (first,) = torch.autograd.grad(ours(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.square().sum().backward()


def test_autocast_and_each_outputs_own_gradient() -> None:
    query, target = (x.requires_grad_() for x in embeddings(12, 12, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = hardness_weighted_contrastive_loss(query, target, within=BOTH)
    rounded = [x.detach().bfloat16() for x in (query, target)]
    assert torch.equal(loss, hardness_weighted_contrastive_loss(*rounded, within=BOTH))
    pair = [x.detach().double().requires_grad_() for x in (query, target)]
    found = logits_of(*pair, logit_scale=50.0, backend="auto", within=BOTH, alpha=0.0)
    expected = (
        *reference_logsumexp(*pair, alpha=0.0),
        reference_within(*pair, within=BOTH),
    )
    for a, b in zip(found, expected, strict=True):
        assert a is not None
        assert b is not None
        gradients = (torch.autograd.grad(x.sum(), pair, retain_graph=True) for x in (a, b))
        for x, y in zip(*gradients, strict=True):
            assert relative_error(x, y) < 1e-10


def test_inputs_are_normalised_by_nobody() -> None:
    pair = embeddings(20, 30, 6, unit=False)
    assert_contract(*pair, 3.0, within=BOTH)
    unit = [normalize(x, dim=1) for x in pair]
    assert_contract(*unit, 3.0, within=BOTH)
