"""Evaluation on small sets with known answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for needed in ("sentence_transformers", "datasets", "PIL"):
    pytest.importorskip(needed)

from PIL import Image  # noqa: E402

from llave import evaluation  # noqa: E402
from llave.data import FIND_VIDEO  # noqa: E402
from llave.evaluation import Result, evaluate, format_table, summarise  # noqa: E402
from llave.mmeb import METAS, PUBLISHED, PUBLISHED_VIDEO, TASKS  # noqa: E402

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Fake:
    """What the road to embeddings takes of a SentenceTransformer. ``vector`` embeds an input."""

    device, default_prompt_name, truncate_dim = torch.device("cpu"), None, None
    dimension = 3

    def __init__(self) -> None:
        self.encoded = 0

    def __getitem__(self, _: int) -> Fake:
        return self

    def __call__(self, features: dict[str, Any]) -> dict[str, Any]:
        self.encoded += len(features["vectors"])
        return {"sentence_embedding": features["vectors"]}

    def get_embedding_dimension(self) -> int:
        return self.dimension

    def parameters(self) -> list[Any]:
        return []

    def eval(self) -> None:
        pass

    def preprocess(self, items: list[Any], prompt: str | None = None) -> dict[str, Any]:
        return {"vectors": torch.tensor(np.stack([self.vector(item) for item in items])).float()}

    def vector(self, item: Any) -> np.ndarray:
        raise NotImplementedError


class ByColour(Fake):
    """Embeds an image by its colour and a text by the colour it names."""

    def vector(self, item: Any) -> np.ndarray:
        if isinstance(item, dict):
            assert item["image"].mode == "RGB"
            return np.asarray(item["image"], np.float32).mean((0, 1))
        return np.array(COLOURS[item.split()[0]], np.float32)


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
    (result,) = results
    assert result[:6] == ("colours", 5, 60.0, 100.0, 100.0, 1)
    assert model.encoded == 7
    # Four rows share their right candidate, so it is no negative of theirs. One of them is far from
    # it.
    assert (sum(result.positives), sum(result.negatives)) == (5, 8)
    assert (result.positives[-1], result.positives[50]) == (4, 1)
    assert result.negatives[50] == 8
    assert result.overlap == pytest.approx(0.2)
    again = evaluate(model, ["colours"], data=data, images=images, out=tmp_path / "out")
    assert again == results
    assert model.encoded == 7
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["colours.json"]

    class Another(ByColour):
        pass

    with pytest.raises(ValueError, match=r"colours\.json holds the score of another model"):
        evaluate(Another(), ["colours"], data=data, images=images, out=tmp_path / "out")


def test_a_copy_of_the_right_candidate_is_right(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, images = folders
    for copy in ("red2", "red3"):
        Image.new("RGB", (4, 4), COLOURS["red"]).save(images / f"{copy}.png")
    # This picture has the same colour but other contents, so it ties.
    Image.new("RGB", (8, 8), COLOURS["red"]).save(images / "larger.png")
    blues = [f"blue{n}" for n in range(11)]
    for blue in blues:
        Image.new("RGB", (4, 4), COLOURS["blue"]).save(images / f"{blue}.png")
    pictures = {
        "same path": ["red.png", "blue.png", "red.png"],
        "same content": ["red.png", "red2.png", "blue.png", "red3.png"],
        "another picture": ["red.png", "larger.png"],
        "far": ["green.png", "blue.png", "green.png"],
        "copies of a wrong one": ["green.png", *(f"{blue}.png" for blue in blues)],
    }
    for name, paths in pictures.items():
        query = "blue thing" if name in ("far", "copies of a wrong one") else "red thing"
        write(data, name, (query, "", [""] * len(paths), paths))
    results = evaluate(ByColour(), list(pictures), data=data, images=images, out=tmp_path / "out")
    assert [(r.precision, r.ties) for r in results] == [(100, 0), (100, 0), (0, 1), (0, 0), (0, 0)]
    # Eleven copies of one picture count as one candidate, so the right one is second.
    assert results[-1].recall_5 == 100.0
    # The same holds for texts. Other rows' right candidates may be copies too.
    write(data, "texts", *[("red thing", "", ["red", "blue", "red"], [""] * 3)] * 3)
    (result,) = evaluate(ByColour(), ["texts"], data=data, images=images, out=tmp_path / "out")
    assert (result.precision, result.ties, sum(result.negatives)) == (100.0, 0, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("broken", ["blue", "green.png", "red thing"])
def test_embeddings_that_are_not_finite_are_refused(
    folders: tuple[Path, Path], tmp_path: Path, value: float, broken: str
) -> None:
    data, images = folders

    class Broken(ByColour):
        def vector(self, item: Any) -> np.ndarray:
            vector = super().vector(item)
            green = isinstance(item, dict) and item["image"].getpixel((0, 0))[1] == 255
            if item == broken or (green and broken == "green.png"):
                vector[1] = value
            return vector

    write(data, "colours", ("red thing", "", ["red", "blue", ""], ["", "", "green.png"]))
    place = "the text '' with green.png" if "png" in broken else f"the text '{broken}'"
    with pytest.raises(ValueError, match=f"task colours: {place}.*: the embedding is not finite"):
        evaluate(Broken(), ["colours"], data=data, images=images, out=tmp_path / "out")
    assert list((tmp_path / "out").glob("*.json")) == []


def test_results_are_of_what_they_scored(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, images = folders
    out, model = tmp_path / "out", ByColour()
    row = ("red thing", "", ["", ""], ["red.png", "blue.png"])
    settings = {"data": data, "images": images, "out": out}

    def scored(**changed: Any) -> float:
        (result,) = evaluate(model, ["colours"], **settings | changed)
        return result.precision

    write(data, "colours", row)
    assert scored() == 100.0
    # The same data in another folder.
    moved = tmp_path / "moved"
    shutil.copytree(images, moved)
    encoded = model.encoded
    assert scored(images=moved, batch_size=1) == 100.0
    assert model.encoded == encoded
    # Pictures change under the same names and sizes. Then rows, candidates, right candidates and
    # instructions change.
    Image.new("RGB", (4, 4), COLOURS["blue"]).save(moved / "red.png")
    with pytest.raises(ValueError, match=r"colours\.json holds the score of other data; choose an"):
        scored(images=moved)
    names = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
    for rows in (
        [row, row],
        [("blue thing", *row[1:])],
        [(*row[:3], ["blue.png", "red.png"])],
        [(*row[:2], ["", "red"], ["red.png", ""])],
        [(*row[:3], ["red.png", "green.png"])],
    ):
        write(data, "colours", *rows)
        with pytest.raises(ValueError, match="holds the score of other data"):
            scored()
    instructed = dict(zip(names, row, strict=True)) | {"qry_inst": "red things:"}
    (data / "colours.jsonl").write_text(json.dumps(instructed))
    with pytest.raises(ValueError, match="holds the score of other data"):
        scored()
    write(data, "colours", row)
    assert scored() == 100.0
    model.max_seq_length = 40
    with pytest.raises(ValueError, match="the score of max_seq_length None, not 40; choose an"):
        scored()
    del model.max_seq_length
    # The file may be from an earlier version, cut short, or no result.
    file = out / "colours.json"
    whole = json.loads(file.read_text())
    for text in (
        json.dumps({k: v for k, v in whole.items() if k != "data"}),
        json.dumps({k: v for k, v in whole.items() if k != "ties"}),
        file.read_text()[:40],
        "[]",
    ):
        file.write_text(text)
        with pytest.raises(
            ValueError, match=r"colours\.json is no result that says what it scored"
        ):
            scored()


def test_batches_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate(ByColour(), ["colours"], data=tmp_path, out=tmp_path / "out", batch_size=0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("red", "", [], []), "row 0 of task bad has 0 candidate texts"),
        (("red", "", ["", ""], ["red.png"]), "has 2 candidate texts and 1 candidate images"),
        (("", "none.png", ["red"], [""]), "path 'none.png' is not in"),
        (
            ("", "../secret.png", ["red"], [""]),
            "path '../secret.png' leaves the folder",
        ),
        (("", "/etc/hostname", ["red"], [""]), "path '/etc/hostname' leaves the"),
        (("", "link.png", ["red"], [""]), "path 'link.png' leaves the folder"),
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
    assert list((tmp_path / "out").glob("*.json")) == []


def test_a_text_that_the_model_refuses_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    class Refusing(ByColour):
        def vector(self, item: Any) -> np.ndarray:
            if "bad" in (item["text"] if isinstance(item, dict) else item):
                raise ValueError("it is bad")
            return super().vector(item)

    data, images = folders
    write(data, "a", ("red", "", ["blue", "bad thing", "green"], ["", "", ""]))
    write(data, "b", ("red", "", ["blue", "bad thing"], ["", "blue.png"]))
    for task, named in (("a", "'bad thing'"), ("b", "'bad thing' with blue.png")):
        with pytest.raises(ValueError, match=f"task {task}: the text {named}: it is bad"):
            evaluate(Refusing(), [task], data=data, images=images, out=tmp_path / "out")


def test_an_interrupted_evaluation_goes_on_where_it_stopped(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    data, images = folders
    write(data, "a", ("red", "", ["red", "blue"], ["", ""]))
    write(data, "b", ("", "late.png", ["blue"], [""]))
    out, model = tmp_path / "out", ByColour()
    with pytest.raises(ValueError, match="task b: path 'late\\.png' is not in"):
        evaluate(model, ["a", "b"], data=data, images=images, out=out)
    assert [path.name for path in out.glob("*.json")] == ["a.json"]
    assert model.encoded == 2
    Image.new("RGB", (4, 4), COLOURS["blue"]).save(images / "late.png")
    results = evaluate(model, ["a", "b"], data=data, images=images, out=out)
    assert [(r.task, r.precision) for r in results] == [("a", 100.0), ("b", 100.0)]
    assert model.encoded == 4


def test_groups_of_tasks() -> None:
    assert evaluation._names(["all"]) == list(TASKS)
    assert evaluation._names(["grounding", "mine", "RefCOCO"]) == [
        "MSCOCO", "RefCOCO", "RefCOCO-Matching", "Visual7W-Pointing", "mine",
    ]  # fmt: skip
    assert len(evaluation._names(["ind"])) == 20
    assert len(evaluation._names(["ood", "vqa"])) == 16 + 6
    parts = ["classification", "vqa", "retrieval", "grounding"]
    assert sorted(evaluation._names(parts)) == sorted(evaluation._names(["ind", "ood"]))


def test_unknown_tasks_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, images = folders
    write(data, "colours", ("red", "", ["red"], [""]))
    with pytest.raises(ValueError, match=r"colors is not in .*; there are colours"):
        evaluate(ByColour(), ["colors"], data=data, images=images, out=tmp_path)
    with pytest.raises(ValueError, match="tasks must be a list of names, got 'colours'"):
        evaluate(ByColour(), "colours", data=data, images=images, out=tmp_path)


def scored(task: str, precision: float, ties: int = 0) -> Result:
    return Result(task, 10, precision, 97.5, 98.5, ties, 0.125, [], [])


def test_mmeb_has_36_sets_and_means_are_over_tasks() -> None:
    assert len(TASKS) == 36
    assert sum(task.in_distribution for task in TASKS.values()) == 20
    assert [sum(t.meta == m for t in TASKS.values()) for m in METAS] == [10, 10, 12, 4]
    results = [scored("ImageNet-1K", 60.0), scored("GQA", 30.0, ties=2), scored("OVEN", 60.0)]
    means = summarise(results)
    assert (means["Classification"], means["VQA"], means["all"]) == (60.0, 30.0, 50.0)
    assert (means["IND"], means["OOD"]) == (60.0, 45.0)
    table = format_table(results)
    assert "| GQA | 10 | 30.0 | 97.5 | 98.5 | 2 | 0.125 |" in table
    assert "| this one | 60.0 | 30.0 | 60.0 | - | 60.0 | 45.0 | 50.0 |" in table
    assert "| LLaVE-7B | 65.7 | 65.4 | 70.9 | 91.9 | 75.0 | 64.4 | 70.3 |" in table
    assert all(len(row) == 7 for row in PUBLISHED.values())


def test_other_tasks_have_no_means_of_mmeb() -> None:
    table = format_table([scored("emoji", 50.0), scored("MSVD", 40.0)])
    assert len(table.splitlines()) == 5
    assert "| LLaVE-7B, published |  | 52.9 | 80.1 | 87.0 |  |  |" in table
    assert all(len(row) == 3 for row in PUBLISHED_VIDEO.values())


class ByNumber(Fake):
    """Embeds a caption or a video as an angle, given by its number."""

    dimension = 2

    def vector(self, item: Any) -> np.ndarray:
        if isinstance(item, dict):
            assert item["text"] == "Represent the given video."
            assert len(item["video"]) == 3
            angle = float(np.asarray(item["video"][1]).mean())
        else:
            assert item.startswith(FIND_VIDEO)
            angle = float(item.split()[-1])
        return np.array([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))])


def test_text_video_retrieval_is_over_all_videos(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    data, videos = folders
    for number in range(12):
        folder = videos / f"v{number}"
        folder.mkdir()
        for frame in range(3):
            Image.new("RGB", (4, 4), (number,) * 3).save(folder / f"{frame}.png")
    # Captions 0 and 0.1 share a video. Caption 2.6 is nearer to v3 than to its own v2. The first
    # caption 9 belongs to v1, which is far from it.
    said = [(0, "v0"), (0.1, "v0"), (2.6, "v2"), (9, "v1"), *((n, f"v{n}") for n in range(3, 12))]
    lines = [json.dumps({"caption": f"number {n}", "video": video}) for n, video in said]
    (data / "film.jsonl").write_text("\n".join(lines))
    (result,) = evaluate(ByNumber(), ["film"], data=data, images=videos, out=tmp_path / "out")
    assert (result.rows, result.ties) == (13, 0)
    assert result.precision == pytest.approx(100 * 11 / 13)
    # Ten videos are nearer to this caption 9 than v1.
    assert result.recall_5 == pytest.approx(100 * 12 / 13)
    assert result.recall_10 == pytest.approx(100 * 12 / 13)
