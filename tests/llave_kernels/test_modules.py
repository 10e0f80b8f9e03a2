"""The module and the similarity statistics."""

from __future__ import annotations

import math

import pytest
import torch

from llave_kernels import (
    HardnessWeightedContrastiveLoss,
    SigmoidContrastiveLoss,
    SupervisedContrastiveLoss,
    diagnostics,
    hardness_weighted_contrastive_loss,
    similarity_statistics,
    supervised_contrastive_loss,
)
from tests.helpers import embeddings


def test_module_is_the_function() -> None:
    query, target = embeddings(6, 12, 5)
    settings = {
        "alpha": 5.0,
        "hardness": "hard_negatives",
        "symmetric": False,
        "false_negative_margin": 0.1,
        "reduction": "sum",
    }
    module = HardnessWeightedContrastiveLoss(30.0, **settings)
    expected = hardness_weighted_contrastive_loss(query, target, logit_scale=30.0, **settings)
    assert torch.equal(module(query, target), expected)
    assert not list(module.parameters())


def test_learnable_scale_trains_and_stays_bounded() -> None:
    module = HardnessWeightedContrastiveLoss(5.0, learnable=True, max_logit_scale=8.0)
    query, noise = embeddings(8, 8, 64)
    target = query + 0.1 * noise  # aligned, so a larger scale is better
    optimizer = torch.optim.SGD(module.parameters(), lr=10.0)
    scales = []
    for _ in range(3):
        assert isinstance(module.logit_scale, torch.Tensor)
        scales.append(float(module.logit_scale.detach()))
        optimizer.zero_grad()
        module(query, target).backward()
        optimizer.step()
    assert scales[0] == pytest.approx(5.0)
    assert scales[0] < scales[-1] <= 8.0 * (1 + 1e-6)
    assert set(module.state_dict()) == {"log_logit_scale"}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_scale_at_its_bound_comes_back(optimizer: type[torch.optim.Optimizer]) -> None:
    module = HardnessWeightedContrastiveLoss(100.0, learnable=True)
    query, _ = embeddings(8, 8, 64)
    step = optimizer(module.parameters(), lr=1e-2)

    def scale_after(steps: int, gradient: float | None = None) -> float:
        for _ in range(steps):
            step.zero_grad()
            module(query, -query).backward()  # far apart: a smaller scale is better
            if gradient is not None:
                module.log_logit_scale.grad.fill_(gradient)
            module.log_logit_scale.grad.clamp_(-1, 1)
            step.step()
        module(query, query)
        return float(module.logit_scale.detach())

    assert scale_after(5) < 99.0
    # The parameter stays at the bound when the gradient keeps pushing it up.
    assert scale_after(300, gradient=-1.0) == pytest.approx(100.0, rel=1e-6)
    assert scale_after(30) < 99.0


@pytest.mark.parametrize("value", [100.0, 100.1, 1e6])
def test_a_scale_over_its_bound_has_the_bounds_loss_and_gradient(value: float) -> None:
    module = HardnessWeightedContrastiveLoss(learnable=True)
    with torch.no_grad():
        module.log_logit_scale.fill_(math.log(value))
    assert float(module.logit_scale.detach()) == pytest.approx(100.0, rel=1e-5)
    query, target = embeddings(8, 8, 4)
    loss = module(query, target)
    loss.backward()
    scale = torch.tensor(100.0, requires_grad=True)
    expected = hardness_weighted_contrastive_loss(query, target, logit_scale=scale)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert float(module.log_logit_scale.grad) == pytest.approx(100 * float(scale.grad), rel=1e-5)


def test_repr_of_a_module_without_values() -> None:
    with torch.device("meta"):
        modules = HardnessWeightedContrastiveLoss(learnable=True), SigmoidContrastiveLoss()
    for module in modules:
        assert "logit_scale=meta" in repr(module)


def test_repr_says_what_the_loss_is() -> None:
    module = HardnessWeightedContrastiveLoss(20.0, learnable=True, target_alpha=0.0)
    assert repr(module) == (
        "HardnessWeightedContrastiveLoss(logit_scale=20 (learnable), alpha=9, "
        "hardness='in_batch', symmetric=True, target_alpha=0, reduction='mean', backend='auto')"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_statistics_against_a_dense_count(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnostics, "STRIP_BUDGET", 512)
    query, target = embeddings(17, 40, 6, dtype)
    labels = torch.randperm(40)[:17]
    ids = torch.randint(5, (17,)), torch.randint(5, (40,))
    got = similarity_statistics(
        query, target, labels=labels, query_ids=ids[0], target_ids=ids[1], bins=20
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    similarity = query.to(wide) @ target.to(wide).T
    positive = torch.zeros(17, 40, dtype=torch.bool).scatter_(1, labels[:, None], True)
    negative = ~positive & (ids[0][:, None] != ids[1])
    for counts, mean, mask in (
        (got.positive, got.positive_mean, positive),
        (got.negative, got.negative_mean, negative),
    ):
        expected = torch.histogram(similarity[mask].double(), 20, range=(-1.0, 1.0)).hist
        assert torch.equal(counts, expected.long())
        assert float(mean) == pytest.approx(
            float(similarity[mask].double().mean()), rel=1e-5, abs=1e-7
        )
    assert 0 <= float(got.overlap) <= 1


def test_overlap_of_separated_and_equal_distributions() -> None:
    eye = torch.eye(6)
    assert float(similarity_statistics(eye, eye).overlap) == 0.0
    same = torch.ones(6, 1)
    assert float(similarity_statistics(same, same).overlap) == 1.0


def test_supervised_module_is_the_function() -> None:
    query, target = embeddings(6, 12, 5)
    settings = {"alpha": 5.0, "denominator": "pair", "symmetric": True, "reduction": "sum"}
    groups = {"query_groups": torch.arange(6) // 2, "target_groups": torch.arange(12) // 3}
    module = SupervisedContrastiveLoss(30.0, **settings)
    expected = supervised_contrastive_loss(query, target, logit_scale=30.0, **groups, **settings)
    assert torch.equal(module(query, target, **groups), expected)
    assert "denominator='pair'" in repr(module)
    learning = SupervisedContrastiveLoss(30.0, learnable=True)
    alone = {"query_groups": groups["query_groups"]}
    learning(query, **alone).backward()
    assert learning.log_logit_scale is not None
    assert learning.log_logit_scale.grad.isfinite()
    expected = supervised_contrastive_loss(query, logit_scale=30.0, **alone)
    assert float(learning(query, **alone)) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(ValueError, match="denominator must be one of"):
        SupervisedContrastiveLoss(denominator="some")
