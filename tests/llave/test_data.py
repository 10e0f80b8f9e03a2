"""MMEB's formats: what the trainer and the evaluation get from rows and images, good or bad."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

for needed in ("sentence_transformers", "datasets", "PIL", "pyarrow"):
    pytest.importorskip(needed)

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from datasets import Dataset, DatasetDict  # noqa: E402
from PIL import Image  # noqa: E402
from sentence_transformers.base.data_collator import BaseDataCollator  # noqa: E402

from llave import data, media  # noqa: E402
from llave.data import load_evaluation, load_training  # noqa: E402
from llave.epochs import joined  # noqa: E402
from llave.media import content_id  # noqa: E402

ROOT = Path(__file__).parents[2]
COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
MARK = "<|image_1|>\n"
Row = tuple[str, ...]


class Folders:
    """A folder of subsets beside a folder of images."""

    def __init__(self, root: Path) -> None:
        self.root, self.source, self.images = root, root / "train", root / "images"
        self.source.mkdir()
        self.images.mkdir()
        for n in range(6):
            Image.new("RGB", (4, 4), (40 * n, 0, 0)).save(self.images / f"{n}.png")

    def write(self, name: str, rows: list[Row], suffix: str = ".jsonl") -> None:
        records = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
        path = self.source / (name + suffix)
        path.parent.mkdir(exist_ok=True)
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(records), path)
        elif suffix == ".json":
            path.write_text(json.dumps(records))
        else:
            path.write_text("\n".join(map(json.dumps, records)))

    def load(self, name: str = "a", **arguments: Any) -> Dataset:
        return load_training(self.source, images=self.images, **arguments)[name]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return Folders(tmp_path)


def pairs(count: int, first: int = 0) -> list[Row]:
    """Rows with an image query, a text target and no negative."""
    span = range(first, first + count)
    return [(f"{MARK}q{n}", f"{n % 6}.png", f"p{n}", "", "", "") for n in span]


def queries(subset: Dataset) -> list[str]:
    return list(subset.with_format(None)["qry"])


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
@pytest.mark.parametrize("name", ["a", "a/part-0"])
def test_files_and_folders_of_files(folders: Folders, name: str, suffix: str) -> None:
    folders.write(name, pairs(3), suffix)
    subset = folders.load()
    assert len(subset) == 3
    row = subset[1]
    assert list(row) == ["anchor", "positive", "label"]
    assert row["anchor"]["text"] == f"{MARK}q1"
    assert row["anchor"]["image"].getpixel((0, 0)) == (40, 0, 0)
    assert row["positive"] == "p1"
    assert row["label"] == [content_id("p1")]


def test_images_are_opened_when_a_row_is_read(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    really = media.open_rgb
    monkeypatch.setattr(
        media, "open_rgb", lambda file, way: opened.append(file.name) or really(file, way)
    )
    folders.write("a", pairs(6))
    subset = folders.load(cap=5)
    list(data.texts_of(subset))
    assert opened == []
    subset[0]
    assert len(opened) == 1
    subset[1:4]
    assert len(opened) == 4


def test_negatives_are_a_column_where_rows_have_them(folders: Folders) -> None:
    folders.write("a", [("q", "", "p", "", "n", ""), ("q", "", "p", "", MARK, "2.png")])
    row = folders.load()[1]
    assert list(row) == ["anchor", "positive", "negative", "label"]
    assert row["negative"]["image"].getpixel((0, 0)) == (80, 0, 0)
    assert row["label"] == [content_id("p"), content_id(row["negative"])]
    folders.write("b", pairs(2))
    assert "negative" not in folders.load("b")[0]


@pytest.mark.parametrize("name", ["a\0.png", "a" * 5000])
def test_what_cannot_be_a_path_is_named_or_left_out(folders: Folders, name: str) -> None:
    folders.write("a", [*pairs(1), ("q", name, "p", "", "", ""), *pairs(1, 2)])
    with pytest.raises(ValueError, match=r"subset a, row 1: 'a.* cannot be a path"):
        folders.load()[:]
    assert len(folders.load(on_error="skip")) == 2


@pytest.mark.parametrize("name", ["a.mp4", "a.WMV", "a.3gp", "a.MTS", "a.flv", "a.webm"])
def test_what_cameras_and_players_call_videos(folders: Folders, name: str) -> None:
    pytest.importorskip("av")
    (folders.images / name).write_bytes(b"no video")
    folders.write("a", [(MARK, name, "p", "", "", "")])
    with pytest.raises(ValueError, match=rf"row 0: video '{name}' in .* cannot be read"):
        folders.load()[0]


def test_paths_of_videos_and_of_folders_of_frames_are_videos(folders: Folders) -> None:
    (folders.images / "clip").mkdir()
    for n in range(40):
        Image.new("RGB", (4, 4), (n, 0, 0)).save(folders.images / "clip" / f"{n}.png")
    (folders.images / "broken.mp4").write_bytes(b"no video")
    folders.write("a", [("q", "", MARK, name, "", "") for name in ("clip", "broken.mp4")])
    row = folders.load()[0]
    reds = [frame.getpixel((0, 0))[0] for frame in row["positive"]["video"]]
    assert (len(reds), reds[0], reds[-1]) == (32, 0, 39)
    assert row["label"] == [content_id(row["positive"])]
    fewer = row["positive"] | {"video": row["positive"]["video"][:-1]}
    assert content_id(fewer) != content_id(row["positive"])
    if find_spec("av"):
        with pytest.raises(ValueError, match=r"row 1: video 'broken\.mp4' in .* cannot be read"):
            folders.load()[1]
        assert len(folders.load(on_error="skip")) == 1


def test_a_row_without_the_negative_that_others_have_repeats_its_positive(folders: Folders) -> None:
    folders.write("a", [("q", "", "", "1.png", "", ""), ("q", "", "p", "", "n", "")])
    rows = folders.load()[:]
    assert rows["negative"] == [rows["positive"][0], "n"]
    assert [len(set(ids)) for ids in rows["label"]] == [1, 2]


def test_cap_is_a_seeded_choice(folders: Folders) -> None:
    folders.write("a", pairs(40))
    everything = {f"{MARK}q{n}" for n in range(40)}
    chosen = queries(folders.load(cap=10, seed=3))
    assert len(set(chosen)) == 10
    assert set(chosen) < everything
    assert queries(folders.load(cap=10, seed=3)) == chosen
    assert queries(folders.load(cap=10, seed=4)) != chosen
    assert queries(folders.load(cap=None)) == [f"{MARK}q{n}" for n in range(40)]
    assert len(folders.load(cap=40)) == 40


def test_the_same_picture_in_two_files_is_one_content(folders: Folders) -> None:
    Image.open(folders.images / "1.png").save(folders.images / "again.bmp")
    folders.write("a", [("q", "", MARK, name, "", "") for name in ("1.png", "again.bmp", "2.png")])
    same, again, other = folders.load()[:]["label"]
    assert same == again != other


BROKEN = [
    ("gone.png", "path 'gone.png' is not in"),
    ("text.png", "image 'text.png' in .* cannot be read"),
    ("cut.png", "image 'cut.png' in .* cannot be read"),
]
OUTSIDE = ["../secret.png", "ABSOLUTE", "link.png", "linked/secret.png"]


def with_image(folders: Folders, name: str) -> None:
    """Write six rows of which row 4 has the image ``name``."""
    (folders.images / "text.png").write_bytes(b"no image")
    whole = (folders.images / "1.png").read_bytes()
    (folders.images / "cut.png").write_bytes(whole[: len(whole) // 2])
    secret = folders.root / "secret.png"
    secret.write_bytes(whole)
    (folders.images / "link.png").symlink_to(secret)
    (folders.images / "linked").symlink_to(folders.root)
    rows = pairs(6)
    rows[4] = ("q4", str(secret) if name == "ABSOLUTE" else name, "p4", "", "", "")
    folders.write("a", rows)


@pytest.mark.parametrize(("name", "message"), BROKEN)
def test_broken_images_are_named_or_left_out(
    folders: Folders, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with_image(folders, name)
    with pytest.raises(ValueError, match=f"subset a, row 4: {message}"):
        folders.load()[:]
    kept = folders.load(on_error="skip")
    assert queries(kept) == [f"{MARK}q{n}" for n in (0, 1, 2, 3, 5)]
    assert len(kept[:]["anchor"]) == 5
    assert "a: 1 of 6 rows left out for broken images or videos" in capsys.readouterr().out


@pytest.mark.parametrize("name", OUTSIDE)
def test_paths_that_leave_the_folder_are_always_errors(folders: Folders, name: str) -> None:
    with_image(folders, name)
    with pytest.raises(ValueError, match=r"subset a, row 4: path .* leaves the folder"):
        folders.load()[:]
    with pytest.raises(ValueError, match="leaves the folder"):
        folders.load(on_error="skip")


def test_a_broken_image_has_its_row_number_of_before_the_cap(folders: Folders) -> None:
    rows = pairs(40)
    rows[17] = ("q", "gone.png", "p", "", "", "")
    folders.write("a", rows)
    seed = next(s for s in range(99) if "q" in queries(folders.load(cap=30, seed=s)))
    with pytest.raises(ValueError, match=r"subset a, row 17: path 'gone.png'"):
        folders.load(cap=30, seed=seed)[:]


def test_skipping_still_needs_an_image_folder(folders: Folders) -> None:
    folders.write("a", pairs(3))
    with pytest.raises(ValueError, match=r"needs the folder that .*; pass images="):
        load_training(folders.source, on_error="skip")


def test_an_oversized_image_is_a_broken_one(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (64, 64)).save(folders.images / "big.png")
    folders.write("a", [("q", "big.png", "p", "", "", "")])
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"subset a, row 0: image 'big.png' .*LLAVE_MAX_PIXELS is"):
        folders.load()[:]
    monkeypatch.setenv("LLAVE_MAX_PIXELS", "4095")
    with pytest.raises(
        ValueError, match=r"4,096 pixels, above the limit \(LLAVE_MAX_PIXELS is 4,095"
    ):
        folders.load()[:]
    monkeypatch.setenv("LLAVE_MAX_PIXELS", "4096")
    assert folders.load()[0]["anchor"]["image"].size == (64, 64)


def collated(dataset: Dataset, rows: list[int]) -> dict[str, Any]:
    """A batch from the trainer's collator. Preprocessing does not change the inputs."""
    collator = BaseDataCollator(preprocess_fn=lambda inputs, **_: {"inputs": inputs})
    return collator([dataset[row] for row in rows])


