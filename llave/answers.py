"""Answer queries from a folder of embeddings: from a file, a prompt or a call, also on a page."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sentence_transformers import SentenceTransformer

from llave.corpus import Source, load_input
from llave.page import Answer, Item, Section, make_item, write_page
from llave.printable import escaped, shown
from llave.search import Hit, embed_queries, search
from llave.shards import read_manifest

BATCH = 32  # queries read and encoded at a time
Query = tuple[str, Any]  # its name, and the input for model.encode


class Answered(NamedTuple):
    """A query as a page shows it, and the rows found."""

    query: Item
    hits: list[Hit]


def read_queries(file: str | Path, model: SentenceTransformer) -> Iterator[Query]:
    """Yield the queries in a file. It is read as the corpus of ``embed`` is, image by image.

    Args:
        file: a ``.jsonl`` or ``.parquet`` file of ``id``, ``text`` and ``image``, a ``.txt`` file
            with a text in each line, or a folder of images.
        model: the model that will embed them.

    Raises:
        FileNotFoundError, ValueError: as in ``embed``. The message names the row.
    """
    source = Source(Path(file), None, BATCH)
    for row in source.rows(0):
        try:
            yield row.id, load_input(row, model.modalities, source.images)
        except Exception as error:  # decoders raise errors of many types
            raise ValueError(f"{shown(file)}, row {row.number}: {error}") from error


def answer(
    folder: str | Path, queries: Iterable[Query], model: SentenceTransformer, **settings: Any
) -> list[Answered]:
    """Search for queries together. The corpus is read once.

    Args:
        folder: a folder that ``embed`` wrote.
        queries: names and inputs.
        model: the folder's model.
        settings: those of ``search``.

    Raises:
        ValueError, ImportError: as in ``search``.
    """
    queries = iter(queries)
    items, vectors = [], []
    while batch := list(islice(queries, BATCH)):
        vectors.append(embed_queries(folder, [value for _, value in batch], model))
        items += [make_item("query", name, value) for name, value in batch]
    if not vectors:
        return []
    found = search(folder, np.concatenate(vectors), **settings)
    return [Answered(item, hits) for item, hits in zip(items, found, strict=True)]


def prompted(ask: Callable[[list[Query]], list[Answered]]) -> Iterator[list[Answered]]:
    """Yield the answer to each line of the standard input, until its end.

    A terminal is asked for the lines. There, a query that is refused is reported, and the next one
    is asked for.
    """
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            print("query: ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            return
        if not (text := line.strip()):
            continue
        try:
            yield ask([(text, {"text": text})])
        except ValueError as error:
            if not terminal:
                raise
            print(escaped(str(error)), file=sys.stderr)


def write_answers(
    file: str | Path, folder: str | Path, corpus: str | Path, answers: list[Answered]
) -> None:
    """Write a page with each query beside the rows found for it.

    Args:
        file: a new file.
        folder: the folder of embeddings.
        corpus: what was embedded. Its rows have the texts and pictures.
        answers: the queries and the rows found.

    Raises:
        FileNotFoundError: there is no ``corpus``.
        ValueError: ``corpus`` is not what was embedded, or ``file`` exists.
        OSError: the page cannot be written.
    """
    wanted = {hit.row: hit.id for one in answers for hit in one.hits}
    known = _rows(Path(corpus), Path(folder), wanted)

    def answered() -> Iterator[Answer]:
        for query, hits in answers:
            items = [
                known[hit.row]._replace(label=f"{place}. {hit.score:.4f}")
                for place, hit in enumerate(hits, 1)
            ]
            yield Answer(query, items)

    write_page(file, f"search in {folder}", [Section("", "", answered())])


def _rows(corpus: Path, folder: Path, wanted: dict[int, str]) -> dict[int, Item]:
    """Return chosen rows of a corpus by their number, as a page shows them."""
    manifest = read_manifest(folder)
    root = manifest["image_root"]
    source = Source(corpus, None if root is None else Path(root), manifest["shard_rows"])
    known = {}
    for row in source.pick(wanted):
        if row.id != wanted[row.number]:
            break
        try:
            value = load_input(row, ["text"], source.images)
        except Exception as error:  # decoders raise errors of many types
            value = f"{row.text or ''}\n(the picture cannot be read: {shown(error)})".lstrip()
        known[row.number] = make_item("", row.id, value)
    if other := sorted(wanted.keys() - known.keys()):
        raise ValueError(
            f"corpus={shown(corpus)} is not what {shown(folder)} was embedded from: its row "
            f"{other[0]} has not the id {wanted[other[0]]!r:.80}"
        )
    return known
