"""The model made of sentence-transformers' modules, compared with plain transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers")
pytest.importorskip("torchvision")

from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

import llave
from llave.encoding import RefusedItemError, encode
from llave.modeling import inputs
from llave.sealing import seal
from tests.llave import tiny

GRIDS = [[24, 24], [24, 48], [48, 24], [48, 48]]
OPENING = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
CLOSING = "<|im_end|>\n<|im_start|>assistant\n\n<|im_end|>\n"


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def backbone():
    return tiny.llava_onevision()


@pytest.fixture(scope="module")
def model(backbone):
    return llave.build(backbone, device="cpu")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save(str(folder), create_model_card=False)
    return folder


def plain(backbone, prompt: str, images: list[Image.Image]) -> np.ndarray:
    """The embedding by plain transformers. This function expands ``<image>`` in the prompt."""
    network, processor = backbone
    pixels = {}
    if images:
        pixels = processor.image_processor(
            [images], image_grid_pinpoints=GRIDS, return_tensors="pt"
        )
        features = network.model.get_image_features(**pixels).pooler_output
        head, *rest = prompt.split("<image>")
        prompt = head + "".join("<image>" * len(f) + r for f, r in zip(features, rest, strict=True))
    ids = processor.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    last = network.model(input_ids=ids, **pixels).last_hidden_state[0, -1]
    return torch.nn.functional.normalize(last, dim=0).numpy()


@pytest.fixture(scope="module", autouse=True)
def _no_grad(backbone, model):
    # The model must set its grids itself, so the reference gets them only after it is built.
    backbone[0].config.image_grid_pinpoints = GRIDS
    with torch.no_grad():
        yield


def test_the_modules_are_sentence_transformers_own(model, saved):
    assert [type(module) for module in model] == [Transformer, Pooling, Normalize]
    assert type(model[0].model).__name__ == "LlavaOnevisionModel"
    types = [entry["type"] for entry in json.loads((saved / "modules.json").read_text())]
    assert all(name.startswith("sentence_transformers.") for name in types)
    assert model.max_seq_length == 4096
    assert model[0].config.image_grid_pinpoints == GRIDS
    assert model[0].processor.image_processor.image_grid_pinpoints == GRIDS


def test_the_pooled_token_is_the_newline_behind_the_last_turn(model):
    ids = model.preprocess(["A cat"])["input_ids"][0]
    assert model.tokenizer.convert_ids_to_tokens(ids[-2:]) == ["<|im_end|>", "Ċ"]


@pytest.mark.parametrize(
    ("item", "user", "images"),
    [
        ("A cat and a dog", "A cat and a dog", []),
        (picture(24, 24), "<image>\nRepresent the given image.", [picture(24, 24)]),
        (picture(96, 20), "<image>\nRepresent the given image.", [picture(96, 20)]),
        (picture(20, 96), "<image>\nRepresent the given image.", [picture(20, 96)]),
        ({"image": picture(60, 50), "text": "A cat"}, "<image>\nA cat", [picture(60, 50)]),
        (
            {"image": [picture(), picture(seed=1)], "text": "A cat"},
            "<image>\n<image>\nA cat",
            [picture(), picture(seed=1)],
        ),
    ],
)
def test_embeddings_are_those_of_transformers_alone(backbone, model, item, user, images):
    expected = plain(backbone, OPENING + user + CLOSING, images)
    np.testing.assert_allclose(model.encode([item])[0], expected, atol=1e-5)


def test_a_wide_image_is_cut_into_tiles(model):
    assert model.preprocess([picture(96, 20)])["pixel_values"].shape[1] == 1 + 2
    assert model.preprocess([picture(96, 96)])["pixel_values"].shape[1] == 1 + 4


def test_the_projector_reads_the_last_layer_before_the_final_norm(backbone, model):
    """The authors cut the tower after its last layer. SigLIP's own output has one more norm."""
    seen = {}
    tower = model[0].model.vision_tower
    tower = getattr(tower, "vision_model", tower)  # only some versions have this level
    hooks = [
        tower.encoder.layers[-1].register_forward_hook(
            lambda module, args, output: seen.update(layer=output)
        ),
        model[0].model.multi_modal_projector.register_forward_hook(
            lambda module, args, output: seen.update(projector=args[0])
        ),
    ]
    model.encode([picture()])
    for hook in hooks:
        hook.remove()
    assert torch.equal(seen["layer"], seen["projector"])


