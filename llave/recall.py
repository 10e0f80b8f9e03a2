"""How many of the true neighbours an index or a compressed folder finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from llave.quantisation import quantise, restore, truncated
from llave.search import Hit, nearest, search
from llave.shards import Range, Shard, ranges, read_manifest, read_shard

QUERIES = 200  # rows that are asked for their neighbours
SPARE = 20  # further neighbours that are looked at for ties with the last one
TIE = 1e-6  # scores that differ by less are tied
SEED = 0


def recall(exact: str | Path, other: str | Path, *, indexed: bool, k: int = 10) -> float | None:
    """Return the share of the ``k`` nearest rows that a search in another way finds, 0 to 1.

    The queries are 200 random rows of the corpus, or all if there are fewer. A row is no neighbour
    of itself. Rows that tie with the last neighbour count as neighbours. None: the folder has fewer
    than two rows.

    Args:
        exact: a folder of embeddings whose exact neighbours are the true ones.
        other: the folder to search: the same one, or one that ``compress`` made of it.
        indexed: whether to ask the index of ``other``. Otherwise it is searched exactly.
        k: neighbours per query, 10 by default.

    Raises:
        ValueError: as in ``search``.
    """
    rows, vectors = _sample(Path(exact))
    backend: Literal["exact", "faiss"] = "faiss" if indexed else "exact"
    queries = truncated(vectors, read_manifest(other))
    true = search(exact, vectors, k=k + 1 + SPARE, partial=True)
    found = search(other, queries, k=k + 1, backend=backend, partial=True)
    return _share(rows, true, found, k)


def sample_recall(vectors: np.ndarray, manifest: dict[str, Any], *, k: int = 10) -> float | None:
    """Return the share of the ``k`` nearest rows that rows as a folder stores them give, 0 to 1.

    It is ``recall`` within some rows, without files. None: there are fewer than two.

    Args:
        vectors: (rows, D) whole embeddings.
        manifest: how the folder stores them.
        k: neighbours per query, 10 by default.
    """
    short = truncated(vectors, manifest)
    stored = restore(quantise(short, manifest), manifest)
    span, names = Range(0, len(vectors)), [str(row) for row in range(len(vectors))]
    rows = np.arange(0, len(vectors), max(1, len(vectors) // QUERIES))
    true = nearest([(span, Shard(names, vectors, []))], vectors[rows], k + 1 + SPARE)
    found = nearest([(span, Shard(names, stored, []))], short[rows], k + 1)
    return _share(rows, true, found, k)


def _share(rows: np.ndarray, true: list[list[Hit]], found: list[list[Hit]], k: int) -> float | None:
    """Return the share of the ``k`` true neighbours of ``rows`` (queries,) that were found.

    None: they have no neighbours.
    """
    hits = wanted = 0
    for row, near, got in zip(rows.tolist(), true, found, strict=True):
        others = _without(near, row)
        count = min(k, len(others))
        if count:
            least = others[count - 1].score - TIE
            right = {hit.row for hit in others if hit.score >= least}
            wanted += count
            hits += len(right & {hit.row for hit in _without(got, row)[:k]})
    return hits / wanted if wanted else None


def _without(hits: list[Hit], row: int) -> list[Hit]:
    return [hit for hit in hits if hit.row != row]


def _sample(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return (queries,) numbers of random rows and their (queries, D) embeddings."""
    manifest = read_manifest(folder)
    there = [span for span in ranges(manifest) if (folder / span.file).exists()]
    share = QUERIES / max(1, sum(span.stop - span.first for span in there))
    numbers, vectors = [], []
    for span in there:
        chance = np.random.default_rng([SEED, span.first])
        chosen = np.flatnonzero(chance.random(span.stop - span.first) < share)
        if len(chosen):
            shard = read_shard(folder / span.file, span, manifest)
            kept = chosen[chosen < len(shard.ids)]
            numbers.append(shard.numbers(span)[kept])
            vectors.append(shard.vectors[kept])
    if not numbers:
        return np.empty(0, np.int64), np.empty((0, manifest["dimension"]), np.float32)
    return np.concatenate(numbers), np.concatenate(vectors).astype(np.float32)
