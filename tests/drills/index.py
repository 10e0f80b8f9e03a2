"""The kill drill of ``llave index``, whose output is in the folder that it reads."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

from llave.shards import ranges
from tests.drills import Point, drill
from tests.llave.test_index import MANIFEST, write

POINTS = {
    "before the training": Point("llave.index._train"),
    "in the file": Point("llave.index._write", after=True),
    "between the files": Point("llave.index.file_sum", after=True),
    "before the sweep": Point("llave.index._sweep"),
}


def run(folder: Path, *, kills: int, seed: int) -> Counter[str]:
    """Run ``tests.drills.drill`` on this command."""
    vectors = folder / "vectors"
    write(vectors, ranges(MANIFEST))

    def to(out: Path) -> list[str]:
        if not out.exists():
            shutil.copytree(vectors, out)
        return ["index", str(out), "--factory", "IVF4,SQ8"]

    return drill(folder, to, POINTS, kills=kills, seed=seed)
