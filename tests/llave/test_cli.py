"""The ``llave`` command: help with examples, one-line errors, all commands on tiny data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

for needed in ("sentence_transformers", "datasets", "accelerate", "torchvision"):
    pytest.importorskip(needed)

from PIL import Image  # noqa: E402

from llave.cli import main  # noqa: E402
from llave.recipe import read_recipe  # noqa: E402

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (90, 90, 90)}


@pytest.mark.parametrize("command", ["train", "evaluate", "convert", "embed", "search"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "examples:" in said
    assert f"llave {command}" in said.split("examples:")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "huge"], "no recipe 'huge'"),
        (["train", "tiny", "--loss.alhpa", "5"], "loss.alhpa of tiny is no setting"),
        (["train", "tiny"], "emoji/train is no folder"),
        (["convert", "nowhere", "made"], "nowhere"),
        (["search", "nowhere", "a dog", "--model", "bare"], "path='bare' has no modules.json"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bare").mkdir()
    assert main(arguments) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"llave {arguments[0]}: error: ")
    assert message in last


def test_a_printed_recipe_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--loss.alpha", "5", "--data.subsets", "[no, 2e-5x]"]
    assert main(["train", "llave-7b", "--print", *words]) == 0
    printed = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    (tmp_path / "my.yaml").write_text(printed)
    assert read_recipe("my.yaml") == read_recipe("llave-7b", words)
    assert main(["train", "my.yaml", "--loss.alpha", "6", "--print"]) == 0
    assert capsys.readouterr().out == printed.replace("alpha: 5.0", "alpha: 6.0")
    assert main(["train", "llave", "--print"]) == 2
    said = capsys.readouterr()
    assert "model of llave needs one of backbone and scratch" in said.err
    assert not said.out


def test_train_evaluate_embed_and_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("emoji/train", "emoji/eval", "emoji/images"):
        Path(folder).mkdir(parents=True)
    rows = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (16, 16), colour).save(f"emoji/images/{name}.png")
        row = {"qry": f"the colour {name}", "qry_image_path": "", "pos_text": ""}
        rows.append(row | {"pos_image_path": f"{name}.png"})
    lines = "\n".join(json.dumps(row) for row in rows * 4)
    Path("emoji/train/colours.jsonl").write_text(lines)
    others = list(COLOURS)[1:]
    row = {"qry_text": "the colour red", "qry_img_path": "", "tgt_text": [""] * 4}
    row["tgt_img_path"] = [f"{name}.png" for name in ("red", *others)]
    Path("emoji/eval/colours.jsonl").write_text(json.dumps(row))
    small = "{hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2"
    overrides = [
        *("--trainer.max_steps", "2", "--trainer.report_to", "none", "--data.batch_size", "8"),
        *("--model.scratch", f"{{vocabulary: 300, vision: {small}}}, text: {small}, "
          "num_key_value_heads: 2}}"),
    ]  # fmt: skip
    assert main(["train", "tiny", *overrides]) == 0
    where = ["--data", "emoji/eval", "--images", "emoji/images"]
    assert main(["evaluate", "tiny/model", "--tasks", "colours", *where]) == 0
    assert "| colours | 1 | " in capsys.readouterr().out
    short = [*where, "--out", "short", "--max-seq-length", "40"]  # too few for an image's tokens
    assert main(["evaluate", "tiny/model", "--tasks", "colours", *short]) == 2
    assert "increase `max_length`" in capsys.readouterr().err
    for setting, value, message in (
        ("--max-seq-length", "0", "max_seq_length=0 leaves no room: the closing turn takes"),
        ("--max-seq-length", "3", "max_seq_length=3 leaves no room"),
        ("--batch-size", "0", "batch_size must be at least 1, got 0"),
    ):
        wrong = [*where, "--out", "wrong", setting, value]
        assert main(["evaluate", "tiny/model", "--tasks", "colours", *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main(["train", "tiny", *overrides]) == 0
    assert "holds a finished run: nothing is trained" in capsys.readouterr().out
    assert main(["embed", "tiny/model", "emoji/images", "--out", "vectors"]) == 0
    capsys.readouterr()
    assert main(["search", "vectors", "the colour red", "--model", "tiny/model", "-k", "2"]) == 0
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[:1] == "{"]
    assert len(hits) == 2
    assert hits[0]["score"] >= hits[1]["score"]
    assert main(["search", "vectors", "an <image>", "--model", "tiny/model"]) == 0
    assert main(["search", "vectors", "an <|image_1|>", "--model", "tiny/model"]) == 2
    assert "the text has an image placeholder" in capsys.readouterr().err
    assert {hit["id"] for hit in hits} <= {f"{name}.png" for name in COLOURS}
