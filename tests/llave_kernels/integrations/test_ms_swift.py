"""ms-swift's InfoNCE loss and ours, in one process and in two."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.nn.functional import normalize

from llave_kernels.reference import similarity_loss
from tests.helpers import relative_error
from tests.processes import run

pytest.importorskip("swift")

from swift.loss import embedding, loss_map
from swift.sequence_parallel import sequence_parallel

from llave_kernels.integrations.ms_swift import InfonceLoss

HOST = (None, SimpleNamespace())  # what the host passes: arguments and trainer


def drawn(draw: np.random.Generator) -> dict[str, str]:
    """Environment variables of the host."""
    settings = {
        "INFONCE_TEMPERATURE": str(draw.uniform(0.02, 1)),
        "INFONCE_USE_BATCH": str(draw.random() < 0.8),
        "INFONCE_HARD_NEGATIVES": str(draw.integers(1, 4)),
        "INFONCE_MASK_FAKE_NEGATIVE": str(draw.random() < 0.4),
        "INFONCE_FAKE_NEG_MARGIN": str(draw.uniform(0, 0.5)),
        "INFONCE_INCLUDE_QQ": str(draw.random() < 0.5),
        "INFONCE_INCLUDE_DD": str(draw.random() < 0.5),
    }
    found = {name: value for name, value in settings.items() if draw.random() < 0.6}
    if found.get("INFONCE_INCLUDE_DD") == "True":
        found.pop("INFONCE_MASK_FAKE_NEGATIVE", None)
    return found


def batch(draw: np.random.Generator, *, even: bool) -> tuple[Tensor, Tensor]:
    """(rows, D) embeddings of queries, positives and negatives in turn, and the host's labels."""
    samples, width = int(draw.integers(1, 8)), int(draw.integers(1, 4))
    negatives = [width if even else int(draw.integers(1, 5)) for _ in range(samples)]
    labels = [x for count in negatives for x in (1, *[0] * count)]
    rows = torch.from_numpy(draw.standard_normal((len(labels) + samples, 7)) + 0.4)
    return normalize(rows, dim=1).requires_grad_(), torch.tensor(labels)


def value_and_gradient(loss_fn: Any, rows: Tensor, labels: Tensor) -> list[Tensor]:
    np.random.seed(0)  # the host draws negatives where a sample has too few
    loss = loss_fn({"last_hidden_state": rows}, labels)
    return [loss.detach(), *torch.autograd.grad(loss, rows)]


def assert_equal(found: list[Tensor], expected: list[Tensor], case: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-9 or float((a - b).norm()) < 1e-12, case


@pytest.mark.parametrize(
    "seeds", [range(100), pytest.param(range(100, 1000), marks=pytest.mark.long)], ids=str
)
def test_value_and_gradient_are_the_hosts(seeds: range, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in seeds:
        draw = np.random.default_rng(seed)
        settings, case = drawn(draw), batch(draw, even=draw.random() < 0.5)
        with monkeypatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            expected = value_and_gradient(embedding.InfonceLoss(*HOST), *case)
            found = value_and_gradient(InfonceLoss(*HOST), *case)
        assert_equal(found, expected, (seed, settings))


@pytest.mark.parametrize("masks", [False, True])
def test_alpha_weights_in_batch_negatives(masks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFONCE_MASK_FAKE_NEGATIVE", str(masks))
    for seed in range(20):
        rows, labels = batch(np.random.default_rng(seed), even=False)
        positives = labels.nonzero()[:, 0]
        queries = positives + torch.arange(len(positives))
        documents = torch.ones(len(rows), dtype=torch.bool).index_fill(0, queries, False)
        loss = similarity_loss(
            rows[queries] @ rows[documents].T,
            logit_scale=10.0,
            alpha=9.0,
            symmetric=False,
            labels=positives,
            owners=range(len(labels)) if masks else positives[labels.cumsum(0) - 1],
            false_negative_margin=0.1 if masks else None,
        )
        expected = [loss.detach(), *torch.autograd.grad(loss, rows)]
        assert_equal(
            value_and_gradient(InfonceLoss(*HOST, alpha=9.0), rows, labels), expected, seed
        )


def gathered_steps() -> list[list[Tensor]]:
    """In one of several processes: the host's and our value and gradient of a layer, averaged."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # unused: the group is there
    PartialState(cpu=True)  # what the trainer makes, and the host gathers by
    rows, labels = batch(np.random.default_rng(10), even=True)
    rows = rows.detach() + dist.get_rank()
    layer = torch.eye(7, dtype=torch.float64).requires_grad_()
    steps = []
    os.environ |= {"INFONCE_INCLUDE_QQ": "true", "INFONCE_INCLUDE_DD": "true"}
    for kind in (embedding.InfonceLoss, InfonceLoss):
        loss = kind(*HOST)({"last_hidden_state": normalize(rows @ layer, dim=1)}, labels)
        found = [loss.detach(), *torch.autograd.grad(loss, layer)]
        for x in found:
            dist.all_reduce(x)
            x /= dist.get_world_size()
        steps.append(found)
    return steps


@pytest.mark.long
def test_two_processes_give_the_hosts_averages() -> None:
    for expected, found in run(__name__, "gathered_steps", 2):
        assert_equal(found, expected, "two processes")


def test_misuse(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"alpha must be >= 0 and finite, got -1"):
        InfonceLoss(*HOST, alpha=-1.0)
    rows, labels = batch(np.random.default_rng(0), even=True)
    with monkeypatch.context() as patch:
        for name in ("INFONCE_INCLUDE_DD", "INFONCE_MASK_FAKE_NEGATIVE"):
            patch.setenv(name, "true")
        with pytest.raises(ValueError, match="INFONCE_INCLUDE_DD is not supported with"):
            value_and_gradient(InfonceLoss(*HOST), rows, labels)
    monkeypatch.setattr(type(sequence_parallel), "dp_group", object())
    with pytest.raises(ValueError, match="sequence parallelism are not supported"):
        value_and_gradient(InfonceLoss(*HOST), rows, labels)


def test_the_registry_takes_it() -> None:
    assert loss_map["infonce"] is embedding.InfonceLoss
    assert isinstance(InfonceLoss(*HOST), loss_map["infonce"])
