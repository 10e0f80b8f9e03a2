"""Data folders on disk: which files are subsets, and the types of their columns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

for needed in ("sentence_transformers", "datasets", "PIL", "pyarrow"):
    pytest.importorskip(needed)

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from datasets import Dataset, DatasetDict, disable_progress_bars  # noqa: E402
from PIL import Image  # noqa: E402

from llave.data import load_evaluation, load_training  # noqa: E402
from llave.epochs import joined  # noqa: E402
from llave.files import left_behind  # noqa: E402

COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    disable_progress_bars()


def rows(*queries: str | None, **other: Any) -> list[dict[str, Any]]:
    return [dict(zip(COLUMNS, (q, "", f"p {q}", ""), strict=True)) | other for q in queries]


def write(path: Path, records: list[dict[str, Any]], schema: pa.Schema | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".parquet":
        pq.write_table(pa.Table.from_pylist(records, schema), path)
    elif path.suffix.lower() == ".jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    else:
        path.write_text(json.dumps(records))
    return path


def queries(source: Path, **arguments: Any) -> dict[str, list[str]]:
    loaded = load_training(source, **arguments)
    return {name: list(subset.with_format(None)["qry"]) for name, subset in loaded.items()}


LEFTOVERS = [
    "._train.jsonl", ".DS_Store", ".cache/huggingface/x.json", ".git/config.json",
    "__MACOSX/._train.jsonl", "@eaDir/train.jsonl/x.json", "Thumbs.db", "desktop.ini",
    ".ipynb_checkpoints/train.jsonl", "images/a.png", "videos/a.mp4", "README.md", "notes.txt",
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".JSONL", ".Parquet"])
@pytest.mark.parametrize("name", ["train", "train/part"])
def test_what_lies_beside_the_data_is_passed_over(tmp_path: Path, suffix: str, name: str) -> None:
    write(tmp_path / f"{name}{suffix}", rows("a", "b"))
    for other in [*LEFTOVERS, *(f"train/{leftover}" for leftover in LEFTOVERS if "/" in name)]:
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_bytes(b"\0\5\26\7 no data")
    assert queries(tmp_path) == {"train": ["a", "b"]}


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("._a.png", True), (".thumbnails", True), ("__MACOSX", True), ("Thumbs.db", True),
        ("Icon\r", True), ("a.png", False), ("_a.png", False), ("a.db", False), ("cache", False),
    ],
)  # fmt: skip
def test_what_a_system_leaves_behind(name: str, left: bool) -> None:
    assert left_behind(name) is left


def test_data_of_other_kinds_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.jsonl", rows("a"))
    Dataset.from_list(rows("b")).save_to_disk(tmp_path / "saved")
    (tmp_path / "more" / ".cache").mkdir(parents=True)
    for name in ("b.csv", "c.jsonl.gz", "notes.txt", "more/d.tsv", "more/.cache/e.csv"):
        (tmp_path / name).touch()
    assert queries(tmp_path) == {"a": ["a"], "saved": ["b"]}
    assert "not read: b.csv, c.jsonl.gz, more/d.tsv; only" in capsys.readouterr().out
    queries(tmp_path / "saved")
    assert "not read" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_files_of_another_format_are_said(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A metadata file in the images folder beside the data is reported, not read as data."""
    write(tmp_path / "images" / f"metadata{suffix}", [{"file_name": "a.png", "text": "a cat"}])
    with pytest.raises(ValueError, match=r"no file of .* has the columns qry, "):
        queries(tmp_path)
    write(tmp_path / "train.jsonl", rows("a"))
    (tmp_path / "state.json").write_text("{}")
    capsys.readouterr()
    assert queries(tmp_path) == {"train": ["a"]}
    assert "images is passed over" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"subset images of .* lacks the columns pos_image_path"):
        queries(tmp_path, subsets=["images"])


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_one_file_of_a_subset_is_of_another_format(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "a" / f"0{suffix}", rows("a"))
    write(tmp_path / "a" / f"1{suffix}", [{"query": "b"}])
    with pytest.raises(ValueError, match="subset a, row 1: the query has neither text"):
        queries(tmp_path)
    assert queries(tmp_path, on_error="skip") == {"a": ["a"]}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_a_file_without_rows_beside_others(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "a" / f"0{suffix}", rows("a"))
    write(tmp_path / "a" / f"1{suffix}", [], typed(pa.string()))
    assert queries(tmp_path) == {"a": ["a"]}


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for suffix in (".jsonl", ".parquet"):
        write(tmp_path / f"a{suffix}", rows("a"))
    with pytest.raises(ValueError, match=r"a\.jsonl and .*a\.parquet would both be the subset a"):
        queries(tmp_path)


