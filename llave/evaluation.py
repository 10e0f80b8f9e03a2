"""MMEB precision@1 per task, and the table beside the paper's; text-video retrieval recall."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
from sentence_transformers import SentenceTransformer

from llave.data import Candidates, Images, load_evaluation, make_input
from llave.embedding import model_fingerprint
from llave.mmeb import METAS, PUBLISHED, TASKS


class Result(NamedTuple):
    """One task's score.

    Attributes:
        task: its name.
        rows: how many rows were scored.
        precision: of them the share, in percent, whose right candidate scores above all others.
        ties: rows whose right candidate ties for the first place: counted as wrong.
    """

    task: str
    rows: int
    precision: float
    ties: int


def evaluate(
    model: SentenceTransformer,
    tasks: Sequence[str],
    *,
    data: str | Path,
    images: str | Path | None = None,
    out: str | Path,
    batch_size: int = 16,
) -> list[Result]:
    """Precision@1 of each task. Each distinct (text, image path) of a task is encoded once.

    Args:
        model: any SentenceTransformer that takes the tasks' inputs.
        tasks: names of files in ``data``, or ``["all"]``, MMEB's 36.
        data: folder with an evaluation file per task, or a hub dataset.
        images: folder the image paths are relative to.
        out: folder of this model's results, one ``TASK.json`` each, written as they come. A task
            whose file is there is not run again.
        batch_size: inputs encoded at a time.

    Raises:
        ValueError: ``out`` holds another model's results, no such task, no candidates in a row, an
            image path that leaves ``images`` or an image that cannot be read.
    """
    if isinstance(tasks, str):
        raise ValueError(f"tasks must be a list of names, got {tasks!r}; use [{tasks!r}]")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = model_fingerprint(model)
    results = []
    for task in TASKS if list(tasks) == ["all"] else tasks:
        file = folder / f"{task}.json"
        if file.exists():
            done = json.loads(file.read_text())
            if done.pop("model") != fingerprint:
                raise ValueError(f"{file} holds the score of another model; choose another out")
            results.append(Result(**done))
            continue
        try:
            rows = load_evaluation(data, task)
            result = score(model, task, rows, Images(images), batch_size)
        except (ValueError, OSError) as error:
            raise ValueError(f"task {task}: {error}") from error
        beside = file.with_suffix(f".{os.getpid()}.part")
        beside.write_text(json.dumps({"model": fingerprint} | result._asdict(), indent=1))
        os.replace(beside, file)
        results.append(result)
    return results


def score(
    model: SentenceTransformer,
    task: str,
    rows: Sequence[Candidates],
    images: Images,
    batch_size: int,
) -> Result:
    """Precision@1 of rows of candidates, the first the right one."""
    places: dict[tuple[str, str], int] = {}
    for row in rows:
        for item in (row.query, *row.targets):
            places.setdefault(item, len(places))
    distinct = list(places)
    vectors = np.concatenate(
        [
            model.encode(
                [make_input(text, image, images) for text, image in distinct[at : at + batch_size]],
                batch_size=batch_size,
                normalize_embeddings=True,
                show_progress_bar=False,
            )
            for at in range(0, len(distinct), batch_size)
        ]
    ).astype(np.float32)
    right = ties = 0
    for row in rows:
        query = vectors[places[row.query]]
        candidates = vectors[[places[target] for target in row.targets]].astype(np.float64)
        # Summed in float64, then rounded: in float32 equal candidates can differ in the last bit.
        scores = (candidates @ query.astype(np.float64)).astype(np.float32)
        best_wrong = scores[1:].max(initial=-np.inf)
        right += bool(scores[0] > best_wrong)
        ties += bool(scores[0] == best_wrong)
    return Result(task, len(rows), 100 * right / len(rows), ties)


def summarise(results: Sequence[Result]) -> dict[str, float]:
    """Means over tasks: per meta-task, in and out of distribution, overall; NaN where none ran."""
    scores = {r.task: r.precision for r in results}

    def over(chosen: list[str]) -> float:
        return mean(scores[name] for name in chosen) if chosen else float("nan")

    known = [name for name in scores if name in TASKS]
    return {
        **{meta: over([n for n in known if TASKS[n].meta == meta]) for meta in METAS},
        "IND": over([n for n in known if TASKS[n].in_distribution]),
        "OOD": over([n for n in known if not TASKS[n].in_distribution]),
        "all": over(list(scores)),
    }


def format_table(results: Sequence[Result]) -> str:
    """The tasks' scores, and MMEB's means beside the published ones, as Markdown."""
    lines = ["| task | rows | precision@1 | ties |", "|---|---|---|---|"]
    lines += [f"| {r.task} | {r.rows} | {r.precision:.1f} | {r.ties} |" for r in results]
    means = summarise(results)
    lines += ["", f"| model | {' | '.join(means)} |", "|---" * (len(means) + 1) + "|"]
    lines.append("| this one | " + " | ".join(_number(v) for v in means.values()) + " |")
    if any(r.task in TASKS for r in results):
        lines += [
            f"| {name} | " + " | ".join(_number(v) for v in row) + " |"
            for name, row in PUBLISHED.items()
        ]
    return "\n".join(lines)


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.1f}"


def recall_at(queries: Any, targets: Any, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Recall in percent of retrieving target i for query i among all targets (text-video: R@k).

    Args:
        queries, targets: (N, D) embeddings. Ties count against the right target.
    """
    scores = np.asarray(queries, np.float64) @ np.asarray(targets, np.float64).T
    scores = scores.astype(np.float32)  # so that equal targets tie, as in score()
    right = scores.diagonal()[:, None]
    above = (scores >= right).sum(1) - 1  # all but itself
    return {k: float(100 * (above < k).mean()) for k in ks}