def test_a_batch_gives_what_single_inputs_give(model):
    items = [
        "A cat",
        picture(),
        {"text": "What is in the image", "image": picture(96, 20)},
        {"image": [picture(), picture(seed=1)]},
        "A much longer text about a cat and a dog and a tiger. " * 3,
        {"video": [picture(seed=2), picture(seed=3)]},
    ]
    singles = np.concatenate([model.encode([item]) for item in items])
    np.testing.assert_allclose(model.encode(items, batch_size=6), singles, atol=1e-5)
    assert model.tokenizer.padding_side == "right"


def test_every_kind_of_image_gives_the_same_embedding(model, tmp_path):
    image = picture()
    path = tmp_path / "image.png"
    image.save(path)
    opaque = image.convert("RGBA")
    items = [image, str(path), np.array(image), opaque]
    arrays = [np.array(image), np.array(opaque)]  # transformers takes RGBA arrays from 5.21
    items += [inputs(images=one) for one in (image, path, *arrays, opaque)]
    found = model.encode(items)
    np.testing.assert_allclose(found, np.broadcast_to(found[0], found.shape), atol=1e-5)


def test_palette_grey_and_transparent_images(model):
    palette = picture().convert("P")
    clear = picture().convert("RGBA")
    clear.putalpha(0)
    grey = np.array(picture().convert("L"))
    found = model.encode(
        [
            palette,
            palette.convert("RGB"),
            inputs(images=clear),
            picture(),
            inputs(images=grey),
            Image.fromarray(grey),
        ]
    )
    np.testing.assert_allclose(found[::2], found[1::2], atol=1e-5)


def test_the_saved_folder_needs_neither_of_our_packages(model, saved):
    items = ["A cat", {"image": "IMAGE", "text": "What is <|image_1|>"}]
    path = saved.parent / "image.png"
    picture(60, 40).save(path)
    items[1]["image"] = str(path)
    program = (
        "import sys, json\n"
        "sys.modules['llave'] = sys.modules['llave_kernels'] = None\n"
        "from sentence_transformers import SentenceTransformer\n"
        "model = SentenceTransformer(sys.argv[1], device='cpu')\n"
        "print(json.dumps(model.encode(json.loads(sys.argv[2]), prompt='Find ').tolist()))\n"
    )
    command = [sys.executable, "-c", program, str(saved), json.dumps(items)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=saved.parent)
    found = np.array(json.loads(out.stdout.splitlines()[-1]))
    np.testing.assert_allclose(found, model.encode(items, prompt="Find "), atol=1e-5)


@pytest.mark.parametrize("with_image", [False, True])
def test_a_long_text_is_cut_inside_the_user_turn(saved, with_image):
    """The tokenizer cuts the text, so it works in a folder loaded without this package too."""
    model = SentenceTransformer(str(saved), device="cpu")
    model.max_seq_length = 100
    item = {"text": "A cat and a dog. " * 50}
    if with_image:
        item["image"] = picture(24, 24)
    short = {**item, "text": "A cat"}
    features = model.preprocess([item, short])
    ids = features["input_ids"][0].tolist()
    assert len(ids) == 100
    text = model.tokenizer.decode(ids)
    assert text.startswith(OPENING)
    assert text.endswith(CLOSING)
    assert text.count("<image>") == (36 if with_image else 0)
    assert "A cat and a dog. A cat" in text
    np.testing.assert_allclose(model.encode([item, short])[1], model.encode([short])[0], atol=1e-5)


def test_images_that_do_not_fit_are_an_error(saved):
    model = SentenceTransformer(str(saved), device="cpu")
    model.max_seq_length = 40
    with pytest.raises(ValueError, match="image"):
        model.encode([picture()])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("see <|image_1|>", r"input 2, 'see <\|image_1\|>': the text has an image placeholder"),
        ("a \ud800", r"input 2, 'a \\ud800': .*surrogates not allowed"),
        ({"text": 3}, r"input 2, \{'text': 3\}: a text must be a string, got 3"),
        (None, "input 2, None: Unsupported input type"),
    ],
)
def test_encode_names_the_item_that_is_refused(model, bad, message):
    with pytest.raises(RefusedItemError, match=message) as caught:
        encode(model, ["a <image>", {"video": [picture()]}, bad, bad], batch_size=3)
    assert caught.value.place == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither text"),
        ({"images": []}, "empty"),
        ({"images": "no/such.png"}, "no/such.png"),
        ({"images": 3}, r"images\[0\] is a int"),
        ({"images": np.zeros((2, 2, 2, 2))}, r"shape \(2, 2, 2, 2\)"),
        ({"video": "no/such.mp4"}, "no/such.mp4"),
        ({"video": [None]}, r"video\[0\] is a NoneType"),
    ],
)
def test_inputs_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        inputs(**arguments)


