"""Files that data name must be regular files inside their folder. Opening them never waits."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for needed in ("sentence_transformers", "datasets", "PIL", "hypothesis"):
    pytest.importorskip(needed)

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from datasets import Dataset, DatasetDict  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from PIL import Image  # noqa: E402

from llave.data import load_training  # noqa: E402
from llave.media import Media  # noqa: E402
from llave.opening import OutsideError, Root, opened  # noqa: E402
from tests.llave.test_embedding import quick, read, write_jsonl  # noqa: E402
from tests.llave.test_subsets import card, rows, write  # noqa: E402


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A secret beside a folder ``in``. That folder holds files, links out of it and a link loop."""
    top = tmp_path_factory.mktemp("place")
    inside = top / "in"
    (inside / "a").mkdir(parents=True)
    for file in (top / "secret", inside / "b", inside / "a" / "b", top / "in2"):
        file.write_bytes(str(file.relative_to(top)).encode())
    (inside / "out").symlink_to(top)
    (inside / "secret").symlink_to("../secret")
    (inside / "link").symlink_to("a/b")
    (inside / "circle").symlink_to("circle")
    return top


PARTS = [
    *("a", "b", "..", ".", "", "out", "secret", "link", "circle", "in", "in2", "~", "C:", "C:\\b"),
    *("http:", "file:", "%2e%2e", "..%2f", "\0", "\n", "\ud800", "\u202e", "b\0.png", "x" * 300),
]
NAMES = st.builds(
    lambda start, parts, end: start + "/".join(parts) + end,
    st.sampled_from(["", "/", "//", "PLACE/", "PLACE/in/", "file://", "\\\\host\\share\\", "-"]),
    st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=6),
    st.sampled_from(["", "/", "\0"]),
)


@given(name=NAMES)
def test_no_name_leads_out(place: Path, name: str) -> None:
    root = Root(place / "in", "images")
    try:
        with root.open(name.replace("PLACE", str(place))) as file:
            content = file.read()
    except (ValueError, OSError):
        return
    assert content in (b"in/b", b"in/a/b")


@pytest.mark.parametrize(
    ("name", "content"),
    [("b", "in/b"), ("a/../b", "in/b"), ("link", "in/a/b"), ("out/in/b", "in/b"), ("IN/b", "in/b")],
)
def test_names_that_end_inside(place: Path, name: str, content: str) -> None:
    root = Root(place / "in", "images")
    with root.open(name.replace("IN", str(place / "in"))) as file:
        assert file.read().decode() == content


@pytest.mark.parametrize("name", ["../secret", "out/secret", "secret", "../in2", "/etc/hostname"])
def test_names_that_end_outside(place: Path, name: str) -> None:
    with pytest.raises(OutsideError, match="only files in the folder that images says are read"):
        Root(place / "in", "images").open(name)


