"""The kill drill of ``llave compress``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from llave.shards import ranges
from tests.drills import Point, drill
from tests.llave.test_index import MANIFEST, write

POINTS = {
    "between the passes": Point("llave.compression.enter_manifest"),
    "in a temporary file": Point("llave.shards._write_shard", after=True),
    "before the name": Point("os.link"),
    "between name and sweep": Point("os.link", after=True),
}


def run(folder: Path, *, kills: int, seed: int) -> Counter[str]:
    """Run ``tests.drills.drill`` on this command."""
    write(folder / "vectors", ranges(MANIFEST))
    command = ["compress", str(folder / "vectors"), "--dtype", "int8", "--truncate-dim", "8"]
    return drill(folder, lambda out: [*command, "--out", str(out)], POINTS, kills=kills, seed=seed)
