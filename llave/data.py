"""MMEB's training and evaluation formats (arXiv 2410.05160), from local folders or the hub.

Training rows have ``qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path``.
Evaluation rows have ``qry_text, qry_img_path, tgt_text, tgt_img_path``. The targets are lists of
candidates, and the first candidate is the right one. Newer sets add ``qry_inst`` and ``tgt_inst``.
Missing values are empty strings. Paths are relative to a folder.

A path may name a video or a folder of frames. At most 32 of its frames are taken
(``llave.video.load_frames``). Images of MMEB's own sets are taken as they are stored. These sets
are recognised by their names. Images of other subsets and tasks are taken as a person sees them
(``llave.images``).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value, load_dataset

from llave import limits, mmeb
from llave.chat import placeholder_problem
from llave.corpus import OnError
from llave.media import BrokenMediaError, Media, content_id, make_input, pixel_count
from llave.printable import shown
from llave.subsets import PROBLEM, read_files, subset_files, typed

SIDES = (("qry", "qry_image_path"), ("pos_text", "pos_image_path"), ("neg_text", "neg_image_path"))
COLUMNS = ("anchor", "positive", "negative")
FIND_VIDEO = "Find me an video that matches the given caption: "  # "an" is the authors'
_TEXT, _TEXTS = Value("string"), List(Value("string"))
TRAINING = Features({column: _TEXT for side in SIDES for column in side})
EVALUATION = Features(
    dict.fromkeys(("qry_inst", "qry_text", "qry_img_path", "tgt_inst", "caption", "video"), _TEXT)
    | dict.fromkeys(("tgt_text", "tgt_img_path"), _TEXTS)
)


def load_training(
    source: str | Path,
    *,
    images: str | Path | None = None,
    split: str = "train",
    subsets: list[str] | None = None,
    cap: int | None = 50_000,
    seed: int = 0,
    negatives: bool = True,
    on_error: OnError = "raise",
) -> dict[str, Dataset]:
    """Load training subsets, by name, as ``SentenceTransformerTrainer`` takes them.

    The columns are anchor, positive and ``label``, and negative where the subset has mined
    negatives. ``label`` holds the content ids of positive and negative. ``LLaVELoss`` uses them to
    leave duplicates out. A row may lack a negative in a subset that has some. Such a row repeats
    its positive, and the loss leaves the copy out. Images are opened when a batch is made.
    LLaVA-OneVision needs all videos of a batch to have the same length.

    Args:
        source: a folder, or a hub dataset with a configuration per subset. A folder has for each
            subset a file ``NAME.parquet``, ``.jsonl`` or ``.json``, or a folder NAME of such files.
            It may also be as the hub's tools leave it (``llave.subsets``).
        images: folder the image paths are relative to.
        split: the split of a hub dataset, or of a folder whose files state their split.
        subsets: names of subsets. Default: all in the folder. For a hub dataset they are required.
        cap: the most rows to take of a subset, chosen by ``seed``. None takes all. The paper has
            50,000.
        negatives: whether to give mined negatives, for subsets that have them. Without negatives
            all subsets have the same columns and can be mixed in a batch.
        on_error: what a row that cannot be used does. Such a row has a query or positive with
            neither text nor image, a value that is not text, a placeholder such as ``<|image_1|>``
            without an image, or an image that is missing or unreadable. ``"raise"`` raises an
            error that names subset and row. A bad image raises it when the image is opened.
            ``"skip"`` opens every image first, leaves such rows out and prints their number. A
            path outside the folder is always an error.

    Raises:
        ValueError: no subsets, unknown names, missing columns, a row that cannot be used.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be raise or skip, got {on_error!r}")
    loaded = {}
    for name, rows in _subsets(source, subsets, split, TRAINING):
        if subsets is None and not set(TRAINING) & set(rows.column_names):
            said = f"{source}: {name} is passed over, it has none of the columns of the format"
            print(shown(said))
            continue
        missing = {column for side in SIDES[:2] for column in side} - set(rows.column_names)
        if missing:
            raise ValueError(
                f"subset {shown(name)} of {source} lacks the columns {', '.join(sorted(missing))}"
            )
        media = Media(images, mmeb.pixels(name))
        rows = rows.add_column("row", np.arange(len(rows)))  # row numbers in the source
        if cap is not None and len(rows) > cap:
            rows = rows.shuffle(seed=seed).select(range(cap))
        used = negatives and set(SIDES[2]) <= set(rows.column_names)
        rows = _without_unusable(name, rows, SIDES[: 3 if used else 2], on_error)
        if on_error == "skip":
            rows = _without_broken(name, rows, media)
        sides = SIDES[: 3 if negatives and _has_negatives(rows) else 2]
        # Other columns are dropped, so that subsets can be joined.
        rows = rows.select_columns([*(column for side in sides for column in side), "row"])
        rows = rows.add_column("subset", [shown(name)] * len(rows))
        rows.set_transform(partial(_batch, sides=sides, root=images))
        loaded[name] = rows
    if not loaded:
        raise ValueError(f"no file of {source} has the columns {', '.join(TRAINING)}")
    return loaded


