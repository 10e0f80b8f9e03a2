"""The table of backbones: every row makes a model, and its entries are true of that model."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

pytest.importorskip("sentence_transformers")
pytest.importorskip("torchvision")

import llave
from llave.backbones import BACKBONES, backbone_of
from llave.chat import chat_template
from tests.llave import tiny
from tests.llave.test_modeling import picture

# Digests of the templates in released versions. Interrupted embeddings resume only with the same
# template.
TEMPLATES = {
    "llava_onevision": "9245e524f1afb54c7f819bfee782881129d3bbb23386d9ff8124aacef113f49c",
    "qwen2_vl": "e5bcf9340d7b47eb853c7cd81bc1d4fd4573c022e0a68e23d3c670b8c8984add",
    "qwen2_5_vl": "e5bcf9340d7b47eb853c7cd81bc1d4fd4573c022e0a68e23d3c670b8c8984add",
}


def test_every_row_has_a_tiny_model() -> None:
    assert tiny.BACKBONES.keys() == TEMPLATES.keys() == BACKBONES.keys()


@pytest.mark.parametrize("model_type", BACKBONES)
def test_every_row_builds(model_type: str) -> None:
    row = backbone_of(model_type)
    network, processor = tiny.BACKBONES[model_type]()
    assert network.config.model_type == model_type
    assert (processor.image_token, processor.video_token) == (row.image, row.video)
    assert hasattr(network.config, "image_grid_pinpoints") == row.tiled
    built = llave.build((network, processor), device="cpu")
    assert (built[0].unpad_inputs is None) == row.packs_texts
    items = [
        "A cat",
        picture(),
        {"text": "A cat", "image": [picture(), picture(seed=1)]},
        {"text": "A cat", "video": [picture(), picture(seed=1)]},
    ]
    singles = np.concatenate([built.encode([item]) for item in items])
    np.testing.assert_allclose(built.encode(items), singles, atol=1e-5)
    assert np.abs(singles @ singles.T - np.eye(len(items))).max() < 0.9999
    for item, token in ((items[1], row.image), (items[3], row.video)):
        ids = built.preprocess([item])["input_ids"][0]
        first, _, last = row.around.partition("{}")
        text = built.tokenizer.decode(ids).replace(token, "")
        assert f"user\n{first}{last}\n" in text


@pytest.mark.parametrize("model_type", BACKBONES)
def test_a_saved_template_stays_as_it_was(model_type: str) -> None:
    template = chat_template(BACKBONES[model_type], ["<|im_end|>", "<image>"])
    assert hashlib.sha256(template.encode()).hexdigest() == TEMPLATES[model_type]


@pytest.mark.parametrize("model_type", ["bert", None])
def test_other_types_are_refused(model_type: str | None) -> None:
    with pytest.raises(ValueError, match=rf"model_type={model_type!r} is not one of \['llava_"):
        backbone_of(model_type)
