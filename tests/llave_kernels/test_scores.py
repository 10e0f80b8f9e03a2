"""The loss of given similarities, compared with the fused loss, reference and cross-entropy."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from llave_kernels import hardness_weighted_contrastive_loss
from llave_kernels.reference import reference_loss
from llave_kernels.rules import RuleArguments
from llave_kernels.scores import CrossEntropyLoss, scores_loss
from tests.helpers import draw_rules, embeddings, loss_and_gradients, relative_error
from tests.llave_kernels.integrations.hosts import BiEncoder


def of_embeddings(query: Tensor, target: Tensor, **rules: Any) -> Tensor:
    return scores_loss(query @ target.T, **rules)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("hardness", ["in_batch", "hard_negatives", "all"])
@pytest.mark.parametrize("kinds", ["", "owners", "labels", "ids margin", "target_alpha margin"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_the_loss_of_embeddings(
    reduction: str, kinds: str, hardness: str, symmetric: bool
) -> None:
    query, target = embeddings(11, 29, 16)
    rules = draw_rules(11, 29, set(kinds.split())) | {"hardness": hardness, "symmetric": symmetric}
    arguments = rules | {"reduction": reduction, "alpha": 9.0}
    found = loss_and_gradients(of_embeddings, query, target, 20.0, **arguments)
    truth = loss_and_gradients(reference_loss, query.double(), target.double(), 20.0, **arguments)
    fused = loss_and_gradients(hardness_weighted_contrastive_loss, query, target, 20.0, **arguments)
    for ours, other, exact in zip(found, fused, truth, strict=True):
        assert relative_error(ours, exact) < 1e-5
        assert relative_error(ours, other) < 1e-5


def value_and_gradient(loss_fn: Any, scores: Tensor) -> list[Tensor]:
    scores = scores.detach().clone().requires_grad_()
    loss = loss_fn(scores)
    loss.backward()
    return [loss.detach(), scores.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_cross_entropy_without_the_weight(dtype: torch.dtype) -> None:
    def plain(scores: Tensor) -> Tensor:
        return cross_entropy(50 * scores, torch.arange(len(scores)))

    query, target = embeddings(33, 65, 32)
    scores = (query @ target.T).to(dtype)
    truth = value_and_gradient(plain, scores.double())
    theirs = value_and_gradient(plain, scores)
    ours = value_and_gradient(
        lambda s: scores_loss(s, logit_scale=50.0, alpha=0.0, symmetric=False), scores
    )
    assert ours[0].dtype == torch.float32
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert relative_error(a, c) <= max(1e-6, relative_error(b, c))


def test_a_converged_batch_keeps_its_digits() -> None:
    scores = 2 * torch.eye(8) - 1
    for alpha in (0.0, 9.0):
        ours, truth = (
            value_and_gradient(lambda s: scores_loss(s, logit_scale=20.0, alpha=alpha), s)  # noqa: B023
            for s in (scores, scores.double())
        )
        assert 0 < ours[0] < 1e-15
        for a, b in zip(ours, truth, strict=True):
            assert relative_error(a, b) < 1e-5


def test_autocast_rounds_nothing() -> None:
    scores = torch.randn(5, 7)
    expected = scores_loss(scores, logit_scale=20.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scores_loss(scores, logit_scale=20.0), expected)


def test_a_row_without_negatives_is_zero() -> None:
    loss, gradient = value_and_gradient(
        lambda s: scores_loss(s, logit_scale=20.0), torch.randn(1, 1)
    )
    assert loss == 0
    assert gradient == 0


def step(model: BiEncoder, loss_fn: Any, *inputs: Any) -> list[Tensor]:
    model.cross_entropy, model.encoder.weight.grad = loss_fn, None
    loss = model(*inputs)
    loss.backward()
    assert model.encoder.weight.grad is not None
    return [loss.detach(), model.encoder.weight.grad]


@pytest.mark.parametrize("hardness", ["in_batch", "hard_negatives", "all"])
@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("width", [1, 3, 7])
def test_cross_entropy_inside_a_hosts_model(width: int, in_batch: bool, hardness: str) -> None:
    """The model uses in-batch negatives, or only each query's own passages.

    In the second case a row owns all its columns, whether or not N divides their number.
    """
    model, n = BiEncoder(0.05), 7
    inputs = torch.randn(n, 11), torch.randn(n * width, 11)
    expected = step(model, nn.CrossEntropyLoss(), *inputs, in_batch)
    for a, b in zip(step(model, CrossEntropyLoss(0.05), *inputs, in_batch), expected, strict=True):
        assert relative_error(a, b) < 1e-5

    def fused(logits: Tensor, target: Tensor) -> Tensor:
        x, y = (model.encode(x) for x in inputs)
        settings = {"logit_scale": 20.0, "symmetric": False, "hardness": hardness}
        if in_batch:
            settings |= {"labels": target, "owners": target.repeat_interleave(width)}
            return hardness_weighted_contrastive_loss(x, y, **settings)
        rows = zip(x.split(1), y.split(width), strict=True)
        return torch.stack(
            [hardness_weighted_contrastive_loss(*r, **settings) for r in rows]
        ).mean()

    expected = step(model, Function(fused), *inputs, in_batch)
    weighted = CrossEntropyLoss(0.05, 9.0, hardness=hardness)
    for a, b in zip(step(model, weighted, *inputs, in_batch), expected, strict=True):
        assert relative_error(a, b) < 1e-5


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.forward = function


@pytest.mark.parametrize(
    ("labels", "owners"),
    [
        ([2, 5, 8], [2, 2, 2, 5, 5, 5, 8, 8, 8]),  # last in their blocks
        ([1, 0, 2], [0, 1, 2]),  # no mined negatives
        ([6, 2, 2], [0, 1, 2, 3, 4, 5, 6]),  # no blocks
    ],
)
def test_cross_entropy_with_positives_anywhere(labels: list[int], owners: list[int]) -> None:
    query, target = embeddings(3, len(owners), 6)
    rules = {"labels": torch.tensor(labels), "owners": torch.tensor(owners), "symmetric": False}
    found = CrossEntropyLoss(0.05, 9.0, false_negative_margin=0.1)(
        query @ target.T / 0.05, rules["labels"]
    )
    expected = hardness_weighted_contrastive_loss(
        query, target, logit_scale=20.0, false_negative_margin=0.1, **rules
    )
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cross_entropy_of_half_precision_is_not_worse_than_the_hosts(dtype: torch.dtype) -> None:
    query, target = embeddings(33, 33, 32)
    logits, labels = (query @ target.T / 0.02).to(dtype), torch.arange(33)
    truth = value_and_gradient(lambda x: cross_entropy(x, labels), logits.double())
    theirs = value_and_gradient(lambda x: cross_entropy(x, labels), logits)
    ours = value_and_gradient(lambda x: CrossEntropyLoss(0.02)(x, labels), logits)
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert relative_error(a, c) <= max(1e-6, relative_error(b, c))


def test_cross_entropy_takes_numpys_numbers_and_compiles() -> None:
    logits, labels = torch.randn(4, 12), torch.arange(4) * 3
    expected = CrossEntropyLoss(0.5, 0.5)(logits, labels)
    assert torch.equal(
        CrossEntropyLoss(np.float32(0.5), torch.tensor([0.5]))(logits, labels), expected
    )
    compiled = torch.compile(CrossEntropyLoss(0.5, 0.5), fullgraph=True, backend="eager")
    assert relative_error(compiled(logits, labels), expected) < 1e-6


def test_cross_entropy_names_mistakes() -> None:
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        CrossEntropyLoss(0.0)
    with pytest.raises(ValueError, match="hardness must be one of"):
        CrossEntropyLoss(1.0, hardness="none")
    loss_fn = CrossEntropyLoss(0.05, 9.0)
    with pytest.raises(ValueError, match=r"logits must have shape \(N, M\), got \(4,\)"):
        loss_fn(torch.randn(4), torch.arange(4))
    with pytest.raises(ValueError, match=r"target must have shape \(4,\), got \(3,\)"):
        loss_fn(torch.randn(4, 8), torch.arange(3))
    with pytest.raises(ValueError, match="target must be columns from 0 to 7, got values"):
        loss_fn(torch.randn(4, 8), torch.arange(5, 9))
    with pytest.raises(TypeError, match="target must be an integer tensor"):
        loss_fn(torch.randn(4, 8), torch.randn(4, 8))


def test_the_signature_shows_the_rules() -> None:
    parameters = inspect.signature(scores_loss).parameters
    assert {"scores", "logit_scale", "reduction", *RuleArguments.__annotations__} == set(parameters)
    with pytest.raises(TypeError, match="unexpected keyword argument 'strength'"):
        scores_loss(torch.randn(3, 3), logit_scale=20.0, strength=1.0)


@pytest.mark.parametrize(
    ("scores", "arguments", "error", "message"),
    [
        ([[1.0]], {}, TypeError, "scores must be a torch.Tensor, got list"),
        (torch.randn(3), {}, ValueError, r"scores must have shape \(N, M\), got \(3,\)"),
        (torch.randn(0, 3), {}, ValueError, "empty"),
        (torch.ones(2, 3).long(), {}, TypeError, "must be float32"),
        (torch.randn(3, 2), {}, ValueError, "pass labels where several queries share one"),
        (torch.randn(3, 3), {"alpha": -1.0}, ValueError, "alpha must be >= 0"),
        (torch.randn(3, 3), {"logit_scale": 0.0}, ValueError, "logit_scale must be positive"),
        (torch.randn(3, 3), {"reduction": "max"}, ValueError, "reduction must be one of"),
        (torch.randn(3, 3), {"labels": torch.tensor([0, 1, 3])}, ValueError, "labels must be"),
    ],
)
def test_mistakes_are_named(
    scores: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        scores_loss(scores, **{"logit_scale": 20.0, **arguments})
