"""Open files that data name: only regular files in a chosen folder, and without blocking."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from llave.files import refuse_other_kinds, snapshot

# O_NONBLOCK: a FIFO or device may replace the file after the check, and must not block the open.
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC


class OutsideError(ValueError):
    """A path that leaves its folder."""


def opened(path: str | os.PathLike[str], *, beside: int | None = None) -> BinaryIO:
    """Open a regular file for reading.

    Args:
        path: the file's path.
        beside: a descriptor of the file's folder. If it is given, the file must not be a link.

    Raises:
        ValueError: it is a folder, a FIFO, a socket or a device.
        OSError: as in ``open``.
    """
    flags, name, follow = _FILE, os.fspath(path), beside is None
    if beside is not None:
        flags, name = flags | os.O_NOFOLLOW, os.path.basename(name)
    # Some devices act when they are opened, so the file is checked before the open. It is checked
    # again after the open, because it may have been replaced.
    refuse_other_kinds(os.stat(name, dir_fd=beside, follow_symlinks=follow), path)
    descriptor = os.open(name, flags, dir_fd=beside)
    try:
        refuse_other_kinds(os.fstat(descriptor), path)
    except ValueError:
        os.close(descriptor)
        raise
    return open(path, "rb", opener=lambda *_: descriptor)  # so that its ``name`` is the path


class Root:
    """A folder that must contain every file that data name.

    A name is a path in the folder, or an absolute path that leads into it. It may have links and
    ``..``, but it must end inside the folder. Links in a snapshot of the hub's cache may lead to
    the cache's blobs. ``~``, ``%2e`` and ``http:`` have no special meaning in a name.

    Args:
        folder: the folder.
        argument: the name of the setting that chooses it, for the errors.
    """

    def __init__(self, folder: str | os.PathLike[str], argument: str) -> None:
        self.folder, self.argument = snapshot(Path(folder)), argument

    def path(self, name: str | os.PathLike[str]) -> Path:
        """Return the path of the file or folder that a name leads to, with links resolved.

        Raises:
            OutsideError: it is outside the folder.
            FileNotFoundError: there is no such file, or the name is not a possible path.
        """
        name = os.fspath(name)
        there = True
        try:
            found = Path(os.path.realpath(self.folder / name))
            found.stat()
        except (FileNotFoundError, NotADirectoryError):
            there = False
        except (ValueError, OSError) as error:  # a null byte, too long, or links in a circle
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
        """Whether a name leads inside the folder. The file need not exist."""
        try:
            return self._base(Path(os.path.realpath(self.folder / name))) is not None
        except (ValueError, OSError):  # as in ``path``
            return False

    def open(self, name: str | os.PathLike[str]) -> BinaryIO:
        """Open the file that a name leads to, for reading.

        It is opened folder by folder, so that a link that appears meanwhile is not followed.

        Raises:
            OutsideError, FileNotFoundError: as in ``path``.
            ValueError, OSError: as in ``opened``.
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