def texts_of(subset: Dataset) -> Iterator[str]:
    """Yield the query and positive texts of a loaded subset, without opening images."""
    plain = subset.with_format(None)
    for column in ("qry", "pos_text"):
        yield from (text for text in plain[column] if text)


class Candidates(NamedTuple):
    """An evaluation row: query and candidates as (text, path), and the right candidate's index."""

    query: tuple[str, str]
    targets: list[tuple[str, str]]
    right: int = 0


def load_evaluation(source: str | Path, task: str) -> list[Candidates]:
    """Load the rows of one evaluation task, in MMEB's format or for text-video retrieval.

    Retrieval has one row per caption, with the columns ``caption`` and ``video`` (a path). The
    candidates of every caption are all videos. The instructions are the paper's.

    Raises:
        ValueError: no such task, missing columns, or a row without a query or candidates.
    """
    ((_, rows),) = _subsets(source, [task], "test", EVALUATION)
    for number, problem in enumerate(rows[PROBLEM] if PROBLEM in rows.column_names else ()):
        if problem:
            raise ValueError(f"row {number} of task {task}: {problem}")
    if {"caption", "video"} <= set(rows.column_names):
        return _retrieval(rows, task)
    columns = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
    if missing := set(columns) - set(rows.column_names):
        raise ValueError(
            f"task {task} of {source} lacks the columns {', '.join(sorted(missing))}; text-video "
            "retrieval has caption and video"
        )
    made = []
    for number, row in enumerate(rows):
        texts, paths = row["tgt_text"] or [], row["tgt_img_path"] or []
        if not texts or len(texts) != len(paths):
            raise ValueError(
                f"row {number} of task {task} has {len(texts)} candidate texts and "
                f"{len(paths)} candidate images; expected as many of both, at least one"
            )
        query = _instructed(row.get("qry_inst"), row["qry_text"]), row["qry_img_path"] or ""
        if not any(query):
            raise ValueError(
                f"row {number} of task {task}: the query has neither text nor image or video"
            )
        targets = [
            (_instructed(row.get("tgt_inst"), text), path or "")
            for text, path in zip(texts, paths, strict=True)
        ]
        made.append(Candidates(query, targets))
    return made


def _retrieval(rows: Dataset, task: str) -> list[Candidates]:
    for number, (caption, video) in enumerate(zip(rows["caption"], rows["video"], strict=True)):
        if not caption or not video:
            raise ValueError(f"row {number} of task {task} lacks its caption or its video's path")
    places = {video: place for place, video in enumerate(dict.fromkeys(rows["video"]))}
    videos = [("Represent the given video.", video) for video in places]
    return [
        Candidates((FIND_VIDEO + caption, ""), videos, places[video])
        for caption, video in zip(rows["caption"], rows["video"], strict=True)
    ]


def _instructed(instruction: str | None, text: str | None) -> str:
    return " ".join(part for part in (instruction, text) if part)


