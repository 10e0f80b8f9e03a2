"""MMEB precision@1 and text-video retrieval recall per task, and tables beside the paper's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from llave.data import Candidates, Images, load_evaluation, make_input
from llave.embedding import model_fingerprint
from llave.files import publish
from llave.mmeb import METAS, PUBLISHED, PUBLISHED_VIDEO, TASKS, pixels
from llave.modeling import RefusedItemError, encode
from llave_kernels import similarity_statistics


class Result(NamedTuple):
    """One task's score. Shares are in percent; a tie counts against the right candidate.

    Attributes:
        task: its name.
        rows: how many rows were scored.
        precision: share of rows whose right candidate scores above all others; R@1 of retrieval.
        recall_5, recall_10: share whose right candidate is among the best 5, the best 10.
        ties: rows whose right candidate ties for the first place.
        overlap: of the similarity histograms of positives and negatives (paper, Figure 1), 0 to 1.
        positives, negatives: those histograms, counts in 100 equal bins over [-1, 1]: queries with
            their own right candidate, and with those of other rows.
    """

    task: str
    rows: int
    precision: float
    recall_5: float
    recall_10: float
    ties: int
    overlap: float
    positives: list[int]
    negatives: list[int]


def evaluate(
    model: SentenceTransformer,
    tasks: Sequence[str],
    *,
    data: str | Path,
    images: str | Path | None = None,
    out: str | Path,
    batch_size: int = 16,
) -> list[Result]:
    """Scores of each task. Each distinct (text, path) of a task is encoded once.

    Args:
        model: any SentenceTransformer that takes the tasks' inputs.
        tasks: names of files in ``data``, or ``["all"]``, MMEB's 36.
        data: folder with an evaluation file per task, or a hub dataset (``load_evaluation``).
        images: folder the image and video paths are relative to.
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
            result = score(model, task, rows, Images(images, pixels(task)), batch_size)
        except (ValueError, OSError) as error:
            raise ValueError(f"task {task}: {error}") from error
        text = json.dumps({"model": fingerprint} | result._asdict(), indent=1)
        publish(file, partial(Path.write_text, data=text))
        results.append(result)
    return results


def score(
    model: SentenceTransformer,
    task: str,
    rows: Sequence[Candidates],
    images: Images,
    batch_size: int,
) -> Result:
    """Scores of rows of candidates."""
    places: dict[tuple[str, str], int] = {}
    for row in rows:
        for item in (row.query, *row.targets):
            places.setdefault(item, len(places))
    distinct = list(places)
    vectors = np.concatenate(
        [
            _embedded(model, distinct[at : at + batch_size], images, batch_size)
            for at in range(0, len(distinct), batch_size)
        ]
    ).astype(np.float32)
    # Rows that share their candidates, as in retrieval, are scored together.
    groups: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(id(row.targets), []).append(number)
    above, tied = np.empty((2, len(rows)), int)
    for numbers in groups.values():
        queries = vectors[[places[rows[n].query] for n in numbers]].astype(np.float64)
        targets = vectors[[places[item] for item in rows[numbers[0]].targets]].astype(np.float64)
        # Summed in float64, then rounded: in float32 equal candidates can differ in the last bit.
        scores = (queries @ targets.T).astype(np.float32)
        right = scores[np.arange(len(numbers)), [rows[n].right for n in numbers]][:, None]
        above[numbers] = (scores > right).sum(1)
        tied[numbers] = (scores == right).sum(1) - 1  # itself
    query, target = (
        torch.tensor([places[item] for item in items])
        for items in zip(*((row.query, row.targets[row.right]) for row in rows), strict=True)
    )
    embeddings = torch.from_numpy(vectors)
    similarities = similarity_statistics(
        embeddings[query], embeddings[target], query_ids=target, target_ids=target
    )
    first, fifth, tenth = (float(100 * (above + tied < k).mean()) for k in (1, 5, 10))
    return Result(
        task,
        len(rows),
        first,
        fifth,
        tenth,
        int(((above == 0) & (tied > 0)).sum()),
        float(similarities.overlap),
        similarities.positive.tolist(),
        similarities.negative.tolist(),
    )


def _embedded(
    model: SentenceTransformer, items: list[tuple[str, str]], images: Images, batch_size: int
) -> np.ndarray:
    """Normalised embeddings of (text, path) pairs; ValueError names one that the model refuses."""
    try:
        return encode(
            model,
            [make_input(text, image, images) for text, image in items],
            batch_size=batch_size,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
    except RefusedItemError as error:
        text, image = items[error.place]
        shown = f" with {image}" if image else ""
        raise ValueError(f"the text {text!r:.80}{shown}: {error.reason}") from error


def summarise(results: Sequence[Result]) -> dict[str, float]:
    """Means over MMEB's tasks: per meta-task, in and out of distribution, all; NaN where none."""
    scores = {r.task: r.precision for r in results if r.task in TASKS}

    def over(chosen: list[str]) -> float:
        return mean(scores[name] for name in chosen) if chosen else float("nan")

    return {
        **{meta: over([n for n in scores if TASKS[n].meta == meta]) for meta in METAS},
        "IND": over([n for n in scores if TASKS[n].in_distribution]),
        "OOD": over([n for n in scores if not TASKS[n].in_distribution]),
        "all": over(list(scores)),
    }


def format_table(results: Sequence[Result]) -> str:
    """The tasks' scores, and MMEB's means beside the published ones, as Markdown."""
    lines = [
        "| task | rows | precision@1 | R@5 | R@10 | ties | overlap |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        shares = r.precision, r.recall_5, r.recall_10
        lines.append(_row(r.task, r.rows, *shares, r.ties, f"{r.overlap:.3f}"))
        if r.task in PUBLISHED_VIDEO:
            lines.append(_row("LLaVE-7B, published", "", *PUBLISHED_VIDEO[r.task], "", ""))
    means = summarise(results)
    if not np.isnan(means["all"]):
        lines += ["", _row("model", *means), "|---" * (len(means) + 1) + "|"]
        lines.append(_row("this one", *means.values()))
        lines += [_row(name, *row) for name, row in PUBLISHED.items()]
    return "\n".join(lines)


def _row(*cells: str | int | float) -> str:
    shown = (f"{c:.1f}".replace("nan", "-") if isinstance(c, float) else str(c) for c in cells)
    return f"| {' | '.join(shown)} |"
