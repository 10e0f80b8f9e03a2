"""``query_bias`` and ``target_bias``. ``draw_rules`` draws them for the tests of all rules too."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from llave_kernels import (
    HardnessWeightedContrastiveLoss,
    contrastive_logsumexp,
    hardness_weighted_contrastive_loss,
    ops,
)
from llave_kernels.reference import reference_logsumexp, reference_loss
from tests.helpers import embeddings, relative_error

N, M, D = 7, 11, 5


def biases(n: int, m: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    sizes = {"query_bias": n, "target_bias": m}
    return {k: (3 * torch.randn(size, dtype=dtype)).requires_grad_() for k, size in sizes.items()}


def two_tower(
    query: Tensor, item: Tensor, probability: Tensor, temperature: float, labels: Tensor
) -> Tensor:
    """Sampled softmax with the log-Q correction (Yi et al. 2019, eq. 5), as recommenders write it.

    ``probability`` (M,) is how likely an item is in a batch.
    """
    logits = query @ item.T / temperature - probability.log()
    return cross_entropy(logits, labels)


def test_the_log_q_correction_of_two_towers() -> None:
    """Value and gradients are the recommenders', at 1,000 random settings."""
    for _ in range(1000):
        n, d = (int(torch.randint(1, most, ())) for most in (20, 24))
        m = n + int(torch.randint(0, 20, ()))
        temperature = float(0.02 + torch.rand(()))
        labels = torch.randperm(m)[:n] if torch.rand(()) < 0.5 else torch.randint(m, (n,))
        frequency = (torch.rand(m) + 1e-3) ** 3  # popular and rare items
        dtype = torch.float32 if torch.rand(()) < 0.5 else torch.float64
        frequency = frequency.to(dtype)
        rows = [normalize(torch.randn(k, d, dtype=dtype), dim=1) for k in (n, m)]
        both = []
        for ours in (True, False):
            leaves = [x.clone().requires_grad_() for x in (*rows, frequency)]
            query, item, counts = leaves
            probability = counts / counts.sum()
            if ours:
                loss = hardness_weighted_contrastive_loss(
                    query, item, logit_scale=1 / temperature, alpha=0.0, symmetric=False,
                    labels=labels, owners=range(m), target_bias=-probability.log(),
                )  # fmt: skip
            else:
                double = [x.double() for x in (query, item, probability)]
                loss = two_tower(*double, temperature, labels)
            both.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        bound = 1e-5 if dtype == torch.float32 else 1e-11
        for found, expected in zip(*both, strict=True):
            # A gradient near 0 is the rest of terms that cancel.
            size = float(expected.norm()) + float(both[1][0]) / 10
            assert float((found - expected).norm()) <= bound * size