def test_the_collator_takes_the_columns(folders: Folders) -> None:
    folders.write("a", [(f"{MARK}q", "1.png", "p", "", "n", "") for _ in range(3)])
    batch = collated(folders.load(), [0, 2])
    assert {"anchor_inputs", "positive_inputs", "negative_inputs", "label"} <= set(batch)
    assert batch["positive_inputs"] == ["p", "p"]
    assert batch["label"].tolist() == [[content_id("p"), content_id("n")]] * 2


def test_subsets_are_apart_or_joined(folders: Folders) -> None:
    for name, first in (("a", 0), ("b", 100)):
        folders.write(name, pairs(4, first))
    subsets = load_training(folders.source, images=folders.images)
    assert list(DatasetDict(subsets)) == ["a", "b"]
    mixed = joined(subsets)
    assert collated(mixed, [0, 7])["positive_inputs"] == ["p0", "p103"]


def test_subsets_with_and_without_negatives_are_joined_without(folders: Folders) -> None:
    folders.write("a", [("q", "", "p", "", "n", "")] * 3)
    folders.write("b", [("q", "", "p", "", "", "")] * 3)
    with pytest.raises(ValueError, match="must give the same columns; load them without negatives"):
        joined(load_training(folders.source, images=folders.images))
    plain = load_training(folders.source, images=folders.images, negatives=False)
    batch = collated(joined(plain), [0, 5])
    assert "negative_inputs" not in batch


