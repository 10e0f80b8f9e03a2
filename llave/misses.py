"""A page of an evaluation's worst rows: the query, what came first, and what was right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from llave.data import load_evaluation
from llave.evaluation import Result
from llave.media import Media, make_input
from llave.mmeb import pixels
from llave.page import Answer, Item, Section, make_item, write_page
from llave.printable import shown


def write_misses(
    file: str | Path,
    results: Sequence[Result],
    *,
    data: str | Path,
    images: str | Path | None = None,
) -> None:
    """Write a page with a section for each task.

    Args:
        file: a new file.
        results: what ``evaluate`` returned.
        data, images: as for ``evaluate``.

    Raises:
        ValueError: ``file`` exists, or as in ``evaluate``.
        OSError: the page cannot be written.
    """
    write_page(file, "evaluation: the worst rows", _sections(results, data, images))


def _sections(
    results: Sequence[Result], data: str | Path, images: str | Path | None
) -> Iterator[Section]:
    for result in results:
        note = f"precision@1 is {result.precision:.1f} % of {result.rows} rows."
        if result.worst:
            note += f" These {len(result.worst)} rows fail by the most."
        elif result.precision < 100:
            note += " This result is of an earlier version and does not say which rows fail."
        yield Section(shown(result.task), note, _answers(result, data, images))


def _answers(result: Result, data: str | Path, images: str | Path | None) -> Iterator[Answer]:
    rows, media = load_evaluation(data, result.task), Media(images, pixels(result.task))

    def item(label: str, pair: tuple[str, str]) -> Item:
        text, path = pair
        return make_item(label, path, make_input(text, path, media))

    for miss in result.worst:
        row = rows[miss.row]
        first = item(f"came first, {miss.first_score:.4f}", row.targets[miss.first])
        right = item(f"right, place {miss.rank}, {miss.right_score:.4f}", row.targets[row.right])
        yield Answer(item(f"query, row {miss.row}", row.query), [first, right])