def test_a_folder_without_data_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"holds no \.parquet.* there is a\.csv, images"):
        queries(tmp_path)
    write(tmp_path / "a.jsonl", rows("a"))
    with pytest.raises(ValueError, match=r"images is not in .*; there are a"):
        queries(tmp_path, subsets=["images"])


def download(root: Path) -> Path:
    """The folder that ``hf download --local-dir`` makes for MMEB's training set."""
    for name in ("VOC2007", "GQA"):
        for split in ("original", "diverse_instruction"):
            for part in range(2):
                file = root / name / f"{split}-{part:05d}-of-00002.parquet"
                write(file, rows(f"{name} {split} {part}"))
    (root / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (root / ".gitattributes").touch()
    (root / "images_zip").mkdir()
    return root


EXPECTED = {name: [f"{name} original {part}" for part in (0, 1)] for name in ("VOC2007", "GQA")}


def test_a_download_gives_one_split(tmp_path: Path) -> None:
    download(tmp_path)
    assert queries(tmp_path, split="original") == EXPECTED
    with pytest.raises(
        ValueError,
        match=r"subset GQA has files of diverse_instruction, original; split='train' must be one",
    ):
        queries(tmp_path)
    shutil.rmtree(tmp_path / "VOC2007")
    for file in (tmp_path / "GQA").glob("diverse*"):
        file.unlink()
    assert queries(tmp_path) == {"GQA": EXPECTED["GQA"]}  # only the files that are left


def test_test_rows_are_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "GQA" / "test-00000-of-00001.parquet", rows("a"))
    with pytest.raises(ValueError, match="files of test; split='train' must be one of them"):
        queries(tmp_path)


CARD = """---
configs:
- config_name: VOC
  data_files:
  - split: original
    path: VOC2007/original-*
  - split: other
    path: [VOC2007/diverse_instruction-*]
- config_name: gone
  data_files: gone/*.parquet
- config_name: folder
  data_dir: GQA
---
# Training data
"""


def test_a_dataset_card_says_what_the_subsets_are(tmp_path: Path) -> None:
    download(tmp_path)
    (tmp_path / "README.md").write_text(CARD)
    expected = {"VOC": EXPECTED["VOC2007"], "folder": EXPECTED["GQA"]}
    assert queries(tmp_path, split="original") == expected
    assert queries(tmp_path, split="original", subsets=["GQA"]) == {"GQA": EXPECTED["GQA"]}
    with pytest.raises(ValueError, match=r"gone is not in .*; there are GQA, VOC2007, VOC, folder"):
        queries(tmp_path, subsets=["gone"])
    for other in ("# No card\n---\n", "---\n: : [\n---\n"):
        (tmp_path / "README.md").write_text(other)
        assert queries(tmp_path, split="original") == EXPECTED


