"""Files appear whole or not at all, and replace no file that is not ours."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llave_kernels import atomic_files
from llave_kernels.atomic_files import create, folder_beside, new_folder, publish

THINGS = ("file", "folder", "link", "broken link")


def put(path: Path, thing: str) -> None:
    """Put a user's file, folder or link at a path."""
    if thing == "file":
        path.write_text("mine")
    elif thing == "folder":
        path.mkdir()
        (path / "notes").write_text("mine")
    else:
        target = path.with_name("target")
        if thing == "link":
            target.write_text("mine")
        path.symlink_to(target)


def tree(folder: Path) -> dict[str, Any]:
    """Every file, link and folder by relative name, with contents, target or None."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


def no_links(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("thing", THINGS)
def test_create_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thing: str, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "made.json"
    assert create(path, partial(Path.write_text, data="ours"))
    assert tree(tmp_path) == {"made.json": b"ours"}
    path.unlink()
    put(path, thing)
    before = tree(tmp_path)
    assert not create(path, partial(Path.write_text, data="ours"))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("links", [True, False])
def test_of_many_one_creates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    for number in range(40):
        path, meet, made = tmp_path / str(number), threading.Barrier(4), []

        def run(name: str) -> None:
            meet.wait()  # noqa: B023
            if create(path, partial(Path.write_text, data=name * 1000)):  # noqa: B023
                made.append(name)  # noqa: B023

        threads = [threading.Thread(target=run, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 1
        assert path.read_text() == made[0] * 1000
    assert len(list(tmp_path.iterdir())) == 40


def test_links_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, path = tmp_path / "mine", tmp_path / "made"
    mine.write_text("mine")
    path.symlink_to(mine)
    publish(path, partial(Path.write_text, data="ours"))
    assert (mine.read_text(), path.read_text(), path.is_symlink()) == ("mine", "ours", False)

    class Known:
        hex = "0" * 32

    monkeypatch.setattr(atomic_files, "uuid4", Known)
    planted = tmp_path / f"other.{Known.hex}.tmp"
    planted.symlink_to(mine)
    for make in (publish, create):
        with pytest.raises(FileExistsError):
            make(tmp_path / "other", partial(Path.write_text, data="ours"))
    with pytest.raises(FileExistsError):
        new_folder(tmp_path / "other")
    assert (mine.read_text(), planted.is_symlink()) == ("mine", True)


@pytest.mark.parametrize("make", [publish, create])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, make: Any) -> None:
    def fill(path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "there").write_text("mine")
    with pytest.raises(OSError, match="No space left"):
        make(tmp_path / "there", fill)
    assert tree(tmp_path) == {"there": b"mine"}


@pytest.mark.parametrize("make", [publish, create])
def test_a_file_is_on_the_disk_before_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    path, done = tmp_path / "made", []

    def noted(name: str, call: Any) -> Any:
        def made(*args: Any) -> Any:
            done.append((name, path.exists()))
            return call(*args)

        return made

    for owner, name in ((os, "fsync"), (os, "link"), (Path, "replace")):
        monkeypatch.setattr(owner, name, noted(name, getattr(owner, name)))
    make(path, partial(Path.write_text, data="ours"))
    named = "replace" if make is publish else "link"
    assert done == [("fsync", False), (named, False), ("fsync", True)]  # True: of the folder


@pytest.mark.parametrize("make", [publish, create])
def test_who_may_read_a_file_is_as_of_any_other(tmp_path: Path, make: Any) -> None:
    (tmp_path / "any").touch()
    make(tmp_path / "made", partial(Path.write_text, data="ours"))
    assert (tmp_path / "made").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_only_folders_of_the_dead_are_removed(tmp_path: Path) -> None:
    program = (
        "import sys, os; from pathlib import Path\n"
        "from llave_kernels.atomic_files import folder_beside\n"
        "with folder_beside(Path(sys.argv[1])) as made:\n"
        "    (made / 'half').write_text('x'); os.kill(os.getpid(), 9)"
    )
    made, others = tmp_path / "made", ("made.tmp", f"made.{'0' * 31}.tmp", f"more.{'0' * 32}.tmp")
    for name in others:
        (tmp_path / name).mkdir()
    linked = tmp_path / f"made.{'1' * 32}.tmp"
    linked.symlink_to(tmp_path / others[0])
    subprocess.run([sys.executable, "-c", program, str(made)], cwd=Path(__file__).parents[2])
    assert len(list(tmp_path.iterdir())) == 5
    with folder_beside(made) as first:
        with folder_beside(made) as second:
            assert {path.name for path in tmp_path.iterdir()} == {
                *others, linked.name, first.name, second.name,
            }  # fmt: skip
        assert first.exists()
    assert {path.name for path in tmp_path.iterdir()} == {*others, linked.name}
