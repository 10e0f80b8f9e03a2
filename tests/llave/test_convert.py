"""Conversion of checkpoints with random weights, compared with transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers")
pytest.importorskip("torchvision")

from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer

import llave
from llave import convert, sealing
from tests.llave import checkpoints, tiny
from tests.llave.checkpoints import (
    GRIDS,
    tower_of_27,
    write_checkpoint,
    write_separate_tokenizer_files,
    write_shards,
)
from tests.llave.test_modeling import picture


@pytest.fixture(scope="module")
def backbone():
    return checkpoints.backbone()


@pytest.fixture(scope="module")
def reference(backbone):
    return llave.build(backbone, device="cpu")


ITEMS = [
    "A cat and a dog",
    picture(24, 24),
    picture(96, 20),
    {"text": "What is in the image", "image": picture(60, 50)},
]


@pytest.mark.parametrize(("shards", "tie"), [(1, False), (3, True)])
def test_a_converted_model_gives_the_same_embeddings(tmp_path, shards, tie):
    network, processor = tiny.llava_onevision(
        vision_layers=convert.VISION_LAYERS, vision_heads=convert.VISION_HEADS, tie=tie
    )
    src, dst = tmp_path / "src", tmp_path / "deep" / "dst"
    src.mkdir()
    state = write_checkpoint(src, network)
    extra = tower_of_27(state) if shards == 3 else []
    if shards == 3:
        write_separate_tokenizer_files(src)
    write_shards(src, state, shards)
    left_out = convert.convert(src, dst)
    assert left_out == sorted(extra + ([] if tie else ["lm_head.weight"]))
    assert [entry.name for entry in dst.parent.iterdir()] == ["dst"]
    assert sealing.problem(dst) is None
    found = SentenceTransformer(str(dst), device="cpu")
    expected = llave.build((network, processor), device="cpu")
    np.testing.assert_allclose(found.encode(ITEMS), expected.encode(ITEMS), atol=1e-5)
    assert found[0].config.image_grid_pinpoints == GRIDS
    # test_modeling compares the reference with plain transformers. This test does it again with the
    # checkpoint's tokenizer and weights.
    features = found.preprocess([ITEMS[3]])
    network.config.image_grid_pinpoints = GRIDS
    pixels = {key: features[key] for key in ("pixel_values", "image_sizes", "batch_num_images")}
    with torch.no_grad():
        states = network.model(input_ids=features["input_ids"], **pixels).last_hidden_state
    last = torch.nn.functional.normalize(states[0, -1], dim=0).numpy()
    np.testing.assert_allclose(found.encode([ITEMS[3]])[0], last, atol=1e-5)


def test_an_embedding_without_room_for_the_image_token_is_extended(backbone, reference, tmp_path):
    rows = len(tiny.tokenizer())
    state = write_checkpoint(tmp_path, backbone[0], rows=rows)
    write_shards(tmp_path, state, 1)
    convert.convert(tmp_path, tmp_path / "dst")
    found = llave.load(tmp_path / "dst", device="cpu")
    assert found[0].config.text_config.vocab_size == rows + 2
    np.testing.assert_allclose(found.encode(ITEMS), reference.encode(ITEMS), atol=1e-5)


def test_a_converted_folder_is_a_backbone_to_train(backbone, reference, tmp_path):
    write_shards(tmp_path, write_checkpoint(tmp_path, backbone[0]), 1)
    with pytest.raises(ValueError, match=r"model_type='llava_qwen' .* llave\.convert first"):
        llave.build(tmp_path)
    convert.convert(tmp_path, tmp_path / "dst")
    found = llave.build(tmp_path / "dst", device="cpu")
    np.testing.assert_allclose(found.encode(ITEMS), reference.encode(ITEMS), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(backbone, tmp_path, dtype):
    state = write_checkpoint(tmp_path, backbone[0], dtype=dtype)
    write_shards(tmp_path, state, 2)
    convert.convert(tmp_path, tmp_path / "dst")
    stored = load_file(tmp_path / "dst" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert llave.load(tmp_path / "dst", device="cpu")[0].model.dtype == dtype


def test_pickled_weights_are_read_only_on_request(backbone, reference, tmp_path):
    state = write_checkpoint(tmp_path, backbone[0])
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="allow_pickle=True"):
        convert.convert(tmp_path, tmp_path / "dst")
    convert.convert(tmp_path, tmp_path / "dst", allow_pickle=True)
    found = llave.load(tmp_path / "dst", device="cpu")
    np.testing.assert_allclose(found.encode(ITEMS), reference.encode(ITEMS), atol=1e-5)


def test_what_a_killed_conversion_left_is_removed(backbone, tmp_path):
    write_shards(tmp_path, write_checkpoint(tmp_path, backbone[0]), 1)
    left = tmp_path / "out" / f"dst.{'0' * 32}.tmp"
    (left / "backbone").mkdir(parents=True)
    (left / "backbone" / "model.safetensors").write_bytes(b"half")
    convert.convert(tmp_path, tmp_path / "out" / "dst")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["dst"]


def test_check_prints_the_cards_scores(reference, tmp_path, capsys, monkeypatch):
    reference.save(str(tmp_path / "model"), create_model_card=False)
    seen = []
    preprocess = Transformer.preprocess

    def recording(self, *args, **kwargs):
        features = preprocess(self, *args, **kwargs)
        seen.append(self.tokenizer.decode(features["input_ids"][0]))
        return features

    monkeypatch.setattr(Transformer, "preprocess", recording)
    scores = convert.check(tmp_path / "model", picture())
    question = "Represent the given image with the following question: What is in the image"
    assert f"<image> {question}<|im_end|>" in seen[0]
    assert list(scores) == ["A cat and a dog", "A cat and a tiger"]
    assert f"A cat and a dog = {scores['A cat and a dog']:.4f}" in capsys.readouterr().out


def test_check_refuses_scores_that_are_not_finite(reference, tmp_path):
    reference.save(str(tmp_path / "model"), create_model_card=False)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    next(tensor for name, tensor in weights.items() if name.endswith("norm.weight"))[0] = np.nan
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="model' gives embeddings that are not finite"):
        convert.check(tmp_path / "model", picture())