def test_build_names_what_is_wrong(backbone, tmp_path):
    with pytest.raises(ValueError, match=r"pinpoints=.*24 pixels"):
        llave.build(backbone, pinpoints=[[24, 30]])
    with pytest.raises(ValueError, match="max_seq_length=20"):
        llave.build(backbone, max_seq_length=20)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type='bert'"):
        llave.build(tmp_path)


def test_load_refuses_what_is_not_pooled_at_the_last_token(backbone, model, saved, tmp_path):
    np.testing.assert_allclose(
        llave.load(saved, device="cpu").encode(["A cat"]), model.encode(["A cat"]), atol=1e-6
    )
    backbone[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no modules\.json"):
        llave.load(tmp_path)
    mean = SentenceTransformer(
        modules=[model[0], Pooling(tiny.WIDTH, pooling_mode="mean")], device="cpu"
    )
    mean.save(str(tmp_path / "mean"), create_model_card=False)
    with pytest.raises(ValueError, match="mean"):
        llave.load(tmp_path / "mean")


def test_a_built_folder_can_be_built_on_again(model, saved):
    again = llave.build(saved, device="cpu")
    np.testing.assert_allclose(again.encode(["A cat"]), model.encode(["A cat"]), atol=1e-6)


@pytest.mark.parametrize("version", ["2", "2_5"])
def test_qwen_vl(version, tmp_path):
    network, processor = tiny.qwen_vl(version)
    built = llave.build((network, processor), device="cpu")
    items = ["A cat", picture(), {"text": "A cat", "image": [picture(), picture(seed=1)]}]
    found = built.encode(items)
    singles = np.concatenate([built.encode([item]) for item in items])
    np.testing.assert_allclose(found, singles, atol=1e-5)

    pixels = processor.image_processor([picture()], return_tensors="pt")
    count = int(pixels["image_grid_thw"].prod()) // 4
    user = f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>\nRepresent the given image."
    ids = processor.tokenizer(
        OPENING + user + CLOSING, add_special_tokens=False, return_tensors="pt"
    )["input_ids"]
    kinds = (ids == network.config.image_token_id).int()
    last = network.model(input_ids=ids, mm_token_type_ids=kinds, **pixels).last_hidden_state[0, -1]
    expected = torch.nn.functional.normalize(last, dim=0).numpy()
    np.testing.assert_allclose(found[1], expected, atol=1e-5)

    built.save(str(tmp_path / "model"), create_model_card=False)
    again = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    np.testing.assert_allclose(again.encode(items), found, atol=1e-6)
    with pytest.raises(ValueError, match="pinpoints="):
        llave.build((network, processor), pinpoints=GRIDS)


def test_importing_the_package_stays_cheap():
    program = "import sys, llave.cli; assert 'torch' not in sys.modules"
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llave.nothing


def test_a_model_saved_after_use_takes_another_length(tmp_path: Path) -> None:
    model = llave.build(tiny.llava_onevision(), max_seq_length=80, device="cpu")
    long = ["a cat " * 200]
    assert model.preprocess(long)["input_ids"].shape[1] == 80
    model.save_pretrained(str(tmp_path))
    again = llave.load(tmp_path, device="cpu")
    again.max_seq_length = 100
    assert again.preprocess(long)["input_ids"].shape[1] == 100


def flipped(file: Path) -> None:
    contents = bytearray(file.read_bytes())
    contents[-9] ^= 1
    file.write_bytes(contents)


@pytest.mark.parametrize("name", ["model.safetensors", "1_Pooling/config.json", "seal.json"])
@pytest.mark.parametrize("change", [flipped, Path.unlink])
def test_a_sealed_model_is_loaded_only_as_it_was_written(saved, tmp_path, name, change):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    seal(folder)
    (folder / "README.md").write_text("what its user says of it")
    llave.load(folder)
    change(folder / name)
    if name == "seal.json" and change is Path.unlink:
        llave.load(folder)  # a folder without a seal is loaded
        return
    for use in (llave.load, llave.build):
        with pytest.raises(ValueError, match=rf"model is not as it was .*{name}.* remove its seal"):
            use(folder)


def test_a_sealed_model_may_be_links(saved, tmp_path):
    sealed, folder = tmp_path / "blobs", tmp_path / "model"
    shutil.copytree(saved, sealed)
    seal(sealed)
    folder.mkdir()
    for path in sealed.iterdir():  # the hub's cache has such links
        (folder / path.name).symlink_to(path)
    llave.load(folder)
    flipped(sealed / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors has other contents"):
        llave.load(folder)


@pytest.mark.parametrize("size", [0, 300, 3000, 30_000, 100_000])
def test_a_full_temporary_folder_is_named(backbone, monkeypatch, tmp_path, size):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(OSError, match=rf"{tmp_path}/\S+ cannot be written \(.*too large"):
            llave.build(backbone)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