def _subsets(
    source: str | Path, names: list[str] | None, split: str, columns: Features
) -> Iterator[tuple[str, Dataset]]:
    folder = Path(source)
    if folder.is_dir():
        for name, files in subset_files(folder, names, split).items():
            yield name, read_files(files, columns, split)
        return
    if names is None:
        raise ValueError(f"{source} is no folder; a hub dataset needs its subsets named")
    for name in names:
        yield name, typed(load_dataset(str(source), name, split=split), columns, name)


def _has_negatives(rows: Dataset) -> bool:
    if not {"neg_text", "neg_image_path"} <= set(rows.column_names):
        return False
    table = rows.with_format("arrow")[:]
    texts, images = (pc.not_equal(pc.fill_null(table[column], ""), "") for column in SIDES[2])
    return bool(pc.any(pc.or_(texts, images)).as_py())


def _without_unusable(
    name: str, rows: Dataset, sides: tuple[tuple[str, str], ...], on_error: OnError
) -> Dataset:
    """Return the rows whose columns can be used. Their images are not read here."""
    table = rows.with_format("arrow")[:]
    there = PROBLEM in table.column_names
    problems = table[PROBLEM].to_pylist() if there else [None] * len(rows)
    for side, (text, image) in zip(("query", "positive", "negative"), sides, strict=False):
        pairs = zip(table[text].to_pylist(), table[image].to_pylist(), strict=True)
        for place, (said, path) in enumerate(pairs):
            problem = problems[place]
            if side != "negative" and not said and not path:
                nothing = f"the {side} has neither text ({text}) nor image or video ({image})"
                problem = problem or nothing
            problems[place] = problem or placeholder_problem(said or "", 1 if path else 0)
    unusable = [place for place, problem in enumerate(problems) if problem]
    if not unusable:
        return rows
    first = f"row {table['row'][unusable[0]]}: {problems[unusable[0]]}"
    if on_error == "raise":
        raise ValueError(
            f"subset {shown(name)}, {first}; mend it, or leave such rows out with on_error='skip'"
        )
    print(shown(f"{name}: {len(unusable)} of {len(rows)} rows left out, the first {first}"))
    return rows.select([place for place, problem in enumerate(problems) if not problem])


def _without_broken(name: str, rows: Dataset, media: Media) -> Dataset:
    paths = [image for _, image in SIDES if image in rows.column_names]
    kept = []
    for number, row in enumerate(rows.select_columns([*paths, "row"])):
        try:
            for path in filter(None, (row[column] for column in paths)):
                media.load(path)
            kept.append(number)
        except (FileNotFoundError, BrokenMediaError) as error:
            if len(kept) == number:
                first = f"row {row['row']}: {error}"
        except ValueError as error:
            raise ValueError(f"subset {shown(name)}, row {row['row']}: {error}") from error
    if len(kept) < len(rows):
        left = f"{len(rows) - len(kept)} of {len(rows)} rows left out for broken images or videos"
        print(shown(f"{name}: {left}, the first {first}"))
    return rows.select(kept)


def _batch(
    batch: dict[str, list[Any]],
    *,
    sides: tuple[tuple[str, str], ...],
    root: str | Path | None,
) -> dict[str, list[Any]]:
    """Make the inputs of a batch, which may mix subsets. The columns are in the trainer's order."""
    media = {name: Media(root, mmeb.pixels(name)) for name in set(batch["subset"])}
    made: dict[str, list[Any]] = {}
    pixels = 0
    for column, (text, image) in zip(COLUMNS, sides, strict=False):
        made[column] = []
        columns = (batch[name] for name in ("subset", "row", text, image))
        for subset, row, said, path in zip(*columns, strict=True):
            try:
                made[column].append(make_input(said or "", path or "", media[subset]))
                pixels += pixel_count(made[column][-1])
                limits.check("LLAVE_MAX_BATCH_PIXELS", pixels, "pixels so far", "the batch")
            except (ValueError, OSError) as error:
                raise ValueError(f"subset {subset}, row {row}: {error}") from error
    if "negative" in made:
        pairs = zip(made["negative"], made["positive"], strict=True)
        made["negative"] = [negative or positive for negative, positive in pairs]
    targets = zip(*(made[column] for column in COLUMNS[1 : len(sides)]), strict=True)
    return made | {"label": [[content_id(item) for item in row] for row in targets]}
