"""Models that have encoded images can be copied and sent to other processes."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers")
pytest.importorskip("torchvision")

from PIL import Image
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader

import llave
from llave.losses import LLaVELoss
from tests.llave import tiny

PICTURE = Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(30, 40, 3))
ITEMS = ["a cat", PICTURE, {"text": "a <image>", "image": PICTURE}, {"video": [PICTURE] * 2}]


def saved(module: object) -> object:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "an old protocol": lambda x: pickle.loads(pickle.dumps(x, protocol=2)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "torch.save": saved,
    "twice": lambda x: pickle.loads(pickle.dumps(copy.deepcopy(x))),
}


@pytest.fixture(scope="module", params=tiny.BACKBONES)
def model(request) -> SentenceTransformer:
    return llave.build(tiny.BACKBONES[request.param](), device="cpu")


@pytest.fixture(scope="module")
def used(tmp_path_factory) -> SentenceTransformer:
    folder = tmp_path_factory.mktemp("saved") / "model"
    llave.build(tiny.llava_onevision(), device="cpu").save(str(folder), create_model_card=False)
    loaded = llave.load(folder, device="cpu")
    loaded.encode(ITEMS)
    return loaded


@pytest.mark.parametrize("way", WAYS)
def test_a_used_model_is_copied(model, way):
    expected = model.encode(ITEMS)
    made = WAYS[way](model)
    for one in (made, made, model):  # twice, because the first image adds hooks
        np.testing.assert_array_equal(one.encode(ITEMS), expected)
    assert [p.requires_grad for p in made.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]


@pytest.mark.parametrize("way", WAYS)
def test_parts_and_wrappers_are_copied(used, way):
    features = used.preprocess([PICTURE])
    expected = used[0](dict(features))["token_embeddings"]
    assert torch.equal(WAYS[way](used[0])(dict(features))["token_embeddings"], expected)
    loss = WAYS[way](LLaVELoss(used))
    assert torch.equal(loss.model[0](dict(features))["token_embeddings"], expected)
    part = WAYS[way](used[0].model.vision_tower)
    pixels = features["pixel_values"][0]
    found = part(pixels, output_hidden_states=True).hidden_states
    before = used[0].model.vision_tower(pixels, output_hidden_states=True).hidden_states
    assert len(found) == len(before)
    assert all(map(torch.equal, found, before))


def unchanged(module: torch.nn.Module, arguments: object, output: object) -> None:
    """A hook that pickle can name."""


def test_hooks_of_the_user_stay():
    model = llave.build(tiny.llava_onevision(), device="cpu")
    layer = first_layer(model)
    layer.register_forward_hook(unchanged)
    model.encode([PICTURE])
    made = first_layer(pickle.loads(pickle.dumps(model)))
    assert list(made._forward_hooks.values()) == [unchanged]


def test_a_model_trained_with_checkpointing_is_pickled_as_the_readme_says():
    model = llave.build(tiny.llava_onevision(), device="cpu")
    model[0].model.gradient_checkpointing_enable()
    expected = model.encode(ITEMS)
    model[0].model.disable_input_require_grads()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).encode(ITEMS), expected)


def first_layer(model: SentenceTransformer) -> torch.nn.Module:
    return next(
        module
        for name, module in model[0].model.vision_tower.named_modules()
        if name.endswith("encoder.layers.0")
    )


@pytest.mark.long
def test_a_used_model_goes_to_a_pool(used):
    expected = used.encode(ITEMS)
    pool = used.start_multi_process_pool(["cpu"])
    try:
        found = used.encode(ITEMS, pool=pool, chunk_size=2)
    finally:
        used.stop_multi_process_pool(pool)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_used_model_goes_to_a_spawned_worker(used):
    loader = DataLoader(
        ITEMS[:2], 2, collate_fn=used.preprocess, num_workers=1, multiprocessing_context="spawn"
    )
    (features,) = loader
    assert torch.equal(features["input_ids"], used.preprocess(ITEMS[:2])["input_ids"])


@pytest.mark.long
def test_a_saved_file_is_read_in_a_new_process(used, tmp_path):
    torch.save(used, tmp_path / "model.pt")
    np.save(tmp_path / "picture.npy", np.asarray(PICTURE))
    program = (
        "import numpy, pickle, torch\n"
        "model = torch.load('model.pt', weights_only=False)\n"
        "numpy.save('found.npy', model.encode([numpy.load('picture.npy')]))\n"
        "pickle.dumps(model)\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env=environment)
    expected = used.encode([np.asarray(PICTURE)])
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, atol=1e-6)
