"""Helpers for files: errors that name a file, and entries to pass over."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from llave.jsonl import whole
from llave.printable import shown
from llave_kernels import atomic_files

LFS_POINTER = b"version https://git-lfs"  # in a clone, the start of a file not yet fetched
# Windows, macOS (in archives), Synology and QNAP make these. Hidden names are passed over anyway.
_LEFTOVERS = {
    "$recycle.bin", "__macosx", "@eadir", "@recycle", "desktop.ini", "ehthumbs.db", "icon\r",
    "lost+found", "system volume information", "thumbs.db",
}  # fmt: skip


_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFLNK: "a link",
}  # fmt: skip


def left_behind(name: str) -> bool:
    """Whether a name is that of a hidden entry, or of one that an operating system makes."""
    return name.startswith(".") or name.lower() in _LEFTOVERS


def snapshot(folder: Path) -> Path:
    """Return the newest revision of a data set in the hub's cache, or any other folder unchanged.

    Raises:
        ValueError: there are no revisions, or several and no ``refs/main`` that names one of them.
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
    """Call ``atomic_files.publish`` with the errors of ``writing``."""
    with writing(path):
        atomic_files.publish(path, write)


def create(path: Path, write: Callable[[Path], object]) -> bool:
    """Call ``atomic_files.create`` with the errors of ``writing``."""
    with writing(path):
        return atomic_files.create(path, write)


def refuse_overlap(name: str, out: Path, others: dict[str, str | os.PathLike[str]]) -> None:
    """Raise ValueError where an output folder overlaps an input: equals, holds or lies in it.

    Inputs that do not exist on this disk, such as hub names, are passed over.

    Args:
        name: the output's name, for the error.
        out: the output folder.
        others: by name, the inputs.
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
    """Raise ValueError where a folder already has one of the files to be written."""
    if there := [name for name in names if os.path.lexists(out / name)]:
        raise ValueError(f"{shown(out)} has {', '.join(there)} already; choose another folder")


def refuse_existing_file(name: str, path: Path) -> None:
    """Raise ValueError where a file to be written exists, or where its folder cannot be made.

    Args:
        name: the output's name, for the error.
        path: the file.
    """
    if os.path.lexists(path):
        raise ValueError(f"{name}={shown(path)} exists; choose another file, or remove it")
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise ValueError(f"{name}={shown(path)}: {shown(above)} is no folder; choose another file")


def create_file(name: str, path: Path, write: Callable[[Path], object]) -> None:
    """Create a file and its folder. Raise ValueError where the file exists by now.

    Args:
        name: the output's name, for the error.
        path: the file.
        write: as in ``atomic_files.create``.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not create(path, write):
        refuse_existing_file(name, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise write errors again with the name of the file or folder.

    Raises:
        OSError: the system or a library failed to write. It keeps the error's ``errno``.
    """
    try:
        yield
    except Exception as error:
        # Libraries in Rust raise SafetensorError or a plain Exception.
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
    """Return the path, if it is a regular file or a link to one.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is a folder, or reading it could block: a pipe, a socket, a device.
    """
    refuse_other_kinds(path.stat(), path)
    return path


def refuse_other_kinds(found: os.stat_result, path: str | os.PathLike[str]) -> None:
    """Raise ValueError where a path's ``stat`` result is not that of a regular file."""
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "of an unknown kind")
        raise ValueError(f"{shown(os.fspath(path))!r} is {kind}, not a regular file")


def refuse_pipes(folder: Path) -> None:
    """Raise ValueError where a folder holds a pipe, a socket or a device, which could block."""
    for path in sorted(folder.rglob("*")):
        if path.exists() and not path.is_dir():
            regular(path)


def read_json(file: Path, kind: type = dict) -> Any:
    """Return the value in a JSON file.

    Raises:
        ValueError: there is no such file, or it is damaged or holds no ``kind``. The message names
            the file.
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
    """Raise a library's error again as one that names the files it was reading.

    A plain ValueError passes unchanged, because it is one of ours.

    Raises:
        ValueError: the library raised an error of any other type.
    """
    try:
        yield
    except Exception as error:
        if type(error) is ValueError:
            raise
        raise _unreadable(error, *files) from error


def _unreadable(error: Exception, *files: Path) -> ValueError:
    names = " or ".join(map(shown, files))
    if isinstance(error, OSError) and error.strerror:  # from the system, not from a decoder
        return ValueError(f"{names} cannot be read ({error.strerror})")
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ValueError(
        f"{names} cannot be read ({said}): it is cut short or not what its name says; download it "
        "again"
    )


def refuse_damaged(folder: Path) -> None:
    """Raise ValueError for the first damaged file in a model's folder."""
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".json":
            read_json(file, list if file.name == "modules.json" else dict)
        elif file.suffix == ".jinja":
            with reading(file):
                regular(file).read_text(encoding="utf-8")
        elif file.suffix == ".safetensors":
            with reading(file):
                safe_open(regular(file), "pt")
