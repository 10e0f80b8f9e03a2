"""A command neither replaces nor removes files that it did not write. It refuses them first."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

for needed in ("sentence_transformers", "datasets", "torchvision"):
    pytest.importorskip(needed)

from llave import evaluation, modeling, shards  # noqa: E402
from llave.cli import main  # noqa: E402
from llave.evaluation import Result  # noqa: E402
from llave.sealing import checksum  # noqa: E402
from llave.shards import Range, Shard, enter_manifest, put, read_manifest  # noqa: E402
from llave_kernels import atomic_files  # noqa: E402
from tests import drills  # noqa: E402
from tests.drills import embed, evaluate  # noqa: E402
from tests.llave_kernels.test_atomic_files import THINGS, tree  # noqa: E402
from tests.llave_kernels.test_atomic_files import put as plant  # noqa: E402

EMBED = ["embed", "model", "photos", "--out"]
EVALUATE = ["evaluate", "model", "--tasks", "colours", "--data", "data", "--images", "photos"]
EVALUATE += ["--out"]
MANIFEST = {
    "source": {"rows": 8}, "dimension": 2, "shard_rows": 4, "normalised": True, "dtype": "float32",
}  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folders. Loading a model fails the test."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "photos", "data", "full"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").write_text("mine")
    (tmp_path / "full/colours.json").write_text('{"my": "own"}')
    (tmp_path / "full/manifest.json").write_text('{"my": "own"}')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "part-0000000000-0000000007.parquet").write_bytes(b"PAR1 mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to("missing")
    os.mkfifo(tmp_path / "other" / "colours.json")

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(modeling, "load", load)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*EMBED, "photos"], "out=photos is source=photos"),
        ([*EMBED, "photos/new"], "out=photos/new lies in source=photos"),
        ([*EMBED, "."], "out=. holds source=photos"),
        ([*EMBED, "model/new"], "out=model/new lies in model=model"),
        ([*EMBED, "data"], "out=data holds other things (notes)"),
        ([*EMBED, "other"], "out=other holds other things (colours.json, part-0000000000-"),
        ([*EMBED, "full"], "full is not a folder of embeddings: manifest.json cannot be used"),
        ([*EMBED, "file"], "out=file is no folder"),
        ([*EMBED, "nowhere"], "out=nowhere is no folder"),
        ([*EVALUATE, "full"], "full/colours.json is no result that says what it scored"),
        ([*EVALUATE, "other"], "other/colours.json is no result that says what it scored"),
        ([*EVALUATE, "model"], "out=model is the folder of model"),
        ([*EVALUATE, "data"], "out=data is the folder of data"),
        ([*EVALUATE, "photos"], "out=photos is the folder of images"),
        ([*EVALUATE, "file"], "out=file is no folder"),
        ([*EVALUATE, "nowhere"], "out=nowhere is no folder"),
        ([*EVALUATE, "new", "--tasks", "../full/notes"], "must be a name, not a path"),
        (["convert", "model", "full"], "dst='full' exists"),
        (["convert", "model", "file"], "dst='file' exists"),
        (["convert", "model", "nowhere"], "dst='nowhere' exists"),
    ],
)
def test_an_output_that_is_something_else(
    place: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(place)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert tree(place) == before


def test_an_output_with_the_name_of_a_subset(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results there would be read as data."""
    (place / "data" / "colours.jsonl").write_text("")
    assert main([*EVALUATE, "data/colours"]) == 2
    message = "out=data/colours would be the same subset as data/colours.jsonl; choose another"
    assert message in capsys.readouterr().err


def entered(folder: Path, dtype: str) -> None:
    enter_manifest(folder, MANIFEST | {"dtype": dtype})


def scored(folder: Path, model: str) -> None:
    """Store a result as ``evaluate`` does."""
    of = {"model": model, "max_seq_length": None, "data": "rows"}
    result = Result("task", 1, 100.0, 100.0, 100.0, 0, 0.0, [1], [1])
    file = folder / "task.json"
    evaluation.create(file, partial(evaluation._write, scored=of, result=result))
    evaluation._refuse_others(file, evaluation._read(file)[0], of)


@pytest.mark.parametrize(("enter", "kinds"), [
    (entered, ("float32", "float16")), (scored, ("one", "two")),
])  # fmt: skip
def test_of_two_runs_at_the_same_moment_one_is_refused(
    tmp_path: Path, enter: Callable[[Path, str], None], kinds: tuple[str, str]
) -> None:
    for number in range(60):
        folder = tmp_path / f"out{number}"
        folder.mkdir()
        # There are two runs of each kind. Runs of one kind agree.
        meet, accepted, refused = threading.Barrier(4), [], []

        def run(kind: str, folder: Path, meet: threading.Barrier, *lists: list[str]) -> None:
            meet.wait()
            try:
                enter(folder, kind)
            except ValueError as error:
                lists["another" in str(error)].append(kind)
            else:
                lists[0].append(kind)

        threads = [
            threading.Thread(target=run, args=(kind, folder, meet, accepted, refused))
            for kind in kinds * 2
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(accepted)) == 1
        assert (len(accepted), len(refused)) == (2, 2)
        assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("thing", THINGS)
