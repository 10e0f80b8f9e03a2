"""Files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from uuid import uuid4


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
