"""Our twins of sentence-transformers' losses against the host's own, for every setting."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sentence_transformers")

from sentence_transformers import util
from sentence_transformers.sentence_transformer import losses as host

from llave_kernels.integrations import sentence_transformers as ours
from llave_kernels.reference import reference_logsumexp, reference_loss
from tests.helpers import relative_error
from tests.llave_kernels.integrations.sentence_transformers.twins import (
    TWINS,
    assert_equal,
    batch,
    compare,
    encoder,
    settings,
    step,
)
from tests.processes import run

OTHERS = ("query_to_query", "doc_to_query", "doc_to_doc")
PARTITIONS = [
    (("query_to_doc", *others), "joint")
    for k in range(4)
    for others in itertools.combinations(OTHERS, k)
]
PARTITIONS += [
    (("query_to_doc",), "per_direction"),
    (("query_to_doc", "doc_to_query"), "per_direction"),
]
HARDNESS = (None, "in_batch_negatives", "hard_negatives", "all_negatives")
EXTRAS = {
    "directions": ("query_to_doc", "doc_to_query"),
    "hardness_mode": "all_negatives",
    "hardness_strength": 5.0,
    "target_hardness_strength": 4.0,
    "false_negative_margin": 0.1,
}


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize(("directions", "partition"), PARTITIONS)
def test_every_setting_equals_the_host(
    name: str, directions: tuple[str, ...], partition: str
) -> None:
    model = encoder()
    similarities = ((util.cos_sim, 20.0), (util.dot_score, 3.0))
    for mode, negatives, (similarity, scale) in itertools.product(HARDNESS, range(3), similarities):
        arguments = settings(directions, partition, mode)
        arguments |= {"scale": scale, "similarity_fct": similarity}
        if name.startswith("Cached"):
            arguments["mini_batch_size"] = 3
        compare(name, model, batch(2 + negatives), **arguments)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize(("directions", "partition"), PARTITIONS)
def test_double_precision_and_a_batch_of_one(
    directions: tuple[str, ...], partition: str, rows: int
) -> None:
    """A single row's loss is small, and the host has few digits of it in float32."""
    arguments = settings(directions, partition, "all_negatives")
    for negatives in range(2):
        features = batch(2 + negatives, rows)
        compare(TWINS[0], encoder().double(), features, 1e-7 if rows == 1 else 1e-12, **arguments)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("similarity", [util.cos_sim, util.dot_score])
@pytest.mark.parametrize(("directions", "partition"), PARTITIONS[::3])
def test_bfloat16_is_not_worse_than_the_host(
    directions: tuple[str, ...], partition: str, similarity: Any, autocast: bool
) -> None:
    """Embeddings in bfloat16, or float32 ones under autocast."""
    dtype = torch.float32 if autocast else torch.bfloat16
    arguments = settings(directions, partition, "in_batch_negatives")
    arguments |= {"similarity_fct": similarity, "scale": 20.0 if similarity == util.cos_sim else 1}

    def run_loss(module: Any, embeddings: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        loss = module.MultipleNegativesRankingLoss(encoder(), **arguments)
        leaves = [x.to(dtype).requires_grad_() for x in embeddings]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype != torch.float64):
            value = loss.compute_loss_from_embeddings(leaves, None)
        value.backward()
        return [value.detach(), *(x.grad for x in leaves)]

    # There are several batches: a single loss can be right by luck.
    errors = torch.zeros(2, 4)
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        embeddings = [torch.randn(32, 24, generator=generator).to(dtype) for _ in range(3)]
        truth = run_loss(host, embeddings, torch.float64)
        for error, module in zip(errors, (ours, host), strict=True):
            values = run_loss(module, embeddings, dtype)
            pairs = zip(values, truth, strict=True)
            error += torch.tensor([relative_error(a, b) for a, b in pairs])
    assert (errors[0] <= 1.1 * errors[1] + 1e-6).all(), errors


@pytest.mark.parametrize("partition", ["joint", "per_direction"])
@pytest.mark.parametrize("name", TWINS)
def test_what_the_host_lacks_equals_the_reference(name: str, partition: str) -> None:
    model, features = encoder().double(), batch(3)
    loss = getattr(ours, name)(model, partition_mode=partition, backend="torch", **EXTRAS)
    found = step(loss, features)
    rows = [nn.functional.normalize(model(x)["sentence_embedding"], dim=1) for x in features]
    rules: dict[str, Any] = {"logit_scale": 20.0, "alpha": 5.0, "target_alpha": 4.0}
    rules |= {"false_negative_margin": 0.1, "hardness": "all"}
    if partition == "per_direction":
        expected = reference_loss(rows[0], torch.cat(rows[1:]), **rules)
    else:
        p, n, back = reference_logsumexp(rows[0], torch.cat(rows[1:]), **rules)
        assert back is not None
        expected = (torch.stack([p, p, n, back[: len(p)]]).logsumexp(0) - p).mean()
    model.zero_grad()
    expected.backward()
    gradients = [x.grad for x in model.parameters()]
    assert_equal(found, [expected.detach(), *gradients], 1e-9, partition)


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize(
    "number", [np.float32(3), np.float64(3), np.int64(3), torch.tensor(3.0), torch.tensor([3.0])]
)
def test_every_kind_of_number_is_taken(number: Any, name: str) -> None:
    model, features = encoder(), batch(3)
    arguments = {"scale": number, "hardness_mode": "all_negatives", "hardness_strength": number}
    compare(name, model, features, **arguments)
    own = {"target_hardness_strength": number, "false_negative_margin": number / 30}
    directions = ("query_to_doc", "doc_to_query")
    found, expected = (
        step(getattr(ours, name)(model, directions=directions, **arguments | x), features)
        for x in (own, {"target_hardness_strength": 3.0, "false_negative_margin": 0.1})
    )
    assert_equal(found, expected, 1e-6, number)


