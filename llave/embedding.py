"""Embed a corpus into parquet shards, with any number of processes. A run can be resumed.

The corpus is cut into fixed ranges of rows, and each range has one file. A file appears whole or
not at all, so the same command continues a killed run. Any number of processes writes the same
files.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

from llave.batching import Lengths, planned
from llave.corpus import OnError, Row, Source, image_size, load_input
from llave.encoding import Encoder, Failure, dimension_of
from llave.files import writing
from llave.filling import checked, fill
from llave.fingerprint import model_fingerprint
from llave.opening import Root
from llave.printable import escaped, shown
from llave.processes import rank_and_size
from llave.quantisation import DTYPES, Dtype, check_truncate_dim, truncated, value_ranges
from llave.recall import sample_recall
from llave.shards import (
    MANIFEST,
    Range,
    Shard,
    enter_manifest,
    ranges,
    read_manifest,
    read_shard,
    refuse_not_finite,
    refuse_out,
)

__all__ = [
    "EmbedReport",
    "Range",
    "Shard",
    "embed",
    "model_fingerprint",
    "ranges",
    "read_manifest",
    "read_shard",
    "refuse_not_finite",
    "refuse_out",
]

SAMPLE = 1024  # rows that give the ranges of int8 and the recall of smaller embeddings
SHOWN = 10  # how many skipped rows are printed
# Batches planned at a time where there are images. Rows may hold image files, and all of a shard's
# could fill the memory.
PLANNED = 16


@dataclass
class EmbedReport:
    """What one call of ``embed`` did. It covers this process's ranges only."""

    rows: int = 0
    """Rows embedded."""
    reused: int = 0
    """Rows found done."""
    skipped: list[dict[str, Any]] = field(default_factory=list)
    """Rows left out because they cannot be used: ``{"row", "id", "error"}`` each."""
    ignored: dict[str, int] = field(default_factory=dict)
    """How many entries of a folder are not taken, by reason."""
    recall: float | None = None
    """Share of the 10 nearest rows that the smaller embeddings give, in a sample of the corpus.

    It is ``llave.recall.sample_recall``. None for whole embeddings, and for processes but rank 0.
    """
    seconds: float = 0.0


