"""Checkpoints that cannot be converted: the error names the file, and nothing is left behind."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch

pytest.importorskip("sentence_transformers")
pytest.importorskip("torchvision")

from safetensors.torch import save_file

from llave import convert
from llave.cli import main
from tests.llave import checkpoints
from tests.llave.checkpoints import (
    write_checkpoint,
    write_separate_tokenizer_files,
    write_shards,
)


@pytest.fixture(scope="module")
def backbone():
    return checkpoints.backbone()


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
    # The image of --check is read first.
    file.write_bytes(whole)
    (tmp_path / "cat.jpg").write_bytes(b"no image")
    picture = ["--check", str(tmp_path / "cat.jpg")]
    assert main(["convert", str(tmp_path), str(tmp_path / "dst"), *picture]) == 2
    assert "cat.jpg" in capsys.readouterr().err
    assert not (tmp_path / "dst").exists()
