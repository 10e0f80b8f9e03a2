"""Seal folders with a marker file, written last. It has checksums and facts (run, step)."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from llave.files import publish, regular
from llave.jsonl import whole
from llave.printable import shown
from llave_kernels.atomic_files import sync

MARKER = "seal.json"
CARD = "README.md"  # a model's card
_BLOCK = 1 << 20  # bytes read at a time


def signed(content: dict[str, Any]) -> str:
    """Return JSON with a checksum of its content, for ``unsigned``."""
    return json.dumps(content | {"checksum": checksum(content)}, indent=1)


def unsigned(file: Path, *, must: bool = True) -> dict[str, Any]:
    """Read a file that ``signed`` made, without its checksum.

    Args:
        file: the file.
        must: whether it must have a checksum. A checksum that is there must be right.

    Raises:
        ValueError: it is damaged, or not such a file.
        OSError: it cannot be read.
    """
    try:
        with regular(file).open("rb") as stream:
            content: dict[str, Any] = whole(stream)
        said = content.pop("checksum", None)
        if said != checksum(content) and (must or said is not None):
            raise ValueError("its checksum is of other contents")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{shown(file)} is damaged ({error})") from error
    return content


def checksum(content: dict[str, Any]) -> str:
    """Return a checksum of a JSON value. Formatting and the order of keys do not matter."""
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def seal(folder: Path, **facts: Any) -> None:
    """Sync a folder's contents to the disk, then write its marker.

    Args:
        folder: the folder. Its files are read again for their checksums.
        facts: what ``facts`` returns later, e.g. ``run`` and ``step``.
    """
    files = {name: path for name, path in _entries(folder).items() if name != MARKER}
    for path in files.values():
        sync(path)
    for root, _, _ in os.walk(folder):
        sync(Path(root))
    with ThreadPoolExecutor() as pool:
        sums = pool.map(file_sum, files.values())
        known = {
            name: [path.stat().st_size, found]
            for (name, path), found in zip(files.items(), sums, strict=True)
        }
    text = signed({"facts": facts, "files": known})
    publish(folder / MARKER, partial(Path.write_text, data=text))


def facts(folder: Path) -> dict[str, Any]:
    """Return the facts in a folder's marker, or an empty dict where it cannot be read."""
    try:
        return dict(unsigned(folder / MARKER)["facts"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def identity(folder: Path) -> str | None:
    """Return the checksum of a folder's marker, or None where the marker is damaged or missing.

    The marker has every file's checksum, so this identifies the folder's contents.
    """
    try:
        return checksum(unsigned(folder / MARKER))
    except (OSError, ValueError):
        return None


def problem(folder: Path, *, contents: bool = True) -> str | None:
    """Return the first difference between a folder and its seal, or None.

    Args:
        folder: the folder.
        contents: whether to compare checksums, too. Otherwise names and sizes are compared.
    """
    if not (folder / MARKER).is_file():
        return f"it has no {MARKER}, so it was not written to its end"
    try:
        known = unsigned(folder / MARKER)["files"]
        there = _entries(folder)
        if links := sorted(name for name, path in there.items() if path.is_symlink()):
            return f"{links[0]} is a link"
        if (found := _difference(folder, known, contents)) is not None:
            return found
        if extra := sorted(there.keys() - known.keys() - {MARKER}):
            return f"{extra[0]} was not written with it"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return str(error)
    return None


def refuse_changed(folder: Path) -> None:
    """Raise ValueError with the first file of a sealed model that is not as it was written.

    The model card may have changed, and there may be other files. Links are followed, because the
    hub's cache has links. Folders without a marker are passed over.
    """
    if not os.path.lexists(folder / MARKER):
        return
    try:
        known = unsigned(folder / MARKER)["files"]
        found = _difference(folder, {n: known[n] for n in known if n != CARD}, contents=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = str(error)
    if found is not None:
        raise ValueError(
            f"{shown(folder)} is not as it was written: {shown(found)}; copy or download it again, "
            f"or remove its {MARKER} if you changed it yourself"
        )


def _difference(folder: Path, known: dict[str, Any], contents: bool) -> str | None:
    for name, (size, _) in known.items():
        if not (folder / name).exists():
            return f"{name} is missing"
        if (found := regular(folder / name).stat().st_size) != size:
            return f"{name} has {found} bytes, not {size}"
    if contents:
        with ThreadPoolExecutor() as pool:
            sums = pool.map(file_sum, (folder / name for name in known))
            for (name, (_, said)), there in zip(known.items(), sums, strict=True):
                if there != said:
                    return f"{name} has other contents than were written"
    return None


def _entries(folder: Path) -> dict[str, Path]:
    """Return a folder's files and links by relative name. Links are not followed."""
    found = {}
    for root, folders, names in os.walk(folder):
        for path in (Path(root, name) for name in (*folders, *names)):
            if path.is_symlink() or not path.is_dir():
                found[path.relative_to(folder).as_posix()] = path
    return found


def file_sum(file: Path) -> str:
    """Return a checksum of a file's contents."""
    found = blake2b(digest_size=16)
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            found.update(block)
    return found.hexdigest()
