"""PyLate's losses and ours, in one process and in two."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from llave_kernels.reference import similarity_loss
from tests.helpers import relative_error
from tests.processes import run

pytest.importorskip("pylate")

from pylate.losses import CachedContrastive, Contrastive

from llave_kernels.integrations import pylate as ours

WORDS, WIDTH = 30, 6
HOSTS = {"Contrastive": Contrastive, "CachedContrastive": CachedContrastive}


class Encoder(nn.Module):
    """A vector for each token. It has what the losses read of PyLate's ``ColBERT``."""

    def __init__(self, expands: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, WIDTH, dtype=torch.float64)
        self.layer = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.skiplist = [3, 5]
        self.do_query_expansion = expands

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"token_embeddings": self.layer(self.words(features["input_ids"]))}


def batch(draw: np.random.Generator, rows: int, columns: int) -> list[dict[str, Tensor]]:
    """A column of queries, one of positives, then mined negatives; (rows, tokens) each."""
    found = []
    for tokens in (3, *[5] * (columns - 1)):
        ids = torch.from_numpy(draw.integers(WORDS, size=(rows, tokens)))
        lengths = torch.from_numpy(draw.integers(1, tokens + 1, size=(rows, 1)))
        mask = (torch.arange(tokens) < lengths).long()
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def drawn(draw: np.random.Generator, name: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "temperature": float(draw.uniform(0.1, 2)),
        "size_average": bool(draw.random() < 0.7),
        "score_mini_batch_size": [None, 1, 2, 3][draw.integers(4)],
    }
    return settings | ({"mini_batch_size": 2} if name == "CachedContrastive" else {})


def value_and_gradients(
    loss_fn: nn.Module, features: list[dict[str, Tensor]], *, averages: bool = False
) -> list[Tensor]:
    """[loss, parameters' gradients], averaged over processes where asked, as DDP does."""
    loss_fn.zero_grad()
    loss = loss_fn(features)
    loss.backward()
    found = [loss.detach().double(), *(p.grad.clone() for p in loss_fn.parameters())]
    for x in found if averages else []:
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return found


def assert_equal(found: list[Tensor], expected: list[Tensor], case: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        # The host adds up the cached loss in float32.
        assert relative_error(a, b) < 1e-9 or float((a - b).norm()) < 1e-12, case


@pytest.mark.parametrize(
    "seeds", [range(30), pytest.param(range(30, 500), marks=pytest.mark.long)], ids=str
)
@pytest.mark.parametrize("name", HOSTS)
def test_value_and_gradients_are_the_hosts(name: str, seeds: range) -> None:
    for seed in seeds:
        draw = np.random.default_rng(seed)
        settings, model = drawn(draw, name), Encoder(bool(draw.random() < 0.5))
        features = batch(draw, int(draw.integers(1, 8)), int(draw.integers(2, 5)))
        expected = value_and_gradients(HOSTS[name](model, **settings), features)
        found = value_and_gradients(getattr(ours, name)(model, **settings), features)
        assert_equal(found, expected, (seed, settings))


@pytest.mark.parametrize("hardness", ["in_batch", "hard_negatives", "all"])
@pytest.mark.parametrize("name", HOSTS)
def test_alpha_weights_the_negatives_of_its_kind(name: str, hardness: str) -> None:
    for seed in range(10):
        draw = np.random.default_rng(seed)
        settings, model = drawn(draw, name) | {"size_average": False}, Encoder(True)
        features = batch(draw, 5, 4)
        query, *documents = (
            nn.functional.normalize(model(f)["token_embeddings"], dim=-1) for f in features
        )
        # (queries, documents, columns, query tokens, document tokens)
        products = torch.einsum("qtd,jcsd->qjcts", query, torch.stack(documents, 1))
        ids = torch.stack([f["input_ids"] for f in features[1:]], 1)
        real = torch.stack([f["attention_mask"] for f in features[1:]], 1).bool()
        real &= ~torch.isin(ids, torch.tensor(model.skiplist))
        scores = (products * real[None, :, :, None]).amax(4).sum(3).flatten(1)
        positives = torch.arange(5) * 3
        loss = similarity_loss(
            scores,
            logit_scale=1 / settings["temperature"],
            alpha=0.7,
            hardness=hardness,
            symmetric=False,
            labels=positives,
            owners=positives.repeat_interleave(3),
            reduction="sum",
        )
        expected = [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
        weights = {"alpha": 0.7, "hardness": hardness}
        found = value_and_gradients(getattr(ours, name)(model, **settings, **weights), features)
        assert_equal(found, expected, (seed, settings))


def gathered_steps() -> list[tuple[list[Tensor], list[Tensor]]]:
    """In one of several processes: what the host's classes and ours give."""
    steps = []
    for name, host in HOSTS.items():
        draw = np.random.default_rng(dist.get_rank())
        model, features = Encoder(False), batch(draw, 4, 3)
        settings = {"gather_across_devices": True, "temperature": 0.5}
        classes = (host, getattr(ours, name))
        made = [
            value_and_gradients(kind(model, **settings), features, averages=True)
            for kind in classes
        ]
        steps.append((made[0], made[1]))
    return steps


@pytest.mark.long
def test_two_processes_give_the_hosts_gradients() -> None:
    for steps in run(__name__, "gathered_steps", 2):
        for expected, found in steps:
            assert_equal(found, expected, "two processes")


def test_misuse() -> None:
    for name in HOSTS:
        with pytest.raises(ValueError, match=r"alpha must be >= 0 and finite, got -1"):
            getattr(ours, name)(Encoder(True), alpha=-1.0)
        with pytest.raises(ValueError, match=r"hardness must be one of .*, got 'easy'"):
            getattr(ours, name)(Encoder(True), hardness="easy")
