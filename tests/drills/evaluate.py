"""The kill drill of ``llave evaluate``, with several small tasks over texts and images."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from llave.modeling import build
from tests.drills import Point, drill
from tests.llave import tiny

TASKS = [f"task{n}" for n in range(4)]
COLOURS = ("red", "green", "blue", "grey")
INPUTS = 600  # queries of the first task, which make three shards
POINTS = {
    "before a manifest": Point("llave.candidates.enter_manifest"),
    "before a task's inputs": Point("llave.candidates.fill"),
    "in a shard": Point("llave.shards._write_shard", after=True),
    "between two shards": Point("llave.filling.put", after=True),
    "before a score": Point("llave.evaluation.score"),
    "after a score": Point("llave.evaluation.score", after=True),
    "in a temporary file": Point("llave.evaluation._write", after=True),
    "before the shards are dropped": Point("llave.evaluation.drop"),
    "while they are dropped": Point("llave.candidates.sweep"),
    "before the sync": Point("llave_kernels.atomic_files.sync"),
    "before the name": Point("os.link"),
    "between name and sweep": Point("os.link", after=True),
    "before the sweep": Point("llave_kernels.atomic_files.sweep"),
}


def arguments(folder: Path) -> Callable[[Path], list[str]]:
    """Write a model, tasks and images to ``folder``. Returns the command for an output folder."""
    build(tiny.llava_onevision(), device="cpu").save(str(folder / "model"))
    for name in COLOURS:
        Image.new("RGB", (16, 16), name).save(folder / f"{name}.png")
    (folder / "data").mkdir()
    for number, task in enumerate(TASKS):
        rows = [
            {
                "qry_text": f"{n} {COLOURS[n % len(COLOURS)]} things, {number}",
                "qry_img_path": "",
                "tgt_text": [""] * len(COLOURS),
                "tgt_img_path": [f"{name}.png" for name in COLOURS],
            }
            for n in range(8 if number else INPUTS)
        ]
        (folder / "data" / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def to(out: Path) -> list[str]:
        where = ["--data", str(folder / "data"), "--images", str(folder), "--out", str(out)]
        return ["evaluate", str(folder / "model"), "--tasks", *TASKS, *where]

    return to


def run(folder: Path, *, kills: int, seed: int, processes: int = 1) -> Counter[str]:
    """Run ``tests.drills.drill`` on this command."""
    return drill(folder, arguments(folder), POINTS, kills=kills, seed=seed, size=processes)
