"""What ``llave embed`` reads from a corpus: folders of images, images inside parquet files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llave import images
from llave.corpus import Source
from tests.llave.test_embedding import model, quick, read, texts, write_jsonl


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(file, "PNG")
    return file.getvalue()


def embedding(*inputs: Any) -> np.ndarray:
    return model().encode(list(inputs), normalize_embeddings=True)


def test_what_lies_beside_images_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(images.MISSING, ".heic", "pip install pillow-heif")
    photos = tmp_path / "photos"
    taken = ["a.png", "b.JFIF", "c/d.jpe", "c/e.avif", "f.webp"]
    hidden = ["._a.png", ".thumbnails/x.png", "__MACOSX/._a.png", "c/@eaDir/x.jpg", "c/Thumbs.db"]
    others = ["g.heic", "h.HEIC", "notes.txt", "clip.mov", "README"]
    for name in [*taken, *hidden, *others]:
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(png("red"))
    (tmp_path / "elsewhere").mkdir()
    (photos / "link").symlink_to(tmp_path / "elsewhere")
    (photos / "gone.png").symlink_to(tmp_path / "gone.png")
    report = quick(photos, tmp_path / "out")
    assert read(tmp_path / "out")[0] == taken
    assert report.ignored == {
        "hidden or left by a system": 5,
        ".heic (pip install pillow-heif)": 2,
        ".txt (no image that is read)": 1,
        ".mov (no image that is read)": 1,
        "without a suffix (no image that is read)": 1,
        "links to folders (pass those folders)": 1,
        "broken links or devices": 1,
    }
    assert "left out 2 .heic (pip install pillow-heif), 1 .mov" in capsys.readouterr().err


def test_a_folder_without_images_says_what_there_is(tmp_path: Path) -> None:
    for name in ("photos/a.parquet", "photos/b.parquet", "photos/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"left out: 2 \.parquet \(a source by itself.*, 1 hidden"):
        quick(tmp_path / "photos", tmp_path / "out")


def test_a_folder_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    root = tmp_path / "datasets--someone--photos"
    for name in ("refs", "blobs", "snapshots/1/images"):
        (root / name).mkdir(parents=True)
    (root / "refs" / "main").write_text("1")
    (root / "blobs" / "abc").write_bytes(png("red"))
    (root / "snapshots/1/images/a.png").symlink_to("../../../blobs/abc")
    quick(root, tmp_path / "out")
    assert read(tmp_path / "out")[0] == ["images/a.png"]


@pytest.mark.parametrize("kind", ["struct", "binary", "large_binary"])
def test_images_held_in_parquet(tmp_path: Path, kind: str) -> None:
    (tmp_path / "blue.png").write_bytes(png("blue"))
    contents = [png("red"), b"no image", png("green"), None, None]
    paths = [None, "a.png", "gone.png", "blue.png", None]
    values: Any = contents
    if kind == "struct":
        values = [{"bytes": b, "path": p} for b, p in zip(contents, paths, strict=True)]
        values[-1] = None
        column = pa.array(values, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    else:
        column = pa.array(values, getattr(pa, kind)())
    said = pa.array([None, None, "green", "blue", "text"])
    table = pa.table({"image": column, "text": said, "label": pa.array(range(5))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with pytest.raises(ValueError, match=r"row 1 \(id '1'\): the image in it cannot be read .*no"):
        quick(tmp_path / "a.parquet", tmp_path / "out", shard_rows=2)
    report = quick(tmp_path / "a.parquet", tmp_path / "out", shard_rows=2, on_error="skip")
    assert report.skipped == [
        {"row": 1, "id": "1", "error": "UnidentifiedImageError from its content"}
    ]
    red, green, blue = (Image.new("RGB", (4, 3), c) for c in ("red", "green", "blue"))
    shown = {"text": "blue", "image": blue} if kind == "struct" else "blue"
    expected = embedding(red, {"text": "green", "image": green}, shown, "text")
    np.testing.assert_allclose(read(tmp_path / "out")[1], expected, atol=1e-6)


def test_columns_of_other_names_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"img": ["a.png"], "caption": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has the columns img, caption; it must have text or"):
        quick(tmp_path / "a.parquet", tmp_path / "out", on_error="skip")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_a_pointer_of_git_lfs_says_so(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(ValueError, match="is a pointer of git-lfs"):
        quick(tmp_path / name, tmp_path / "out")


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"a\.parquet is no whole parquet file"):
        quick(tmp_path / "a.parquet", tmp_path / "out")


UNUSABLE = [
    ({"id": "b"}, "row 1 has neither text nor image"),
    ({"text": "", "image": None}, "row 1 has neither text nor image"),
    ({"text": 3}, "row 1: text must be a string, got 3"),
    ({"text": ["a"]}, "row 1: text must be a string"),
    ({"text": "a", "image": 3}, "row 1: image must be a path"),
    ({"text": "a", "id": 1.5}, "row 1: id must be a string, got 1.5"),
    ({"text": "a", "id": "\ud800"}, "row 1: the id .* is not valid Unicode"),
    ({"text": "a \udfff"}, "row 1: the text .* is not valid Unicode"),
    ({"text": "again", "id": "doc 0"}, "rows? .*1 ha(ve|s) the (same )?id"),
    (["a"], "row 1 must be an object"),
    ("{", "row 1 is not JSON"),
    ("[" * 100_000, "row 1 is not JSON"),
    ({"image": "gone.png"}, "gone.png"),
    ({"image": "cut.png"}, "cut.png"),
]


@pytest.mark.parametrize(("record", "problem"), UNUSABLE)
def test_a_row_that_cannot_be_used_is_named_or_left_out(
    tmp_path: Path, record: Any, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.png").write_bytes(png("red")[:40])
    first, last = texts(2)
    source = write_jsonl(tmp_path / "a.jsonl", [first, record, last])
    if isinstance(record, str):
        source.write_text(f"{json.dumps(first)}\n{record}\n{json.dumps(last)}\n")
    with pytest.raises(ValueError, match=problem):
        quick(source, tmp_path / "out")
    report = quick(source, tmp_path / "out", on_error="skip")
    assert (report.rows, [row["row"] for row in report.skipped]) == (2, [1])
    assert read(tmp_path / "out")[0] == ["doc 0", "doc 1"]
    said = capsys.readouterr().err
    assert "2 rows in" in said
    assert "1 skipped" in said
    assert report.skipped[0]["error"] in said
    assert quick(source, tmp_path / "out", on_error="skip").skipped == report.skipped


def test_parquet_text_that_is_no_unicode_is_named_or_left_out(tmp_path: Path) -> None:
    data = pa.array([b"a", b"\xff\xfe", b"c", b"d"]).view(pa.string())
    pq.write_table(pa.table({"text": data}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="row 1 is not valid Unicode"):
        quick(tmp_path / "a.parquet", tmp_path / "out")
    report = quick(tmp_path / "a.parquet", tmp_path / "out", on_error="skip")
    assert [row["row"] for row in report.skipped] == [1]
    assert read(tmp_path / "out")[0] == ["0", "2", "3"]


def test_ranges_start_anywhere(tmp_path: Path) -> None:
    """Unusable rows count as rows, in JSONL and in parquet."""
    records = [{"text": f"{n}"} if n % 3 else {"text": None} for n in range(40)]
    write_jsonl(tmp_path / "a.jsonl", records)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet", row_group_size=7)
    for name in ("a.jsonl", "a.parquet"):
        source = Source(tmp_path / name, None, 5)
        whole = list(source.rows(0))
        assert [row.number for row in whole if row.problem] == list(range(0, 40, 3))
        for first in range(0, 40, 5):
            assert list(source.rows(first, first + 5)) == whole[first : first + 5]
