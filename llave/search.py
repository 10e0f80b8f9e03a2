"""Search a folder of embeddings for the nearest rows, exactly or by the folder's index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from sentence_transformers import SentenceTransformer

from llave.encoding import encode
from llave.fingerprint import model_fingerprint
from llave.index import search_index
from llave.printable import shown
from llave.quantisation import check_truncate_dim, truncated
from llave.shards import (
    Range,
    Shard,
    ranges,
    read_manifest,
    read_shard,
    refuse_not_finite,
)

# Queries scored at a time. The scores in memory are at most this times a shard's rows.
QUERY_BLOCK = 256


class Hit(NamedTuple):
    """One result: the row's id, its inner product with the query, its number in the corpus."""

    id: str
    score: float
    row: int


def search(
    folder: str | Path,
    queries: np.ndarray | Sequence[Any],
    *,
    model: SentenceTransformer | None = None,
    k: int = 10,
    backend: Literal["exact", "faiss"] = "exact",
    prompt: str | None = None,
    truncate_dim: int | None = None,
    partial: bool = False,
) -> list[list[Hit]]:
    """Return for each query the ``k`` rows with the highest inner product, best first.

    Args:
        folder: a folder that ``llave.embedding.embed`` wrote.
        queries: (queries, D) embeddings, used as they are; or a list of inputs (texts, images,
            dicts of both). ``model`` embeds the inputs. It normalises them if the folder's
            embeddings are normalised.
        model: the model that embedded the folder. Only inputs need it.
        k: results per query, 10 by default. There are fewer if the folder has fewer rows.
        backend: ``"exact"`` (default) reads one shard at a time. It sums products in float64 and
            rounds them to float32, so equal rows have equal scores in every shard. Ties are in
            order of id. ``"faiss"`` asks the index that ``llave.index.build_index`` made. What it
            finds may be approximate.
        prompt: the prompt for the inputs. By default the model's own.
        truncate_dim: compare only so many of the first values, for a model that was trained for it
            (Matryoshka). Normalised embeddings are normalised again. By default all.
        partial: whether to search a folder, or an index, with missing files. By default it is
            refused.

    Returns:
        For each query a list of ``Hit(id, score, row)``.

    Raises:
        ImportError: ``backend="faiss"`` without faiss.
        ValueError: ``folder`` has no embeddings or no index, or has damaged or missing files;
            ``queries`` have another dimension, are not finite or came without ``model``; ``model``
            refuses one of them (the message names it), or is not the folder's model; ``k``,
            ``backend`` or ``truncate_dim`` is out of range; an index is asked with a
            ``truncate_dim``.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if backend not in ("exact", "faiss"):
        raise ValueError(f"backend must be 'exact' or 'faiss', got {backend!r}")
    manifest = read_manifest(folder)
    check_truncate_dim(truncate_dim, manifest["dimension"])
    if truncate_dim is not None and backend == "faiss":
        raise ValueError(
            f"truncate_dim={truncate_dim} has no meaning for an index; build one of a folder that "
            "llave compress made"
        )
    shards = _shards(Path(folder), manifest, partial)
    vectors = _vectors(queries, model, prompt, manifest)
    if truncate_dim is not None:
        cut = manifest | {"dimension": truncate_dim}
        vectors = truncated(vectors, cut)
        shards = ((span, x._replace(vectors=truncated(x.vectors, cut))) for span, x in shards)
    if backend == "exact":
        return nearest(shards, vectors, k)
    found = search_index(Path(folder), manifest, vectors, k, partial=partial)
    return [sorted((Hit(*hit) for hit in hits), key=_order) for hits in found]


def embed_queries(
    folder: str | Path, inputs: Sequence[Any], model: SentenceTransformer, prompt: str | None = None
) -> np.ndarray:
    """Return (inputs, D) embeddings of inputs, for ``search`` in a folder.

    Args:
        folder, model, prompt: as in ``search``.
        inputs: texts, images, dicts of both.

    Raises:
        ValueError: as in ``search``.
    """
    return _vectors(inputs, model, prompt, read_manifest(folder))


def _shards(folder: Path, manifest: dict[str, Any], partial: bool) -> Iterator[tuple[Range, Shard]]:
    spans = ranges(manifest)
    there = [span for span in spans if (folder / span.file).exists()]
    if len(there) < len(spans) and not partial:
        missing = min(set(spans) - set(there))
        raise ValueError(
            f"folder {shown(folder)} lacks {len(spans) - len(there)} of {len(spans)} files, the "
            f"first {missing.file}; run embed again to complete it, or search what there is with "
            "partial=True"
        )
    return ((span, read_shard(folder / span.file, span, manifest)) for span in there)


def _vectors(
    queries: np.ndarray | Sequence[Any],
    model: SentenceTransformer | None,
    prompt: str | None,
    manifest: dict[str, Any],
) -> np.ndarray:
    if isinstance(queries, np.ndarray):
        vectors = queries
    else:
        if isinstance(queries, str | dict):
            raise ValueError(f"queries must be a list of inputs, got {queries!r:.80}; use [...]")
        if model is None:
            raise ValueError(
                "queries are inputs, so model is needed; pass it, or a numpy array of embeddings"
            )
        if (here := model_fingerprint(model)) != manifest["model"]:
            raise ValueError(
                f"model has the fingerprint {here}, but the folder was embedded with "
                f"{manifest['model']}; pass that model, or a numpy array of embeddings"
            )
        vectors = encode(model, list(queries), prompt=prompt, normalize=manifest["normalised"])
        vectors = truncated(vectors, manifest)
    if vectors.ndim != 2 or vectors.shape[1] != manifest["dimension"]:
        raise ValueError(
            f"queries must have shape (queries, {manifest['dimension']}), as the folder's "
            f"embeddings, got {vectors.shape}"
        )
    refuse_not_finite(vectors, lambda row: f"queries must be finite, query {row}")
    return vectors


def _order(hit: Hit) -> tuple[float, str]:
    return -hit.score, hit.id


def nearest(shards: Iterable[tuple[Range, Shard]], queries: np.ndarray, k: int) -> list[list[Hit]]:
    """Return for each of (queries, D) the ``k`` nearest rows of some shards, as in ``search``."""
    queries = queries.astype(np.float64)
    best: list[list[Hit]] = [[] for _ in queries]
    worst = np.full(len(queries), -np.inf, np.float32)  # the k-th best score so far
    for span, shard in shards:
        count = len(shard.ids)
        if not count:
            continue
        rows = shard.numbers(span)
        vectors = shard.vectors.astype(np.float64).T
        for first in range(0, len(queries), QUERY_BLOCK):
            block = slice(first, first + QUERY_BLOCK)
            scores = (queries[block] @ vectors).astype(np.float32)
            least = worst[block]
            if count > k:
                least = np.maximum(least, np.partition(scores, count - k, axis=1)[:, count - k])
            # Ties with the k-th best are kept. The order of ids decides between them.
            candidates = scores >= least[:, None]
            for number in np.flatnonzero(candidates.any(axis=1)):
                row, hits = scores[number], best[first + number]
                hits += (
                    Hit(shard.ids[i], float(row[i]), int(rows[i]))
                    for i in np.flatnonzero(candidates[number])
                )
                hits.sort(key=_order)
                del hits[k:]
                if len(hits) == k:
                    worst[first + number] = hits[-1].score
    return best
