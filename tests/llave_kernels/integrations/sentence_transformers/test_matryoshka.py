"""Our MatryoshkaLoss against the host's own around the host's ranking losses."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("sentence_transformers")

from sentence_transformers import util
from sentence_transformers.sentence_transformer import losses as host

from llave_kernels.integrations import sentence_transformers as ours
from tests.llave_kernels.integrations.sentence_transformers.twins import (
    ROWS,
    TWINS,
    WIDTH,
    assert_equal,
    batch,
    encoder,
    settings,
    step,
)
from tests.processes import run

HOST = "sentence_transformers.sentence_transformer.losses.matryoshka"
DIMS, WEIGHTS = [3, 12, 8, 5], [1.0, 0.5, 0.0, 2]
DIRECTIONS = [
    (("query_to_doc",), "joint"),
    (("query_to_doc", "doc_to_query"), "per_direction"),
    (("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc"), "joint"),
]


def wrapped(module: Any, model: Any, name: str, *dims: Any, **arguments: Any) -> Any:
    return module.MatryoshkaLoss(model, getattr(module, name)(model, **arguments), *dims)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the host's loop ran")


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize(("directions", "partition"), DIRECTIONS)
def test_every_setting_equals_the_host(
    name: str, directions: tuple[str, ...], partition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    similarities = ((util.cos_sim, 20.0), (util.dot_score, 3.0))
    modes = (None, "in_batch_negatives", "hard_negatives", "all_negatives")
    for mode, negatives, (similarity, scale) in itertools.product(modes, range(2), similarities):
        arguments = settings(directions, partition, mode)
        arguments |= {"scale": scale, "similarity_fct": similarity}
        if name.startswith("Cached"):
            arguments["mini_batch_size"] = 3
        features = batch(2 + negatives)
        expected = step(wrapped(host, encoder(), name, DIMS, WEIGHTS, **arguments), features)
        loss = wrapped(ours, encoder(), name, DIMS, WEIGHTS, **arguments)
        with monkeypatch.context() as patch:  # one call for all dims
            patch.setattr(HOST + ".shrink", never)
            found = step(loss, features)
        assert_equal(found, expected, 1e-5, (arguments, negatives))


@pytest.mark.parametrize("name", TWINS)
def test_a_random_choice_of_dims_equals_the_host(name: str) -> None:
    losses = [wrapped(module, encoder(), name, DIMS, WEIGHTS, 2) for module in (host, ours)]
    seen = set()
    for seed in range(6):
        steps = []
        for loss in losses:
            random.seed(seed)
            steps.append(step(loss, batch(3)))
        assert_equal(steps[1], steps[0], 1e-5, seed)
        seen.add(float(steps[0][0]))
    assert len(seen) > 1


@pytest.mark.parametrize("name", TWINS)
def test_dims_that_end_before_the_last_column(name: str) -> None:
    """Columns beyond the longest dim get no gradient. A dim of 1 has only signs to compare."""
    both = [
        step(wrapped(module, encoder().double(), name, (1, 2, 7), None), batch(3, rows))
        for module, rows in itertools.product((host, ours), (1, ROWS))
    ]
    for expected, found in zip(both[:2], both[2:], strict=True):
        assert_equal(found, expected, 1e-8, name)
    assert not found[-1][7:].any()


@pytest.mark.filterwarnings("ignore:.*neither cosine")
@pytest.mark.parametrize("name", TWINS)
def test_other_losses_are_computed_by_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A similarity that is not fused, a subclass of our loss, and a loss of the host."""

    class Halved(ours.MultipleNegativesRankingLoss):
        def compute_loss_from_embeddings(self, *args: Any) -> Tensor:
            return super().compute_loss_from_embeddings(*args) / 2

    monkeypatch.setattr(ours.MultipleNegativesRankingLoss, "over_prefixes", never)
    other = {"similarity_fct": util.manhattan_sim, "scale": 2.0}
    expected = step(wrapped(host, encoder(), name, DIMS, None, **other), batch(3))
    assert_equal(
        step(wrapped(ours, encoder(), name, DIMS, None, **other), batch(3)), expected, 1e-6, name
    )
    expected = step(wrapped(host, encoder(), name, DIMS), batch(3))
    model = encoder()
    inner = getattr(host, name)(model)
    assert_equal(step(ours.MatryoshkaLoss(model, inner, DIMS), batch(3)), expected, 1e-6, name)
    half = step(ours.MatryoshkaLoss(model := encoder(), Halved(model), DIMS), batch(3))
    assert_equal([2 * x for x in half], expected, 1e-5, name)


