"""A faiss index of a folder of embeddings, kept in the folder and built shard by shard.

``index.json`` says what the index holds. It names a file ``index-*.faiss``, whose name is a hash of
what it holds. An index that is extended is written to another file, and ``index.json`` is replaced
at the end. A killed build therefore leaves the index that was there.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from llave.files import publish
from llave.printable import shown
from llave.sealing import checksum, file_sum, signed, unsigned
from llave.shards import Range, count_rows, ranges, read_manifest, read_shard
from llave_kernels.atomic_files import lock

INDEX = "index.json"
FLAT_ROWS = 20_000  # up to here an index compares a query with every row
GRAPH_BYTES = 2**31  # float32 bytes of the embeddings, up to here a graph holds them
SAMPLE_BYTES = 2**31  # the most that the sample for training takes
SAVED_ROWS = 2**20  # an index that is being built is saved after so many further rows
GROWTH = 4  # an index that was trained on a corpus so many times smaller is trained again
SEED = 0


class Index(NamedTuple):
    """What an index holds: the contents of ``index.json``.

    Attributes:
        manifest: checksum of the folder's manifest.
        factory: faiss's description of the index, such as ``IVF4096,PQ64``.
        trained: the number of rows that the folder had when the index was trained.
        shards: by file, the number of rows, in the order in which they were added.
        file: name of faiss's file in the folder.
        content: checksum of that file.
    """

    manifest: str
    factory: str
    trained: int
    shards: dict[str, int]
    file: str
    content: str

    @property
    def rows(self) -> int:
        return sum(self.shards.values())


def build_index(folder: str | Path, *, factory: str | None = None) -> Index:
    """Make or extend the index of a folder of embeddings. Shards that are in it are not read again.

    One shard at a time is in memory, and the index itself. An index with the settings of the one
    that is there extends it. Another ``factory`` replaces it.

    Args:
        folder: a folder that ``llave.embedding.embed`` wrote, finished or not.
        factory: a description of faiss's ``index_factory``, such as ``"Flat"``, ``"HNSW32"`` or
            ``"IVF4096,PQ64"``. By default that of the index that is there, or one chosen by the
            size of the corpus (``default_factory``).

    Returns:
        What the index holds.

    Raises:
        ImportError: faiss is not installed.
        ValueError: ``folder`` has no embeddings or a damaged file; ``factory`` is none of faiss or
            cannot be trained on these rows; another process builds the index.
        OSError: the index cannot be written.
    """
    faiss, folder = _faiss(), Path(folder)
    manifest = read_manifest(folder)
    there = [span for span in ranges(manifest) if (folder / span.file).exists()]
    rows = {span.file: count_rows(folder / span.file, span, manifest) for span in there}
    if not sum(rows.values()):
        raise ValueError(f"{shown(folder)} has no embeddings yet; run embed first")
    with _alone(folder):
        known = read_index(folder)
        if factory is None:
            factory = known.factory if known else default_factory(manifest)
        empty = Index(checksum(manifest), factory, 0, {}, "", "")
        try:
            fresh = faiss.index_factory(manifest["dimension"], factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ValueError(
                f"factory={factory!r} cannot be made for {manifest['dimension']} values: "
                f"{_said(error)}"
            ) from error
        limit = sys.maxsize if fresh.is_trained else sum(rows.values())
        index, state = None, empty
        if known and _extends(known, empty, rows, limit):
            index, state = _loaded(folder, known, faiss), known
        if index is None:
            index, state = fresh, empty._replace(trained=sum(rows.values()))
            _train(index, folder, manifest, there, factory)
        state = _add(index, folder, manifest, there, state)
        _sweep(folder, state)
    return state


def default_factory(manifest: dict[str, Any]) -> str:
    """Return faiss's description of an index for a corpus, by its size.

    Up to 20,000 rows it is flat: a query is compared with every row. Up to 2 GiB of float32 values
    it is a graph (HNSW). Above, inverted lists hold 8-bit codes of four values each (IVF-PQ).
    """
    rows, dimension = manifest["source"]["rows"], manifest["dimension"]
    if rows <= FLAT_ROWS:
        return "Flat"
    if rows * dimension * 4 <= GRAPH_BYTES:
        return "HNSW32"
    # faiss wants at least 39 rows for each list that is trained.
    lists = min(4 * rows**0.5, SAMPLE_BYTES / (dimension * 4) / 39)
    codes = max(n for n in range(1, max(1, dimension // 4) + 1) if dimension % n == 0)
    return f"IVF{2 ** int(np.log2(lists))},PQ{codes}"


def read_index(folder: Path) -> Index | None:
    """Return what a folder's index holds, or None where there is none.

    Raises:
        ValueError: ``index.json`` is damaged or something else.
    """
    if not os.path.lexists(folder / INDEX):
        return None
    try:
        return Index(**unsigned(folder / INDEX))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{shown(folder / INDEX)} is no index of llave ({error}); move it away and run llave "
            "index again"
        ) from error


def search_index(
    folder: Path, manifest: dict[str, Any], queries: np.ndarray, k: int, *, partial: bool
) -> list[list[tuple[str, float, int]]]:
    """Return (id, score, row) of the rows that the index finds nearest to each query.

    The index stays on the disk, and pages that a search touches come into memory. There may be
    fewer than ``k`` rows.

    Args:
        folder: the folder of embeddings.
        manifest: its manifest.
        queries: (queries, D) embeddings.
        k: results per query.
        partial: whether files may be missing in the folder or in the index.

    Raises:
        ImportError: faiss is not installed.
        ValueError: there is no index, or it is damaged or not of the folder's files.
    """
    faiss, state = _faiss(), read_index(folder)
    again = f"run llave index {shown(folder)}"
    if state is None:
        raise ValueError(f"{shown(folder)} has no index; {again}")
    if state.manifest != checksum(manifest):
        raise ValueError(f"the index of {shown(folder)} is of other embeddings; {again}")
    spans = {span.file: span for span in ranges(manifest)}
    if len(state.shards) < len(spans) and not partial:
        raise ValueError(
            f"the index of {shown(folder)} lacks {len(spans) - len(state.shards)} of {len(spans)} "
            f"files; complete them with embed and {again}, or search what there is with "
            "partial=True"
        )
    try:
        index = faiss.read_index(str(folder / state.file), faiss.IO_FLAG_MMAP_IFC)
        scores, places = index.search(np.ascontiguousarray(queries, np.float32), min(k, state.rows))
    except RuntimeError as error:
        raise ValueError(
            f"{shown(folder / state.file)} cannot be used ({_said(error)}); {again}"
        ) from error
    files, starts = list(state.shards), np.cumsum([0, *state.shards.values()])
    shards = np.searchsorted(starts, places, side="right") - 1
    names: dict[int, tuple[list[str], np.ndarray]] = {}
    for number in np.unique(shards[places >= 0]).tolist():
        file = files[number]
        shard = read_shard(folder / file, spans[file], manifest, values=False)
        if len(shard.ids) != state.shards[file]:
            raise ValueError(f"{shown(folder / file)} changed after it was indexed; {again}")
        names[number] = shard.ids, shard.numbers(spans[file])
    found: list[list[tuple[str, float, int]]] = []
    for row in range(len(queries)):
        hits = []
        for place, number, score in zip(places[row], shards[row], scores[row], strict=True):
            if place >= 0:  # a place without a row is -1
                ids, numbers = names[int(number)]
                at = int(place - starts[number])
                hits.append((ids[at], float(score), int(numbers[at])))
        found.append(hits)
    return found


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(f"an index needs faiss: pip install faiss-cpu ({error})") from error
    return faiss


def _extends(known: Index, empty: Index, rows: dict[str, int], limit: int) -> bool:
    """Whether an index can be extended to the shards that are there."""
    same = (known.manifest, known.factory) == (empty.manifest, empty.factory)
    kept = all(rows.get(file) == count for file, count in known.shards.items())
    return same and kept and (limit == sys.maxsize or limit <= GROWTH * known.trained)


def _loaded(folder: Path, known: Index, faiss: Any) -> Any:
    """Return the index to extend. None where its file is damaged, which one line says."""
    file = folder / known.file
    with suppress(OSError, RuntimeError):
        if file_sum(file) == known.content:
            return faiss.read_index(str(file))
    print(f"{shown(file)} is missing or damaged, and is made again", file=sys.stderr)
    return None


def _train(
    index: Any, folder: Path, manifest: dict[str, Any], spans: list[Range], factory: str
) -> None:
    """Train an index on a random sample of every shard, where it needs training."""
    if index.is_trained:
        return
    rows = sum(span.stop - span.first for span in spans)
    share = min(1.0, SAMPLE_BYTES / (manifest["dimension"] * 4) / rows)
    parts = []
    for span in tqdm(spans, desc="sample", unit="file"):
        vectors = read_shard(folder / span.file, span, manifest).vectors
        chance = np.random.default_rng([SEED, span.first])
        taken = chance.choice(len(vectors), int(np.ceil(share * len(vectors))), replace=False)
        parts.append(vectors[np.sort(taken)].astype(np.float32))
    sample = np.concatenate(parts)
    print(f"training {factory} on {len(sample):,} rows", file=sys.stderr)
    try:
        index.train(sample)
    except RuntimeError as error:
        raise ValueError(
            f"factory={factory!r} cannot be trained on {len(sample):,} rows ({_said(error)}); "
            "choose one with fewer lists or codes"
        ) from error


def _add(
    index: Any, folder: Path, manifest: dict[str, Any], spans: list[Range], state: Index
) -> Index:
    """Add the shards that the index lacks, and save it now and then and at the end."""
    _set_effort(index)
    missing = [span for span in spans if span.file not in state.shards]
    total = sum(span.stop - span.first for span in missing)
    saved = state.rows
    with tqdm(total=total, desc="index", unit="row") as bar:
        for span in missing:
            shard = read_shard(folder / span.file, span, manifest)
            try:
                index.add(shard.vectors.astype(np.float32))
            except RuntimeError as error:
                raise ValueError(
                    f"factory={state.factory!r} takes no rows, shard by shard ({_said(error)}); "
                    "choose another"
                ) from error
            state = state._replace(shards=state.shards | {span.file: len(shard.ids)})
            bar.update(span.stop - span.first)
            if state.rows - saved >= SAVED_ROWS and span != missing[-1]:
                state, saved = _save(index, folder, state), state.rows
    return _save(index, folder, state) if missing else state


def _set_effort(index: Any) -> None:
    """Set how much of the index a search looks at. faiss's defaults favour speed."""
    faiss = _faiss()
    inner = _innermost(index)
    if isinstance(inner, faiss.IndexIVF):
        inner.nprobe = max(8, inner.nlist // 64)
    if isinstance(inner, faiss.IndexHNSW):
        inner.hnsw.efSearch = 128


def _innermost(index: Any) -> Any:
    """Return the index that is searched, below transforms, refinements and maps of ids."""
    index = _faiss().downcast_index(index)
    for name in ("index", "base_index"):
        if hasattr(index, name):
            return _innermost(getattr(index, name))
    return index


def _save(index: Any, folder: Path, state: Index) -> Index:
    of = [state.manifest, state.factory, state.trained, list(state.shards.items())]
    name = f"index-{checksum({'of': of})}.faiss"
    publish(folder / name, partial(_write, index))
    state = state._replace(file=name, content=file_sum(folder / name))
    text = signed(state._asdict()) + "\n"
    publish(folder / INDEX, partial(Path.write_text, data=text, encoding="utf-8"))
    return state


def _write(index: Any, path: Path) -> None:
    try:
        _faiss().write_index(index, str(path))
    except RuntimeError as error:  # faiss says so where a disk is full
        raise OSError(_said(error)) from error


def _sweep(folder: Path, state: Index) -> None:
    """Remove the files of earlier indexes. Searches that have them open keep them."""
    for path in folder.iterdir():
        ours = re.fullmatch(r"index-[0-9a-f]{32}\.faiss(\.[0-9a-f]{32}\.tmp)?", path.name)
        if ours and path.name != state.file:
            path.unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Raise ValueError where another process builds the folder's index."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        ours = True
        with suppress(OSError):  # some file systems have no locks
            ours = lock(descriptor)
        if not ours:
            raise ValueError(f"another process builds the index of {shown(folder)}; wait for it")
        yield
    finally:
        os.close(descriptor)


def _said(error: RuntimeError) -> str:
    return " ".join(str(error).split())[-200:]