def test_a_joined_dataset_names_the_subset_of_a_broken_image(folders: Folders) -> None:
    folders.write("a", pairs(2))
    folders.write("b", [*pairs(1), ("q", "gone.png", "p", "", "", "")])
    mixed = joined(load_training(folders.source, images=folders.images))
    with pytest.raises(ValueError, match="subset b, row 1"):
        mixed[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"subsets": ["c"]}, "c is not in .*; there are a"),
        ({"on_error": "ignore"}, "on_error must be raise or skip, got 'ignore'"),
    ],
)
def test_bad_arguments_are_named(folders: Folders, arguments: Any, message: str) -> None:
    folders.write("a", pairs(1))
    with pytest.raises(ValueError, match=message):
        folders.load(**arguments)


def test_bad_sources_are_named(folders: Folders) -> None:
    with pytest.raises(ValueError, match=r"holds no \.parquet, \.jsonl, \.json files"):
        folders.load()
    with pytest.raises(ValueError, match="no folder; a hub dataset needs its subsets named"):
        load_training("someone/something")
    (folders.source / "a.jsonl").write_text('{"qry": "q", "pos_text": "p"}')
    with pytest.raises(ValueError, match="lacks the columns pos_image_path, qry_image_path"):
        folders.load()


def test_a_hub_dataset_has_a_configuration_per_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def hub(name: str, configuration: str, **_: Any) -> Dataset:
        asked.append((name, configuration))
        return Dataset.from_list([dict.fromkeys(COLUMNS, "x")])

    monkeypatch.setattr("llave.data.load_dataset", hub)
    assert list(load_training("someone/MMEB-train", subsets=["N24News", "GQA"])) == [
        "N24News",
        "GQA",
    ]
    assert asked == [("someone/MMEB-train", "N24News"), ("someone/MMEB-train", "GQA")]


