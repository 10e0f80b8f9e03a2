"""Fill a folder of embeddings: the work that its processes share, and that a kill may interrupt."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llave.corpus import OnError
from llave.encoding import Encoded, Encoder, Failure
from llave.quantisation import float_type, truncated
from llave.shards import Range, Shard, finished, put, refuse_foreign
from llave_kernels.atomic_files import sweep


class Filling(Protocol):
    """What is embedded. An item has its row number as ``number``."""

    def batches(self, span: Range) -> Iterable[list[Any]]:
        """Return the batches of a range's items. Together they hold every item once."""

    def refuse(self, item: Any, failure: Failure, *, loaded: bool) -> dict[str, Any]:
        """Raise an error for an item without an embedding, or return the note to keep.

        Args:
            item: the item.
            failure: why it has none.
            loaded: whether the item was read, so that the model refused it.
        """

    def done(self, span: Range, shard: Shard, *, reused: bool) -> None:
        """Take notice of a finished range.

        Args:
            span: the range.
            shard: its contents.
            reused: whether an earlier run made it.
        """


def fill(
    folder: Path,
    manifest: dict[str, Any],
    spans: list[Range],
    filling: Filling,
    encoder: Encoder,
    *,
    on_error: OnError = "raise",
    advance: Callable[[int], object],
) -> None:
    """Write the files of some ranges. Files that are there and whole are kept.

    The batches of a range come from that range alone. Its file therefore depends neither on the
    number of processes nor on restarts.

    Args:
        folder: the folder, with its manifest.
        manifest: the manifest.
        spans: this process's ranges.
        filling: what is embedded.
        encoder: the model.
        on_error: ``"raise"`` makes files with skipped rows again.
        advance: called with the number of items that were done.

    Raises:
        ValueError: a file is from another run, an item is refused, or the model gives embeddings of
            another dimension than it says.
        OSError: a file cannot be written.
    """
    for span in spans:
        refuse_foreign(folder / span.file, span, manifest)
    owners: deque[Range] = deque()  # the ranges of the batches under way

    def batches() -> Iterator[list[Any]]:
        for span in spans:
            shard = finished(folder / span.file, span, manifest, on_error)
            if shard is not None:
                sweep(folder / span.file)
                filling.done(span, shard, reused=True)
                advance(span.stop - span.first)
                continue
            for batch in filling.batches(span):
                owners.append(span)
                yield batch

    dimension = encoder.dimension
    kept: list[tuple[int, str, np.ndarray]] = []
    skipped: list[dict[str, Any]] = []
    for batch in encoder.run(batches()):
        span = owners.popleft()
        for one in batch:
            found = checked(one, manifest, dimension)
            if isinstance(found, Failure):
                skipped.append(filling.refuse(one.item, found, loaded=one.id is not None))
            else:
                kept.append((one.item.number, one.id or "", found))
        advance(len(batch))
        if len(kept) + len(skipped) == span.stop - span.first:
            shard = _shard(kept, skipped, manifest, dimension)
            put(folder / span.file, span, shard, manifest)
            filling.done(span, shard, reused=False)
            kept, skipped = [], []


def checked(one: Encoded, manifest: dict[str, Any], dimension: int) -> np.ndarray | Failure:
    """Return an item's (D,) float32 embedding, or why it has none that can be stored.

    Args:
        one: the item.
        manifest: the folder's manifest.
        dimension: D, as the model says.

    Raises:
        ValueError: the model gives embeddings of another dimension.
    """
    if isinstance(one.found, Failure):
        return one.found
    if one.found.shape != (dimension,):
        raise ValueError(
            f"model gave embeddings of {len(one.found)} values, but says it gives {dimension}; "
            "correct its get_embedding_dimension()"
        )
    dtype = float_type(manifest)
    if not np.isfinite(one.found.astype(dtype)).all():
        return Failure("ValueError", f"the embedding is not finite in {dtype}")
    return one.found


def _shard(
    kept: list[tuple[int, str, np.ndarray]],
    skipped: list[dict[str, Any]],
    manifest: dict[str, Any],
    dimension: int,
) -> Shard:
    """Make a range's contents of its rows, in the order of their numbers."""
    kept = sorted(kept, key=itemgetter(0))
    vectors = np.empty((len(kept), dimension), np.float32)
    for place, (_, _, vector) in enumerate(kept):
        vectors[place] = vector
    vectors = truncated(vectors, manifest)
    names = [name for _, name, _ in kept]
    return Shard(names, vectors, sorted(skipped, key=itemgetter("row")))
