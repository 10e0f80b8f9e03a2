"""Directions within a side: random settings against the host, and Qwen3-Embedding's mask."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("sentence_transformers")

from sentence_transformers import util
from sentence_transformers.sentence_transformer import losses as host

from llave_kernels import within
from llave_kernels.integrations import sentence_transformers as ours
from llave_kernels.reference import reference_loss
from tests.helpers import relative_error
from tests.llave_kernels.integrations.sentence_transformers.twins import encoder

OTHERS = ("query_to_query", "doc_to_query", "doc_to_doc")
MODES = (None, "in_batch_negatives", "hard_negatives", "all_negatives")


def value_and_gradients(loss: Any, embeddings: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in embeddings]
    value = loss.compute_loss_from_embeddings(leaves, None)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def arguments(draw: random.Random) -> dict[str, Any]:
    directions = ("query_to_doc", *(x for x in OTHERS if draw.random() < 0.6))
    same = {"query_to_query", "doc_to_doc"} & {*directions}
    mode = draw.choice(MODES)
    return {
        "directions": directions,
        "partition_mode": "joint" if same else draw.choice(["joint", "per_direction"]),
        "hardness_mode": mode,
        "hardness_strength": draw.uniform(0.5, 9.0) if mode else 0.0,
        "similarity_fct": draw.choice([util.cos_sim, util.dot_score]),
        "scale": draw.uniform(0.5, 30.0),
    }


@pytest.mark.parametrize("settings", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_random_settings_equal_the_host(settings: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in one strip and in strips of 4 rows. A sum that cancels is compared with its terms."""
    model, draw = encoder(), random.Random(settings)
    for _ in range(settings):
        given, n, d = arguments(draw), draw.randint(2, 13), draw.randint(3, 24)
        embeddings = [torch.randn(n, d) / d**0.5 for _ in range(draw.randint(2, 4))]
        theirs, own = (
            module.MultipleNegativesRankingLoss(model, **given) for module in (host, ours)
        )
        expected = value_and_gradients(theirs, [x.double() for x in embeddings])
        rows = draw.choice([4, n])
        monkeypatch.setattr(within, "strip_rows", lambda n, device, rows=rows: min(n, rows))
        found = value_and_gradients(own, embeddings)
        largest = max(float(x.norm()) for x in expected[1:])
        for a, b in zip(found, expected, strict=True):
            close = float((a.double() - b).norm()) < 1e-5 * max(float(b.norm()), 0.1 * largest)
            assert close or relative_error(a, b) < 1e-5, (given, n, d)


@pytest.mark.parametrize("columns", [2, 3])
def test_the_margin_is_qwen3_embeddings_mask(columns: int) -> None:
    """It compares with the row's positive in every direction."""
    embeddings = [torch.randn(9, 5, dtype=torch.float64) for _ in range(columns)]
    directions = ("query_to_doc", "query_to_query", "doc_to_doc")
    loss = ours.MultipleNegativesRankingLoss(
        encoder(), directions=directions, false_negative_margin=0.1
    )
    found = value_and_gradients(loss, embeddings)
    leaves = [x.clone().requires_grad_() for x in embeddings]
    query, *documents = (torch.nn.functional.normalize(x, dim=1) for x in leaves)
    expected = reference_loss(
        query, torch.cat(documents), logit_scale=20.0, alpha=0.0, symmetric=False,
        false_negative_margin=0.1, within=("query", "target"),
    )  # fmt: skip
    for a, b in zip(found, [expected, *torch.autograd.grad(expected, leaves)], strict=True):
        assert relative_error(a, b) < 1e-10
