"""An encoder, its batches, and the comparison of a host's loss class with ours of that name."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as host
from torch import Tensor, nn

from llave_kernels.integrations import sentence_transformers as ours
from tests.helpers import relative_error

WORDS, WIDTH, ROWS = 40, 12, 7
TWINS = ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss")


class Encoder(nn.Module):
    """The mean of a row's word vectors, plus its images' vectors, through a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        x = self.words(features["input_ids"]).mean(1)
        if "pixel_values" in features:
            counts = features["batch_num_images"]
            assert len(counts) == len(x)
            assert counts.sum() == len(features["image_sizes"])
            samples = torch.arange(len(x)).repeat_interleave(counts)
            images = features["pixel_values"] * features["image_sizes"][:, :1]
            x = x.index_add(0, samples, images)
        return features | {"sentence_embedding": self.layer(x)}


def encoder() -> SentenceTransformer:
    torch.manual_seed(0)
    return SentenceTransformer(modules=[Encoder()], device="cpu")


def batch(columns: int, rows: int = ROWS) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(rows)
    return [
        {"input_ids": torch.randint(WORDS, (rows, 3), generator=generator)} for _ in range(columns)
    ]


def step(loss: nn.Module, features: list[dict[str, Any]]) -> list[Tensor]:
    """[loss, parameters' gradients]"""
    loss.model.zero_grad()
    value = loss(features, torch.empty(0))
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in loss.model.parameters())]


def assert_equal(found: list[Tensor], expected: list[Tensor], bound: float, case: Any) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        # A bias moves all rows alike and cancels. Its gradient is rounding on both sides.
        assert relative_error(a, b) < bound or float((a - b).norm()) < 1e-7, (case, i, a, b)


def settings(directions: tuple[str, ...], partition: str, mode: str | None) -> dict[str, Any]:
    return {
        "directions": directions,
        "partition_mode": partition,
        "hardness_mode": mode,
        "hardness_strength": 5.0 if mode else 0.0,
    }


def compare(
    name: str, model: Any, features: list[dict[str, Any]], bound: float = 1e-5, **arguments: Any
) -> None:
    """Loss and gradients of the two classes of that name."""
    expected, found = (
        step(getattr(module, name)(model, **arguments), features) for module in (host, ours)
    )
    assert_equal(found, expected, bound, (name, arguments))
