"""Bad input: every error names the argument, its value and the remedy."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llave_kernels import (
    HardnessWeightedContrastiveLoss,
    RuleArguments,
    SupervisedContrastiveLoss,
    contrastive_logsumexp,
    hardness_weighted_contrastive_loss,
    scores,
    similarity_statistics,
)
from llave_kernels.integrations import gradcache, tevatron, vlm2vec
from llave_kernels.integrations.llave_trainer import WeightedClipLoss
from llave_kernels.reference import reference_loss
from tests.helpers import embeddings, relative_error

N, M, D = 4, 8, 3
QUERY, TARGET = torch.ones(N, D), torch.ones(M, D)
IDS = {"query_ids": torch.arange(N), "target_ids": torch.arange(M)}

# (exception, part of the message, the wrong arguments)
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
    # The scale is checked in float32, as it will be used.
    (ValueError, "logit_scale must be positive and finite, got 1e.39", {"logit_scale": 1e39}),
    (ValueError, "logit_scale .* got 1e-50 in torch.float32", {"logit_scale": 1e-50}),
    (
        ValueError,
        "logit_scale must be positive and finite, got 1e.39",
        {"logit_scale": torch.tensor(1e39, dtype=torch.float64)},
    ),
    (ValueError, "alpha must be >= 0 and finite, got 1e.39", {"alpha": 1e39}),
    (ValueError, r"alpha must be >= 0 and finite, got 10+\.\.\.", {"alpha": 10**400}),
    (ValueError, "target_alpha .* got Fraction", {"target_alpha": Fraction(10**400)}),
    (ValueError, "false_negative_margin .* got -1e.39", {"false_negative_margin": -1e39}),
    (ValueError, r"logit_scale \+ alpha must be finite", {"logit_scale": 3e38, "alpha": 3e38}),
    (TypeError, "query must be a dense tensor", {"query": torch.nested.nested_tensor([QUERY])}),
    (TypeError, "query must be float32.* got torch.complex64", {"query": QUERY + 0j}),
    (TypeError, "labels must be a dense tensor", {"labels": torch.arange(N).to_sparse()}),
    (
        TypeError,
        r"query must be a plain torch.Tensor, got MaskedTensor; pass query.get_data\(\)",
        {"query": torch.masked.masked_tensor(QUERY, QUERY > 0)},
    ),
    (ValueError, "reduction must be one of .* got array", {"reduction": np.array(["mean"])}),
    (ValueError, "backend=None is not a backend", {"backend": None}),
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
        (ValueError, "backend='cuda0' is not a backend", {"backend": "cuda0"}),
        (
            TypeError,
            "gather_group must be a process .* got int -100",
            {"gather_group": -100},
        ),
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
    Decimal(3),
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


def test_wide_numbers_are_taken_where_sums_are_wide() -> None:
    pair = embeddings(N, M, D, torch.float64)
    settings = {"logit_scale": 1e39, "alpha": 1e-50}
    found = hardness_weighted_contrastive_loss(*pair, **settings)
    assert relative_error(found, reference_loss(*pair, **settings)) < 1e-12


@pytest.mark.parametrize("size", [1e19, 1e30, 1e37])
@pytest.mark.parametrize("symmetric", [True, False])
def test_products_beyond_the_range_are_never_a_finite_loss(size: float, symmetric: bool) -> None:
    query, target = embeddings(N, N, D)
    loss = hardness_weighted_contrastive_loss(query * size, target * size, symmetric=symmetric)
    assert not loss.isfinite()


def test_autocast_takes_no_dtype_that_is_refused_without() -> None:
    for other in (torch.int64, torch.complex64, torch.bool):
        pair = [x.to(other) for x in embeddings(N, M, D)]
        with torch.autocast("cpu"), pytest.raises(TypeError, match="query must be float32"):
            hardness_weighted_contrastive_loss(*pair)


class Odd:
    """An object whose comparisons return no bool."""

    def __eq__(self, other: object) -> Any:
        return np.array([True, True])

    __hash__ = None  # type: ignore[assignment]


ANYTHING: list[Any] = [
    "3", b"3", "", object(), Odd(), [3.0], (3,), {}, {3.0}, 3j, math.nan, -math.inf, math.inf, -1,
    -1e39, 1e39, 10**400, -(10**400), Fraction(-(10**400)), Decimal("sNaN"), Decimal("-Infinity"),
    np.array(["3"]), np.array("3"), np.array([None]), np.zeros(0), np.ones(2), np.ma.masked,
    np.datetime64("2020"), np.complex64(1j), torch.ones(2), torch.ones(0), torch.tensor(3j),
    torch.ones(1).to_sparse(), torch.ones(2, 2).to_sparse_csr(),
    torch.nested.nested_tensor([torch.ones(1)]), torch.tensor(3.0, device="meta"),
    torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged), torch.tensor([True]),
    torch.masked.masked_tensor(torch.ones(1), torch.ones(1) > 0), torch.float32, SimpleNamespace(),
    torch.arange(N)[::2], torch.arange(N).float(), torch.full((N,), -1), torch.arange(M) + 2**40,
]  # fmt: skip
NUMBER = [x for x in SCALARS if not isinstance(x, np.int64)]
GOOD: dict[str, list[tuple[Any, Any]]] = {  # (unusual value, the reference's value)
    "logit_scale": [(x, 3.0) for x in NUMBER] + [(torch.tensor([3.0], requires_grad=True), 3.0)],
    "alpha": [(x, 3.0) for x in NUMBER] + [(0, 0.0), (1e-50, 0.0)],
    "target_alpha": [(x, 3.0) for x in NUMBER] + [(None, None)],
    "false_negative_margin": [(x, 3.0) for x in NUMBER] + [(None, None), (-2, -2.0), (1e38, 1e38)],
    "hardness": [(np.str_("all"), "all"), ("in_batch", "in_batch")],
    "symmetric": [(np.True_, True), (np.False_, False), (True, True)],
    "reduction": [(np.str_("sum"), "sum"), ("mean", "mean"), ("none", "none")],
    "backend": [("torch", None), (np.str_("auto"), None)],
    "labels": [(x, x.long()) for x in (torch.arange(N).to(torch.uint8), torch.arange(M)[1::2])],
    "owners": [((torch.arange(M) % N).to(torch.int16), torch.arange(M) % N)],
}


def arguments_of(draw: random.Random) -> tuple[dict[str, Any], dict[str, Any], set[str]]:
    """The arguments of a call, those of the reference, and the names of the wrong ones."""
    given, plain, wrong = {}, {}, set()
    for name in draw.sample(sorted(GOOD), draw.randint(1, 4)):
        if draw.random() < 0.3:
            given[name] = draw.choice(ANYTHING)
            if isinstance(given[name], int) and (name, given[name]) in TAKEN:
                given[name] = "3"
            wrong.add(name)
        else:
            given[name], expected = draw.choice(GOOD[name])
            if name != "backend":
                plain[name] = expected
    return given, plain, wrong


@pytest.mark.parametrize("seed", range(4))
def test_random_calls_are_right_or_name_what_is_wrong(seed: int) -> None:
    draw = random.Random(seed)
    query, target = embeddings(N, M, D)
    for _ in range(400):
        given, plain, wrong = arguments_of(draw)
        call = partial(hardness_weighted_contrastive_loss, query, target, **given)
        if not wrong:
            truth = reference_loss(query.double(), target.double(), **plain)
            assert relative_error(call(), truth) < 1e-5, given
            continue
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        assert any(name in str(error.value) for name in wrong), given


def open_clip(**settings: Any) -> Any:
    return pytest.importorskip("llave_kernels.integrations.open_clip").ClipLoss(**settings)


def metric_learning(**settings: Any) -> Any:
    return pytest.importorskip("llave_kernels.integrations.metric_learning").NTXentLoss(**settings)


def ranking(kind: str, **settings: Any) -> Any:
    module = pytest.importorskip("llave_kernels.integrations.sentence_transformers")
    return getattr(module, kind)(torch.nn.Sequential(torch.nn.Identity()), **settings)


BLOCKS = "temperature alpha target_alpha hardness symmetric false_negative_margin backend"
RANKING = (
    "scale similarity_fct directions gather_across_devices partition_mode hardness_mode "
    "hardness_strength target_hardness_strength false_negative_margin backend"
)
CONSTRUCTORS: list[tuple[Callable[..., Any], str]] = [
    (
        HardnessWeightedContrastiveLoss,
        "logit_scale alpha hardness symmetric target_alpha false_negative_margin reduction backend "
        "learnable max_logit_scale gather_group",
    ),
    (
        SupervisedContrastiveLoss,
        "logit_scale alpha denominator symmetric reduction backend learnable max_logit_scale "
        "gather_group",
    ),
    (gradcache.SimpleContrastiveLoss, "n_hard_negatives " + BLOCKS),
    (tevatron.SimpleContrastiveLoss, BLOCKS),
    (vlm2vec.SimpleContrastiveLoss, BLOCKS),
    (WeightedClipLoss, "local_loss gather_with_grad rank world_size backend"),
    (open_clip, "local_loss gather_with_grad rank world_size alpha backend"),
    (metric_learning, "temperature alpha backend"),
    (
        partial(scores.CrossEntropyLoss, 0.1),
        "temperature alpha hardness false_negative_margin",
    ),
    (partial(ranking, "MultipleNegativesRankingLoss"), RANKING),
    (partial(ranking, "CachedMultipleNegativesRankingLoss"), RANKING + " mini_batch_size"),
]


# These values are valid. The sizes are only checked later, in the call.
TAKEN = {("false_negative_margin", -1)} | {
    (name, 10**400) for name in ("n_hard_negatives", "rank", "world_size", "mini_batch_size")
}


@pytest.mark.parametrize(("build", "names"), CONSTRUCTORS, ids=map(str, range(len(CONSTRUCTORS))))
def test_every_constructor_names_what_is_wrong(build: Callable[..., Any], names: str) -> None:
    for name in names.split():
        for value in ANYTHING:
            if isinstance(value, int) and (name, value) in TAKEN:
                continue
            with pytest.raises((TypeError, ValueError)) as error:
                build(**{name: value})
            assert name in str(error.value).lower(), (name, value, error.value)


@pytest.mark.parametrize(
    "build", [build for build, _ in CONSTRUCTORS], ids=range(len(CONSTRUCTORS))
)
def test_every_constructor_refuses_an_unknown_name(build: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'strength'"):
        build(strength=1.0)


@pytest.mark.parametrize(
    "loss", [hardness_weighted_contrastive_loss, contrastive_logsumexp], ids=lambda f: f.__name__
)
def test_signatures_show_the_rules_and_an_unknown_name_is_an_error(loss: Any) -> None:
    parameters = inspect.signature(loss).parameters
    assert set(RuleArguments.__annotations__) < set(parameters)
    assert parameters["alpha"].default == 9.0
    with pytest.raises(TypeError, match="unexpected keyword argument 'lables'; the rules are"):
        loss(torch.ones(2, 2), torch.ones(2, 2), lables=torch.arange(2))