@pytest.mark.parametrize("name", TWINS)
def test_model_card_entries_and_the_loss_inside(name: str) -> None:
    theirs, loss = (wrapped(module, encoder(), name, DIMS, WEIGHTS) for module in (host, ours))
    assert loss.get_config_dict() == theirs.get_config_dict()
    assert loss.citation == theirs.citation
    plain = step(getattr(ours, name)(encoder()), batch(2))
    step(loss, batch(2))
    if name == TWINS[0]:  # a cached loss keeps the host's decorator
        assert_equal(step(loss.loss, batch(2)), plain, 1e-6, name)


@pytest.mark.parametrize(
    ("dims", "more", "error", "message"),
    [
        ([], [], ValueError, "matryoshka_dims must be different lengths, got"),
        ([4, 4], [], ValueError, "matryoshka_dims must be different lengths, got"),
        ([4, 0], [], ValueError, r"matryoshka_dims\[1\] must be an integer >= 1, got 0"),
        ([4, WIDTH + 1], [], ValueError, "<= 12, got 13, the width of the embeddings is the most"),
        (8, [], TypeError, "matryoshka_dims must be a list or tuple of numbers, got int 8"),
        ([4, 8], [[1.0]], ValueError, "matryoshka_weights must be 2 finite numbers"),
        ([4, 8], [None, 0.5], ValueError, "n_dims_per_step must be an integer"),
    ],
)
def test_mistakes_are_refused(
    dims: Any, more: list[Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        step(wrapped(ours, encoder(), TWINS[0], dims, *more), batch(2))


def gathered() -> list[tuple[Any, list[Tensor], list[Tensor]]]:
    """(case, the host's step, ours) of every partition in each process."""
    rank = torch.distributed.get_rank()
    features = [{"input_ids": x["input_ids"][rank * 2 : rank * 2 + 2]} for x in batch(3, rows=4)]
    results = []
    for name, (directions, partition) in itertools.product(TWINS, DIRECTIONS):
        arguments = settings(directions, partition, "all_negatives")
        losses = (
            wrapped(module, encoder(), name, DIMS, WEIGHTS, gather_across_devices=True, **arguments)
            for module in (host, ours)
        )
        results.append(((name, directions), *(step(loss, features) for loss in losses)))
    return results


@pytest.mark.long
def test_gathered_across_processes() -> None:
    for found in run(__name__, "gathered", 2):
        for case, expected, value in found:
            assert_equal(value, expected, 1e-5, case)


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.long)])
def test_random_settings_equal_the_host(count: int) -> None:
    generator = random.Random(count)
    for _ in range(count):
        directions, partition = generator.choice(DIRECTIONS)
        arguments = settings(directions, partition, generator.choice([None, "all_negatives"]))
        arguments["scale"] = generator.choice([1.0, 20.0, 50.0])
        dims = generator.sample(range(2, WIDTH + 1), generator.randint(1, 5))
        weights = [generator.choice([0.0, 0.5, 1, 3.0]) for _ in dims]
        features = batch(generator.randint(2, 4), generator.randint(2, 9))
        model = encoder().double()
        expected, found = (
            step(wrapped(module, model, TWINS[0], dims, weights, **arguments), features)
            for module in (host, ours)
        )
        assert_equal(found, expected, 1e-9, (dims, weights, arguments))
