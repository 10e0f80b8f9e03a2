"""Score tasks by MMEB precision@1 and text-video recall, and print them beside the paper's."""

from __future__ import annotations

import glob
import hashlib
import html
import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

from llave.candidates import Encoding, drop, encode_inputs
from llave.data import Candidates, load_evaluation
from llave.files import create, writing
from llave.fingerprint import model_fingerprint
from llave.media import Media
from llave.mmeb import GROUPS, METAS, PUBLISHED, PUBLISHED_VIDEO, TASKS, pixels
from llave.printable import shown
from llave.processes import rank_and_size
from llave.sealing import signed, unsigned
from llave_kernels import similarity_statistics
from llave_kernels.atomic_files import sweep

WORST = 20  # rows that a result describes


class Miss(NamedTuple):
    """A row whose right candidate does not score above all others.

    Attributes:
        row: its number in the task.
        first: the place in its candidates of the best wrong one.
        first_score, right_score: cosines of the query with that candidate and with the right one.
        rank: the place of the right candidate in the order of scores, 2 or more.
    """

    row: int
    first: int
    first_score: float
    right_score: float
    rank: int


class Result(NamedTuple):
    """One task's score. Shares are in percent. A tie counts against the right candidate.

    Candidates with the same text and pixels count as one, also where their paths differ. A copy of
    the right candidate is therefore right.

    Attributes:
        task: its name.
        rows: how many rows were scored.
        precision: share of rows whose right candidate scores above all others (R@1 in retrieval).
        recall_5, recall_10: share of rows whose right candidate is among the best 5 or 10.
        ties: number of rows whose right candidate ties for the first place.
        overlap: overlap of the two similarity histograms (paper, Figure 1), 0 to 1.
        positives, negatives: the two histograms, counts in 100 equal bins over [-1, 1]. Positives
            are similarities of a query and its right candidate. Negatives are similarities of a
            query and the right candidates of other rows.
        worst: the 20 rows, or fewer, that fail by the most: the largest difference of the scores of
            a wrong candidate and the right one. Results of earlier versions have none.
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
    worst: Sequence[Miss] = ()


def evaluate(
    model: SentenceTransformer,
    tasks: Sequence[str],
    *,
    data: str | Path,
    images: str | Path | None = None,
    out: str | Path,
    batch_size: int = 16,
    workers: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> list[Result]:
    """Score a model on each task. Each distinct (text, path) of a task is encoded once.

    Several processes share the encoding, as under torchrun, and rank 0 scores. They must see the
    same ``out``. The results are the same for any number of processes. A killed evaluation goes on
    within a task.

    Args:
        model: any SentenceTransformer that takes the tasks' inputs.
        tasks: names of files in ``data``, or of groups of MMEB's 36 tasks (``llave.mmeb.GROUPS``):
            ``all``, a meta-task in small letters, ``ind`` and ``ood``.
        data: folder with an evaluation file per task, or a hub dataset (``load_evaluation``).
        images: folder the image and video paths are relative to.
        out: folder of this model's results. Each task's ``TASK.json`` is written when the task is
            scored. It records a digest of the model, and a digest of the task's rows with their
            image and video files. A task whose file is there is not encoded again. No file is
            replaced. Until then ``.TASK.inputs`` holds the encoded inputs.
        batch_size: inputs encoded at a time, 16 by default. It changes scores only by rounding.
        workers: processes that read and preprocess ahead of the model. By default this process's
            share of the cores less one, 1 to 4. 0 reads in this process.
        rank: this process's number. By default the environment's ``RANK``, or 0.
        world_size: the number of processes. By default the environment's ``WORLD_SIZE``, or 1.

    Returns:
        The results on rank 0, and an empty list on other ranks. Rank 0 shows its progress on
        stderr.

    Raises:
        ValueError: ``out`` holds results of another model or other data, or other files under the
            results' names; there is no such task; a row has no candidates; an image path leaves
            ``images``; an image cannot be read; or an embedding is not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(tasks, str):
        raise ValueError(f"tasks must be a list of names, got {tasks!r}; use [{tasks!r}]")
    rank, world_size = rank_and_size(rank, world_size)
    folder, names = Path(out), _names(tasks)
    identity = {
        "model": model_fingerprint(model),
        # The fingerprint covers it too. By name it makes a clearer error.
        "max_seq_length": getattr(model, "max_seq_length", None),
    }
    others = {} if images is None else {"images": images}
    for file, (there, _) in refuse_out(out, names, data=data, **others).items():
        _refuse_others(file, there, identity)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    share = {"batch_size": batch_size, "workers": workers, "rank": rank, "world_size": world_size}
    results = []
    for task in tqdm(names, unit="task", disable=rank != 0 or len(names) < 2):
        try:
            result = _evaluated(model, task, folder, identity, data, images, share)
        except (ValueError, OSError) as error:
            raise ValueError(f"task {shown(task)}: {error}") from error
        if result is not None:
            results.append(result)
    return results


