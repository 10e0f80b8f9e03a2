"""The road from inputs to embeddings: workers, batches, memory that runs out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

for needed in ("sentence_transformers", "torchvision"):
    pytest.importorskip(needed)

from PIL import Image  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402

from llave.batching import Lengths, planned  # noqa: E402
from llave.encoding import Encoder, Failure, _precision, default_workers, encode  # noqa: E402
from llave.modeling import build  # noqa: E402
from tests.llave import tiny  # noqa: E402

ALLOCATORS = {
    "host": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you "
        "tried to allocate 9 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has"),
}


def picture(number: int) -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 256, (20 + 7 * number, 31, 3), np.uint8)
    return Image.fromarray(noise)


@pytest.fixture(scope="module")
def model() -> SentenceTransformer:
    return build(tiny.llava_onevision(), device="cpu")


@pytest.fixture(scope="module")
def items() -> list[Any]:
    mixed: list[Any] = [f"{n} cats and {'dogs ' * (n % 4)}" for n in range(5)]
    mixed += [picture(n) for n in range(4)]
    mixed += [{"text": "What is in the image", "image": picture(9)}]
    mixed += [{"video": [picture(1)] * 3}, {"video": [picture(2)] * 2}]
    return mixed[::2] + mixed[1::2]


def test_workers_and_batches_change_no_embedding(
    model: SentenceTransformer, items: list[Any]
) -> None:
    here = encode(model, items, batch_size=3, workers=0)
    np.testing.assert_array_equal(encode(model, items, batch_size=3, workers=2), here)
    singles = np.concatenate([model.encode([one], normalize_embeddings=True) for one in items])
    np.testing.assert_allclose(here, singles, atol=1e-5)
    assert here.dtype == np.float32


def test_the_default_prompt_is_the_model_s(model: SentenceTransformer) -> None:
    plain = encode(model, ["a cat"])
    model.prompts["query"], model.default_prompt_name = "Find ", "query"
    try:
        found = encode(model, ["a cat"])
        np.testing.assert_allclose(found, model.encode(["a cat"]), atol=1e-6)
    finally:
        model.default_prompt_name = None
    assert np.abs(found - plain).max() > 1e-3


def test_embeddings_are_cut_and_normalised_as_asked(model: SentenceTransformer) -> None:
    model.truncate_dim = 5
    try:
        found, raw = encode(model, ["a cat"]), encode(model, ["a cat"], normalize=False)
    finally:
        model.truncate_dim = None
    assert found.shape == (1, 5)
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
    assert np.linalg.norm(raw) < 0.99


def limited(
    model: SentenceTransformer, most: int, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Let the model fail for more than ``most`` inputs. Returns the sizes of the batches tried."""
    tried: list[int] = []
    forward = model[-1].forward

    def watched(features: dict[str, Any], *rest: Any, **settings: Any) -> Any:
        tried.append(len(features["sentence_embedding"]))
        if tried[-1] > most:
            raise error
        return forward(features, *rest, **settings)

    monkeypatch.setattr(model[-1], "forward", watched)
    return tried


@pytest.mark.parametrize("kind", ALLOCATORS)
def test_a_batch_that_does_not_fit_is_encoded_by_halves(
    model: SentenceTransformer,
    items: list[Any],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = encode(model, items)
    tried = limited(model, 2, ALLOCATORS[kind], monkeypatch)
    found = encode(model, items, batch_size=7)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert max(tried) > 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not fit into memory" in line


def test_a_single_input_that_does_not_fit_is_an_error(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = limited(model, 0, ALLOCATORS["host"], monkeypatch)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        encode(model, ["a cat", "two dogs"])
    assert tried == [2, 1]


def test_other_errors_of_a_device_are_raised_at_once(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = limited(model, 0, RuntimeError("device-side assert triggered"), monkeypatch)
    with pytest.raises(RuntimeError, match="device-side assert"):
        encode(model, ["a cat", "two dogs"])
    assert tried == [2]


def test_what_cannot_be_read_or_is_refused_stands_beside_the_rest(
    model: SentenceTransformer,
) -> None:
    def load(item: Any) -> tuple[str, Any]:
        if item == "gone":
            raise FileNotFoundError("there is no such file")
        return f"id of {item}", item

    batches = [["a cat", "gone", "see <|image_1|>"], ["two dogs"]]
    for workers in (0, 1):
        first, second = Encoder(model, load, workers=workers).run(batches)
        assert [one.item for one in first] == batches[0]
        assert [one.id for one in first] == ["id of a cat", None, "id of see <|image_1|>"]
        assert first[1].found == Failure("FileNotFoundError", "there is no such file")
        assert isinstance(first[2].found, Failure)
        assert "image placeholder" in first[2].found.reason
        for one in (first[0], second[0]):
            expected = model.encode([one.item])[0]
            np.testing.assert_allclose(one.found, expected, atol=1e-6)


def test_batches_are_of_like_length(model: SentenceTransformer) -> None:
    length = Lengths(model)
    one_tile, two_tiles, four_tiles = (24, 24), (48, 24), (48, 48)
    sizes = [one_tile, None, four_tiles, two_tiles, one_tile, four_tiles, two_tiles, None]
    lengths = [length("What is it", size) for size in sizes]
    assert planned(sizes, lengths, 2) == [
        [four_tiles] * 2, [two_tiles] * 2, [one_tile] * 2, [None] * 2,
    ]  # fmt: skip
    for size in (one_tile, two_tiles, four_tiles):
        features = model.preprocess([Image.new("RGB", size)])
        tokens = int((features["input_ids"] == model[0].model.config.image_token_id).sum())
        assert length("", size) == tokens + 1
    # Without such a processor the pixels count.
    plain = Lengths([SimpleNamespace()])  # type: ignore[arg-type]
    assert plain("", (100, 70)) == 8


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize(("dtype", "low"), [(torch.float32, True), (torch.float16, False)])
def test_a_float32_model_computes_in_bfloat16_where_the_gpu_has_it(
    dtype: torch.dtype, low: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [torch.zeros(1, dtype=dtype)]
    fake = SimpleNamespace(device=torch.device("cuda"), parameters=lambda: weights)
    for has in (True, False):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda has=has, **_: has)
        found = _precision(fake)  # type: ignore[arg-type]
        assert isinstance(found, torch.autocast) == (low and has)
    fake.device = torch.device("cpu")
    assert not isinstance(_precision(fake), torch.autocast)  # type: ignore[arg-type]


def test_workers_are_counted_by_the_cores_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(24)))
    for processes, workers in ((1, 4), (8, 2), (24, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert default_workers() == workers
    monkeypatch.setattr("sys.platform", "darwin")
    assert default_workers() == 0


def test_a_negative_number_of_workers_is_refused(model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match="workers must be at least 0, got -1"):
        Encoder(model, lambda item: ("", item), workers=-1)
