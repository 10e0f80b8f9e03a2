"""The short emoji run: real images, a model from random weights, held-out concepts."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("sentence_transformers", "datasets", "accelerate", "torchvision", "matplotlib"):
    pytest.importorskip(needed)

ROOT = Path(__file__).parents[2]
CHANCE = 2.0  # percent, with 50 candidates


@pytest.mark.long
@pytest.mark.skipif(shutil.which("npm") is None, reason="npm brings the emoji")
def test_held_out_concepts_are_found_five_times_better_than_by_chance(tmp_path: Path) -> None:
    def call(script: str, *arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, str(ROOT / "examples" / "emoji" / script), *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    call("build.py", "emoji", "--packages", str(ROOT / "build" / "emoji"))
    call("sweep.py", "emoji", "--quick", "--out", "results")
    with (tmp_path / "results" / "runs.csv").open(newline="") as file:
        rows = {row["task"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"image_to_image", "image_to_image_held_out"}
    for row in rows.values():
        assert float(row["precision"]) >= 5 * CHANCE
        assert 0 < float(row["overlap"]) < 1
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {"runs.csv", "precision.png", "overlap.png"}
