"""The paper's Figure 1 for evaluation results: similarities of positives and negatives."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llave.evaluation import Result, refuse_out
from llave.files import create_file, refuse_existing_file
from llave.printable import shown
from llave_kernels.plots import draw_similarities, pyplot

COLUMNS = 4  # panels beside each other


def similarity_figure(panels: Sequence[tuple[str, Result]]) -> Any:
    """Return a matplotlib ``Figure`` with a panel for each (title, result).

    Raises:
        ImportError: matplotlib is not installed.
    """
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = pyplot().Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for place, (title, result) in zip(axes.flat, panels, strict=False):
        counts = result.positives, result.negatives
        draw_similarities(*counts, result.overlap, axes=place, title=_plain(title))
    for unused in axes.flat[len(panels) :]:
        unused.remove()
    return figure


def refuse_plot(file: str | Path) -> None:
    """Check a plot's file before anything is loaded.

    Raises:
        ValueError: the file exists, its folder cannot be made, or its suffix is not that of a
            format that matplotlib writes.
        ImportError: matplotlib is not installed.
    """
    file = Path(file)
    refuse_existing_file("plot", file)
    known = pyplot().Figure().canvas.get_supported_filetypes()
    if _format(file) not in known:
        raise ValueError(
            f"plot={shown(file)} needs the suffix of a format that matplotlib writes: "
            f"{', '.join(sorted(known))}"
        )


def plot_results(
    results: Sequence[Result], file: str | Path, before: Sequence[Result] | None = None
) -> None:
    """Write a new file with a panel of similarities for each task.

    Args:
        results: results of a model.
        file: the file. Its suffix says the format.
        before: results of another model on the same tasks, in the same order, for example before
            training. Each has a panel beside that of ``results``.

    Raises:
        ValueError, ImportError: as in ``refuse_plot``.
        OSError: the file cannot be written.
    """
    panels = [(result.task, result) for result in results]
    if before is not None:
        panels = [
            (f"{result.task}, {when}", result)
            for pair in zip(before, results, strict=True)
            for when, result in zip(("before", "after"), pair, strict=True)
        ]
    file = Path(file)
    save = partial(similarity_figure(panels).savefig, format=_format(file), dpi=130)
    create_file("plot", file, save)


def results_before(before: str | Path, out: str | Path, results: Sequence[Result]) -> list[Result]:
    """Read another model's results of the same tasks and data, in the same order.

    Args:
        before: the folder of its results.
        out: the folder of ``results``.
        results: what ``evaluate`` returned.

    Raises:
        ValueError: ``before`` lacks a task, or its result is of other data.
    """
    tasks = [result.task for result in results]
    there, here = (
        {result.task: (of["data"], result) for of, result in refuse_out(place, tasks).values()}
        for place in (before, out)
    )
    for task in tasks:
        if task not in there or there[task][0] != here[task][0]:
            what = "is of other data" if task in there else "is not there"
            raise ValueError(
                f"before={shown(before)}: the result of {shown(task)} {what}; evaluate that model "
                "on these tasks, too"
            )
    return [there[task][1] for task in tasks]


def _format(file: Path) -> str:
    return file.suffix[1:].lower()


def _plain(name: str) -> str:
    return shown(name).replace("$", r"\$")  # a pair of them would be mathematics
