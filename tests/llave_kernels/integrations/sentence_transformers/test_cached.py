"""Mini-batches of the gradient-cached loss, and trainings of both losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sentence_transformers")

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as host

from llave_kernels.integrations import sentence_transformers as ours
from llave_kernels.integrations.sentence_transformers.minibatches import sliceable
from tests.llave_kernels.integrations.sentence_transformers.twins import (
    TWINS,
    WIDTH,
    WORDS,
    assert_equal,
    batch,
    encoder,
    step,
)


def test_settings_of_the_cached_loss_can_be_assigned() -> None:
    model = encoder()
    loss = ours.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3)
    loss.scale, loss.false_negative_margin, loss.backend = 50.0, 0.05, "torch"
    plain = ours.MultipleNegativesRankingLoss(
        model, 50.0, false_negative_margin=0.05, backend="torch"
    )
    assert loss.get_config_dict()["false_negative_margin"] == 0.05
    assert_equal(step(loss, batch(3)), step(plain, batch(3)), 1e-5, "assigned")


def with_images(counts: list[int], *, seed: int) -> dict[str, Any]:
    """A column whose samples have these numbers of images, as LLaVA-OneVision's processor makes it.

    The images of all samples are stacked.
    """
    generator = torch.Generator().manual_seed(seed)
    images = sum(counts)
    return {
        "input_ids": torch.randint(WORDS, (len(counts), 3), generator=generator),
        "pixel_values": torch.randn(images, WIDTH, generator=generator),
        "image_sizes": torch.randint(1, 4, (images, 2), generator=generator),
        "batch_num_images": torch.tensor(counts),
    }


COUNTS = [[2, 1, 3, 1, 2], [2, 0, 1, 1, 1], [0, 0, 1, 2, 0]]


@pytest.mark.parametrize("counted_by", ["batch_num_images", "num_images_per_sample"])
def test_minibatches_hold_the_images_of_their_samples(counted_by: str) -> None:
    whole = [with_images(counts, seed=i) for i, counts in enumerate(COUNTS)]
    expected = step(host.MultipleNegativesRankingLoss(encoder()), whole)
    cut = [dict(column) for column in whole]
    if counted_by == "num_images_per_sample":
        for column in cut:
            counts = column["batch_num_images"]
            column["num_images_per_sample"] = counts
            column["batch_num_images"] = counts[counts > 0]
    before = [{k: v.clone() for k, v in column.items()} for column in cut]
    for size in (1, 2, 3, 8):
        loss = ours.CachedMultipleNegativesRankingLoss(encoder(), mini_batch_size=size)
        assert_equal(step(loss, cut), expected, 1e-5, size)
    for column, original in zip(cut, before, strict=True):
        assert column.keys() == original.keys()
        assert all(torch.equal(column[key], original[key]) for key in column)


def test_grids_of_images_are_cut_as_by_the_host() -> None:
    grids = torch.tensor([[1, 2, 2], [1, 1, 3], [1, 2, 1], [1, 1, 1]])
    feature = {
        "input_ids": torch.zeros(3, 2, dtype=torch.int64),
        "image_grid_thw": grids,
        "pixel_values": torch.arange(10.0)[:, None].expand(10, 2),
        "num_images_per_sample": torch.tensor([1, 1, 2]),
    }
    assert sliceable(feature).keys() == feature.keys()
    del feature["num_images_per_sample"]
    with pytest.raises(ValueError, match="image_grid_thw of shape"):
        sliceable(feature)


@pytest.mark.parametrize("key", ["pixel_values", "batch_num_images", "pixel_values_videos"])
def test_features_that_cannot_be_cut_are_refused(key: str) -> None:
    column = with_images([2, 0, 1], seed=0)
    if key == "pixel_values":
        del column["batch_num_images"]
        column["pixel_values"] = column["pixel_values"].repeat(2, 1)
    elif key == "batch_num_images":
        column["batch_num_images"] = torch.tensor([2, 1])
    else:
        column["pixel_values_videos"] = torch.zeros(2, 4)
    loss = ours.CachedMultipleNegativesRankingLoss(encoder(), mini_batch_size=2)
    with pytest.raises(ValueError, match=rf"{key} of shape .* Add num_images_per_sample"):
        loss([column, column], torch.empty(0))


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(WORDS))]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", TWINS)
def test_a_trainers_loss_curve_equals_the_hosts(name: str, tiny_bert: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    def sentences(start: int) -> list[str]:
        return [f"w{(i + start) % WORDS} w{i * 7 % WORDS} w{i * i % WORDS}" for i in range(48)]

    data = datasets.Dataset.from_dict(
        {"anchor": sentences(0), "positive": sentences(1), "negative": sentences(5)}
    )

    def curve(module: Any) -> list[float]:
        transformer = Transformer(str(tiny_bert))
        pooling = Pooling(transformer.get_embedding_dimension())
        model = SentenceTransformer(modules=[transformer, pooling], device="cpu")
        cached = {"mini_batch_size": 4} if name.startswith("Cached") else {}
        loss = getattr(module, name)(
            model, hardness_mode="in_batch_negatives", hardness_strength=9.0, **cached
        )
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=8, logging_steps=1,
            learning_rate=1e-2, report_to="none", save_strategy="no", use_cpu=True, seed=3,
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=data, loss=loss
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    theirs, found = curve(host), curve(ours)
    assert len(found) == 6
    assert found[-1] < found[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(theirs), rtol=1e-4, atol=0.0)
