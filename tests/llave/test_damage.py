"""A model folder with a missing, cut or changed file.

The error names the file, or the model works as before.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

for needed in ("sentence_transformers", "torchvision"):
    pytest.importorskip(needed)

from safetensors.torch import load_file, save_file  # noqa: E402

import llave  # noqa: E402
from llave import modeling  # noqa: E402
from llave.cli import main  # noqa: E402
from tests.llave import tiny  # noqa: E402

TEXTS = ["a cat", "the video of two dogs"]
DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "gone": lambda whole: None,
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[: len(whole) // 2],
    "zeros": lambda whole: bytes(len(whole)),
    "a list": lambda whole: b"[]",
    "an object": lambda whole: b"{}",
    "nested": lambda whole: b"[" * 100_000,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    llave.build(tiny.llava_onevision(), device="cpu").save(str(folder), create_model_card=False)
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_is_named_or_was_not_needed(saved: Path, tmp_path: Path, damage: str) -> None:
    expected = llave.load(saved, device="cpu").encode(TEXTS)
    for file in sorted(path for path in saved.rglob("*") if path.is_file()):
        folder = tmp_path / "model"
        shutil.copytree(saved, folder)
        bent, contents = folder / file.relative_to(saved), DAMAGE[damage](file.read_bytes())
        bent.unlink()
        if contents is not None:
            bent.write_bytes(contents)
        try:
            found = llave.load(folder, device="cpu").encode(TEXTS)
        except ValueError as error:
            refused(error, file.name)
        else:
            np.testing.assert_allclose(found, expected, atol=1e-6)
        shutil.rmtree(folder)


def refused(error: Exception, name: str) -> None:
    assert name in str(error)
    assert "\n" not in str(error)


def test_weights_that_no_file_has_are_not_drawn(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("up_proj.weight"))
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 weights .*up_proj\.weight"):
        llave.load(folder, device="cpu")


@pytest.mark.parametrize("model_type", tiny.BACKBONES)
def test_a_model_without_its_tokenizer(tmp_path: Path, model_type: str) -> None:
    folder = tmp_path / "model"
    llave.build(tiny.BACKBONES[model_type](), device="cpu").save(str(folder))
    (folder / "tokenizer.json").unlink()
    for left in (True, False):
        if not left:
            (folder / "tokenizer_config.json").unlink()
        with pytest.raises(ValueError, match="tokenizer"):
            llave.load(folder, device="cpu")


def test_texts_that_are_not_told_apart(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if "embed_tokens" in name:
            weight.zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="two texts have the same embedding"):
        llave.load(folder, device="cpu")


def test_a_module_of_another_package(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "os.path.join"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"look at modules\.json"):
        llave.load(folder, device="cpu")


def test_a_damaged_model_is_named_when_it_is_loaded(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(saved, model)
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


def test_a_name_that_is_no_folder_is_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(modeling, "SentenceTransformer", refuse)
    with pytest.raises(ValueError, match=r"path='nowhere' is no folder here.*no connection"):
        llave.load("nowhere")


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
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    contents: bytes | None,
    message: str,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(saved, model)
    (model / name).unlink()
    if contents is not None:
        (model / name).write_bytes(contents)
    assert main(["search", "nowhere", "a dog", "--model", str(model)]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
