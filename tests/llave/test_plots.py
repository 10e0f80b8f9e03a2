"""Figures of evaluation results: alone, and beside those of another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

for needed in ("sentence_transformers", "datasets", "matplotlib"):
    pytest.importorskip(needed)

from llave import evaluation  # noqa: E402
from llave.evaluation import Result, evaluate  # noqa: E402
from llave.plots import (  # noqa: E402
    plot_results,
    refuse_plot,
    results_before,
    similarity_figure,
)
from tests.llave.test_evaluation import ByColour, write  # noqa: E402

TASKS = ["first", "second $x$"]


class Untrained(ByColour):
    def vector(self, item: Any) -> np.ndarray:
        return np.full_like(super().vector(item), 3**-0.5)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    """Results of a model in ``after``, and of an untrained one in ``before``."""
    monkeypatch.setattr(evaluation, "model_fingerprint", lambda model: type(model).__name__)
    data = tmp_path / "data"
    data.mkdir()
    for task in TASKS:
        write(data, task, *((c, "", [c, "blue"], [""] * 2) for c in ("red", "green")))
    evaluate(Untrained(), TASKS, data=data, out=tmp_path / "before")
    return evaluate(ByColour(), TASKS, data=data, out=tmp_path / "after")


def test_panels_stand_beside_each_other(results: list[Result], tmp_path: Path) -> None:
    before = results_before(tmp_path / "before", tmp_path / "after", results)
    assert [result.task for result in before] == TASKS
    assert [result.overlap for result in (*before, *results)] == [1.0, 1.0, 0.0, 0.0]
    figure = similarity_figure(
        [(result.task, result) for result in (*before, *results, results[0])]
    )
    assert [axes.get_title() for axes in figure.axes] == ["first", r"second \$x\$"] * 2 + ["first"]
    sizes = []
    for name, others in (("alone.PNG", None), ("both.png", before)):
        plot_results(results, tmp_path / "new" / name, others)
        with Image.open(tmp_path / "new" / name) as picture:
            sizes.append(picture.size)
    assert sizes[1] == (2 * sizes[0][0], sizes[0][1])


def test_results_before_must_be_of_the_same_data(results: list[Result], tmp_path: Path) -> None:
    write(tmp_path / "data", "first", ("red", "", ["red", "blue"], ["", ""]))
    evaluate(Untrained(), ["first"], data=tmp_path / "data", out=tmp_path / "other")
    for task, said in zip(TASKS, ("is of other data", "is not there"), strict=True):
        chosen = [result for result in results if result.task == task]
        with pytest.raises(ValueError, match=rf"before=.*other: the result of {task[:5]}.* {said}"):
            results_before(tmp_path / "other", tmp_path / "after", chosen)


def test_a_plot_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_text("mine")
    for name, said in (
        ("mine.png", r"plot=.*mine\.png exists; choose another file, or remove it"),
        ("mine.png/a/b.png", r"plot=.*: .*mine\.png is no folder"),
        ("plot", "needs the suffix of a format that matplotlib writes: .*png"),
        ("plot.docx", r"plot=.*docx needs the suffix"),
    ):
        with pytest.raises(ValueError, match=said):
            refuse_plot(tmp_path / name)
    assert (tmp_path / "mine.png").read_text() == "mine"
