"""The benchmark: what its peers compute, which arguments it refuses, which files it writes."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from torch.nn.functional import normalize

from benchmarks import data, loss_bench, peers, report, truth, workers
from benchmarks.peer import SCALE, Job
from llave_kernels.reference import reference_loss
from tests.helpers import relative_error

ROOT = Path(__file__).parents[2]
COMMITTED = sorted(ROOT.glob("benchmarks/results/**/loss_bench.csv"))


@pytest.mark.parametrize("name", ["llave-torch", "authors", "dense"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_peers_compute_the_same_loss(name: str, symmetric: bool) -> None:
    query, target = data.random(40, 12)
    value = peers.PEERS[name].build(Job(9.0, symmetric))(query, target)
    truth = reference_loss(query.double(), target.double(), symmetric=symmetric)
    assert relative_error(value, truth) < 2e-5


@pytest.mark.parametrize(("query_alpha", "target_alpha"), [(9.0, 9.0), (9.0, 0.0), (0.0, None)])
@pytest.mark.parametrize("spread", [0.1, 4.0])
@pytest.mark.parametrize("negatives", [0, 2])
def test_truth_in_strips_is_the_dense_loss(
    query_alpha: float,
    target_alpha: float | None,
    spread: float,
    negatives: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(truth, "STRIP", 80 * 7)  # the rows of a strip do not divide 40
    query = torch.randn(40, 12, dtype=torch.float64)
    target = torch.cat([query, *query.new_zeros(negatives, *query.shape)])
    target = target + spread * torch.randn_like(target)
    pair = [normalize(x, dim=1) for x in (query, target)]
    computed = truth.truth(*pair, 50.0, query_alpha, target_alpha)
    leaves = [x.requires_grad_() for x in pair]
    symmetric = target_alpha is not None
    loss = reference_loss(
        *leaves, alpha=query_alpha, target_alpha=target_alpha, symmetric=symmetric
    )
    loss.backward()
    for value, exact in zip(computed, (loss, *(x.grad for x in leaves)), strict=True):
        assert relative_error(value, exact) < 1e-12


def test_every_peer_runs_or_says_why() -> None:
    for symmetric in (True, False):
        reasons = peers.FAMILY.refusals("cpu", symmetric, True)
        assert reasons["llave-torch"] is None
        assert reasons["authors"] == "takes no mined negatives; leave out --negatives"
        assert reasons["llave-triton"] == "needs a GPU"
        assert all(reason is None or reason for reason in reasons.values())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("negatives", [0, 3])
@pytest.mark.parametrize("name", ["llave-torch", "dense", "sentence-transformers", "open-clip"])
def test_installed_peers_compute_what_they_are_held_against(
    name: str, symmetric: bool, negatives: int
) -> None:
    peer = peers.PEERS[name]
    if (reason := peer.refusal("cpu", symmetric, negatives > 0, None)) is not None:
        pytest.skip(reason)
    query, target = data.random(40, 12, negatives)
    value = peer.build(Job(9.0, symmetric))(query, target)
    weights = 9.0 * peer.query_alpha, 9.0 * peer.target_alpha if symmetric else None
    assert relative_error(value, truth.truth(query, target, SCALE, *weights)[0]) < 2e-5


def test_nothing_to_measure_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="none of the implementations"):
        loss_bench.main(["--impl", "liger", "--device", "cpu", "--out", str(tmp_path)])


def test_a_run_leaves_csv_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numpy.savez(tmp_path / "pairs.npz", query=numpy.eye(24, 8) + 1, target=numpy.ones((24, 8)))
    arguments = ["--data", str(tmp_path / "pairs.npz"), "--impl", "llave-torch", "authors"]
    arguments += ["--seconds", "0.01", "--device", "cpu"]
    loss_bench.main([*arguments, "--out", str(tmp_path)])
    with (tmp_path / "loss_bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["impl"] for row in rows] == ["llave-torch", "authors"]
    assert all(row["status"] == "ok" and float(row["loss_error"]) < 1e-4 for row in rows)
    assert float(rows[1]["times_faster_than_authors"]) == 1.0
    for row in rows:
        assert float(row["share"]) == pytest.approx(float(row["floor_ms"]) / float(row["step_ms"]))
        work = 8 * 24 * 24 * 8 / float(row["ceiling_tflops"]) / 1e9
        moved = 2 * 48 * 32 / float(row["ceiling_gb_s"]) / 1e6  # rows of 32 bytes
        assert float(row["floor_ms"]) == pytest.approx(max(work, moved))
    assert (tmp_path / "loss_bench_D8.png").stat().st_size > 1000
    assert "llave-torch" in capsys.readouterr().out


@pytest.mark.long
def test_a_run_with_a_rule_is_named_by_it(tmp_path: Path) -> None:
    rule = "ids"
    arguments = ["--data", "random", "--sizes", "24", "--dims", "8", "--device", "cpu"]
    arguments += ["--seconds", "0.01", "--rule", rule, "--out", str(tmp_path)]
    loss_bench.main(arguments)
    (row,) = report.read_csv(tmp_path / "loss_bench.csv")
    assert (row["impl"], row["data"], row["status"]) == ("llave-torch", f"random {rule}", "ok")
    assert row["loss_error"] == ""
    assert f"random {rule} N=24" in report.digest([row])[0]


@pytest.mark.parametrize("rule", list(peers.RULES))
def test_rules_are_those_of_the_loss(rule: str) -> None:
    query, target = data.random(40, 12)
    value = peers.PEERS["llave-torch"].build(Job(9.0, True, rule))(query, target)
    given = peers.RULES[rule](40, 40, query.device)
    assert relative_error(value, reference_loss(query.double(), target.double(), **given)) < 2e-5


def test_out_of_memory_is_shown_as_such(tmp_path: Path) -> None:
    row = {"data": "random", "impl": "dense", "d": 4, "query_alpha": 9.0, "target_alpha": None}
    row["m"] = 8
    figures = {"step_ms": 1.0, "step_p20_ms": 0.9, "step_p80_ms": 1.2, "extra_mib": 2.0}
    good, lost = (
        row | figures | {"n": 8, "status": "ok"},
        row | {"n": 16} | {"status": "out of memory"},
    )
    assert report.table([good, lost]).splitlines()[2].endswith("out of memory")
    for rows in ([good, lost], [lost]):
        assert report.plots(rows, tmp_path)[0].stat().st_size > 1000


def test_a_digest_has_our_fastest_and_counts_what_has_no_figures() -> None:
    def row(impl: str, step_ms: str, share: str = "0.5") -> dict[str, str]:
        size = {"data": "random", "n": "8", "m": "16", "d": "4", "dtype": "float16"}
        return size | {
            "directions": "1", "impl": impl, "step_ms": step_ms, "tflops": "2", "share": share
        }  # fmt: skip

    rows = [row("llave-torch", "4"), row("llave-cuda", "2"), row("authors", "5"), row("dense", "")]
    assert report.digest(rows) == [
        "random N=8 M=16 D=4 float16, 1 direction(s): llave-cuda 2 ms, 2 TFLOP/s, 50% of floor; "
        "1 of 4 without figures; 2.00x llave-torch; 2.50x authors"
    ]
    assert report.digest([row("liger", "")])[0].endswith(": 1 of 1 without figures")
    assert "floor" not in report.digest([row("llave-torch", "4", share="")])[0]


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.parent.name)
def test_committed_results_can_be_read(file: Path) -> None:
    rows = report.read_csv(file)
    groups = {(row["data"], row["n"], row["m"], row["d"]) for row in rows}
    assert len(report.digest(rows)) == len(groups)
    assert all("llave-torch" in line for line in report.digest(rows))
    assert len(report.markdown(rows).splitlines()) == 2 + len({row["impl"] for row in rows})


def test_plots_are_drawn_from_a_csv(tmp_path: Path) -> None:
    file = tmp_path / "loss_bench.csv"
    shutil.copy(ROOT / "benchmarks" / "results" / "cpu" / "sizes" / "loss_bench.csv", file)
    command = [sys.executable, "benchmarks/report.py", "--plot", str(file)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    written = [Path(line) for line in run.stdout.splitlines()]
    assert written == [tmp_path / "loss_bench_D384.png"]
    assert written[0].stat().st_size > 1000


def test_the_gpu_check_names_what_failed(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = ROOT / "benchmarks" / "gpu_check.sh"
    done = subprocess.run(
        ["bash", str(script), str(tmp_path), "half"],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"FAILED: half, see {tmp_path}/half.log" in done.stdout
    assert "torch sees no GPU" in done.stdout


def test_a_failed_child_says_why(tmp_path: Path) -> None:
    worker = workers.Worker("measure", {"loss": "contrastive", "impl": "no such"}, tmp_path)
    assert worker.ask("prepare {}") == {"status": "failed: KeyError: 'no such'"}
    assert "KeyError" in worker.ask("time 1")["status"]
    worker.close()
    assert "KeyError" in str(workers.run("truth", {}, tmp_path))


def test_a_stuck_child_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CHILD_LIMIT", 0.05)
    worker = workers.Worker("measure", {"loss": "contrastive", "impl": "authors"}, tmp_path)
    kill = worker.process.kill
    # The child may be gone before the thread that killed it returns.
    monkeypatch.setattr(worker.process, "kill", lambda: (kill(), time.sleep(0.2)))
    assert worker.ask("prepare {}") == {"status": "failed: no answer after 0.05 s"}
    worker.close()


@pytest.mark.long
def test_a_killed_run_keeps_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask, asked = workers.Worker.ask, []

    def interrupted(self: workers.Worker, line: str) -> dict[str, float]:
        asked.append(line)
        if len(asked) > 6:
            raise KeyboardInterrupt
        return ask(self, line)

    monkeypatch.setattr(workers.Worker, "ask", interrupted)
    arguments = ["--data", "random", "--sizes", "16", "--dims", "8", "--device", "cpu"]
    arguments += ["--impl", "llave-torch", "authors", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        loss_bench.main([*arguments, "--seconds", "0"])
    with (tmp_path / "loss_bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["steps"] for row in rows] == ["1", "1"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"query": numpy.ones((3, 2))}, "no array named 'target', only"),
        ({"query": numpy.ones(3), "target": numpy.ones((3, 2))}, r"query must be \(N, D\), got"),
        ({"query": numpy.ones((3, 2)), "target": numpy.ones((4, 2))}, "must match"),
        ({"query": numpy.ones((1, 2)), "target": numpy.ones((1, 2))}, "two rows or more"),
        ({"query": numpy.array([{}]), "target": numpy.ones((1, 2))}, "cannot be read"),
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
    assert abs(float((query * target).sum(1).mean()) - 0.24) < 0.1
