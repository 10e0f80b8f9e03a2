"""Files that appear whole, errors that name damaged ones, and what a system leaves beside."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from uuid import uuid4

from safetensors import safe_open

LFS_POINTER = b"version https://git-lfs"  # what a clone has in place of a file not yet fetched
LONGEST_NAME = 1000  # characters that ``shown`` keeps
# Made by Windows, macOS in archives, Synology and QNAP; hidden names are left behind anyway.
_LEFTOVERS = {
    "$recycle.bin", "__macosx", "@eadir", "@recycle", "desktop.ini", "ehthumbs.db", "icon\r",
    "lost+found", "system volume information", "thumbs.db",
}  # fmt: skip


def shown(name: object) -> str:
    """A name from data as text for one line of a terminal, a log or a page.

    Control characters, ANSI escapes, line ends, marks of writing direction and what else prints
    nothing become backslash escapes; of more than 1,000 characters only the first are shown.
    """
    text = str(name)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:LONGEST_NAME]) + (
        "..." if len(text) > LONGEST_NAME else ""
    )


def left_behind(name: str) -> bool:
    """Whether a file or folder of that name is hidden or made by a system, not by a user."""
    return name.startswith(".") or name.lower() in _LEFTOVERS


def snapshot(folder: Path) -> Path:
    """The newest revision of a data set in the hub's cache; other folders as they are.

    Raises:
        ValueError: there are several revisions and it is not said which is the newest.
    """
    revisions = folder / "snapshots"
    if not (revisions.is_dir() and (folder / "refs").is_dir()):
        return folder
    main = folder / "refs" / "main"
    there = sorted(path.name for path in revisions.iterdir() if path.is_dir())
    revision = main.read_text().strip() if main.is_file() else ""
    if revision not in there:
        if len(there) != 1:
            raise ValueError(
                f"{folder} holds the revisions {', '.join(there) or 'none'}; pass the folder of "
                "one, below its snapshots"
            )
        (revision,) = there
    return revisions / revision


def publish(path: Path, write: Callable[[Path], object]) -> None:
    """Let a file appear whole, and stay through a power loss.

    ``write`` makes it beside ``path`` under a random name, then it is renamed. Several processes may
    publish the same file at a time.
    """
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        write(temporary)
        try:
            sync(temporary)
            temporary.replace(path)
        except FileNotFoundError:
            # Another process finished the same file first and swept ours.
            if not path.exists():
                raise
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    sweep(path)


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(path: Path) -> None:
    """Remove what dead processes left of a file that is done."""
    for leftover in path.parent.glob(f"{escape(path.name)}.{'[0-9a-f]' * 32}.tmp"):
        leftover.unlink(missing_ok=True)


@contextmanager
def reading(*files: Path) -> Iterator[None]:
    """Name the files at whose contents a library fails, with an error of whatever type.

    Raises:
        ValueError: where anything but a plain ValueError, which is one of ours, was raised.
    """
    try:
        yield
    except Exception as error:
        if type(error) is ValueError:
            raise
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(
            f"{' or '.join(map(str, files))} cannot be read ({said}): it is cut short or not what "
            "its name says; download it again"
        ) from error


def refuse_damaged(folder: Path) -> None:
    """ValueError for the first JSON or safetensors file of a folder that cannot be opened."""
    for file in sorted(folder.rglob("*")):
        with reading(file):
            if file.suffix == ".json":
                expected = list if file.name == "modules.json" else dict
                if not isinstance(json.loads(file.read_bytes()), expected):
                    raise TypeError(f"expected a {expected.__name__}")
            elif file.suffix == ".safetensors":
                safe_open(file, "pt")
