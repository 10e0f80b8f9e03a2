"""A folder of embeddings on disk: its manifest, its parquet files, and checks before writing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llave import limits
from llave.corpus import OnError
from llave.files import create, left_behind, publish, refuse_overlap, regular
from llave.printable import shown
from llave.quantisation import DTYPES, check_ranges, quantise, restore, stored_type
from llave.sealing import checksum, signed, unsigned
from llave_kernels.atomic_files import sweep

MANIFEST = "manifest.json"
BATCH_ROWS = 64  # rows read at a time
PARQUET = b"PAR1"  # the first bytes of every parquet file
# The manifest's fields. Any other field comes from another program, or from damage.
FIELDS = {
    *("source", "image_root", "model", "dimension"),
    *("shard_rows", "normalised", "dtype", "prompt", "ranges"),
}
MANIFEST_VALUES = {"dtype": DTYPES, "normalised": (True, False)}


class Shard(NamedTuple):
    """One parquet file's contents: ids, (rows, D) embeddings, and the rows left out."""

    ids: list[str]
    vectors: np.ndarray
    skipped: list[dict[str, Any]]

    def numbers(self, span: Range) -> np.ndarray:
        """Return the (rows,) numbers that the rows have in the corpus."""
        skipped = [row["row"] for row in self.skipped]
        return np.setdiff1d(np.arange(span.first, span.stop), skipped)


class Range(NamedTuple):
    """Rows ``first`` to ``stop - 1`` of the corpus."""

    first: int
    stop: int

    @property
    def file(self) -> str:
        return f"part-{self.first:010d}-{self.stop - 1:010d}.parquet"


def refuse_out(
    out: str | Path, source: str | Path, model: str | os.PathLike[str] | None = None
) -> None:
    """Raise ValueError where ``out`` cannot take embeddings of ``source``. Nothing is loaded.

    ``out`` must not overlap the source or the model's folder. It must hold embeddings or be empty,
    apart from hidden and system files.
    """
    folder = Path(out)
    others: dict[str, str | os.PathLike[str]] = {"source": source}
    if model is not None:
        others["model"] = model
    refuse_overlap("out", folder, others)
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"out={shown(folder)} is no folder; choose another")
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    # The listing may miss a manifest that another process makes meanwhile.
    if MANIFEST in there or os.path.lexists(folder / MANIFEST):
        read_manifest(folder)
        return
    names = sorted(n for n in there if not left_behind(n) and not n.startswith(f"{MANIFEST}."))
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"out={shown(folder)} holds other things ({', '.join(map(shown, names[:3]))}{more}); "
            "choose a new or an empty folder"
        )


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Return the settings of a folder of embeddings. Raise ValueError where they cannot be used."""
    try:
        manifest = unsigned(Path(folder) / MANIFEST, must=False)  # older manifests have no checksum
        if unknown := sorted(manifest.keys() - FIELDS):
            raise ValueError(f"it has {', '.join(unknown)!r:.80}")
        values = manifest | {"rows": manifest["source"]["rows"]}
        for name in ("rows", "shard_rows", "dimension"):
            if type(values[name]) is not int or values[name] < 1:
                raise ValueError(f"{name} is {values[name]!r:.80}, not a positive number")
        for name, kinds in MANIFEST_VALUES.items():
            if values[name] not in kinds:
                raise ValueError(f"{name} is {values[name]!r:.80}")
        check_ranges(manifest)
        limits.check("LLAVE_MAX_SHARDS", -(-values["rows"] // values["shard_rows"]), "files")
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{shown(folder)} is not a folder of embeddings: {MANIFEST} cannot be used ({said}); "
            "embed the corpus into a new folder"
        ) from error
    return manifest


def ranges(manifest: dict[str, Any]) -> list[Range]:
    """Return the ranges that a corpus is cut into. Each range has one file."""
    rows, step = manifest["source"]["rows"], manifest["shard_rows"]
    return [Range(first, min(first + step, rows)) for first in range(0, rows, step)]


def read_shard(path: Path, span: Range, manifest: dict[str, Any], *, values: bool = True) -> Shard:
    """Read one range's file. Raise ValueError if it is damaged, not finite or from another run.

    Args:
        path: the file.
        span: its range.
        manifest: the folder's manifest.
        values: whether to read the embeddings, too. Otherwise ``vectors`` has no columns.
    """
    refuse_foreign(path, span, manifest)
    try:
        table = _table(regular(path), span, None if values else ["id"])
        note = json.loads(table.schema.metadata[b"llave"])
        schema = _schema(manifest)
        if not table.schema.equals(schema if values else pa.schema([schema.field("id")])):
            raise ValueError(f"it has the columns {table.schema.to_string()!r:.200}")
        ids = table["id"].to_pylist()
        vectors = np.empty((len(ids), 0), np.float32)
        if values:
            vectors = restore(_values(table["embedding"].combine_chunks(), manifest), manifest)
        if len(ids) + len(note["skipped"]) != span.stop - span.first:
            raise ValueError(f"it has {len(ids)} rows, {len(note['skipped'])} skipped")
        refuse_not_finite(vectors, lambda row: f"id {ids[row]!r}")
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise _unusable(path, error) from error
    return Shard(ids, vectors, note["skipped"])


def _unusable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{shown(path)} cannot be used ({' '.join(str(error).split())}); run embed again to "
        "replace it"
    )


def _schema(manifest: dict[str, Any]) -> pa.Schema:
    dtype, count = stored_type(manifest)
    # Parquet would store a list's 8-bit numbers in 32 bits each.
    plain = dtype.itemsize == 1
    embedding = pa.binary(count) if plain else pa.list_(pa.from_numpy_dtype(dtype), count)
    return pa.schema({"id": pa.string(), "embedding": embedding})


def _values(column: pa.Array, manifest: dict[str, Any]) -> np.ndarray:
    """Return a column's (rows, values) of the stored type."""
    dtype, count = stored_type(manifest)
    if dtype.itemsize > 1:
        flat = column.flatten().to_numpy(zero_copy_only=False)
    else:
        flat = np.frombuffer(column.buffers()[1] or b"", dtype)[column.offset * count :]
    return flat[: len(column) * count].reshape(len(column), count)


