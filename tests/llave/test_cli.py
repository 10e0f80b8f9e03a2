"""The ``llave`` command: help with examples, one-line errors, all commands on tiny data."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

for needed in ("sentence_transformers", "datasets", "accelerate", "torchvision"):
    pytest.importorskip(needed)

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from llave.cli import main  # noqa: E402
from llave.recipe import read_recipe  # noqa: E402
from llave.shards import read_manifest  # noqa: E402

EVALUATE = ["evaluate", "bare", "--tasks", "t", "--data", "d", "--images", "i"]
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (90, 90, 90)}


@pytest.mark.parametrize(
    "command", ["train", "evaluate", "convert", "embed", "compress", "index", "search"]
)
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
        (["search", "nowhere", "a dog", "--model", "m", "--queries", "q"], "give one of them"),
        (["search", "nowhere", "--model", "m", "--html", "p"], "--html and --corpus go together"),
        (["search", "x", "--model", "m", "--html", "bare", "--corpus", "c"], "html=bare exists"),
        (["search", "x", "--model", "m", "--html", "p", "--corpus", "c"], "--corpus c does not"),
        ([*EVALUATE, "--html", "bare"], "html=bare exists; choose another file"),
        ([*EVALUATE, "--plot", "a.doc"], "plot=a.doc needs the suffix of a format"),
        ([*EVALUATE, "--plot", "a.png", "--before", "bare"], "a folder with results of these"),
        (["index", "bare"], "bare is not a folder of embeddings"),
        (["compress", "bare", "--out", "small"], "bare is not a folder of embeddings"),
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
    assert main(["search", "vectors", "--model", "tiny/model", "-k", "2", "the colour red"]) == 0
    behind = capsys.readouterr().out
    assert main(["search", "vectors", "the colour red", "--model", "tiny/model", "-k", "2"]) == 0
    said = capsys.readouterr().out
    assert said == behind  # the query may stand behind the options
    hits = [json.loads(line) for line in said.splitlines() if line[:1] == "{"]
    assert len(hits) == 2
    assert hits[0]["score"] >= hits[1]["score"]
    assert main(["search", "vectors", "an <image>", "--model", "tiny/model"]) == 0
    assert main(["search", "vectors", "an <|image_1|>", "--model", "tiny/model"]) == 2
    assert "the text has an image placeholder" in capsys.readouterr().err
    assert {hit["id"] for hit in hits} <= {f"{name}.png" for name in COLOURS}
    looks(monkeypatch, capsys, where)


def looks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: list[str]
) -> None:
    """Pages, figures, an index and a smaller copy, of the model and folder made above."""
    again = [*where, "--plot", "figure.png", "--before", "results", "--html", "worst.html"]
    assert main(["evaluate", "tiny/model", "--tasks", "colours", *again]) == 0
    assert "colours" in Path("worst.html").read_text()
    assert Path("figure.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main(["index", "vectors"]) == 0
    assert "Flat of 4 rows" in (said := capsys.readouterr().out)
    assert "recall@10 against exact search, for rows of the corpus: 1.000" in said
    smaller = ["--truncate-dim", "16", "--dtype", "int8"]
    assert main(["compress", "vectors", "--out", "small", *smaller]) == 0
    assert "recall@10 against the whole embeddings" in capsys.readouterr().out
    assert main(["embed", "tiny/model", "emoji/images", "--out", "at-once", *smaller]) == 0
    assert "recall@10 against the whole embeddings, in a sample of 4" in capsys.readouterr().err
    once, later = read_manifest("at-once"), read_manifest("small")
    np.testing.assert_allclose(once.pop("ranges"), later.pop("ranges"), atol=1e-5)
    assert once == later
    Path("queries.txt").write_text("the colour red\nblue <b>\n")
    asked = ["--model", "tiny/model", "-k", "3"]
    page = [*asked, "--queries", "queries.txt", "--html", "found.html", "--corpus", "emoji/images"]
    answers = {}
    for folder in ("vectors", "small"):
        assert main(["search", folder, *asked, "--queries", "queries.txt"]) == 0
        answers[folder] = capsys.readouterr().out
        found = [json.loads(line) for line in answers[folder].splitlines()]
        assert [hit["query"] for hit in found] == ["0"] * 3 + ["1"] * 3
    assert main(["search", "vectors", "red", *asked, "--truncate-dim", "16"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(["search", "vectors", "red", *asked, "--truncate-dim", "99"]) == 2
    assert "truncate_dim must be in 1..32, got 99" in capsys.readouterr().err
    assert main(["search", "vectors", *page, "--backend", "faiss"]) == 0
    faiss = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    exact = [json.loads(line) for line in answers["vectors"].splitlines()]
    assert [hit["row"] for hit in faiss] == [hit["row"] for hit in exact]
    assert "blue &lt;b&gt;" in Path("found.html").read_text()
    monkeypatch.setattr("sys.stdin", io.StringIO("the colour red\n\nblue <b>"))
    assert main(["search", "vectors", *asked]) == 0
    typed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [hit.pop("query") for hit in typed] == ["the colour red"] * 3 + ["blue <b>"] * 3
    assert [hit["row"] for hit in typed] == [hit["row"] for hit in exact]
