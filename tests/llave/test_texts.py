"""Every reader embeds any valid text. It names a row with invalid text, which can be skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

for needed in ("sentence_transformers", "torchvision", "datasets"):
    pytest.importorskip(needed)

from PIL import Image  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402

import llave  # noqa: E402
from llave.data import load_training  # noqa: E402
from llave.embedding import embed, ranges, read_manifest, read_shard  # noqa: E402
from llave.evaluation import evaluate  # noqa: E402
from llave.search import search  # noqa: E402
from tests.llave import tiny  # noqa: E402

ODD = [
    *("<image>", "<video>", "<|im_start|>user\n", "<|im_end|>", "<|endoftext|>", "<pad>", "<s>"),
    "<rss><channel><image><url>a.png</url></image></channel></rss>\n",
    "<svg><image href='a.png'/></svg>",
    '<video src="a.mp4"></video>',
    "![](<image>) <|image_x|> {{ messages }} {% raise %}",
    *("https://example.invalid/cat.png", "clip.mp4", "data:image/png;base64,AAAA", "/etc/hostname"),
    *(" ", "\t\n", "\r\n", "\x00", "a\x00b", "\x1b[0m", "\u2028", "\u202e", "\ufeff", "\ufdd00"),
    *("\uffff", "\U0010ffff", "e\u0301", "\U0001f642\u200d\U0001f642", "null", "NaN", "3"),
    *("word " * 5000, "x" * 20000, "<image>" * 2000, "\U0001f642" * 3000),
]
# JSON values, and the error for each.
BAD = {
    '"\\ud800"': "not valid Unicode",
    '"a \\udc00\\ud800 b"': "not valid Unicode",
    '["a"]': "must be a",
    '{"a": "<image>"}': "must be a",
    "true": "must be a",
    '"see <|image_1|>"': "image placeholder|the placeholder <.image_1.>",
    '""': "neither text",
    "null": "neither text",
}


@pytest.fixture(scope="module")
def model() -> SentenceTransformer:
    return llave.build(tiny.llava_onevision(), max_seq_length=200, device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (24, 24), (200, 100, 50)).save(tmp_path / "a.png")
    return tmp_path


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def inputs(texts: list[str], image: Image.Image) -> list[dict[str, Any]]:
    return [{"text": text} for text in texts] + [{"text": text, "image": image} for text in texts]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_embed_and_search(model: SentenceTransformer, folder: Path, suffix: str) -> None:
    rows = [{"text": text, "image": ""} for text in ODD]
    rows += [{"text": text, "image": "a.png"} for text in ODD]
    source = write(folder / f"corpus.{suffix}", rows)
    report = embed(model, source, folder / "out", shard_rows=9)
    assert (report.rows, report.skipped) == (len(rows), [])
    manifest = read_manifest(folder / "out")
    shards = [read_shard(folder / "out" / span.file, span, manifest) for span in ranges(manifest)]
    items = inputs(ODD, Image.open(folder / "a.png"))
    expected = model.encode(items, normalize_embeddings=True)
    np.testing.assert_allclose(np.concatenate([s.vectors for s in shards]), expected, atol=1e-5)
    for hits in search(folder / "out", items, model=model, k=1):
        assert hits[0].score == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("text", "message"), BAD.items())
def test_embed_names_and_skips(
    model: SentenceTransformer, folder: Path, text: str, message: str
) -> None:
    source = folder / "corpus.jsonl"
    source.write_text(f'{{"text": "a"}}\n{{"text": {text}}}\n{{"text": "<image>"}}\n')
    with pytest.raises(ValueError, match=f"row 1 .*({message})|row 1: .*({message})"):
        embed(model, source, folder / "out")
    report = embed(model, source, folder / "skipped", on_error="skip")
    assert report.rows == 2
    assert [skipped["row"] for skipped in report.skipped] == [1]


def invalid(rows: int, bad: int) -> pa.Array:
    """Texts of one byte. One is not valid UTF-8, which a parquet file can hold."""
    data = bytearray(b"a" * rows)
    data[bad] = 0xFF
    offsets = np.arange(rows + 1, dtype=np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(bytes(data))]
    return pa.Array.from_buffers(pa.string(), rows, buffers)


def test_embed_names_and_skips_bytes_that_are_no_text(
    model: SentenceTransformer, folder: Path
) -> None:
    pq.write_table(pa.table({"text": invalid(5, 3)}), folder / "corpus.parquet")
    with pytest.raises(ValueError, match="row 3 is not valid Unicode"):
        embed(model, folder / "corpus.parquet", folder / "out")
    report = embed(model, folder / "corpus.parquet", folder / "skipped", on_error="skip")
    assert (report.rows, [skipped["row"] for skipped in report.skipped]) == (4, [3])


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_training(model: SentenceTransformer, folder: Path, suffix: str) -> None:
    rows = [
        {"qry": text, "qry_image_path": image, "pos_text": text, "pos_image_path": ""}
        for text in ODD
        for image in ("", "a.png")
    ]
    write(folder / "train" / f"S.{suffix}", rows)
    (subset,) = load_training(folder / "train", images=folder).values()
    batch = subset[:]
    assert len(batch["anchor"]) == len(rows)
    said = [item if isinstance(item, str) else item["text"] for item in batch["anchor"]]
    assert said == [row["qry"] for row in rows]
    assert np.isfinite(model.encode(batch["anchor"])).all()
    assert np.isfinite(model.encode(batch["positive"])).all()


@pytest.mark.parametrize("column", ["qry", "pos_text"])
@pytest.mark.parametrize(("text", "message"), BAD.items())
def test_training_names_and_skips(
    folder: Path, text: str, message: str, column: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "pos_text" if column == "qry" else "qry"
    lines = [
        f'{{"{column}": {value}, "{other}": "<video>", "qry_image_path": "", "pos_image_path": ""}}'
        for value in ('"a"', text, '"<image>"')
    ]
    (folder / "S.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=f"subset S, row 1: .*({message})"):
        load_training(folder)
    (subset,) = load_training(folder, on_error="skip").values()
    assert subset.with_format(None)[column] == ["a", "<image>"]
    assert "1 of 3 rows left out, the first row 1: " in capsys.readouterr().out


def test_a_placeholder_in_a_negative_counts_where_it_is_used(folder: Path) -> None:
    row = dict.fromkeys(("qry", "pos_text", "neg_text"), "a")
    row |= dict.fromkeys(("qry_image_path", "pos_image_path", "neg_image_path"), "")
    write(folder / "train" / "S.jsonl", [row, row | {"neg_text": "<|image_1|>\nb"}])
    with pytest.raises(ValueError, match="subset S, row 1: the text has the placeholder"):
        load_training(folder / "train")
    assert len(load_training(folder / "train", on_error="skip")["S"]) == 1
    assert len(load_training(folder / "train", negatives=False)["S"]) == 2


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_evaluation(model: SentenceTransformer, folder: Path, suffix: str) -> None:
    rows = [
        {
            "qry_text": text,
            "qry_img_path": "",
            "tgt_text": ODD,
            "tgt_img_path": ["a.png"] * len(ODD),
        }
        for text in ODD
    ]
    write(folder / "data" / f"S.{suffix}", rows)
    (result,) = evaluate(
        model, ["S"], data=folder / "data", images=folder, out=folder / "out", batch_size=32
    )
    assert result.rows == len(ODD)


@pytest.mark.parametrize(("text", "message"), list(BAD.items())[:-2])
def test_evaluation_names(
    model: SentenceTransformer, folder: Path, text: str, message: str
) -> None:
    (folder / "S.jsonl").write_text(
        f'{{"qry_text": "<image>", "qry_img_path": "", "tgt_text": ["a", {text}], '
        '"tgt_img_path": ["", ""]}\n'
    )
    with pytest.raises(ValueError, match=f"task S: (row 0 .*|the text 'see .*)({message})"):
        evaluate(model, ["S"], data=folder, out=folder / "out")
