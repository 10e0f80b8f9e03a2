"""Checkpoints in the authors' layout, made here from random weights, against transformers."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

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
from llave.cli import main
from tests.llave import tiny
from tests.llave.test_modeling import picture

GRIDS = [[24, 24], [24, 48], [48, 24], [48, 48]]
TOWER = "model.vision_tower.vision_tower.vision_model."


def theirs(name: str) -> str:
    """The authors' name of a tensor of LlavaOnevisionForConditionalGeneration."""
    for ours, other in (
        ("model.vision_tower.vision_model.", TOWER),
        ("model.vision_tower.", TOWER),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("model.language_model.", "model."),
    ):
        if name.startswith(ours):
            return name.replace(ours, other)
    return name


def write_checkpoint(
    folder: Path, network, *, rows: int | None = None, dtype=torch.float32
) -> dict[str, torch.Tensor]:
    """The tensors in the authors' layout; with them the config and tokenizer go to ``folder``."""
    text = network.config.text_config.to_dict()
    keys = set(convert._TEXT_KEYS) & text.keys()
    settings = {key: text[key] for key in keys} | {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        "rope_theta": 10000.0,
        "mm_hidden_size": tiny.WIDTH,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": GRIDS,
        "vocab_size": text["vocab_size"],
    }
    (folder / "config.json").write_text(json.dumps(settings))
    tiny.tokenizer().save_pretrained(folder)
    state = {theirs(name): tensor.to(dtype) for name, tensor in network.state_dict().items()}
    if network.config.tie_word_embeddings:
        del state["lm_head.weight"]
    if rows is not None:
        state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:rows].clone()
    return state


