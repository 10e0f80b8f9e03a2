"""The kill drill of ``llave embed``, with texts in many small shards, stored in int8."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from llave.modeling import build
from tests.drills import Point, drill
from tests.llave import tiny

ROWS = 60
POINTS = {
    "before the ranges": Point("llave.embedding.value_ranges"),
    "before the manifest": Point("llave.embedding.enter_manifest"),
    "before the first rows": Point("llave.embedding.fill"),
    "in a temporary file": Point("llave.shards._write_shard", after=True),
    "before the sync": Point("llave_kernels.atomic_files.sync"),
    "before the name": Point("os.link"),
    "between name and sweep": Point("os.link", after=True),
    "before the sweep": Point("llave_kernels.atomic_files.sweep"),
}


def arguments(folder: Path) -> Callable[[Path], list[str]]:
    """Write a model and a corpus to ``folder``. Returns the command for an output folder."""
    build(tiny.llava_onevision(), device="cpu").save(str(folder / "model"))
    source = folder / "corpus.jsonl"
    rows = ({"id": f"row {n}", "text": f"a cat and {n} dogs"} for n in range(ROWS))
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def to(out: Path) -> list[str]:
        small = ["--shard-rows", "4", "--batch-size", "4", "--truncate-dim", "9", "--dtype", "int8"]
        return ["embed", str(folder / "model"), str(source), "--out", str(out), *small]

    return to


def run(folder: Path, *, kills: int, seed: int, processes: int = 1) -> Counter[str]:
    """Run ``tests.drills.drill`` on this command."""
    return drill(folder, arguments(folder), POINTS, kills=kills, seed=seed, size=processes)
