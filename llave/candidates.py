"""The distinct inputs of an evaluation task, encoded by any number of processes.

Embeddings are kept in shards beside the task's result, as ``embed`` keeps them. A killed evaluation
goes on within a task. The shards are dropped once the task is scored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from sentence_transformers import SentenceTransformer

from llave.batching import Lengths, planned
from llave.encoding import Encoder, Failure, dimension_of
from llave.files import writing
from llave.filling import fill
from llave.media import Media, content_id, make_input
from llave.printable import shown
from llave.shards import (
    MANIFEST,
    Range,
    Shard,
    enter_manifest,
    finished,
    ranges,
    read_manifest,
)
from llave_kernels.atomic_files import sweep

SHARD_ROWS = 256  # inputs a shard: what a kill costs at most, and the unit of the processes' shares
VIDEO_TOKENS = 1 << 13  # assumed of a video, which is not opened to plan batches
POLL = 0.1  # seconds between looks at what other processes have finished


class Encoding(NamedTuple):
    """Encoded inputs, in their order.

    Attributes:
        vectors: (inputs, D) float32 embeddings of length 1.
        ids: (inputs,) int64 ``llave.media.content_id`` of each.
    """

    vectors: np.ndarray
    ids: np.ndarray


class _Input(NamedTuple):
    number: int
    text: str
    path: str


def encode_inputs(
    model: SentenceTransformer,
    inputs: Sequence[tuple[str, str]],
    media: Media,
    folder: Path,
    identity: dict[str, Any],
    *,
    batch_size: int,
    workers: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    advance: Callable[[int], object] = lambda _: None,
) -> Encoding | None:
    """Encode this process's share of inputs. Rank 0 waits for the others and returns all.

    Args:
        model: the model.
        inputs: distinct (text, path) pairs.
        media: opens the paths.
        folder: holds the shards.
        identity: what identifies model and data.
        batch_size: inputs per forward pass.
        workers: as in ``Encoder``.
        rank, world_size: this process's number, and the number of processes.
        advance: called with the number of inputs that were done, by all processes on rank 0.

    Returns:
        The encoded inputs on rank 0, and None on other ranks.

    Raises:
        ValueError: an input cannot be read or is refused, an embedding is not finite, or ``folder``
            holds embeddings of another model or other data.
        OSError: a file cannot be written.
    """
    manifest = {
        "source": {"rows": len(inputs), "data": identity["data"]},
        "image_root": None,
        "model": identity["model"],
        "dimension": dimension_of(model),
        "shard_rows": SHARD_ROWS,
        "normalised": True,
        "dtype": "float32",
        "prompt": None,
    }
    if folder.is_symlink():
        raise ValueError(f"{shown(folder)} is a link; move it away")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    enter_manifest(folder, manifest)
    spans = ranges(manifest)
    mine = spans[rank::world_size]
    encoder = Encoder(model, partial(_named_input, media=media), workers=workers)
    with ThreadPoolExecutor() as pool:
        filling = _Inputs(inputs, media, pool, Lengths(model), batch_size)
        fill(folder, manifest, mine, filling, encoder, advance=advance)
    if rank:
        return None
    shards = []
    for span in spans:
        while (shard := finished(folder / span.file, span, manifest, "raise")) is None:
            time.sleep(POLL)
        shards.append(shard)
        if span not in mine:
            advance(span.stop - span.first)
    ids = np.array([int(name) for shard in shards for name in shard.ids], np.int64)
    return Encoding(np.concatenate([shard.vectors for shard in shards]), ids)


def drop(folder: Path) -> None:
    """Remove the shards of a scored task. Files that are not of this kind stay."""
    if not folder.is_dir():
        return
    with suppress(OSError, ValueError):  # another process drops it too, or it holds other things
        manifest = folder / MANIFEST
        if manifest.exists():
            for span in ranges(read_manifest(folder)):
                (folder / span.file).unlink(missing_ok=True)
                sweep(folder / span.file)
            manifest.unlink(missing_ok=True)
        sweep(manifest)
        folder.rmdir()


class _Inputs:
    """The inputs for ``fill``."""

    def __init__(
        self,
        inputs: Sequence[tuple[str, str]],
        media: Media,
        pool: ThreadPoolExecutor,
        length: Lengths,
        batch_size: int,
    ) -> None:
        self._inputs, self._media, self._pool = inputs, media, pool
        self._length, self._batch_size = length, batch_size

    def batches(self, span: Range) -> Iterator[list[_Input]]:
        taken = [_Input(number, *self._inputs[number]) for number in range(*span)]
        lengths = list(self._pool.map(self._tokens, taken))
        yield from planned(taken, lengths, self._batch_size)

    def refuse(self, one: _Input, failure: Failure, *, loaded: bool) -> NoReturn:
        if not loaded:
            raise ValueError(failure.reason)
        beside = f" with {shown(one.path)}" if one.path else ""
        raise ValueError(f"the text {one.text!r:.80}{beside}: {failure.reason}")

    def done(self, span: Range, shard: Shard, *, reused: bool) -> None:
        pass

    def _tokens(self, one: _Input) -> int:
        size = self._media.size(one.path) if one.path else None
        unknown = VIDEO_TOKENS if one.path and size is None else 0
        return self._length(one.text, size) + unknown


def _named_input(one: _Input, *, media: Media) -> tuple[str, Any]:
    made = make_input(one.text, one.path, media)
    return str(content_id(made)), made