def write_separate_tokenizer_files(folder: Path) -> None:
    """Qwen2's files before tokenizer.json: vocabulary, merges and the added tokens' numbers."""
    made = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(made["model"]["vocab"]))
    merges = [" ".join(pair) for pair in made["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    added = {str(token.pop("id")): token for token in made["added_tokens"]}
    numbers = {token["content"]: int(number) for number, token in added.items()}
    (folder / "added_tokens.json").write_text(json.dumps(numbers))
    settings = {
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "chat_template": "{{ messages }}",
        "eos_token": "<|im_end|>",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_shards(folder: Path, state: dict[str, torch.Tensor], count: int) -> None:
    names = sorted(state)
    parts = [names[i::count] for i in range(count)]
    if count == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    where = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        where.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tower_of_27(state: dict[str, torch.Tensor]) -> list[str]:
    """SigLIP's last layer and head put back, as in a checkpoint saved before they are dropped."""
    last = f"{TOWER}encoder.layers.{convert.VISION_LAYERS - 1}."
    more = {
        name.replace(f".{convert.VISION_LAYERS - 1}.", f".{convert.VISION_LAYERS}."): tensor.clone()
        for name, tensor in state.items()
        if name.startswith(last)
    }
    more[f"{TOWER}head.probe"] = torch.zeros(1, 1, tiny.WIDTH)
    state.update(more)
    return list(more)


@pytest.fixture(scope="module")
def backbone():
    return tiny.llava_onevision(
        vision_layers=convert.VISION_LAYERS, vision_heads=convert.VISION_HEADS
    )


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
    # The reference is itself compared with transformers alone in test_modeling; once more here,
    # from the checkpoint's words and weights.
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


def test_wrong_tensors_are_listed_and_nothing_is_left_behind(backbone, tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    state = write_checkpoint(src, backbone[0])
    del state["model.norm.weight"], state["model.layers.1.mlp.up_proj.weight"]
    state["model.surprise"] = torch.zeros(2)
    state["model.image_newline"] = torch.zeros(5)
    write_shards(src, state, 1)
    with pytest.raises(ValueError, match="does not hold") as error:
        convert.convert(src, tmp_path / "dst")
    said = str(error.value)
    assert "unknown: model.surprise" in said
    assert "language_model.layers.1.mlp.up_proj.weight, language_model.norm.weight" in said
    assert "model.image_newline (5,), not (32,)" in said
    assert [entry.name for entry in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["Other"], "model_type": "other"}, "needs no conversion"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "list of pairs"),
        ({"image_grid_pinpoints": [[48, 48]]}, "16 patches of 6 pixels"),
        ({"mm_projector_type": "linear"}, "mm_projector_type='linear'"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio='pad'"),
    ],
)
def test_other_configurations_are_refused(backbone, tmp_path, change, message):
    write_shards(tmp_path, write_checkpoint(tmp_path, backbone[0]), 1)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=message):
        convert.convert(tmp_path, tmp_path / "dst")


def test_incomplete_folders_are_refused(backbone, tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        convert.convert(tmp_path, tmp_path / "dst")
    state = write_checkpoint(tmp_path, backbone[0])
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        convert.convert(tmp_path, tmp_path / "dst")
    write_shards(tmp_path, state, 2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks .*model-00002"):
        convert.convert(tmp_path, tmp_path / "dst")
    with pytest.raises(ValueError, match="exists"):
        convert.convert(tmp_path, tmp_path)


DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "cut at the end": lambda data: data[:-2],
    "zeros": lambda data: bytes(len(data)),
    "a pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a page": lambda data: b"<!doctype html><html>Not found</html>",
    "a list": lambda data: b"[]",
    "an archive": lambda data: b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("kind", ["whole", "shards", "separate", "pickled"])
def test_a_damaged_file_is_named(backbone, tmp_path, kind):
    src = tmp_path / "src"
    src.mkdir()
    state = write_checkpoint(src, backbone[0])
    if kind == "separate":
        write_separate_tokenizer_files(src)
    if kind == "pickled":
        torch.save(state, src / "pytorch_model.bin")
    else:
        write_shards(src, state, 2 if kind == "shards" else 1)
    for file in sorted(src.iterdir()):
        whole = file.read_bytes()
        for name, damage in DAMAGE.items():
            file.write_bytes(damage(whole))
            if file.suffix == ".json" and name == "cut at the end":
                file.write_bytes(whole.rstrip()[:-1])
            with pytest.raises(ValueError, match=rf"^[^\n]*{file.name} [^\n]*$") as error:
                convert.convert(src, tmp_path / "dst", allow_pickle=True)
            assert "download it again" in str(error.value), (file, name)
            assert [entry.name for entry in tmp_path.iterdir()] == ["src"]
        file.write_bytes(whole)
    convert.convert(src, tmp_path / "dst", allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/etc/passwd.safetensors", "which leaves"),
        ("../outside.safetensors", "which leaves"),
        ("inner/../../outside.safetensors", "which leaves"),
        ("link.safetensors", "which leaves"),
        ("circle.safetensors", "which leaves|lacks"),
        ("a\0b.safetensors", "which leaves"),
        ("folder.safetensors", "is a folder, not a regular file"),
        ("pickled.bin", r"may name \.safetensors files only"),
        ("outside", r"may name \.safetensors files only"),
        ("a\x1b[2J\n.safetensors", "lacks"),
    ],
)
def test_an_index_names_files_of_the_folder(backbone, tmp_path, capsys, name, message):
    src, dst = tmp_path / "src", tmp_path / "dst"
    src.mkdir()
    state = write_checkpoint(src, backbone[0])
    write_shards(src, state, 2)
    save_file({"x": torch.zeros(1)}, tmp_path / "outside.safetensors")
    torch.save(state, src / "pickled.bin")
    (src / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (src / "circle.safetensors").symlink_to("circle.safetensors")
    (src / "folder.safetensors").mkdir()
    index = src / "model.safetensors.index.json"
    named = json.loads(index.read_text())
    named["weight_map"]["model.surprise"] = name
    index.write_text(json.dumps(named))
    assert main(["convert", str(src), str(dst)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert line.isprintable()
    assert not dst.exists()


def test_a_checkpoint_with_a_pipe_is_not_waited_for(backbone, tmp_path):
    write_shards(tmp_path, write_checkpoint(tmp_path, backbone[0]), 1)
    os.mkfifo(tmp_path / "chat_template.jinja")
    with pytest.raises(ValueError, match=r"chat_template\.jinja.* is a FIFO, not a regular file"):
        convert.convert(tmp_path, tmp_path / "dst")


def test_what_a_killed_conversion_left_is_removed(backbone, tmp_path):
    write_shards(tmp_path, write_checkpoint(tmp_path, backbone[0]), 1)
    left = tmp_path / "out" / f"dst.{'0' * 32}.tmp"
    (left / "backbone").mkdir(parents=True)
    (left / "backbone" / "model.safetensors").write_bytes(b"half")
    convert.convert(tmp_path, tmp_path / "out" / "dst")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["dst"]


def test_cut_merges_would_be_another_tokenizer(backbone, tmp_path):
    write_shards(tmp_path, write_checkpoint(tmp_path, backbone[0]), 1)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    merges = whole["model"]["merges"]
    whole["model"]["merges"] = merges[:-3]
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    last = "".join(merges[-1])
    with pytest.raises(
        ValueError, match=rf"tokenizer\.json has no merge for 3 of .* {last!r}: it is"
    ):
        convert.convert(tmp_path, tmp_path / "dst")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "896"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": -1},
        {"architectures": 5, "model_type": None},
        {"image_grid_pinpoints": []},
        {"image_grid_pinpoints": [["a", "b"]]},
    ],
)
def test_a_config_of_other_types_is_named(backbone, tmp_path, change):
    write_shards(tmp_path, write_checkpoint(tmp_path, backbone[0]), 1)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=r"config\.json"):
        convert.convert(tmp_path, tmp_path / "dst")


def test_a_damaged_file_is_one_line_of_the_command(backbone, tmp_path, capsys):
    write_shards(tmp_path, write_checkpoint(tmp_path, backbone[0]), 1)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert main(["convert", str(tmp_path), str(tmp_path / "dst")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert f"llave convert: error: {file} cannot be read" in said[0]
    # The image of --check is looked at first.
    file.write_bytes(whole)
    (tmp_path / "cat.jpg").write_bytes(b"no image")
    picture = ["--check", str(tmp_path / "cat.jpg")]
    assert main(["convert", str(tmp_path), str(tmp_path / "dst"), *picture]) == 2
    assert "cat.jpg" in capsys.readouterr().err
    assert not (tmp_path / "dst").exists()


def test_a_damaged_model_is_named_when_it_is_loaded(reference, tmp_path, capsys):
    model = tmp_path / "model"
    reference.save(str(model), create_model_card=False)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "modules.json"):
        whole = (model / name).read_bytes()
        (model / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=rf"{name} cannot be read"):
            llave.load(model)
        (model / name).write_bytes(whole)
    (model / "model.safetensors").write_bytes(b"version https://git-lfs")
    arguments = ["search", "nowhere", "a dog", "--model", str(model)]
    assert main(arguments) == 2
    assert "model.safetensors cannot be read" in capsys.readouterr().err


PLAIN = b'{"tokenizer_class": "PreTrainedTokenizerFast"}'


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("chat_template.jinja", b"{% for message in messages %}", "chat_template.jinja cannot be"),
        ("chat_template.jinja", b"<html>404</html>", "chat_template.jinja .*no text"),
        ("chat_template.jinja", None, "chat_template.jinja .*no template"),
        ("tokenizer_config.json", PLAIN, "tokenizer_config.json .*no pad_token"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json .*expected a dict"),
        ("modules.json", b"{}", "modules.json .*expected a list|modules list"),
        ("tokenizer.json", b"{}", r"model' cannot be loaded \(KeyError"),
        ("1_Pooling/config.json", b"{}", r"model' cannot be loaded \(TypeError"),
    ],
)
def test_a_file_of_a_model_that_holds_something_else(
    reference, tmp_path, capsys, name, contents, message
):
    model = tmp_path / "model"
    reference.tokenizer.backend_tokenizer.no_padding()  # once it has padded, tokenizer.json says so
    reference.save(str(model), create_model_card=False)
    (model / name).unlink()
    if contents is not None:
        (model / name).write_bytes(contents)
    assert main(["search", "nowhere", "a dog", "--model", str(model)]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


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