def test_a_file_that_appears_under_a_shard_s_name_stays(tmp_path: Path, thing: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    enter_manifest(folder, MANIFEST)
    span = Range(0, 4)
    plant(folder / span.file, thing)
    before = tree(tmp_path)
    shard = Shard(list("abcd"), np.zeros((4, 2), "float32"), [])
    with pytest.raises((ValueError, OSError), match=r"part-0000000000-0000000003\.parquet"):
        put(folder / span.file, span, shard, MANIFEST)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "change",
    [
        {"source": None}, {"source": {}}, {"source": {"rows": "8"}}, {"source": {"rows": True}},
        {"shard_rows": 0}, {"shard_rows": 1.5}, {"dimension": -1}, {"dtype": "int8"},
        {"normalised": "yes"}, {"source": {"rows": 10**12}}, {"dtype": []},
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be(tmp_path: Path, change: dict[str, object]) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST | change))
    with pytest.raises(ValueError, match=r"^[^\n]*manifest\.json cannot be used[^\n]*$"):
        read_manifest(tmp_path)


class Full:
    """A disk with room for ``room`` more files."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, path: Path) -> None:
        self.room -= 1
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("made", [embed, evaluate])
def test_a_command_goes_on_once_there_is_room(
    tmp_path: Path,
    made: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.undo()  # this test loads a model
    place = tmp_path / "new"
    place.mkdir()
    arguments, out = made.arguments(place), place / "out"
    kept: dict[str, bytes] = {}
    for room in (0, 2, 3):
        monkeypatch.setattr(atomic_files, "sync", Full(room))
        assert main(arguments(out)) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert re.search(rf": {out}/\S+ cannot be written \(No space left on device\)", last)
        found = drills.contents(out)
        assert kept.items() <= found.items()
        kept = found
    monkeypatch.undo()
    assert main(arguments(out)) == 0
    assert main(arguments(place / "whole")) == 0
    assert drills.contents(out) == drills.contents(place / "whole")


def test_a_bent_shard_is_refused_or_right(tmp_path: Path) -> None:
    span = Range(0, 4)
    shard = Shard(list("abcd"), np.arange(8, dtype="float32").reshape(4, 2), [])
    file = tmp_path / span.file
    put(file, span, shard, MANIFEST)
    whole = file.read_bytes()
    for place in range(0, len(whole), 13):
        for bent in (
            whole[:place],
            whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :],
            whole[:place] + bytes(len(whole) - place),
        ):
            file.write_bytes(bent)
            try:
                found = shards.read_shard(file, span, MANIFEST)
            except ValueError as error:
                refused(file, error)
            else:
                assert found.ids == shard.ids
                assert (found.vectors == shard.vectors).all()


def refused(file: Path, error: Exception) -> None:
    assert re.fullmatch(rf"[^\n]*{file.name}[^\n]*", str(error))


def test_a_small_file_asks_for_no_gigabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVE_MAX_SHARD_BYTES", str(1 << 20))
    rows, span = 1000, Range(0, 1000)
    manifest = MANIFEST | {"source": {"rows": rows}, "shard_rows": rows}
    note = {"manifest": checksum(manifest), "first": 0, "skipped": []}
    zeros = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(2 * rows, "float32")), 2)
    names = pa.array(["x" * 10_000] * rows)
    schema = shards._schema(manifest).with_metadata({"llave": json.dumps(note)})
    pq.write_table(pa.table([names, zeros], schema), tmp_path / span.file)  # stored once
    with pytest.raises(ValueError, match=r"parquet cannot be used .*LLAVE_MAX_SHARD_BYTES"):
        shards.read_shard(tmp_path / span.file, span, manifest)
    with pytest.raises(ValueError, match="it has 1000 rows"):
        shards._table(tmp_path / span.file, Range(0, 4))


def test_a_bent_result_is_refused_or_right(tmp_path: Path) -> None:
    scored(tmp_path, "one")
    file = tmp_path / "task.json"
    whole, right = file.read_bytes(), evaluation._read(file)
    for place in range(0, len(whole), 3):
        flipped = bytes([whole[place] ^ 1 << place % 8])
        for bent in (whole[:place], whole[:place] + flipped + whole[place + 1 :]):
            file.write_bytes(bent)
            try:
                found = evaluation._read(file)
            except ValueError as error:
                refused(file, error)
            else:
                assert found == right
