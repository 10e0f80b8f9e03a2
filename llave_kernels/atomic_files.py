"""Files and folders that appear whole or not at all, and survive a power loss.

Each is made beside its path, under a name that nobody can guess. It is then moved into place.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def publish(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that appears whole. It replaces an earlier one.

    Several processes may publish the same file at the same time. Temporary files that killed
    processes left are removed.

    Args:
        path: the file.
        write: called with the path of an empty file beside ``path``. It fills that file.

    Raises:
        OSError: the file cannot be written. An earlier one stays.
    """
    with _file_beside(path) as temporary:
        write(temporary)
        try:
            sync(temporary)
            temporary.replace(path)
        except FileNotFoundError:
            # Another process finished the same file first and removed our temporary one.
            if not path.exists():
                raise
    sweep(path)


def create(path: Path, write: Callable[[Path], object]) -> bool:
    """``publish`` only where nothing exists. Of several processes, one makes the file.

    Returns:
        False where ``path`` already exists, even as a broken link. It is left as it is.

    Raises:
        OSError: the file cannot be written.
    """
    with _file_beside(path) as temporary:
        write(temporary)
        try:
            sync(temporary)
            os.link(temporary, path)  # unlike a rename, it replaces nothing
        except FileExistsError:
            return False
        except OSError:  # no links on this file system, or another process removed our file
            if not _claim(temporary, path):
                return False
    sweep(path)
    return True


def new_folder(path: Path) -> Path:
    """Make an empty folder beside ``path``. The caller renames or removes it.

    Raises:
        OSError: the folder cannot be made.
    """
    folder = _beside(path)
    folder.mkdir()  # mkdir follows no link
    return folder


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A ``new_folder`` that is removed at the end.

    Folders that killed processes left are removed at the start. Those of living processes stay.

    Raises:
        OSError: the folder cannot be made.
    """
    for leftover in leftovers(path):
        with _locked(leftover) as ours:
            if ours:
                shutil.rmtree(leftover, ignore_errors=True)
    temporary = new_folder(path)
    with _locked(temporary):
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def leftovers(path: Path) -> list[Path]:
    """The temporary files and folders beside a path. Living processes may still use them."""
    names = re.compile(re.escape(path.name) + r"\.[0-9a-f]{32}\.tmp")
    try:
        return [other for other in path.parent.iterdir() if names.fullmatch(other.name)]
    except FileNotFoundError:
        return []


def sweep(path: Path) -> None:
    """Remove the temporary files beside a finished file, those of living processes too."""
    for leftover in leftovers(path):
        if leftover.is_symlink() or not leftover.is_dir():
            leftover.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(descriptor: int, *, inherited: bool = True) -> bool:
    """Lock an open file or folder until it is closed. False if another process has the lock.

    Args:
        descriptor: of a file or a folder.
        inherited: whether processes forked meanwhile hold the lock too. If not, the descriptor must
            be of a file open for writing, and the lock does not exclude this process itself.

    Raises:
        OSError: the system or the file system has no such locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    take = fcntl.flock if inherited else fcntl.lockf
    try:
        take(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{uuid4().hex}.tmp")


@contextmanager
def _file_beside(path: Path) -> Iterator[Path]:
    """An empty file beside ``path``."""
    temporary = _beside(path)
    temporary.touch(exist_ok=False)  # follows no link
    try:
        yield temporary
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _claim(temporary: Path, path: Path) -> bool:
    """``create`` without a link: take the name with an empty file, then replace that."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    try:
        temporary.replace(path)
    except OSError:
        path.unlink()
        raise
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a folder until the block or the process ends. False if another process has the lock."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (OSError, AttributeError):  # no folder, or Windows
        yield False
        return
    try:
        try:
            ours = lock(descriptor)
        except OSError:
            ours = False
        yield ours
    finally:
        os.close(descriptor)
