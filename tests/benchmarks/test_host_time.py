"""The host's part of a small step, in a process of its own, because it replaces the launches."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_way_has_a_row(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    command = [sys.executable, "benchmarks/host_time.py", "--turns", "1", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with (out / "host_time.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert all(0 < float(row["least_us"]) <= float(row["us"]) for row in rows)
    assert float(rows[0]["ratio"]) == 1
