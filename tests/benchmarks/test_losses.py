"""The losses that the benchmark knows: each implementation computes the dense formula."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import data, loss_bench, report, truth
from benchmarks.losses import LOSSES
from benchmarks.peer import SCALE, Job
from tests.helpers import relative_error

PEERS = [
    pytest.param(loss, name, directions, id=f"{loss} {name} {directions}")
    for loss, family in LOSSES.items()
    for name, peer in family.peers.items()
    if not peer.gpu_only and "compiled" not in name  # compiling takes long
    for directions in peer.directions
    if directions in family.directions
]


@pytest.mark.parametrize(("loss", "name", "directions"), PEERS)
def test_a_peer_computes_the_formula(loss: str, name: str, directions: int) -> None:
    family, symmetric = LOSSES[loss], directions == 2
    peer = family.peers[name]
    if (reason := peer.refusal("cpu", symmetric, False, None)) is not None:
        pytest.skip(reason)
    query, target = data.random(40, 24)
    weights = 9.0 * peer.query_alpha, 9.0 * peer.target_alpha if symmetric else None
    if family.truth is None:
        expected = truth.truth(query, target, SCALE, *weights)
    else:
        expected = truth.differentiated(family.truth(Job(weights[0], symmetric)), query, target)
    leaves = [x.requires_grad_() for x in (query, target)]
    value = peer.build(Job(9.0, symmetric))(*leaves)
    value.backward()
    for found, exact in zip((value, *(x.grad for x in leaves)), expected, strict=True):
        assert relative_error(found, exact) < 5e-5


@pytest.mark.long
@pytest.mark.parametrize("loss", ["supcon", "sigmoid"])  # of one direction, of both
def test_a_run_of_a_loss(loss: str, tmp_path: Path) -> None:
    directions = [] if 2 in LOSSES[loss].directions else ["--one-direction"]
    arguments = ["--data", "random", "--sizes", "24", "--dims", "24", "--device", "cpu"]
    arguments += ["--seconds", "0.01", "--loss", loss, "--impl", "llave-torch", *directions]
    loss_bench.main([*arguments, "--out", str(tmp_path)])
    (row,) = report.read_csv(tmp_path / "loss_bench.csv")
    assert (row["loss_name"], row["status"]) == (loss, "ok")
    assert float(row["loss_error"]) < 1e-4
    assert float(row["gradient_error"]) < 1e-4


def test_an_unknown_implementation_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        loss_bench.arguments(["--impl", "nobody"])
    assert "--impl nobody: not one of llave-" in capsys.readouterr().err
