"""Evaluation on hand-made sets with known answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for needed in ("sentence_transformers", "datasets", "PIL"):
    pytest.importorskip(needed)

from PIL import Image  # noqa: E402

from llave import evaluation  # noqa: E402
from llave.evaluation import Result, evaluate, format_table, recall_at, summarise  # noqa: E402
from llave.mmeb import METAS, PUBLISHED, TASKS  # noqa: E402

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class ByColour:
    """Embeds an image by its colour and a text by the colour it names."""

    def __init__(self) -> None:
        self.encoded = 0

    def encode(self, items: list[Any], **_: Any) -> np.ndarray:
        self.encoded += len(items)
        vectors = []
        for item in items:
            if isinstance(item, dict):
                assert item["image"].mode == "RGB"
                vectors.append(np.asarray(item["image"], np.float32).mean((0, 1)))
            else:
                vectors.append(np.array(COLOURS[item.split()[0]], np.float32))
        return np.array([v / np.linalg.norm(v) for v in vectors])


@pytest.fixture(autouse=True)
def _fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "model_fingerprint", lambda model: type(model).__name__)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    data, images = tmp_path / "data", tmp_path / "images"
    data.mkdir()
    images.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (4, 4), colour).save(images / f"{name}.png")
    return data, images


def write(data: Path, task: str, *rows: tuple[str, str, list[str], list[str]]) -> None:
    names = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    (data / f"{task}.jsonl").write_text("\n".join(lines))


def test_known_answers_ties_and_one_encoding_each(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    data, images = folders
    write(
        data,
        "colours",
        ("red thing", "", ["", ""], ["red.png", "blue.png"]),  # right
        ("", "green.png", ["green", "red"], ["", ""]),  # right
        ("blue thing", "", ["", ""], ["red.png", "blue.png"]),  # wrong
        ("red thing", "", ["", "red"], ["red.png", ""]),  # a tie: wrong
        ("red thing", "", [""], ["red.png"]),  # alone: right
    )
    model = ByColour()
    results = evaluate(model, ["colours"], data=data, images=images, out=tmp_path / "out")
    assert results == [Result("colours", 5, 60.0, 1)]
    assert model.encoded == 7
    again = evaluate(model, ["colours"], data=data, images=images, out=tmp_path / "out")
    assert again == results
    assert model.encoded == 7
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["colours.json"]

    class Another(ByColour):
        pass

    with pytest.raises(ValueError, match=r"colours\.json holds the score of another model"):
        evaluate(Another(), ["colours"], data=data, images=images, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("red", "", [], []), "row 0 of task bad has 0 candidate texts"),
        (("red", "", ["", ""], ["red.png"]), "has 2 candidate texts and 1 candidate images"),
        (("", "none.png", ["red"], [""]), "image 'none.png' is not in"),
        (
            ("", "../secret.png", ["red"], [""]),
            "image path '../secret.png' leaves the image folder",
        ),
        (("", "/etc/hostname", ["red"], [""]), "image path '/etc/hostname' leaves the image"),
        (("", "link.png", ["red"], [""]), "image path 'link.png' leaves the image folder"),
        (("", "broken.png", ["red"], [""]), "image 'broken.png' in .* cannot be read"),
    ],
)
def test_a_bad_row_is_named(
    folders: tuple[Path, Path], tmp_path: Path, row: Any, message: str
) -> None:
    data, images = folders
    (images / "broken.png").write_bytes(b"no image")
    (tmp_path / "secret.png").write_bytes((images / "red.png").read_bytes())
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    write(data, "bad", row)
    with pytest.raises(ValueError, match=f"task bad: .*{message}"):
        evaluate(ByColour(), ["bad"], data=data, images=images, out=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_unknown_tasks_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, images = folders
    write(data, "colours", ("red", "", ["red"], [""]))
    with pytest.raises(ValueError, match=r"colors is not in .*; there are colours"):
        evaluate(ByColour(), ["colors"], data=data, images=images, out=tmp_path)
    with pytest.raises(ValueError, match="tasks must be a list of names, got 'colours'"):
        evaluate(ByColour(), "colours", data=data, images=images, out=tmp_path)


def test_mmeb_has_36_sets_and_means_are_over_tasks() -> None:
    assert len(TASKS) == 36
    assert sum(task.in_distribution for task in TASKS.values()) == 20
    assert [sum(t.meta == m for t in TASKS.values()) for m in METAS] == [10, 10, 12, 4]
    results = [
        Result("ImageNet-1K", 10, 60.0, 0),
        Result("GQA", 10, 30.0, 2),
        Result("OVEN", 5, 60.0, 0),
    ]
    means = summarise(results)
    assert (means["Classification"], means["VQA"], means["all"]) == (60.0, 30.0, 50.0)
    assert (means["IND"], means["OOD"]) == (60.0, 45.0)
    table = format_table(results)
    assert "| GQA | 10 | 30.0 | 2 |" in table
    assert "| this one | 60.0 | 30.0 | 60.0 | - | 60.0 | 45.0 | 50.0 |" in table
    assert "| LLaVE-7B | 65.7 | 65.4 | 70.9 | 91.9 | 75.0 | 64.4 | 70.3 |" in table
    assert all(len(row) == 7 for row in PUBLISHED.values())


def test_recall_counts_ties_against_the_right_one() -> None:
    queries = np.eye(3)
    assert recall_at(queries, queries) == {1: 100.0, 5: 100.0, 10: 100.0}
    targets = np.array([[1.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0]])
    assert recall_at(queries, targets, (1, 2, 3)) == {
        1: pytest.approx(100 / 3),
        2: pytest.approx(200 / 3),
        3: 100.0,
    }
