"""The trainer's losses: values, ids, gradient caching."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sentence_transformers")

import torch.distributed as dist
from sentence_transformers import SentenceTransformer

from llave.losses import CachedLLaVELoss, LLaVELoss
from llave_kernels.reference import reference_loss
from tests.helpers import relative_error
from tests.processes import run


class Embedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 8)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return features | {"sentence_embedding": self.table(features["input_ids"]).mean(1)}


def fresh() -> SentenceTransformer:
    torch.manual_seed(0)
    return SentenceTransformer(modules=[Embedder()], device="cpu")


@pytest.fixture
def model() -> SentenceTransformer:
    return fresh()


def columns(count: int, n: int = 10) -> list[dict[str, Tensor]]:
    return [
        {"input_ids": torch.randint(64, (n, 4)), "attention_mask": torch.ones(n, 4).long()}
        for _ in range(count)
    ]


def gradients(model: SentenceTransformer, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return model[0].table.weight.grad.clone()


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("with_ids", [True, False])
def test_both_losses_are_the_papers(model: SentenceTransformer, count: int, with_ids: bool) -> None:
    features, n = columns(count), 10
    vectors = [nn.functional.normalize(model(f)["sentence_embedding"], dim=1) for f in features]
    target, labels, ids = torch.cat(vectors[1:]), None, {}
    if with_ids:
        labels = torch.randint(6, (n, count - 1))
        labels[3, 1:] = labels[3, 0]  # a row without negatives
        column, row = torch.cartesian_prod(torch.arange(count - 1), torch.arange(n)).unbind(1)
        there = (column == 0) | (labels[row, column] != labels[row, 0])
        ids = {"query_ids": labels[:, 0], "target_ids": labels[row, column][there]}
        ids["owners"] = row[there]
        target = target[there]
    truth = reference_loss(vectors[0], target, alpha=9.0, logit_scale=50.0, **ids)
    expected = gradients(model, truth)
    for loss_fn in (LLaVELoss(model), CachedLLaVELoss(model, mini_batch_size=3)):
        loss = loss_fn([dict(f) for f in features], labels)
        assert relative_error(loss, truth) < 1e-5
        assert relative_error(gradients(model, loss), expected) < 1e-4


def test_settings_reach_the_loss(model: SentenceTransformer) -> None:
    features = columns(2)
    values = {
        float(kind(model, scale=20.0, alpha=alpha)([dict(f) for f in features], None).detach())
        for kind in (LLaVELoss, CachedLLaVELoss)
        for alpha in (0.0, 5.0)
    }
    rounded = {round(value, 4) for value in values}
    assert len(rounded) == 2
    assert LLaVELoss(model).get_config_dict()["hardness_strength"] == 9.0


def test_ids_of_another_shape_are_refused(model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match=r"label has shape \(10, 3\), expected one content id"):
        LLaVELoss(model)(columns(2), torch.zeros(10, 3))


def rows_of(rank: int, count: int) -> list[Tensor]:
    """Loss and gradient of both losses over ``count`` of 12 rows. Row 3 has no mined negatives."""
    whole = fresh()
    features, rows = columns(3, 12), slice(rank * count, (rank + 1) * count)
    labels = torch.randint(6, (12, 2))
    labels[3, 1] = labels[3, 0]
    own = [{name: x[rows] for name, x in column.items()} for column in features]
    found = []
    for loss_fn in (LLaVELoss(whole), CachedLLaVELoss(whole, mini_batch_size=2)):
        loss = loss_fn(own, labels[rows])
        found += [loss.detach(), gradients(whole, loss)]
    return found


def own_rows() -> list[Tensor]:
    return rows_of(dist.get_rank(), 3)


@pytest.mark.long
def test_four_processes_average_to_one() -> None:
    by_rank = run(__name__, "own_rows", 4)
    for parts, expected in zip(zip(*by_rank, strict=True), rows_of(0, 12), strict=True):
        assert relative_error(torch.stack(parts).mean(0), expected) < 1e-5
