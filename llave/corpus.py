"""Rows of a corpus, streamed: texts and images of a JSONL or parquet file or of a folder."""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from llave.modeling import text_input
from llave.images import open_rgb

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp"}
FIELDS = ("id", "text", "image")


class Row(NamedTuple):
    """One checked row: a text, an image's path, or both."""

    number: int
    id: str
    text: str | None
    image: Path | None


class Source:
    """Rows of a JSONL file, a parquet file or a folder of images, streamed from a range's start."""

    def __init__(self, path: Path, image_root: Path | None, shard_rows: int) -> None:
        self.path = path
        self.stride = shard_rows
        if path.is_dir():
            if image_root is not None:
                raise ValueError(
                    f"image_root={image_root} has no meaning with the folder {path} as source; "
                    "leave it out"
                )
            self.root = path
            self.files = sorted(
                file.relative_to(path).as_posix()
                for file in path.rglob("*")
                if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
            )
            self._records: Callable[[int], Iterator[Any]] = self._images
            return
        if not path.exists():
            raise FileNotFoundError(f"source {path} does not exist")
        self.root = image_root if image_root is not None else path.parent
        if path.suffix == ".jsonl":
            self.offsets = array("Q")  # of every stride-th row, filled as rows are first read
            self._records = self._jsonl
        elif path.suffix == ".parquet":
            self._records = self._parquet
        else:
            raise ValueError(
                f"source must be a .jsonl file, a .parquet file or a folder of images, got {path}"
            )

    def rows(self, first: int, stop: int | None = None) -> Iterator[Row]:
        """Rows ``first``, a multiple of the stride, to ``stop - 1``."""
        count = None if stop is None else stop - first
        for number, record in enumerate(islice(self._records(first), count), first):
            yield self._row(number, record)

    def fingerprint(self) -> dict[str, Any]:
        """Size, rows and hashes of the source; refuses ids that repeat."""
        ids = hashlib.blake2b(digest_size=16)
        hashes = array("Q")
        for row in self.rows(0):
            try:
                name = row.id.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{self.path}, row {row.number}: the id {row.id!r} is not valid Unicode"
                ) from error
            short = hashlib.blake2b(name, digest_size=8).digest()
            hashes.append(int.from_bytes(short, sys.byteorder))
            ids.update(b"%d:%s" % (len(name), name))
        if not hashes:
            raise ValueError(f"source {self.path} has no rows")
        self._refuse_duplicates(np.frombuffer(hashes, dtype=np.uint64))
        size, content = self._content()
        return {"size": size, "rows": len(hashes), "ids": ids.hexdigest(), "content": content}

    def _refuse_duplicates(self, hashes: np.ndarray) -> None:
        values, counts = np.unique(hashes, return_counts=True)
        if len(values) == len(hashes):
            return
        # Different ids may share a hash: the rows in question are read again.
        suspects = np.isin(hashes, values[counts > 1])
        seen: dict[str, int] = {}
        for row in self.rows(0):
            if suspects[row.number] and seen.setdefault(row.id, row.number) != row.number:
                raise ValueError(
                    f"{self.path}: rows {seen[row.id]} and {row.number} have the same id "
                    f"{row.id!r}; ids must be unique: rename or remove one"
                )

    def _content(self) -> tuple[int, str]:
        content = hashlib.blake2b(digest_size=16)
        if self.path.is_dir():
            sizes = [(self.path / name).stat().st_size for name in self.files]
            content.update(json.dumps([self.files, sizes]).encode())
            return sum(sizes), content.hexdigest()
        with self.path.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
        return self.path.stat().st_size, content.hexdigest()

    def _row(self, number: int, record: Any) -> Row:
        where = f"{self.path}, row {number}"
        if not isinstance(record, dict):
            raise ValueError(f"{where} must be an object with text or image, got {record!r:.80}")
        identifier = record.get("id")
        if identifier is None:
            identifier = number
        if isinstance(identifier, int) and not isinstance(identifier, bool):
            identifier = str(identifier)
        text, image = record.get("text"), record.get("image")
        for name, value in (("id", identifier), ("text", text), ("image", image)):
            if not isinstance(value, str | None):
                raise ValueError(f"{where}: {name} must be a string, got {value!r:.80}")
        if not text and not image:
            raise ValueError(f"{where} has neither text nor image; fill one in or remove the row")
        return Row(number, identifier, text or None, self.root / image if image else None)

    def _images(self, first: int) -> Iterator[dict[str, str]]:
        for name in self.files[first:]:
            yield {"id": name, "image": name}

    def _jsonl(self, first: int) -> Iterator[Any]:
        with self.path.open("rb") as file:
            offset = file.seek(self.offsets[first // self.stride]) if first else 0
            number = first
            for line in file:
                if line.strip():
                    if number == len(self.offsets) * self.stride:
                        self.offsets.append(offset)
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise ValueError(
                            f"{self.path}, row {number} is not JSON ({error}): {line!r:.80}"
                        ) from error
                    number += 1
                offset += len(line)

    def _parquet(self, first: int) -> Iterator[dict[str, Any]]:
        with pq.ParquetFile(self.path) as file:
            columns = [name for name in FIELDS if name in file.schema_arrow.names]
            group = 0
            while first and first >= (rows := file.metadata.row_group(group).num_rows):
                first -= rows
                group += 1
            for batch in file.iter_batches(
                min(self.stride, 4096), range(group, file.num_row_groups), columns
            ):
                yield from batch.slice(first).to_pylist()
                first = max(0, first - len(batch))


def load_inputs(
    rows: list[Row], step: int, pool: ThreadPoolExecutor, modalities: list[Any]
) -> Iterator[list[tuple[Row, Any]]]:
    """Chunks of ``step`` rows with what ``model.encode`` takes, or the error an image gave.

    The next chunk is read while the caller encodes this one.
    """
    chunks = [rows[first : first + step] for first in range(0, len(rows), step)]
    load = partial(_input, modalities=modalities)
    ahead = pool.map(load, chunks[0])
    for chunk, following in zip(chunks, [*chunks[1:], []], strict=True):
        inputs = list(ahead)
        ahead = pool.map(load, following)
        yield list(zip(chunk, inputs, strict=True))


def _input(row: Row, modalities: list[Any]) -> Any:
    if row.image is None:
        return text_input(row.text, modalities)
    try:
        image = open_rgb(row.image)
    except Exception as error:  # decoders raise errors of many types
        return error
    return image if row.text is None else {"text": row.text, "image": image}
