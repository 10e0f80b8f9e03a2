"""Stream a corpus: a JSONL or parquet file, a file of texts, or a folder of images."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llave import limits
from llave.files import LFS_POINTER, left_behind, reading
from llave.images import IMAGE_SUFFIXES, MISSING, declared_size, open_rgb
from llave.jsonl import lines, parsed
from llave.modeling import text_input
from llave.opening import Root, opened
from llave.printable import shown

FIELDS = ("id", "text", "image")
OnError = Literal["raise", "skip"]


class Row(NamedTuple):
    """One row of a corpus: a text, an image or both, or the problem that makes it unusable.

    An image is a path as the row states it, or a file's content. ``Source.images`` opens the path.
    """

    number: int
    id: str
    text: str | None = None
    image: Path | bytes | None = None
    problem: str | None = None


class Source:
    """Streams the rows of a JSONL file, a parquet file, a file of texts or a folder of images.

    Reading can start at the first row of any shard.

    Attributes:
        images: the folder that the rows' paths are in.
        ignored: the number of a folder's entries that are left out, by reason.
    """

    def __init__(self, path: Path, image_root: Path | None, shard_rows: int) -> None:
        self.path = path
        self.stride = shard_rows
        self.ignored: Counter[str] = Counter()
        self._repeats: dict[int, int] = {}  # row with a repeated id -> earlier row with that id
        self._ranges_with_images: set[int] = set()
        if path.is_dir():
            if image_root is not None:
                raise ValueError(
                    f"image_root={image_root} has no meaning with the folder {path} as source; "
                    "leave it out"
                )
            self.images = Root(path, "source")
            self.files = sorted(self._scan())
            self._records: Callable[[int], Iterator[Any]] = self._images
            return
        if not path.exists():
            raise FileNotFoundError(f"source {path} does not exist")
        if image_root is not None and not image_root.is_dir():
            raise FileNotFoundError(f"image_root={image_root} is no folder")
        self.images = Root(path.parent if image_root is None else image_root, "image_root")
        if path.suffix.lower() not in (".jsonl", ".txt", ".parquet"):
            raise ValueError(
                f"source must be a .jsonl, .parquet or .txt file or a folder of images, got {path}"
            )
        with opened(path) as file:
            if file.read(64).startswith(LFS_POINTER):
                raise ValueError(f"{path} is a pointer of git-lfs, not yet the file: git lfs pull")
        self.offsets = array("Q")  # byte offset of every stride-th line, filled while reading
        if path.suffix.lower() == ".parquet":
            self._records = self._parquet
        elif path.suffix.lower() == ".jsonl":
            self._records = partial(self._lines, parsed, "JSON")
        else:
            self._records = partial(self._lines, _text, "text in UTF-8")

    def rows(self, first: int, stop: int | None = None) -> Iterator[Row]:
        """Yield rows ``first`` to ``stop - 1``. ``first`` must be a multiple of the stride."""
        count = None if stop is None else stop - first
        for number, record in enumerate(islice(self._records(first), count), first):
            if number in self._repeats:
                problem = f"row {number} has the id of row {self._repeats[number]}"
                yield Row(number, str(number), problem=f"{problem}; ids must be unique")
                continue
            try:
                yield self._row(number, record)
            except ValueError as error:
                yield Row(number, str(number), problem=str(error))

    def pick(self, numbers: Iterable[int]) -> Iterator[Row]:
        """Yield chosen rows in the order of their numbers. ``fingerprint`` need not have run."""
        blocks: dict[int, set[int]] = {}
        for number in sorted(numbers):
            blocks.setdefault(number // self.stride, set()).add(number)
        for block, wanted in blocks.items():
            rows = self.rows(block * self.stride, max(wanted) + 1)
            yield from (row for row in rows if row.number in wanted)

    def shows_images(self, first: int) -> bool:
        """Whether any row of a shard has an image. ``fingerprint`` must have run before.

        Args:
            first: the first row of the shard, a multiple of the stride.
        """
        return first // self.stride in self._ranges_with_images

    def fingerprint(self, on_error: OnError) -> dict[str, Any]:
        """Return the source's size, number of rows and hashes.

        Args:
            on_error: what an unusable row or a repeated id does. ``"raise"`` raises ValueError.
                With ``"skip"``, ``rows`` gives such a row with its problem from then on.
        """
        ids = hashlib.blake2b(digest_size=16)
        hashes = array("Q")
        for row in self.rows(0):
            if row.problem and on_error == "raise":
                raise ValueError(f"{self.path}, {row.problem}")
            if row.image is not None:
                self._ranges_with_images.add(row.number // self.stride)
            name = row.id.encode()
            short = hashlib.blake2b(name, digest_size=8).digest()
            hashes.append(int.from_bytes(short, sys.byteorder))
            ids.update(b"%d:%s" % (len(name), name))
        if not hashes:
            left = f"; left out: {self.left_out()}" if self.ignored else ""
            raise ValueError(f"source {self.path} has no rows{left}")
        self._repeats = self._find_repeats(np.frombuffer(hashes, dtype=np.uint64), on_error)
        size, content = self._content()
        return {"size": size, "rows": len(hashes), "ids": ids.hexdigest(), "content": content}

    def left_out(self) -> str:
        """Say how many of a folder's entries are left out, and why."""
        return ", ".join(f"{count} {why}" for why, count in sorted(self.ignored.items()))

    def _find_repeats(self, hashes: np.ndarray, on_error: OnError) -> dict[int, int]:
        values, counts = np.unique(hashes, return_counts=True)
        if len(values) == len(hashes):
            return {}
        # Different ids may share a hash, so the rows in question are read again.
        suspects = np.isin(hashes, values[counts > 1])
        seen: dict[str, int] = {}
        repeats = {}
        for row in self.rows(0):
            if row.problem or not suspects[row.number]:
                continue
            earlier = seen.setdefault(row.id, row.number)
            if earlier != row.number:
                if on_error == "raise":
                    raise ValueError(
                        f"{self.path}: rows {earlier} and {row.number} have the same id "
                        f"{row.id!r}; ids must be unique: rename or remove one"
                    )
                repeats[row.number] = earlier
        return repeats

    def _content(self) -> tuple[int, str]:
        content = hashlib.blake2b(digest_size=16)
        if self.path.is_dir():
            sizes = [(self.images.folder / name).stat().st_size for name in self.files]
            content.update(json.dumps([self.files, sizes]).encode())
            return sum(sizes), content.hexdigest()
        with self.path.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
        return self.path.stat().st_size, content.hexdigest()

    def _row(self, number: int, record: Any) -> Row:
        """Make a row of a record. Raise ValueError where the record cannot be used."""
        if isinstance(record, ValueError):
            raise record
        if not isinstance(record, dict):
            raise ValueError(
                f"row {number} must be an object with text or image, got {record!r:.80}"
            )
        identifier = record.get("id")
        if identifier is None:
            identifier = number
        if isinstance(identifier, int) and not isinstance(identifier, bool):
            identifier = str(identifier)
        text, image = record.get("text"), record.get("image")
        if isinstance(image, dict) and {"bytes", "path"} & image.keys():  # the hub's image type
            image = image.get("bytes") or image.get("path")
        if not isinstance(image, str | bytes | None):
            raise ValueError(
                f"row {number}: image must be a path, or in parquet a file's content (bytes), "
                f"got {image!r:.80}"
            )
        for name, value in (("id", identifier), ("text", text)):
            if not isinstance(value, str | None):
                raise ValueError(f"row {number}: {name} must be a string, got {value!r:.80}")
            try:
                (value or "").encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"row {number}: the {name} {value!r:.80} is not valid Unicode"
                ) from error
        if not text and not image:
            raise ValueError(
                f"row {number} has neither text nor image; fill one in or remove the row"
            )
        if isinstance(image, str):
            image = Path(image) if image else None
        return Row(number, identifier, text or None, image or None)

    def _scan(self) -> Iterator[str]:
        """Yield the relative paths of a folder's images, and count the other entries."""

        def refuse(error: OSError) -> None:
            raise error

        root = self.images.folder
        for parent, folders, files in os.walk(root, onerror=refuse):
            hidden = [name for name in (*folders, *files) if left_behind(name)]
            self.ignored["hidden or left by a system"] += len(hidden)
            folders[:] = [name for name in folders if not left_behind(name)]
            links = [name for name in folders if Path(parent, name).is_symlink()]
            self.ignored["links to folders (pass those folders)"] += len(links)
            for name in files:
                path = Path(parent, name)
                suffix = shown(path.suffix.lower())
                if left_behind(name):
                    continue
                name = path.relative_to(root).as_posix()
                if not path.is_file():
                    self.ignored["broken links or devices"] += 1
                elif path.is_symlink() and not self.images.holds(name):
                    self.ignored["links out of the folder (a .jsonl file may list them)"] += 1
                elif suffix in MISSING:
                    self.ignored[f"{suffix} ({MISSING[suffix]})"] += 1
                elif suffix in (".jsonl", ".parquet"):
                    self.ignored[f"{suffix} (a source by itself: pass the file)"] += 1
                elif suffix not in IMAGE_SUFFIXES:
                    self.ignored[f"{suffix or 'without a suffix'} (no image that is read)"] += 1
                else:
                    yield name
        self.ignored = +self.ignored  # drops the zeros

    def _images(self, first: int) -> Iterator[dict[str, str]]:
        for name in self.files[first:]:
            yield {"id": name, "image": name}

    def _lines(self, parse: Callable[[bytes], Any], kind: str, first: int) -> Iterator[Any]:
        with self.path.open("rb") as file:
            block = max(0, min(first // self.stride, len(self.offsets) - 1))
            offset = file.seek(self.offsets[block]) if block else 0
            number = block * self.stride
            for line in lines(file):
                if line.strip():
                    if number == len(self.offsets) * self.stride:
                        self.offsets.append(offset)
                    if number >= first:
                        try:
                            yield parse(line)
                        except ValueError as error:
                            yield ValueError(f"row {number} is not {kind} ({error}): {line!r:.80}")
                    number += 1
                offset += len(line)

    def _parquet(self, first: int) -> Iterator[Any]:
        try:
            file = pq.ParquetFile(self.path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.path} is no whole parquet file ({error})") from error
        with reading(self.path), file:
            schema = file.schema_arrow
            columns = [name for name in FIELDS if name in schema.names]
            if not {"text", "image"} & set(columns):
                raise ValueError(
                    f"{self.path} has the columns {shown(', '.join(schema.names))}; it must have "
                    "text or image: rename one"
                )
            limits.check_parquet(file.metadata, columns, self.path)
            # Rows may hold whole image files. Such rows are read a few at a time.
            image = schema.field("image").type if "image" in columns else pa.null()
            whole = pa.types.is_struct(image) or str(image).endswith("binary")
            size = min(self.stride, 64 if whole else 4096)
            group, number = 0, first
            while first and first >= (rows := file.metadata.row_group(group).num_rows):
                first -= rows
                group += 1
            for batch in file.iter_batches(size, range(group, file.num_row_groups), columns):
                for record in _records(batch.slice(first), number):
                    yield record
                    number += 1
                first = max(0, first - len(batch))


def _text(line: bytes) -> dict[str, str]:
    return {"text": line.decode("utf-8-sig").rstrip("\r\n")}


def _records(batch: pa.RecordBatch, number: int) -> list[Any]:
    """Return a batch's rows, with an error in place of a row of invalid Unicode.

    Args:
        batch: the batch.
        number: the row number of its first row.
    """
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            return [ValueError(f"row {number} is not valid Unicode ({error})")]
        half = len(batch) // 2
        return _records(batch[:half], number) + _records(batch[half:], number + half)


def image_size(row: Row, images: Root) -> tuple[int, int] | None:
    """Return the (width, height) that a row's image declares. None if it has none to be read."""
    if row.image is None:
        return None
    try:
        with _source(row, images) as source:
            return declared_size(source)
    except Exception:  # loading the image reports the error
        return None


def load_input(row: Row, modalities: list[Any], images: Root) -> Any:
    """Return a row's input for ``model.encode``.

    Args:
        row: the row.
        modalities: the model's modalities.
        images: the folder of the images (``Source.images``).

    Raises:
        ValueError: the row has a problem. Decoders raise errors of many other types.
    """
    if row.problem is not None:
        raise ValueError(row.problem)
    if row.image is None:
        return text_input(row.text or "", modalities)
    with _source(row, images) as source:
        image = open_rgb(source)
    return image if row.text is None else {"text": row.text, "image": image}


def _source(row: Row, images: Root) -> Any:
    return images.open(row.image) if isinstance(row.image, Path) else nullcontext(row.image)