@pytest.mark.parametrize("name", TWINS)
def test_matryoshka_equals_the_host(name: str) -> None:
    results = []
    for module in (host, ours):
        model = encoder()
        inner = getattr(module, name)(model, hardness_mode="all_negatives", hardness_strength=5.0)
        wrapped = host.MatryoshkaLoss(model, inner, [12, 8, 4], [1.0, 0.5, 0.25])
        results.append(step(wrapped, batch(3)))
    assert_equal(results[1], results[0], 1e-5, name)


@pytest.mark.parametrize("name", TWINS)
def test_other_similarities_are_the_hosts_with_one_warning(name: str) -> None:
    model, features = encoder(), batch(2)
    arguments = {"similarity_fct": util.euclidean_sim, "scale": 2.0}
    expected = step(getattr(host, name)(model, **arguments), features)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = getattr(ours, name)(model, **arguments)
        found = [step(loss, features) for _ in range(2)][-1]
    assert sum("neither cosine" in str(x.message) for x in caught) == 1
    assert_equal(found, expected, 1e-6, name)


@pytest.mark.filterwarnings("ignore:.*neither cosine")
@pytest.mark.parametrize("kind", ["cosine", "dot", "euclidean"])
def test_the_models_own_similarity_is_recognised(kind: str) -> None:
    model = encoder()
    model.similarity_fn_name = kind
    loss = ours.MultipleNegativesRankingLoss(model, similarity_fct=model.similarity)
    assert loss.fuses() == (kind != "euclidean")
    compare(TWINS[0], model, batch(3), scale=2.0, similarity_fct=model.similarity)


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0.0}, "Scale"),
        ({"target_hardness_strength": 2.0}, "no effect"),
        ({"target_hardness_strength": -2.0}, ">= 0"),
        ({"false_negative_margin": float("nan")}, "finite"),
        ({"false_negative_margin": 0.1, "similarity_fct": util.manhattan_sim}, "cos_sim"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(ours, name)(encoder(), **arguments)


def test_columns_of_unequal_length_are_refused() -> None:
    loss = ours.MultipleNegativesRankingLoss(encoder())
    for features in (batch(1), batch(2) + batch(1, rows=3)):
        with pytest.raises(ValueError, match="2 or more columns of equal shape"):
            step(loss, features)


def test_model_card_entries() -> None:
    for name in TWINS:
        model = encoder()
        theirs = getattr(host, name)(model, scale=50.0)
        loss = getattr(ours, name)(model, scale=50.0)
        assert loss.get_config_dict() == theirs.get_config_dict()
        own: dict[str, Any] = {"false_negative_margin": 0.1, "backend": "torch"}
        loss = getattr(ours, name)(model, scale=50.0, **own)
        assert loss.get_config_dict() == theirs.get_config_dict() | own
        assert "2503.04812" in loss.citation
        assert theirs.citation in loss.citation
        assert isinstance(loss, getattr(host, name))
        assert loss.temperature == theirs.temperature


def gathered() -> tuple[list[Any], list[list[Tensor]]]:
    """(case, the host's step, ours) of every partition in each process, and ours with extras."""
    rank = torch.distributed.get_rank()
    features = [{"input_ids": x["input_ids"][rank * 2 : rank * 2 + 2]} for x in batch(3, rows=8)]

    def one(module: Any, name: str, arguments: dict[str, Any]) -> list[Tensor]:
        return step(
            getattr(module, name)(encoder(), gather_across_devices=True, **arguments), features
        )

    results = []
    for name, (directions, partition), mode in itertools.product(TWINS, PARTITIONS, HARDNESS[1:3]):
        arguments = settings(directions, partition, mode)
        case = (name, directions, partition, mode)
        results.append((case, *(one(module, name, arguments) for module in (host, ours))))
    return results, [one(ours, name, EXTRAS) for name in TWINS]


@pytest.mark.long
def test_gathered_across_processes() -> None:
    """Each process's value and gradients are the host's.

    With our own settings, their average is that of one process with all rows.
    """
    by_rank = run(__name__, "gathered", 4)
    for found, _ in by_rank:
        for case, expected, value in found:
            assert_equal(value, expected, 1e-5, case)
    for name, *parts in zip(TWINS, *(extras for _, extras in by_rank), strict=True):
        whole = step(getattr(ours, name)(encoder(), **EXTRAS), batch(3, rows=8))
        average = [sum(each) / 4 for each in zip(*parts, strict=True)]
        assert_equal(average, whole, 1e-5, name)


@pytest.mark.parametrize("name", TWINS)
def test_gathering_in_one_process_equals_the_host(name: str) -> None:
    compare(name, encoder(), batch(3), gather_across_devices=True)