def count_rows(path: Path, span: Range, manifest: dict[str, Any]) -> int:
    """Return the number of rows in one range's file. Raise ValueError as in ``read_shard``."""
    refuse_foreign(path, span, manifest)
    try:
        return int(pq.read_metadata(regular(path)).num_rows)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unusable(path, error) from error


def _table(path: Path, span: Range, columns: list[str] | None = None) -> pa.Table:
    """Read a file's rows. Raise ValueError where they take far more memory than the file's size."""
    size = path.stat().st_size
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        if file.metadata.num_rows > span.stop - span.first:
            raise ValueError(f"it has {file.metadata.num_rows} rows")
        # The size is measured on the batches. pyarrow aborts the process where it reads the column
        # sizes of a damaged footer.
        batches, taken = [], 0
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            batches.append(batch)
            taken += batch.nbytes
            # Rows that embed stored take no more memory than the file's size.
            if taken > 4 * size:
                limits.check("LLAVE_MAX_SHARD_BYTES", taken, "bytes or more unpacked")
        schema = file.schema_arrow
        for name in set(schema.names) - set(columns or schema.names):
            schema = schema.remove(schema.get_field_index(name))
        return pa.Table.from_batches(batches, schema)


def refuse_foreign(path: Path, span: Range, manifest: dict[str, Any]) -> None:
    """Raise ValueError where a range's file is from another run, or is no shard.

    A damaged file of this run is not refused, because it will be written again.
    """
    if not os.path.lexists(path):
        return
    remedy = "move it away"
    with regular(path).open("rb") as file:
        start = file.read(len(PARQUET))
    if not PARQUET.startswith(start) and start.strip(b"\0"):
        raise ValueError(f"{shown(path)} is no shard of embeddings; {remedy}")
    try:
        note = json.loads(pq.read_schema(path).metadata[b"llave"])
        known = note["manifest"], note["first"]
    except (TypeError, KeyError) as error:  # a readable parquet file without our metadata
        raise ValueError(f"{shown(path)} is not of embed; {remedy}") from error
    except (pa.ArrowException, OSError, ValueError):
        return
    if known != (checksum(manifest), span.first):
        raise ValueError(f"{shown(path)} comes from another run; {remedy}")


def refuse_not_finite(vectors: np.ndarray, name: Callable[[int], str]) -> None:
    """Raise ValueError for embeddings with inf or NaN.

    Args:
        vectors: (rows, D) embeddings.
        name: returns a row's name. The message has that of the first row with inf or NaN.
    """
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{name(int(np.argmin(finite)))}: the embedding is not finite in {vectors.dtype}; "
            "check the model and its precision"
        )


def enter_manifest(
    folder: Path, manifest: dict[str, Any], *, measured: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Write a folder's manifest, or compare it with the one that is there. Return what is there.

    Args:
        folder: the folder.
        manifest: this run's settings.
        measured: fields that the first process measures for all. They are not compared.

    Raises:
        ValueError: the folder holds the embeddings of another run.
    """
    text = signed(manifest) + "\n"
    path = folder / MANIFEST
    if not path.exists():
        create(path, partial(Path.write_text, data=text, encoding="utf-8"))
    # Another process may have been first, so the manifest is read back.
    there = read_manifest(folder)
    sweep(path)
    differing = [
        f"{name} is {there.get(name)!r} there and {value!r} here"
        for name, value in (dict.fromkeys(there) | manifest).items()
        if name not in measured and (name not in there or there[name] != value)
    ]
    if differing:
        raise ValueError(
            f"out={shown(folder)} holds the embeddings of another run: {'; '.join(differing)}. "
            "Choose another folder, delete this one, or go back to its settings"
        )
    return there


def finished(path: Path, span: Range, manifest: dict[str, Any], on_error: OnError) -> Shard | None:
    if not path.exists():
        return None
    try:
        shard = read_shard(path, span, manifest)
    except ValueError:
        return None
    return None if shard.skipped and on_error == "raise" else shard


def put(path: Path, span: Range, shard: Shard, manifest: dict[str, Any]) -> None:
    note = {"manifest": checksum(manifest), "first": span.first, "skipped": shard.skipped}
    stored = shard._replace(vectors=quantise(shard.vectors, manifest))
    write = partial(_write_shard, shard=stored, note=note, schema=_schema(manifest))
    if os.path.lexists(path):  # this run's file, damaged or with rows that were skipped
        refuse_foreign(path, span, manifest)
        publish(path, write)
    elif not create(path, write):
        read_shard(path, span, manifest)  # raises unless another process of this run wrote it


def _write_shard(path: Path, *, shard: Shard, note: dict[str, Any], schema: pa.Schema) -> None:
    kind, flat = schema.field("embedding").type, shard.vectors.reshape(-1)
    if pa.types.is_fixed_size_binary(kind):
        buffers = [None, pa.py_buffer(flat.tobytes())]
        vectors = pa.FixedSizeBinaryArray.from_buffers(kind, len(shard.ids), buffers)
    else:
        vectors = pa.FixedSizeListArray.from_arrays(flat, kind.list_size)
    columns = [pa.array(shard.ids, pa.string()), vectors]
    table = pa.table(columns, schema.with_metadata({"llave": json.dumps(note)}))
    # Embeddings do not compress.
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