def card(tmp_path: Path, configs: str) -> None:
    (tmp_path / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")


@pytest.mark.parametrize("files", ["a/**", "a/**/*.jsonl", "[a/b.jsonl, a/c/**]", "{train: a/**}"])
def test_patterns_of_a_dataset_card(tmp_path: Path, files: str) -> None:
    for name in ("b", "c/d"):
        write(tmp_path / "a" / f"{name}.jsonl", rows(name))
    card(tmp_path, f"[{{config_name: 2024, data_files: {files}}}]")
    assert queries(tmp_path) == {"2024": ["b", "c/d"]}


@pytest.mark.parametrize("configs", ["x", "[x]", "[{data_files: [{split: train}]}]"])
def test_a_dataset_card_of_another_form_is_named(tmp_path: Path, configs: str) -> None:
    write(tmp_path / "train.jsonl", rows("a"))
    card(tmp_path, configs)
    with pytest.raises(ValueError, match=r"README\.md: its configs are not as the hub has them"):
        queries(tmp_path)


def cached(root: Path, revision: str, files: dict[str, Path]) -> Path:
    """A revision in the hub's cache. Its files are links to blobs."""
    snapshot = root / "snapshots" / revision
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    for number, (name, file) in enumerate(files.items()):
        blob = root / "blobs" / f"{revision}{number:04x}"
        shutil.move(file, blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(Path(*[".."] * (2 + name.count("/")), "blobs", blob.name))
    return snapshot


def test_the_cache_of_the_hub(tmp_path: Path) -> None:
    root = tmp_path / "datasets--someone--pairs"
    picture = tmp_path / "a.png"
    Image.new("RGB", (2, 2), "red").save(picture)
    record = rows("a", qry_image_path="images/a.png")
    files = {
        "GQA/train-00000-of-00001.parquet": write(tmp_path / "a.parquet", record),
        "images/a.png": picture,
    }
    snapshot = cached(root, "one", files)
    for source in (snapshot, root):
        loaded = load_training(source, images=source)["GQA"]
        assert loaded[0]["anchor"]["image"].getpixel((0, 0)) == (255, 0, 0)
    cached(root, "two", {"b.jsonl": write(tmp_path / "b.jsonl", rows("b"))})
    with pytest.raises(ValueError, match="holds the revisions one, two; pass the folder of one"):
        queries(root)
    (root / "refs" / "main").write_text("two")
    assert queries(root) == {"b": ["b"]}
    (snapshot / "out.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "secret.png").touch()
    write(tmp_path / "c" / "c.jsonl", rows("c", qry_image_path="out.png"))
    with pytest.raises(ValueError, match="leaves the folder"):
        load_training(tmp_path / "c", images=snapshot)["c"][0]


def test_the_whole_cache_of_the_hub_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        file = write(tmp_path / "a.jsonl", rows("a"))
        cached(tmp_path / f"datasets--someone--{name}", "one", {"a.jsonl": file})
    with pytest.raises(ValueError, match=r"is the hub's cache; pass a folder in it, e\.g\. .*a$"):
        queries(tmp_path)


def test_missing_shards_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in (0, 2):
        write(tmp_path / "GQA" / f"train-{part:05d}-of-00003.parquet", rows(f"{part}"))
    assert queries(tmp_path) == {"GQA": ["0", "2"]}
    assert "GQA: 2 of 3 files are there, the first" in capsys.readouterr().out


def test_parquet_as_the_hub_converts_it(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / "GQA" / split / "0000.parquet", rows(split))
    assert queries(tmp_path) == {"GQA": ["train"]}


@pytest.mark.parametrize("place", ["train-{}.parquet", "data/train-{}.parquet"])
def test_shards_are_one_subset(tmp_path: Path, place: str) -> None:
    for part in range(2):
        file = tmp_path / place.format(f"{part:05d}-of-00002")
        write(file, rows(f"{part}"))
        write(file.with_name(file.name.replace("train", "test")), rows("test"))
    (found,) = queries(tmp_path).values()
    assert found == ["0", "1"]


def test_what_save_to_disk_writes(tmp_path: Path) -> None:
    splits = {split: Dataset.from_list(rows(split)) for split in ("train", "test")}
    DatasetDict(splits).save_to_disk(tmp_path / "both" / "GQA")
    splits["train"].save_to_disk(tmp_path / "one" / "GQA")
    for source in ("both", "one", "both/GQA", "one/GQA"):
        assert queries(tmp_path / source) == {"GQA": ["train"]}
    with pytest.raises(ValueError, match=r"GQA has the splits train, test, not 'original'"):
        queries(tmp_path / "both", split="original")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a/b.json"])
def test_a_pointer_of_git_lfs_says_so(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(ValueError, match="is a pointer of git-lfs"):
        queries(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", rows("a"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet is no whole parquet file"):
        queries(tmp_path)
    path.unlink()
    (tmp_path / "a.json").write_text('[{"qry": "a"')
    with pytest.raises(ValueError, match=r"a\.json is not JSON"):
        queries(tmp_path)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=r"a\.json: there are no rows"):
        queries(tmp_path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_nulls_in_one_file_and_text_in_the_next(tmp_path: Path, suffix: str) -> None:
    bare = [{**row, "qry_image_path": None, "neg_text": None} for row in rows("a", "b")]
    full = rows("c", neg_text="n", neg_image_path="")
    write(tmp_path / "train" / f"0{suffix}", bare)
    write(tmp_path / "train" / f"1{suffix}", full)
    (subset,) = load_training(tmp_path).values()
    assert subset[:]["negative"] == ["p a", "p b", "n"]


def test_nulls_in_the_first_rows_of_a_file(tmp_path: Path) -> None:
    """There are more nulls than the rows from which a reader takes a column's type."""
    bare = [{**row, "pos_image_path": None} for row in rows(*["a" * 1000] * 12_000)]
    write(tmp_path / "train.jsonl", [*bare, *rows("last", extra=1)])
    assert len(queries(tmp_path)["train"]) == 12_001


def typed(text: pa.DataType, **unused: pa.DataType) -> pa.Schema:
    return pa.schema(dict.fromkeys(COLUMNS, text) | unused)


def test_subsets_of_other_types_and_columns_are_mixed(tmp_path: Path) -> None:
    plain, large = pa.string(), pa.large_string()
    write(tmp_path / "a.parquet", rows("a", score=1), typed(plain, score=pa.int8()))
    write(tmp_path / "b.parquet", rows("b", score="x"), typed(large, score=plain))
    write(tmp_path / "c.parquet", rows("c"), typed(pa.dictionary(pa.int32(), plain)))
    write(tmp_path / "d.parquet", rows("d", tags=["x"]), typed(plain, tags=pa.list_(plain)))
    write(tmp_path / "e.jsonl", rows("e", extra={"any": "thing"}))
    write(tmp_path / "f.parquet", rows("f", neg_text=None, neg_image_path=None))
    mixed = joined(load_training(tmp_path, negatives=False))
    assert mixed[:]["anchor"] == list("abcdef")
    assert mixed[:]["positive"] == [f"p {name}" for name in "abcdef"]


def test_datasets_of_a_user_s_own_are_mixed() -> None:
    kinds = (pa.null(), pa.large_string(), pa.string())
    tables = [
        pa.table({"anchor": ["q"], "positive": pa.array([None if k == pa.null() else "p"], k)})
        for k in kinds
    ]
    mixed = joined({f"{n}": Dataset(table) for n, table in enumerate(tables)})
    assert mixed[:]["positive"] == [None, "p", "p"]


def test_numbers_stand_for_their_text(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", rows("a", pos_text=7))
    write(tmp_path / "b.parquet", rows("b", pos_text=7))
    for subset in load_training(tmp_path).values():
        assert subset[0]["positive"] == "7"


@pytest.mark.parametrize("value", [{"a": 1}, [1], True, "\ud800"])
def test_values_that_are_no_text_are_named_or_left_out(
    tmp_path: Path, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.jsonl", [*rows("a"), *rows("b", pos_text=value), *rows("c")])
    with pytest.raises(ValueError, match=r"subset a, row 1: pos_text (must be a text|is not v)"):
        load_training(tmp_path)
    assert queries(tmp_path, on_error="skip") == {"a": ["a", "c"]}
    said = capsys.readouterr().out
    assert "a: 1 of 3 rows left out, the first row 1: pos_text" in said


def test_lines_that_are_no_object_are_named_or_left_out(tmp_path: Path) -> None:
    lines = [json.dumps(rows(name)[0]) for name in "abc"]
    lines[1:1] = ["{", '"text"', "", "[" * 100_000]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    with pytest.raises(ValueError, match="subset a, row 1: it is no JSON object"):
        load_training(tmp_path)
    assert queries(tmp_path, on_error="skip") == {"a": ["a", "b", "c"]}


def test_columns_are_there_where_no_row_can_be_used(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", rows("a", qry_image_path={"path": "a.png"}))
    with pytest.raises(ValueError, match="subset a, row 0: qry_image_path must be a text"):
        queries(tmp_path)


def test_parquet_columns_of_other_types_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", rows("a", pos_text={"bytes": b"x"}))
    with pytest.raises(ValueError, match=r"a\.parquet: column pos_text is of type struct"):
        load_training(tmp_path)


@pytest.mark.parametrize("side", ["query", "positive"])
def test_rows_without_a_side_are_named_or_left_out(tmp_path: Path, side: str) -> None:
    empty = {"query": {"qry": None}, "positive": {"pos_text": ""}}[side]
    write(tmp_path / "a.jsonl", [*rows("a"), *rows("b", **empty)])
    with pytest.raises(ValueError, match=f"subset a, row 1: the {side} has neither text"):
        load_training(tmp_path)
    assert queries(tmp_path, on_error="skip") == {"a": ["a"]}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_evaluation_files_of_other_types(tmp_path: Path, suffix: str) -> None:
    row = {"qry_text": "q", "qry_img_path": None, "tgt_text": ["a", "b"], "tgt_img_path": None}
    paths = [None, ["", ""]]
    for number, path in enumerate(paths):
        record = row | {"tgt_img_path": path, "tgt_text": ["a", "b"] if path else None}
        write(tmp_path / "t" / f"{number}{suffix}", [record])
    with pytest.raises(ValueError, match="row 0 of task t has 0 candidate texts"):
        load_evaluation(tmp_path, "t")
    (tmp_path / "t" / f"0{suffix}").unlink()
    assert load_evaluation(tmp_path, "t") == [(("q", ""), [("a", ""), ("b", "")], 0)]
    write(tmp_path / "v.jsonl", [{"caption": "c", "video": "v.mp4"}, {"caption": "c"}])
    with pytest.raises(ValueError, match="row 1 of task v lacks its caption or its video"):
        load_evaluation(tmp_path, "v")
