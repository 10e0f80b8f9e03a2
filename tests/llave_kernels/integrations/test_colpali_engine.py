"""colpali-engine's loss classes and ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from llave_kernels.reference import similarity_loss
from tests.helpers import relative_error

pytest.importorskip("colpali_engine")

from colpali_engine.loss import bi_encoder_losses, late_interaction_losses

from llave_kernels.integrations import colpali_engine as ours

WEIGHTED = ("BiEncoderLoss", "BiPairedEncoderLoss", "ColbertLoss")
HOSTS = {
    "BiEncoderLoss": bi_encoder_losses.BiEncoderLoss,
    "BiPairedEncoderLoss": bi_encoder_losses.BiPairedEncoderLoss,
    "BiSigmoidLoss": bi_encoder_losses.BiSigmoidLoss,
    "ColbertLoss": late_interaction_losses.ColbertLoss,
}
# The host's losses that hold one of these as ``inner_loss``, and whose own part is small.
OUTER = {
    "BiEncoderLoss": bi_encoder_losses.BiNegativeCELoss,
    "ColbertLoss": late_interaction_losses.ColbertNegativeCELoss,
}


def rows(draw: np.random.Generator, *shape: int) -> Tensor:
    values = torch.from_numpy(draw.standard_normal(shape) + 0.3)
    return normalize(values, dim=-1).requires_grad_()


def drawn(draw: np.random.Generator, name: str) -> tuple[dict[str, Any], list[Tensor], int]:
    """Settings, queries and documents, the column of the first positive."""
    settings = {
        "temperature": float(draw.uniform(0.02, 1)),
        "pos_aware_negative_filtering": bool(draw.random() < 0.3),
        "filter_threshold": float(draw.uniform(0.5, 1)),
        "filter_factor": float(draw.uniform(0.1, 1)),
    }
    n, d = (int(draw.integers(1, x)) for x in (9, 20))
    processes = 1 if name == "BiPairedEncoderLoss" else int(draw.integers(1, 4))
    if name == "ColbertLoss":
        settings["normalize_scores"] = bool(draw.random() < 0.7)
        settings["use_smooth_max"] = bool(draw.random() < 0.3)
        shapes = [(n, int(draw.integers(1, 6)), d), (n * processes, int(draw.integers(1, 6)), d)]
    else:
        shapes = [(n, d), (n * processes, d)]
    return settings, [rows(draw, *shape) for shape in shapes], n * int(draw.integers(processes))


def value_and_gradients(loss_fn: Any, leaves: list[Tensor], offset: int) -> list[Tensor]:
    loss = loss_fn(*leaves, offset=offset)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def assert_equal(found: list[Tensor], expected: list[Tensor], case: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-9 or float((a - b).norm()) < 1e-12, case


@pytest.mark.parametrize(
    "seeds", [range(100), pytest.param(range(100, 1000), marks=pytest.mark.long)], ids=str
)
@pytest.mark.parametrize("name", HOSTS)
def test_value_and_gradients_are_the_hosts(name: str, seeds: range) -> None:
    for seed in seeds:
        settings, leaves, offset = drawn(np.random.default_rng(seed), name)
        expected = value_and_gradients(HOSTS[name](**settings), leaves, offset)
        found = value_and_gradients(getattr(ours, name)(**settings), leaves, offset)
        assert_equal(found, expected, (seed, settings))


@pytest.mark.parametrize("name", OUTER)
def test_it_is_the_inner_loss_of_the_hosts_class_for_negatives(name: str) -> None:
    for seed in range(20):
        draw = np.random.default_rng(seed)
        settings, leaves, offset = drawn(draw, name)
        query = leaves[0]
        negatives = rows(draw, len(query), 3, *query.shape[1:])
        outer = OUTER[name](in_batch_term_weight=0.3, **settings)
        given = [*leaves, negatives]
        expected = value_and_gradients(outer, given, offset)
        outer.inner_loss = getattr(ours, name)(**settings)
        assert_equal(value_and_gradients(outer, given, offset), expected, (seed, settings))


@pytest.mark.parametrize("name", WEIGHTED)
def test_alpha_weights_every_negative(name: str) -> None:
    """Documents of other processes are negatives too, not a query's own."""
    for seed in range(20):
        settings, leaves, offset = drawn(np.random.default_rng(seed), name)
        settings |= {"pos_aware_negative_filtering": False, "use_smooth_max": False}
        if name != "ColbertLoss":
            del settings["use_smooth_max"]
            scores = leaves[0] @ leaves[1].T
        else:
            scores = torch.einsum("bnd,csd->bcns", *leaves).amax(3).sum(2)
            if settings["normalize_scores"]:
                scores = scores / leaves[0].shape[1]
        expected = similarity_loss(
            scores,
            logit_scale=1 / settings["temperature"],
            alpha=5.0,
            symmetric=name == "BiPairedEncoderLoss",
            labels=offset + torch.arange(len(scores)),
            owners=range(scores.shape[1]),
        )
        expected = [expected.detach(), *torch.autograd.grad(expected, leaves)]
        found = value_and_gradients(getattr(ours, name)(**settings, alpha=5.0), leaves, offset)
        assert_equal(found, expected, (seed, settings))


def test_a_large_batch_needs_no_large_buffer() -> None:
    leaves = [rows(np.random.default_rng(0), 9, 4) for _ in range(2)]
    with pytest.raises(ValueError, match="batch_size"):
        bi_encoder_losses.BiEncoderLoss(max_batch_size=8)(*leaves)
    whole = bi_encoder_losses.BiEncoderLoss()(*leaves)
    assert relative_error(ours.BiEncoderLoss(max_batch_size=8)(*leaves), whole) < 1e-9


def test_misuse() -> None:
    for kind in (ours.BiEncoderLoss, ours.ColbertLoss):
        with pytest.raises(ValueError, match=r"alpha must be >= 0 and finite, got -1"):
            kind(alpha=-1.0)
    for kind in (ours.BiEncoderLoss, ours.BiSigmoidLoss):
        with pytest.raises(ValueError, match=r"backend='fast' is not a backend"):
            kind(backend="fast")