def _evaluated(
    model: SentenceTransformer,
    task: str,
    folder: Path,
    identity: dict[str, Any],
    data: str | Path,
    images: str | Path | None,
    share: dict[str, Any],
) -> Result | None:
    """Return a task's result on rank 0. It is read where it is there, or made and written."""
    file, media = _file(folder, task), Media(images, pixels(task))
    encoded = file.with_name(f".{task}.inputs")
    rows = load_evaluation(data, task)
    scored = identity | {"data": data_fingerprint(rows, media)}
    inputs, first = distinct(rows), share["rank"] == 0
    if not file.exists():
        try:
            with tqdm(
                total=len(inputs), desc=shown(task), unit="row", leave=False, disable=not first
            ) as bar:
                found = encode_inputs(
                    model, inputs, media, encoded, scored, **share, advance=bar.update
                )
        except (ValueError, OSError):
            # Another process may have scored the task, and dropped what it had encoded.
            if not file.exists():
                raise
        else:
            if found is not None:
                create(file, partial(_write, scored=scored, result=score(task, rows, found)))
    if not file.exists():  # rank 0 is not done yet
        return None
    there, result = _read(file)
    _refuse_others(file, there, scored)
    sweep(file)
    drop(encoded)
    return result if first else None


def refuse_out(
    out: str | Path, tasks: Sequence[str], **others: str | Path
) -> dict[Path, tuple[dict[str, Any], Result]]:
    """Check ``out`` and read the tasks' results that it holds, before anything is loaded.

    Args:
        out: folder of the results.
        tasks: names of tasks or groups.
        others: by name, folders that ``out`` must not be.

    Returns:
        By file, what was scored (digests) and the result.

    Raises:
        ValueError: a file with a task's name is no result, ``out`` is no folder, or it is one of
            ``others``.
    """
    folder = Path(out)
    for name, other in others.items():
        if folder.resolve() == Path(other).resolve():
            raise ValueError(f"out={shown(out)} is the folder of {name}; choose another")
    data = others.get("data")
    inside = data is not None and folder.resolve().parent == Path(data).resolve()
    if clash := inside and sorted(folder.parent.glob(f"{glob.escape(folder.name)}.*")):
        raise ValueError(
            f"out={shown(out)} would be the same subset as {shown(clash[0])}; choose another"
        )
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"out={shown(out)} is no folder; choose another")
    files = [_file(folder, task) for task in _names(tasks)]
    return {file: _read(file) for file in files if os.path.lexists(file)}


def _names(tasks: Sequence[str]) -> list[str]:
    """Return the names of tasks, with groups in full and each name once."""
    return list(dict.fromkeys(name for task in tasks for name in GROUPS.get(task, [task])))


def _file(folder: Path, task: str) -> Path:
    if Path(task).name != task:
        raise ValueError(f"task {shown(task)} must be a name, not a path")
    return folder / f"{task}.json"


def data_fingerprint(rows: Sequence[Candidates], media: Media) -> str:
    """Return a hash of evaluation rows and of their files' contents, wherever the files are."""
    digest = hashlib.blake2b(digest_size=16)
    lists: dict[int, int] = {}  # rows may share a list of candidates
    paths: set[str] = set()
    for row in rows:
        if (key := id(row.targets)) not in lists:
            lists[key] = len(lists)
            digest.update(json.dumps(row.targets).encode())
            paths.update(path for _, path in row.targets)
        digest.update(json.dumps([row.query, lists[key], row.right]).encode())
        paths.add(row.query[1])
    for name in sorted(paths - {""}):
        path = media.path(name)
        frames = sorted(p for p in path.glob("[!.]*") if p.is_file()) if path.is_dir() else [path]
        for file in frames:
            with media.open(file) as opened:
                digest.update(hashlib.blake2b(opened.read()).digest())
    return digest.hexdigest()


def _write(file: Path, *, scored: dict[str, Any], result: Result) -> None:
    file.write_text(signed(scored | result._asdict()))


def _read(file: Path) -> tuple[dict[str, Any], Result]:
    """Read a task's file: what was scored (digests), and the result."""
    try:
        done = unsigned(file)
        there = {name: done.pop(name) for name in ("model", "max_seq_length", "data")}
        done["worst"] = [Miss(*miss) for miss in done.get("worst", ())]
        return there, Result(**done)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{shown(file)} is no result that says what it scored ({error!r}); remove it, or "
            "choose another out"
        ) from error


