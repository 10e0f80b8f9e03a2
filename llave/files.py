"""Files that appear whole or not at all, and errors that name those which are damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from safetensors import safe_open


def publish(path: Path, write: Callable[[Path], object]) -> None:
    """Let a file appear whole: ``write`` makes it beside ``path``, then it is renamed.

    Several processes may publish the same file at a time.
    """
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        write(temporary)
        try:
            temporary.replace(path)
        except FileNotFoundError:
            # Another process finished the same file first and swept ours.
            if not path.exists():
                raise
    finally:
        temporary.unlink(missing_ok=True)
    sweep(path)


def sweep(path: Path) -> None:
    """Remove what dead processes left of a file that is done."""
    for leftover in path.parent.glob(f"{path.name}.*.tmp"):
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
                json.loads(file.read_bytes())
            elif file.suffix == ".safetensors":
                safe_open(file, "pt")