def evaluation(folders: Folders, **columns: Any) -> list[data.Candidates]:
    row = {"qry_text": "q", "qry_img_path": "", "tgt_text": ["a", "b"], "tgt_img_path": ["", ""]}
    (folders.source / "t.jsonl").write_text(json.dumps(row | columns))
    return load_evaluation(folders.source, "t")


def test_evaluation_rows(folders: Folders) -> None:
    assert evaluation(folders) == [(("q", ""), [("a", ""), ("b", "")], 0)]
    assert evaluation(folders, qry_inst=f"{MARK}Find it.", tgt_inst="Represent:") == [
        ((f"{MARK}Find it. q", ""), [("Represent: a", ""), ("Represent: b", "")], 0)
    ]
    assert evaluation(folders, qry_img_path="1.png", tgt_text=["", ""])[0].query == ("q", "1.png")


def test_evaluation_rows_without_a_query_are_named(folders: Folders) -> None:
    with pytest.raises(
        ValueError, match="row 0 of task t: the query has neither text nor image or video"
    ):
        evaluation(folders, qry_text=None)
    assert evaluation(folders, qry_text="", qry_inst="Find it.")[0].query == ("Find it.", "")


def test_evaluation_rows_without_candidates_are_named(folders: Folders) -> None:
    with pytest.raises(ValueError, match="row 0 of task t has 0 candidate texts and 0 candidate"):
        evaluation(folders, tgt_text=[], tgt_img_path=[])
    with pytest.raises(ValueError, match="row 0 of task t has 1 candidate texts and 2 candidate"):
        evaluation(folders, tgt_text=["a"])


def test_evaluation_sets_of_the_hub_are_a_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    splits: list[str] = []

    def hub(name: str, configuration: str, *, split: str) -> Dataset:
        splits.append(split)
        return Dataset.from_dict(
            {"qry_text": ["q"], "qry_img_path": [""], "tgt_text": [["a"]], "tgt_img_path": [[""]]}
        )

    monkeypatch.setattr("llave.data.load_dataset", hub)
    load_evaluation("someone/MMEB-eval", "GQA")
    assert splits == ["test"]
