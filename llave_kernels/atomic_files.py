"""Files and folders that appear whole, or not at all, and stay through a power loss.

Each is made beside its place, under a name that nobody can know before, and renamed.
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
    """Let a file appear whole, in place of one that is ours.

    Several processes may publish the same file at a time. What killed ones left of it is removed.

    Args:
        path: the file.
        write: is given the path of an empty file beside it, to fill.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    with _file_beside(path) as temporary:
        write(temporary)
        try:
            sync(temporary)
            temporary.replace(path)
        except FileNotFoundError:
            # Another process finished the same file first and swept ours.
            if not path.exists():
                raise
    sweep(path)


def create(path: Path, write: Callable[[Path], object]) -> bool:
    """``publish`` where nothing is: of several processes one makes the file, the others are told.

    Returns:
        False where ``path`` is something already, a broken link too, which is left as it is.

    Raises:
        OSError: it cannot be written.
    """
    with _file_beside(path) as temporary:
        write(temporary)
        try:
            sync(temporary)
            os.link(temporary, path)  # unlike a rename it replaces nothing
        except FileExistsError:
            return False
        except OSError:  # the file system has no links, or another process swept ours
            if not _claim(temporary, path):
                return False
    sweep(path)
    return True


def new_folder(path: Path) -> Path:
    """An empty folder beside ``path``, which stays until it is renamed or removed.

    Raises:
        OSError: it cannot be made.
    """
    folder = _beside(path)
    folder.mkdir()  # which follows no link
    return folder


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """``new_folder`` that is removed at the end.

    Those that killed processes left are removed at the start, those of living ones are not.

    Raises:
        OSError: it cannot be made.
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
    """What was made beside a path and not removed; living processes may still use it."""
    names = re.compile(re.escape(path.name) + r"\.[0-9a-f]{32}\.tmp")
    try:
        return [other for other in path.parent.iterdir() if names.fullmatch(other.name)]
    except FileNotFoundError:
        return []


def sweep(path: Path) -> None:
    """Remove the files that dead processes left of one that is done."""
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
    """Lock what is open, until it is closed; False where another process has the lock.

    Args:
        descriptor: of a file or a folder.
        inherited: whether processes that are forked meanwhile hold it too. If not, it must be of a
            file that is open for writing, and this process cannot keep itself out.

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
    temporary.touch(exist_ok=False)  # a link is not followed
    try:
        yield temporary
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _claim(temporary: Path, path: Path) -> bool:
    """``create`` by a name that is taken before it gets its contents."""
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
    """Lock a folder until the end, the process's at the latest; False where another one has it."""
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
