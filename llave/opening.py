"""Files that data name: only those inside a chosen folder, only regular ones, never waiting."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from llave.files import refuse_other_kinds, snapshot

# A FIFO or a device that takes a file's place after the check does not make the open wait.
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC


class OutsideError(ValueError):
    """A path that leaves its folder."""


def opened(path: str | os.PathLike[str], *, beside: int | None = None) -> BinaryIO:
    """A regular file, opened for reading.

    Args:
        path: the file's.
        beside: the descriptor of the folder ``path`` is in, where it must not be a link.

    Raises:
        ValueError: it is a folder, a FIFO, a socket or a device.
        OSError: as ``open``.
    """
    flags, name, follow = _FILE, os.fspath(path), beside is None
    if beside is not None:
        flags, name = flags | os.O_NOFOLLOW, os.path.basename(name)
    # Looked at before, because some devices act when they are opened, and again once it is open.
    refuse_other_kinds(os.stat(name, dir_fd=beside, follow_symlinks=follow), path)
    descriptor = os.open(name, flags, dir_fd=beside)
    try:
        refuse_other_kinds(os.fstat(descriptor), path)
    except ValueError:
        os.close(descriptor)
        raise
    return open(path, "rb", opener=lambda *_: descriptor)  # its name is the path


class Root:
    """A folder in which all files lie that data name.

    A name is a path in the folder, or an absolute one that leads into it. Whatever links and ``..``
    it has, where they end must be inside. Links inside a snapshot of the hub's cache may lead to
    its blobs. Nothing else is read into a name: ``~``, ``%2e`` and ``http:`` are such characters.

    Args:
        folder: the folder.
        argument: the setting that chooses it, for the errors.
    """

    def __init__(self, folder: str | os.PathLike[str], argument: str) -> None:
        self.folder, self.argument = snapshot(Path(folder)), argument

    def path(self, name: str | os.PathLike[str]) -> Path:
        """The file or folder that a name leads to, free of links.

        Raises:
            OutsideError: it is outside.
            FileNotFoundError: no such file, nor could there be.
        """
        name = os.fspath(name)
        there = True
        try:
            found = Path(os.path.realpath(self.folder / name))
            found.stat()
        except (FileNotFoundError, NotADirectoryError):
            there = False
        except (ValueError, OSError) as error:  # it has a null byte, is too long, links in a circle
            problem = f"{name!r:.80} cannot be a path: {error!s:.80}"
            raise FileNotFoundError(problem) from error
        if self._base(found) is None:
            raise OutsideError(
                f"path {name!r} leaves the folder {self.folder}; only files in the folder that "
                f"{self.argument} says are read"
            )
        if not there or found == self._bases()[0]:
            raise FileNotFoundError(f"path {name!r} is not in {self.folder}")
        return found

    def holds(self, name: str | os.PathLike[str]) -> bool:
        """Whether a name leads inside, be there something or not."""
        try:
            return self._base(Path(os.path.realpath(self.folder / name))) is not None
        except (ValueError, OSError):  # as in ``path``
            return False

    def open(self, name: str | os.PathLike[str]) -> BinaryIO:
        """The file that a name leads to, opened for reading.

        It is reached folder by folder, so that no link is followed that appears meanwhile.

        Raises:
            OutsideError, FileNotFoundError: as in ``path``; ValueError, OSError: as ``opened``.
        """
        path = self.path(name)
        base = self._base(path)
        assert base is not None
        folder = os.open(base, _FOLDER)
        try:
            for part in path.parent.relative_to(base).parts:
                inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = inner
            return opened(path, beside=folder)
        finally:
            os.close(folder)

    def _base(self, path: Path) -> Path | None:
        return next((base for base in self._bases() if path.is_relative_to(base)), None)

    def _bases(self) -> list[Path]:
        root = Path(os.path.realpath(self.folder))
        cache = [p.parent / "blobs" for p in (root, *root.parents) if p.name == "snapshots"]
        return [root, *cache]
