"""Bad input: every mistake gets an error that names the argument, its value and the remedy."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from llave_kernels import (
    HardnessWeightedContrastiveLoss,
    hardness_weighted_contrastive_loss,
    similarity_statistics,
)
from tests.helpers import embeddings

N, M, D = 4, 8, 3
QUERY, TARGET = torch.ones(N, D), torch.ones(M, D)
IDS = {"query_ids": torch.arange(N), "target_ids": torch.arange(M)}

# (exception, part of the message, arguments that replace good ones)
MISTAKES: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "query must be a torch.Tensor, got list", {"query": [[1.0]]}),
    (TypeError, "target must be a torch.Tensor, got NoneType", {"target": None}),
    (ValueError, r"query must have shape \(rows, D\), got \(4,\)", {"query": torch.ones(4)}),
    (ValueError, r"target must have shape .* got \(8, 3, 1\)", {"target": torch.ones(8, 3, 1)}),
    (TypeError, "query must be float32.* got torch.int64", {"query": torch.ones(N, D).long()}),
    (TypeError, "target must be float32.* got torch.bool", {"target": TARGET.bool()}),
    (TypeError, "query must be a dense tensor", {"query": QUERY.to_sparse()}),
    (ValueError, r"query is empty, shape \(0, 3\)", {"query": torch.ones(0, D)}),
    (ValueError, r"target is empty, shape \(8, 0\)", {"target": torch.ones(M, 0)}),
    (ValueError, "same width, got 3 and 5", {"target": torch.ones(M, 5)}),
    (TypeError, "same dtype, got torch.float32 and torch.float64", {"target": TARGET.double()}),
    (ValueError, "target must be on query's device cpu, got meta", {"target": TARGET.to("meta")}),
    (ValueError, "target has 2 rows for 4 queries", {"target": torch.ones(2, D)}),
    (ValueError, "logit_scale must be positive and finite, got 0", {"logit_scale": 0}),
    (ValueError, "logit_scale must be positive .* got -3.0", {"logit_scale": -3.0}),
    (ValueError, "logit_scale must be positive .* got inf", {"logit_scale": float("inf")}),
    (ValueError, "logit_scale must be positive .* got -1.0", {"logit_scale": torch.tensor(-1.0)}),
    (
        ValueError,
        r"logit_scale must be .* one element, got .* \(2,\)",
        {"logit_scale": torch.ones(2)},
    ),
    (TypeError, "logit_scale must be .* got torch.bool", {"logit_scale": torch.tensor(True)}),
    (TypeError, "logit_scale must be a float, got str", {"logit_scale": "50"}),
    (TypeError, "logit_scale must be a float, got bool", {"logit_scale": True}),
    (TypeError, "logit_scale must be a float, got complex", {"logit_scale": 50j}),
    (
        ValueError,
        "logit_scale must be on query's device",
        {"logit_scale": torch.tensor(1.0, device="meta")},
    ),
    (ValueError, "alpha must be >= 0 and finite, got -1", {"alpha": -1}),
    (ValueError, "alpha must be >= 0 and finite, got nan", {"alpha": float("nan")}),
    (TypeError, "alpha must be a float, got str", {"alpha": "9"}),
    (TypeError, "alpha must be a float, got bool", {"alpha": np.True_}),
    (TypeError, "alpha must be a float, got Tensor", {"alpha": torch.ones(2)}),
    (ValueError, "alpha is a constant", {"alpha": torch.tensor(9.0, requires_grad=True)}),
    (ValueError, "target_alpha must be >= 0 and finite, got -0.5", {"target_alpha": -0.5}),
    (TypeError, "target_alpha must be a float, got list", {"target_alpha": [1.0]}),
    (ValueError, "hardness must be one of in_batch, .* got 'hard'", {"hardness": "hard"}),
    (ValueError, "reduction must be one of mean, sum, none, got 'avg'", {"reduction": "avg"}),
    (TypeError, "symmetric must be True or False, got 1", {"symmetric": 1}),
    (ValueError, "backend='cuda0' is not a backend", {"backend": "cuda0"}),
    (TypeError, "labels must be a torch.Tensor, got list", {"labels": [0, 1, 2, 3]}),
    (TypeError, "labels must be an integer tensor, got torch.float32", {"labels": torch.ones(N)}),
    (ValueError, r"labels must have shape \(4,\), got \(3,\)", {"labels": torch.arange(3)}),
    (ValueError, "labels must be columns .* 0 to 7, got .* to 8", {"labels": torch.arange(5, 9)}),
    (ValueError, "got values from -1 to 2", {"labels": torch.arange(-1, 3)}),
    (ValueError, "labels must not repeat", {"labels": torch.tensor([0, 1, 1, 2])}),
    (ValueError, "labels must be on query's device", {"labels": torch.arange(N, device="meta")}),
    (ValueError, r"owners must have shape \(8,\), got \(4,\)", {"owners": torch.arange(N)}),
    (
        ValueError,
        "owners must be columns .* got values from 1 to 8",
        {"owners": torch.arange(1, 9)},
    ),
    (TypeError, "owners must be an integer tensor", {"owners": torch.ones(M, dtype=torch.bool)}),
    (ValueError, "query_ids needs target_ids", {"query_ids": IDS["query_ids"]}),
    (ValueError, "target_ids needs query_ids", {"target_ids": IDS["target_ids"]}),
    (TypeError, "query_ids must be int64", IDS | {"query_ids": torch.arange(N).int()}),
    (TypeError, "target_ids must be an integer", IDS | {"target_ids": torch.ones(M)}),
    (ValueError, r"target_ids must have shape \(8,\)", IDS | {"target_ids": torch.arange(N)}),
    (ValueError, "false_negative_margin must be finite", {"false_negative_margin": float("nan")}),
    (TypeError, "false_negative_margin must be a float", {"false_negative_margin": "0.1"}),
]


@pytest.mark.parametrize(("error", "message", "change"), MISTAKES, ids=lambda v: str(v)[:48])
def test_mistake(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"query": QUERY, "target": TARGET} | change
    with pytest.raises(error, match=message):
        hardness_weighted_contrastive_loss(
            arguments.pop("query"), arguments.pop("target"), **arguments
        )


@pytest.mark.parametrize(
    ("error", "message", "settings"),
    [
        (ValueError, "logit_scale must be positive and finite, got 0", {"logit_scale": 0}),
        (ValueError, "alpha must be >= 0", {"alpha": -9.0}),
        (ValueError, "target_alpha must be >= 0", {"target_alpha": -9.0}),
        (ValueError, "hardness must be one of", {"hardness": ""}),
        (ValueError, "reduction must be one of", {"reduction": None}),
        (TypeError, "learnable must be True or False", {"learnable": "yes"}),
        (
            ValueError,
            "above max_logit_scale=100.0; raise that",
            {"learnable": True, "logit_scale": 101.0},
        ),
        (ValueError, "max_logit_scale must be positive", {"max_logit_scale": -1.0}),
    ],
)
def test_module_refuses_at_construction(
    error: type[Exception], message: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        HardnessWeightedContrastiveLoss(**settings)


SCALARS = [
    np.float32(3.0),
    np.array([3.0]),
    np.float64(3.0),
    np.int64(3),
    np.array(3.0),
    Fraction(3),
    torch.tensor([3.0]),
    torch.tensor(3),
    torch.tensor([[3.0]], dtype=torch.float64),
]


@pytest.mark.parametrize("value", SCALARS, ids=repr)
@pytest.mark.parametrize(
    "name", ["logit_scale", "alpha", "target_alpha", "false_negative_margin", "max_logit_scale"]
)
def test_every_kind_of_number_is_taken(name: str, value: Any) -> None:
    query, target = embeddings(N, M, D)

    def loss(number: Any) -> torch.Tensor:
        module = HardnessWeightedContrastiveLoss(**{name: number})
        assert "3" in repr(module) or name == "max_logit_scale"
        return module(query, target)

    assert torch.equal(loss(value), loss(3.0))
    if name != "max_logit_scale":
        found = hardness_weighted_contrastive_loss(query, target, **{name: value})
        assert torch.equal(found, loss(3.0))


def test_a_scale_of_one_element_keeps_its_graph() -> None:
    scale = torch.tensor([3.0], requires_grad=True)
    hardness_weighted_contrastive_loss(*embeddings(N, M, D), logit_scale=scale).backward()
    assert scale.grad is not None
    assert scale.grad.shape == (1,)
    assert scale.grad != 0


def test_shared_targets_are_fine_in_one_direction() -> None:
    labels = torch.tensor([0, 1, 1, 2])
    value = hardness_weighted_contrastive_loss(QUERY, TARGET, labels=labels, symmetric=False)
    assert value.isfinite()


@pytest.mark.parametrize("bins", [0, -1, 2.5, True])
def test_statistics_refuses_bins(bins: Any) -> None:
    with pytest.raises(ValueError, match="bins must be an integer >= 1"):
        similarity_statistics(QUERY, TARGET, bins=bins)


def test_statistics_takes_numpys_integers() -> None:
    for bins in (np.int64(5), np.array(5), torch.tensor(5), torch.tensor([5])):
        assert len(similarity_statistics(QUERY, TARGET, bins=bins).positive) == 5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_statistics_refuses_what_has_no_bin(value: float) -> None:
    with pytest.raises(ValueError, match=r"of query rows 0 to \d+ are not finite"):
        similarity_statistics(QUERY * value, TARGET)