def test_a_link_that_appears_after_the_check_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("in/a/b", "out/b"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    root = Root(tmp_path / "in", "images")
    found = root.path("a/b")
    shutil.move(tmp_path / "in" / "a", tmp_path / "away")
    (tmp_path / "in" / "a").symlink_to(tmp_path / "out")
    monkeypatch.setattr(root, "path", lambda _: found)
    with pytest.raises(NotADirectoryError):
        root.open("a/b")


@pytest.fixture
def special(tmp_path: Path) -> Iterator[Path]:
    """A folder of images. Some are not regular files."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (2, 2), "red").save(folder / "a.png")
    os.mkfifo(folder / "fifo.png")
    os.mkfifo(folder / "fifo.mp4")
    (folder / "null.png").symlink_to("/dev/null")
    (folder / "clip").mkdir()
    os.mkfifo(folder / "clip" / "1.png")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.open(folder, os.O_RDONLY)
        listening.bind(f"/proc/self/fd/{here}/socket.png")
        os.close(here)
        yield folder


SPECIAL = ["fifo.png", "fifo.mp4", "socket.png", "clip"]


@pytest.mark.parametrize("name", SPECIAL)
def test_special_files_of_a_data_set_are_refused_at_once(special: Path, name: str) -> None:
    pytest.importorskip("av")
    with pytest.raises(ValueError, match=r"is a (FIFO|socket), not a regular file"):
        Media(special).load(name)


@pytest.mark.parametrize("name", ["fifo.png", "socket.png", "clip", "null.png"])
def test_special_files_of_a_corpus_are_refused_at_once(special: Path, name: str) -> None:
    source = write_jsonl(special.parent / "a.jsonl", [{"image": "a.png"}, {"image": name}])
    settings = {"image_root": "/"} if name == "null.png" else {"image_root": special}
    if name == "null.png":
        records = [{"image": str(special / "a.png")}, {"image": str(special / name)}]
        source = write_jsonl(source, records)
    message = r"row 1 .* is a (FIFO|socket|folder|device), not a regular file"
    with pytest.raises(ValueError, match=message):
        quick(source, special.parent / "out", **settings)
    report = quick(source, special.parent / "out", on_error="skip", **settings)
    assert (report.rows, len(report.skipped)) == (1, 1)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_source_that_is_no_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="is a FIFO, not a regular file"):
        quick(tmp_path / name, tmp_path / "out")


def test_what_is_no_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a device may trigger it. Opening a FIFO lets its writer continue."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("it was opened")

    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr(os, "open", fail)
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/null")):
        with pytest.raises(ValueError, match=r"is a (FIFO|folder|device), not a regular file"):
            opened(path)


def test_a_fifo_that_takes_a_file_s_place_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    before = os.stat(tmp_path / "file")
    (tmp_path / "file").unlink()
    os.mkfifo(tmp_path / "file")
    monkeypatch.setattr(os, "stat", lambda *_, **__: before)
    with pytest.raises(ValueError, match="is a FIFO"):
        opened(tmp_path / "file")


@pytest.mark.parametrize("way", ["../secret.png", "ABSOLUTE", "link.png"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_corpus_is_read_inside_the_folder_that_is_chosen(
    tmp_path: Path, way: str, suffix: str
) -> None:
    (tmp_path / "corpus").mkdir()
    Image.new("RGB", (2, 2), "red").save(tmp_path / "secret.png")
    (tmp_path / "corpus" / "link.png").symlink_to(tmp_path / "secret.png")
    name = str(tmp_path / "secret.png") if way == "ABSOLUTE" else way
    values: list[Any] = [{"id": "a", "image": name}, {"id": "b", "text": "b"}]
    if suffix == ".parquet":  # the hub stores images this way
        values[0] |= {"image": {"path": name, "bytes": None}, "text": ""}
    source = tmp_path / "corpus" / f"a{suffix}"
    if suffix == ".jsonl":
        write_jsonl(source, values)
    else:
        pq.write_table(pa.Table.from_pylist(values), source)
    with pytest.raises(ValueError, match=r"row 0 .* leaves the folder .* image_root says"):
        quick(source, tmp_path / "out")
    assert len(quick(source, tmp_path / "out", on_error="skip").skipped) == 1
    if way == "ABSOLUTE":
        for root in (tmp_path, "/"):
            out = tmp_path / f"out {len(str(root))}"
            quick(source, out, image_root=root)
            assert read(out)[0] == ["a", "b"]


def test_links_that_lead_out_of_a_folder_of_images_are_counted(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("photos/a.png", "b.png"):
        Image.new("RGB", (2, 2), "red").save(tmp_path / name)
    (tmp_path / "photos" / "b.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "photos" / "c.png").symlink_to("a.png")
    report = quick(tmp_path / "photos", tmp_path / "out")
    assert read(tmp_path / "out")[0] == ["a.png", "c.png"]
    assert report.ignored == {"links out of the folder (a .jsonl file may list them)": 1}


def test_frames_that_lead_out_are_always_an_error(tmp_path: Path) -> None:
    (tmp_path / "images" / "clip").mkdir(parents=True)
    for name in ("images/clip/0.png", "secret.png"):
        Image.new("RGB", (2, 2), "red").save(tmp_path / name)
    (tmp_path / "images" / "clip" / "1.png").symlink_to(tmp_path / "secret.png")
    write(tmp_path / "train" / "a.jsonl", rows("a", qry_image_path="clip"))
    for on_error in ("raise", "skip"):
        with pytest.raises(ValueError, match=r"row 0: path .* leaves the folder"):
            load_training(tmp_path / "train", images=tmp_path / "images", on_error=on_error)["a"][0]


@pytest.mark.parametrize(
    "configs",
    [
        "[{data_files: ../secret/*.jsonl}]",
        "[{data_files: {train: out/*.jsonl}}]",
        "[{data_dir: ../secret}]",
        "[{data_dir: PLACE/secret}]",
    ],
)
def test_what_a_dataset_card_names_outside_is_refused(tmp_path: Path, configs: str) -> None:
    write(tmp_path / "secret" / "a.jsonl", rows("a"))
    write(tmp_path / "data" / "b.jsonl", rows("b"))
    (tmp_path / "data" / "out").symlink_to(tmp_path / "secret")
    card(tmp_path / "data", configs.replace("PLACE", str(tmp_path)))
    with pytest.raises(ValueError, match="outside of it"):
        load_training(tmp_path / "data")


@pytest.mark.parametrize("file", ["state.json", "dataset_dict.json"])
def test_what_a_saved_data_set_names_outside_is_refused(tmp_path: Path, file: str) -> None:
    Dataset.from_list(rows("secret")).save_to_disk(tmp_path / "secret")
    DatasetDict({"train": Dataset.from_list(rows("a"))}).save_to_disk(tmp_path / "data" / "a")
    if file == "state.json":
        path = tmp_path / "data" / "a" / "train" / file
        state = json.loads(path.read_text())
        state["_data_files"] = [{"filename": "../../../secret/data-00000-of-00001.arrow"}]
        path.write_text(json.dumps(state))
        split = "train"
    else:
        split = "../../secret"
        (tmp_path / "data" / "a" / file).write_text(json.dumps({"splits": [split]}))
    with pytest.raises(ValueError, match="outside of it"):
        load_training(tmp_path / "data", split=split)
