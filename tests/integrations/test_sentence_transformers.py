"""Our twins of sentence-transformers' losses against the host's own."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sentence_transformers")

from sentence_transformers import SentenceTransformer, util
from sentence_transformers.sentence_transformer import losses as host

from llave_kernels.integrations import sentence_transformers as ours
from llave_kernels.reference import reference_logsumexp, reference_loss
from tests.helpers import relative_error
from tests.processes import run

WORDS, WIDTH, ROWS = 40, 12, 7
TWINS = ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss")
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


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, which on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Encoder(nn.Module):
    """The mean of the rows' word vectors, plus that of each image, through a layer."""

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
        # The gradient of what cancels (a bias moves all rows alike) is rounding on both sides.
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

    # Over several batches: a single loss can be rounded to the right value by luck.
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
        (
            {"false_negative_margin": 0.1, "directions": ("query_to_doc", "doc_to_doc")},
            "leave doc_to_doc out",
        ),
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
    """A column whose samples have these numbers of images, as LLaVA-OneVision's processor says:
    images of all samples stacked, counts of the samples that have any."""
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
    assert ours._sliceable(feature).keys() == feature.keys()
    del feature["num_images_per_sample"]
    with pytest.raises(ValueError, match="image_grid_thw of shape"):
        ours._sliceable(feature)


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


def gathered() -> tuple[list[Any], list[list[Tensor]]]:
    """In each process: (case, the host's step, ours) of every partition, and ours with extras."""
    rank = torch.distributed.get_rank()
    features = [{"input_ids": x["input_ids"][rank * 4 : rank * 4 + 4]} for x in batch(3, rows=8)]

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


def test_gathered_across_processes() -> None:
    """Each process's value and gradients are the host's; with our extras, their average is that of
    one process with all rows."""
    by_rank = run(__name__, "gathered", 2)
    for found, _ in by_rank:
        for case, expected, value in found:
            assert_equal(value, expected, 1e-5, case)
    for name, *parts in zip(TWINS, *(extras for _, extras in by_rank), strict=True):
        whole = step(getattr(ours, name)(encoder(), **EXTRAS), batch(3, rows=8))
        average = [(a + b) / 2 for a, b in zip(*parts, strict=True)]
        assert_equal(average, whole, 1e-5, name)


@pytest.mark.parametrize("name", TWINS)
def test_gathering_in_one_process_equals_the_host(name: str) -> None:
    compare(name, encoder(), batch(3), gather_across_devices=True)


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
