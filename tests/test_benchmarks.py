"""The benchmark itself: its peers compute what they say, its inputs are checked, a run leaves its
files."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import data  # noqa: E402
import loss_bench  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402

from llave_kernels.reference import reference_loss  # noqa: E402
from tests.helpers import relative_error  # noqa: E402


@pytest.mark.parametrize("name", ["llave-torch", "authors", "dense"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_peers_compute_the_same_loss(name: str, symmetric: bool) -> None:
    query, target = data.random(40, 12)
    value = peers.PEERS[name].build(peers.Job(9.0, symmetric))(query, target)
    truth = reference_loss(query.double(), target.double(), symmetric=symmetric)
    assert relative_error(value, truth) < 2e-5


def test_every_peer_runs_or_says_why() -> None:
    for symmetric in (True, False):
        reasons = peers.refusals("cpu", symmetric)
        assert reasons["llave-torch"] is None
        assert reasons["llave-triton"] == "needs a GPU"
        assert all(reason is None or reason for reason in reasons.values())


def test_a_run_leaves_csv_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numpy.savez(tmp_path / "pairs.npz", query=numpy.eye(24, 8) + 1, target=numpy.ones((24, 8)))
    arguments = ["--data", str(tmp_path / "pairs.npz"), "--impl", "llave-torch", "authors"]
    loss_bench.main([*arguments, "--seconds", "0.01", "--device", "cpu", "--out", str(tmp_path)])
    with (tmp_path / "loss_bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["impl"] for row in rows] == ["llave-torch", "authors"]
    assert all(row["status"] == "ok" and float(row["loss_error"]) < 1e-4 for row in rows)
    assert float(rows[1]["times_faster_than_authors"]) == 1.0
    assert (tmp_path / "loss_bench_D8.png").stat().st_size > 1000
    assert "llave-torch" in capsys.readouterr().out


def test_out_of_memory_is_shown_as_such(tmp_path: Path) -> None:
    good = {"data": "random", "impl": "dense", "n": 8, "d": 4, "status": "ok", "step_ms": 1.0}
    rows = [good | {"extra_mib": 2.0}, good | {"n": 16, "status": "out of memory"}]
    assert report.table(rows).splitlines()[2].endswith("out of memory")
    assert report.plots(rows, tmp_path)[0].exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"query": numpy.ones((3, 2))}, "no array named 'target', only"),
        ({"query": numpy.ones(3), "target": numpy.ones((3, 2))}, r"query must be \(N, D\), got"),
        ({"query": numpy.ones((3, 2)), "target": numpy.ones((4, 2))}, "must match"),
        ({"query": numpy.full((3, 2), numpy.nan), "target": numpy.ones((3, 2))}, "not finite"),
    ],
)
def test_bad_files(tmp_path: Path, arrays: dict[str, numpy.ndarray], message: str) -> None:
    path = tmp_path / "pairs.npz"
    numpy.savez(path, **arrays)
    with pytest.raises(SystemExit, match=message):
        loss_bench.main(["--data", str(path), "--impl", "dense"])


def test_real_pairs_are_real_and_distinct() -> None:
    pairs = data.docstring_pairs(50)
    assert len(pairs) == 50
    assert len({summary for summary, _ in pairs}) == 50
    assert all("(" in signature for _, signature in pairs)


def test_random_pairs_are_unit_and_aligned() -> None:
    query, target = data.random(64, 16)
    assert torch.allclose(query.norm(dim=1), torch.ones(64))
    assert float((query * target).sum(1).mean()) > 0.3