def embed(
    model: SentenceTransformer,
    source: str | Path,
    out: str | Path,
    *,
    batch_size: int = 32,
    shard_rows: int = 4096,
    normalize: bool = True,
    truncate_dim: int | None = None,
    dtype: Dtype = "float32",
    prompt: str | None = None,
    image_root: str | Path | None = None,
    on_error: OnError = "raise",
    workers: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> EmbedReport:
    """Write the embeddings of a corpus to ``out``: one parquet file per ``shard_rows`` rows.

    Each file ``part-<first row>-<last row>.parquet`` has the columns ``id`` (string) and
    ``embedding`` (fixed-size list). A second call continues the first. It keeps readable files and
    computes damaged and missing ones. ``manifest.json`` records source, model and settings. A call
    with other values is refused. A file's bytes do not depend on the number of processes or on
    restarts, given the same ``batch_size``, device and library versions. Files that this run did
    not write are neither replaced nor removed.

    Args:
        model: a model on the device to use.
        source: a ``.jsonl`` or ``.parquet`` file, a ``.txt`` file with a text in each line, or a
            folder of images. A ``.jsonl`` or ``.parquet`` file has the fields ``text`` and/or
            ``image`` (a path) and optionally ``id`` (default: the row number). In parquet an image
            may also be its file's content, or ``{bytes, path}`` as in the hub's
            data sets. A folder is read recursively and sorted, and the relative path is the id.
            Images are taken as a person sees them (``llave.images``). A later call does not notice
            that an image file changed, unless its size changed in a folder.
        out: the folder for the files. It is created if it does not exist. It must be empty or hold
            this run. Processes on many machines may share it.
        batch_size: inputs per forward pass, 32 by default. Large images make a batch smaller
            (LLAVE_MAX_PIXELS of ``llave.limits``), and so does a lack of memory.
        shard_rows: rows per file. 4096 by default.
        normalize: whether embeddings are scaled to length 1. True by default.
        truncate_dim, dtype: as in ``llave.compression.compress``. The levels of ``"int8"`` lie
            between the least and the largest value of each dimension in 1,024 rows, spread evenly
            over the corpus. Values outside are stored as the nearest level. The first process
            writes these ranges into the manifest, for all processes and later calls.
        prompt: the prompt given to ``model.encode``. By default the model's own.
        image_root: the folder of the images, by default the source file's folder. Paths are
            relative to it, and no absolute path or link may leave it. ``"/"`` allows any.
        on_error: what a row that cannot be used does. Such a row is malformed, repeats an id, has
            neither text nor image, has an unreadable image, is refused by the model, or gets an
            embedding that is not finite. ``"raise"`` (default) raises an error that names it.
            ``"skip"`` leaves it out and records it in the file's metadata. After images are
            repaired, a call with ``"raise"`` computes the files with skipped rows again.
        workers: processes that read and preprocess ahead of the model. They change no embedding. By
            default this process's share of the cores less one, 1 to 4. 0 reads in this process.
        rank: this process's number. By default the environment's ``RANK``, or 0.
        world_size: the number of processes. By default the environment's ``WORLD_SIZE``, or 1.

    Returns:
        What this process did. Rank 0 also prints progress and throughput to stderr, and the recall
        of smaller embeddings.

    Raises:
        TypeError: ``model`` is not a SentenceTransformer.
        FileNotFoundError: there is no ``source``.
        ValueError: a setting is out of range, the source has no rows or one that cannot be used,
            or ``out`` holds another run or other things.
        OSError: a file cannot be written, because there is no space or no permission. The message
            names the file.
    """
    rank, world_size = rank_and_size(rank, world_size)
    _check(model, batch_size, shard_rows, dtype, on_error)
    dimension = dimension_of(model)
    check_truncate_dim(truncate_dim, dimension)
    refuse_out(out, source)
    root = None if image_root is None else Path(image_root)
    rows = Source(Path(source), root, shard_rows)
    manifest: dict[str, Any] = {
        "source": rows.fingerprint(on_error),
        "image_root": None if root is None else str(root),
        "model": model_fingerprint(model),
        "dimension": truncate_dim or dimension,
        "shard_rows": shard_rows,
        "normalised": normalize,
        "dtype": dtype,
        "prompt": prompt,
    }
    folder = Path(out)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    report = EmbedReport(ignored=dict(rows.ignored))
    if rank == 0 and rows.ignored:
        print(f"{shown(source)}: left out {escaped(rows.left_out())}", file=sys.stderr)
    start = time.monotonic()
    encoder = Encoder(
        model,
        partial(_named_input, modalities=model.modalities, images=rows.images),
        prompt=prompt,
        normalize=normalize,
        workers=workers,
    )
    with ThreadPoolExecutor() as pool:
        filling = _Corpus(rows, report, pool, Lengths(model), batch_size, on_error)
        smaller = manifest["dimension"] < dimension or dtype in ("int8", "binary")
        calibrates = dtype == "int8" and not (folder / MANIFEST).exists()
        sample = None
        if calibrates or (smaller and rank == 0):
            sample = filling.sample(encoder, manifest)
        if sample is not None and calibrates:
            manifest["ranges"] = value_ranges([truncated(sample, manifest)])
        manifest = enter_manifest(folder, manifest, measured=("ranges",))
        if sample is not None and rank == 0 and len(sample) > 1:
            report.recall = sample_recall(sample, manifest)
            print(
                f"recall@10 against the whole embeddings, in a sample of {len(sample):,} rows: "
                f"{report.recall:.3f}",
                file=sys.stderr,
            )
        mine = ranges(manifest)[rank::world_size]
        total = sum(span.stop - span.first for span in mine)
        with tqdm(total=total, unit="row", disable=rank != 0) as bar:
            fill(folder, manifest, mine, filling, encoder, on_error=on_error, advance=bar.update)
    report.skipped.sort(key=itemgetter("row"))
    report.seconds = time.monotonic() - start
    for skipped in report.skipped[:SHOWN]:
        print(f"skipped {skipped['id']!r}: {escaped(skipped['error'])}", file=sys.stderr)
    if len(report.skipped) > SHOWN:
        print(f"and {len(report.skipped) - SHOWN} more", file=sys.stderr)
    if rank == 0:
        print(
            f"rank 0 of {world_size}: {report.rows} rows in {report.seconds:.1f} s "
            f"({report.rows / report.seconds:.1f} rows/s), {report.reused} found done, "
            f"{len(report.skipped)} skipped",
            file=sys.stderr,
        )
    return report


def _check(
    model: object,
    batch_size: int,
    shard_rows: int,
    dtype: str,
    on_error: str,
) -> None:
    if not isinstance(model, SentenceTransformer):
        raise TypeError(
            f"model must be a SentenceTransformer, got {type(model).__name__}; load it first"
        )
    for name, value in (("batch_size", batch_size), ("shard_rows", shard_rows)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")


class _Corpus:
    """The corpus for ``fill``. It keeps the report."""

    def __init__(
        self,
        source: Source,
        report: EmbedReport,
        pool: ThreadPoolExecutor,
        length: Lengths,
        batch_size: int,
        on_error: OnError,
    ) -> None:
        self._source, self._report, self._pool = source, report, pool
        self._length, self._batch_size, self._on_error = length, batch_size, on_error

    def sample(self, encoder: Encoder, manifest: dict[str, Any]) -> np.ndarray:
        """Return (rows, D) whole embeddings of rows that are spread evenly over the corpus."""
        count = manifest["source"]["rows"]
        numbers = np.linspace(0, count - 1, min(count, SAMPLE)).astype(int).tolist()
        rows, vectors = self._source.pick(numbers), []
        for batch in encoder.run(self._planned(rows, PLANNED * self._batch_size)):
            for one in batch:
                found = checked(one, manifest, encoder.dimension)
                if isinstance(found, Failure):
                    self.refuse(one.item, found, loaded=one.id is not None)
                else:
                    vectors.append(found)
        return np.array(vectors, np.float32).reshape(len(vectors), encoder.dimension)

    def batches(self, span: Range) -> Iterator[list[Row]]:
        whole = not self._source.shows_images(span.first)
        step = span.stop - span.first if whole else PLANNED * self._batch_size
        return self._planned(self._source.rows(*span), step)

    def _planned(self, rows: Iterator[Row], step: int) -> Iterator[list[Row]]:
        """Yield batches of like length. ``step`` rows are planned at a time."""
        while taken := list(islice(rows, step)):
            sizes = self._pool.map(partial(image_size, images=self._source.images), taken)
            lengths = [self._length(row.text or "", s) for row, s in zip(taken, sizes, strict=True)]
            yield from planned(taken, lengths, self._batch_size)

    def refuse(self, row: Row, failure: Failure, *, loaded: bool) -> dict[str, Any]:
        problem = failure.reason
        if not loaded and not row.problem:
            if self._on_error == "raise":
                place = "in it" if isinstance(row.image, bytes) else shown(row.image)
                problem = f"the image {place} cannot be read ({problem})"
            else:  # no folder in the recorded error, because folders differ between machines
                name = row.image.name if isinstance(row.image, Path) else "its content"
                problem = f"{failure.kind} from {name}"
        if self._on_error == "raise":
            remedy = "repair it, or leave such rows out with on_error='skip'"
            raise ValueError(f"row {row.number} (id {row.id!r}): {problem}; {remedy}")
        return {"row": row.number, "id": row.id, "error": problem[:200]}

    def done(self, span: Range, shard: Shard, *, reused: bool) -> None:
        if reused:
            self._report.reused += len(shard.ids)
        else:
            self._report.rows += len(shard.ids)
        self._report.skipped += shard.skipped


def _named_input(row: Row, *, modalities: list[Any], images: Root) -> tuple[str, Any]:
    return row.id, load_input(row, modalities, images)