def _refuse_others(file: Path, there: dict[str, Any], scored: dict[str, Any]) -> None:
    """Raise ValueError where a result on disk scored another model or other data."""
    of = {"model": "another model", "data": "other data"}
    others = [
        of.get(name, f"{name} {there[name]}, not {scored[name]}")
        for name in scored
        if there[name] != scored[name]
    ]
    if others:
        raise ValueError(
            f"{shown(file)} holds the score of {', '.join(others)}; choose another out"
        )


def distinct(rows: Sequence[Candidates]) -> list[tuple[str, str]]:
    """Return the (text, path) pairs of queries and candidates, each once, in their order."""
    return list(dict.fromkeys(item for row in rows for item in (row.query, *row.targets)))


def score(task: str, rows: Sequence[Candidates], encoded: Encoding) -> Result:
    """Score the rows of one task.

    Args:
        task: its name.
        rows: its rows.
        encoded: their ``distinct`` inputs, encoded.
    """
    places = {item: place for place, item in enumerate(distinct(rows))}
    vectors, ids = encoded
    # Rows that share their candidates, as in retrieval, are scored together.
    groups: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(id(row.targets), []).append(number)
    above, tied = np.empty((2, len(rows)), int)
    misses: list[Miss] = []
    for numbers in groups.values():
        candidates = np.array([places[item] for item in rows[numbers[0]].targets])
        known, first = np.unique(ids[candidates], return_index=True)  # copies are one candidate
        queries = vectors[[places[rows[n].query] for n in numbers]].astype(np.float64)
        # In float32 equal candidates can differ in the last bit. The sum is therefore in float64
        # and rounded at the end.
        scores = (queries @ vectors[candidates[first]].astype(np.float64).T).astype(np.float32)
        places_right = np.searchsorted(known, ids[candidates[[rows[n].right for n in numbers]]])
        right = scores[np.arange(len(numbers)), places_right][:, None]
        above[numbers] = (scores > right).sum(1)
        tied[numbers] = (scores == right).sum(1) - 1  # the right candidate equals itself
        misses += _misses(numbers, scores, places_right, first)
    query, target = (
        np.array([places[item] for item in items])
        for items in zip(*((row.query, row.targets[row.right]) for row in rows), strict=True)
    )
    targets = torch.from_numpy(ids[target])
    similarities = similarity_statistics(
        *(torch.from_numpy(vectors[side]) for side in (query, target)),
        query_ids=targets,
        target_ids=targets,
    )
    at_1, at_5, at_10 = (float(100 * (above + tied < k).mean()) for k in (1, 5, 10))
    return Result(
        task,
        len(rows),
        at_1,
        at_5,
        at_10,
        int(((above == 0) & (tied > 0)).sum()),
        float(similarities.overlap),
        similarities.positive.tolist(),
        similarities.negative.tolist(),
        sorted(misses, key=lambda miss: miss.right_score - miss.first_score)[:WORST],
    )


def _misses(
    numbers: list[int], scores: np.ndarray, right: np.ndarray, places: np.ndarray
) -> Iterator[Miss]:
    """Yield the rows of a group whose right candidate is not first.

    Args:
        numbers: (rows,) numbers of the rows.
        scores: (rows, candidates) scores. They are overwritten.
        right: (rows,) columns of the right candidates.
        places: (candidates,) places of the columns in the rows' lists of candidates.
    """
    rows = np.arange(len(numbers))
    reached = scores[rows, right]
    ranks = (scores >= reached[:, None]).sum(1)
    scores[rows, right] = -np.inf
    first = scores.argmax(1)
    best = scores[rows, first]
    for row in np.flatnonzero(best >= reached):
        found = int(places[first[row]]), float(best[row]), float(reached[row]), int(ranks[row])
        yield Miss(numbers[row], *found)


def summarise(results: Sequence[Result]) -> dict[str, float]:
    """Return MMEB's means: per meta-task, in distribution, out of distribution, and over all tasks.

    A mean over no tasks is NaN.
    """
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
    """Return Markdown tables: the tasks' scores, and MMEB's means beside the published ones."""
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
    said = (f"{c:.1f}".replace("nan", "-") if isinstance(c, float) else _cell(c) for c in cells)
    return f"| {' | '.join(said)} |"


def _cell(value: str | int) -> str:
    """Escape a name from data for Markdown and for the HTML that may be made of it."""
    return re.sub(r"[|`\[\\]", r"\\\g<0>", html.escape(shown(value), quote=False))
