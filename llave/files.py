"""Errors that name files, names from data as text, what systems leave in folders."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from llave.jsonl import whole
from llave_kernels import atomic_files

LFS_POINTER = b"version https://git-lfs"  # what a clone has in place of a file not yet fetched
LONGEST_NAME = 1000  # characters that ``shown`` keeps
# Made by Windows, macOS in archives, Synology and QNAP; hidden names are left behind anyway.
_LEFTOVERS = {
    "$recycle.bin", "__macosx", "@eadir", "@recycle", "desktop.ini", "ehthumbs.db", "icon\r",
    "lost+found", "system volume information", "thumbs.db",
}  # fmt: skip


_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFLNK: "a link",
}  # fmt: skip


def shown(name: object) -> str:
    """A name from data as text for one line of a terminal, a log or a page.

    Control characters, ANSI escapes, line ends, marks of writing direction and what else prints
    nothing become backslash escapes; of more than 1,000 characters only the first are shown.
    """
    text = str(name)
    cut = "..." if len(text) > LONGEST_NAME else ""
    return escaped(text[:LONGEST_NAME]) + cut


def escaped(text: str) -> str:
    """A text of any length on one line, as ``shown`` does it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


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
    """``atomic_files.publish``, with errors as ``writing`` says them."""
    with writing(path):
        atomic_files.publish(path, write)


def create(path: Path, write: Callable[[Path], object]) -> bool:
    """``atomic_files.create``, with errors as ``writing`` says them."""
    with writing(path):
        return atomic_files.create(path, write)


def refuse_overlap(name: str, out: Path, others: dict[str, str | os.PathLike[str]]) -> None:
    """ValueError where a folder to write is, holds or lies in one of others, by their names.

    Hub names and others that are not on this disk are passed over.
    """
    here = out.resolve()
    for other, place in others.items():
        there = Path(place).resolve()
        if there.exists() and (here.is_relative_to(there) or there.is_relative_to(here)):
            how = "is" if here == there else "lies in" if here.is_relative_to(there) else "holds"
            raise ValueError(
                f"{name}={shown(out)} {how} {other}={shown(place)}; choose a folder apart from it"
            )


def refuse_existing(out: Path, names: Iterable[str]) -> None:
    """ValueError where a folder already has one of the files that are to be written there."""
    if there := [name for name in names if os.path.lexists(out / name)]:
        raise ValueError(f"{shown(out)} has {', '.join(there)} already; choose another folder")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file or folder that a system or a library fails to write.

    Raises:
        OSError: for an error of the system or of such a library, with its ``errno``.
    """
    try:
        yield
    except Exception as error:
        # Of the libraries in Rust one has its own type, one raises Exception itself.
        if not isinstance(error, (OSError, SafetensorError)) and type(error) is not Exception:
            raise
        cause = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        named = OSError(
            f"{shown(path)} cannot be written ({cause}); what was finished stays, and the same "
            "command goes on once that is mended"
        )
        named.errno = getattr(error, "errno", None)
        raise named from error


def regular(path: Path) -> Path:
    """The path, if a file is there, or a link to one.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a folder is, or what would be waited for: a pipe, a socket, a device.
    """
    refuse_other_kinds(path.stat(), path)
    return path


def refuse_other_kinds(found: os.stat_result, path: str | os.PathLike[str]) -> None:
    """ValueError where what was found at a path is no regular file."""
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "of an unknown kind")
        raise ValueError(f"{shown(os.fspath(path))!r} is {kind}, not a regular file")


def refuse_pipes(folder: Path) -> None:
    """ValueError for what a library would wait for in a folder: a pipe, a socket, a device."""
    for path in sorted(folder.rglob("*")):
        if path.exists() and not path.is_dir():
            regular(path)


def read_json(file: Path, kind: type = dict) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: there is no such file, or it is damaged or holds no ``kind``; it is named.
    """
    try:
        with regular(file).open("rb") as stream:
            found = whole(stream)
        if not isinstance(found, kind):
            raise TypeError(f"expected a {kind.__name__}, got a {type(found).__name__}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise _unreadable(error, file) from error
    return found


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
        raise _unreadable(error, *files) from error


def _unreadable(error: Exception, *files: Path) -> ValueError:
    names = " or ".join(map(shown, files))
    if isinstance(error, OSError) and error.strerror:  # the system's, not a decoder's
        return ValueError(f"{names} cannot be read ({error.strerror})")
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ValueError(
        f"{names} cannot be read ({said}): it is cut short or not what its name says; download it "
        "again"
    )


def refuse_damaged(folder: Path) -> None:
    """ValueError for the first file of a model's folder that is not what its name says."""
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".json":
            read_json(file, list if file.name == "modules.json" else dict)
        elif file.suffix == ".jinja":
            with reading(file):
                regular(file).read_text(encoding="utf-8")
        elif file.suffix == ".safetensors":
            with reading(file):
                safe_open(regular(file), "pt")