@pytest.mark.parametrize("symmetric", [True, False])
def test_outputs_have_the_biases_in_them(backend: str, symmetric: bool) -> None:
    pair, given = embeddings(N, M, D), biases(N, M)
    rules: dict[str, Any] = {"logit_scale": 20.0, "symmetric": symmetric}
    found = contrastive_logsumexp(*pair, backend=backend, **rules, **given)
    truth = reference_logsumexp(
        *(x.double() for x in pair), **rules, **{k: x.double() for k, x in given.items()}
    )
    for ours, expected in zip(found[:3], truth, strict=True):
        assert (ours is None) == (expected is None)
        assert ours is None or relative_error(ours, expected) < 2e-6
    # Any loss of the outputs differentiates.
    upstream = [torch.rand(len(x)) for x in truth if x is not None]
    outputs = [x for x in found[:3] if x is not None]
    ours = torch.autograd.grad(outputs, list(given.values()), upstream)
    outputs = [x for x in truth if x is not None]
    expected = torch.autograd.grad(outputs, list(given.values()), [x.double() for x in upstream])
    for a, b in zip(ours, expected, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("names", [("query_bias",), ("target_bias",)], ids=str)
def test_one_bias_alone_and_one_that_does_not_learn(backend: str, names: tuple[str, ...]) -> None:
    pair = [x.requires_grad_() for x in embeddings(N, M, D)]
    given = biases(N, M)
    frozen = {k: x.detach() for k, x in given.items()}
    values = []
    for loss in (reference_loss, hardness_weighted_contrastive_loss):
        chosen = {"backend": backend} if loss is not reference_loss else {}
        alone = loss(*pair, **{k: given[k] for k in names}, **chosen)
        frozen_but_one = loss(*pair, **frozen | {k: given[k] for k in names}, **chosen)
        leaves = [*pair, *(given[k] for k in names)]
        for value in (alone, frozen_but_one):
            values.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for expected, found in zip(values[:2], values[2:], strict=True):
        for a, b in zip(found, expected, strict=True):
            assert relative_error(a, b) < 5e-5


def test_a_bias_of_all_cancels(backend: str) -> None:
    """A constant added to all logits changes no loss. The gradients of a bias sum to 0."""
    pair = embeddings(N, M, D)
    for symmetric in (True, False):
        rules: dict[str, Any] = {"symmetric": symmetric, "backend": backend}
        plain = hardness_weighted_contrastive_loss(*pair, **rules)
        given = {k: torch.full_like(x, 5.0).requires_grad_() for k, x in biases(N, M).items()}
        loss = hardness_weighted_contrastive_loss(*pair, **rules, **given)
        assert relative_error(loss, plain) < 1e-5
        for d in torch.autograd.grad(loss, list(given.values())):
            assert abs(float(d.sum())) < 1e-6
    # In one direction a row's bias cancels in its own loss.
    loss = loss_of_rows(pair, given, backend)
    (d,) = torch.autograd.grad(loss, given["query_bias"])
    assert float(d.abs().max()) < 1e-6


def loss_of_rows(pair: tuple[Tensor, Tensor], given: dict[str, Tensor], backend: str) -> Tensor:
    return hardness_weighted_contrastive_loss(*pair, symmetric=False, backend=backend, **given)


def test_a_low_bias_keeps_a_target_out(backend: str) -> None:
    pair = embeddings(N, M, D)
    bias = torch.zeros(M)
    bias[N:] = -1e3
    found = loss_of_rows(pair, {"target_bias": bias}, backend)
    query, target = pair
    expected = loss_of_rows((query, target[:N]), {}, backend)
    assert relative_error(found, expected) < 1e-5


def test_nan_in_nan_out(backend: str) -> None:
    for name, size in (("query_bias", N), ("target_bias", M)):
        bias = torch.zeros(size)
        bias[2] = float("nan")
        pair = [x.requires_grad_() for x in embeddings(N, M, D)]
        loss = hardness_weighted_contrastive_loss(*pair, backend=backend, **{name: bias})
        assert loss.isnan()
        assert all(d.isnan().any() for d in torch.autograd.grad(loss, pair))


@pytest.mark.parametrize("symmetric", [True, False])
def test_compiled_without_a_break(symmetric: bool) -> None:
    module = HardnessWeightedContrastiveLoss(20.0, symmetric=symmetric)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    pair, given = embeddings(N, M, D), biases(N, M)
    both = []
    for loss in (compiled, module):
        value = loss(*pair, **given)
        both.append([value.detach(), *torch.autograd.grad(value, list(given.values()))])
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_transforms_see_the_biases() -> None:
    pair, given = embeddings(N, M, D, torch.float64), biases(N, M, torch.float64)
    fixed = [x.detach() for x in given.values()]
    names = list(given)

    def of(loss: Any) -> Any:
        return lambda *values: loss(*pair, **dict(zip(names, values, strict=True)))

    found = torch.func.grad(of(hardness_weighted_contrastive_loss), (0, 1))(*fixed)
    expected = torch.func.grad(of(reference_loss), (0, 1))(*fixed)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-10
    several = [torch.stack([x, -x]) for x in fixed]
    values = torch.vmap(of(hardness_weighted_contrastive_loss))(*several)
    each = [of(reference_loss)(*x) for x in zip(*several, strict=True)]
    assert relative_error(values, torch.stack(each)) < 1e-12


def second_derivative(loss: Tensor, bias: Tensor) -> None:
    (gradient,) = torch.autograd.grad(loss, bias, create_graph=True)
    gradient.square().sum().backward()


def test_second_derivatives_are_refused() -> None:
    pair, given = embeddings(N, M, D), biases(N, M)
    for symmetric in (True, False):
        loss = hardness_weighted_contrastive_loss(*pair, symmetric=symmetric, **given)
        with pytest.raises(RuntimeError, match="no second derivative"):
            second_derivative(loss, given["target_bias"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_deterministic_and_in_the_sums_dtype(backend: str, dtype: torch.dtype) -> None:
    pair, given = embeddings(70, 90, 33, dtype), biases(70, 90)
    first, second = (
        torch.autograd.grad(
            hardness_weighted_contrastive_loss(*pair, backend=backend, **given),
            list(given.values()),
        )
        for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_operators_return_no_gradient_that_is_not_asked_for() -> None:
    """Nor for a bias that is not there."""
    query, target = embeddings(N, M, D)
    scale, bias = torch.tensor(20.0), torch.randn(M)
    for given, asked in itertools.product((None, bias), (True, False)):
        rules = *[None] * 7, given, 9.0, 9.0, "in_batch", None, True
        *outputs, kept = ops.contrastive_logsumexp(query, target, scale, "torch", *rules)
        upstream = [torch.ones_like(x) for x in outputs]
        found = ops.contrastive_logsumexp_backward(
            *upstream, *outputs, kept, False, asked, query, target, scale, "torch", *rules
        )
        sizes = 0, M if asked and given is not None else 0
        assert tuple(len(x) for x in found[3:]) == sizes


MISTAKES: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "query_bias must be a torch.Tensor, got list", {"query_bias": [0.0] * N}),
    (
        TypeError,
        "target_bias must be torch.float32 for embeddings in torch.float32, got torch.float64; use "
        "to.torch.float32.",
        {"target_bias": torch.zeros(M, dtype=torch.float64)},
    ),
    (ValueError, r"query_bias must have shape \(7,\), got \(11,\)", {"query_bias": torch.zeros(M)}),
    (ValueError, r"target_bias must have shape \(11,\)", {"target_bias": torch.zeros(M, 1)}),
    (ValueError, "must be on query's device", {"target_bias": torch.zeros(M, device="meta")}),
    *(
        (
            ValueError,
            "target_bias must be finite, got an infinite value; -1e3 keeps",
            {"target_bias": x},
        )
        for x in (torch.full((M,), float("inf")), torch.tensor([0.0] * (M - 1) + [-float("inf")]))
    ),
]


@pytest.mark.parametrize(("kind", "message", "given"), MISTAKES, ids=lambda x: str(x)[:30])
def test_mistakes(kind: type[Exception], message: str, given: dict[str, Any]) -> None:
    pair = embeddings(N, M, D)
    for function in (hardness_weighted_contrastive_loss, contrastive_logsumexp):
        with pytest.raises(kind, match=message):
            function(*pair, **given)
