"""Kills of a tiny training, alone or under torchrun; each ends as one that nobody disturbed.

``python -m tests.drills.train --kills 20 --seed 0 --processes 2``
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from tests.llave.train_worker import POINTS

ROOT = Path(__file__).parents[2]
LAST = 8
# A longer run has the losses of a shorter one, checkpoints are removed, and logs span several.
SETTINGS = {
    "trainer.lr_scheduler_type": "constant",
    "trainer.save_total_limit": "1",
    "trainer.save_steps": "2",
    "trainer.logging_steps": "4",
    "trainer.eval_steps": "4",
}


def drill(folder: Path, *, kills: int, seed: int, processes: int = 1) -> None:
    """Kill runs, at named points and at random moments, and compare what comes of them.

    Args:
        folder: for the runs.
        kills: how many processes are killed, or launches of several; two a run.
        seed: of the points and moments.
        processes: of each run.

    Raises:
        AssertionError: a run failed, or ended in another way than the undisturbed one.
    """
    draw = random.Random(seed)
    points = [*POINTS, *["moment"] * len(POINTS)]
    draw.shuffle(points)
    whole = folder / "whole"
    before, lasting = timed(whole, processes)
    said: Counter[str] = Counter()
    for number in range(kills):
        out = folder / f"run-{number // 2}"
        point = points[number % len(points)]
        if point == "replaced":  # where there is a model of fewer steps
            finish(out, processes, steps=LAST // 2)
        if point == "moment":
            killed = kill_after(draw.uniform(before, before + lasting), out, processes)
        else:
            running = start(out, processes, f"{point}:{draw.randint(1, 1 + (point == 'seal'))}")
            killed = running.wait() != 0
            end(running)
        said[point if killed else f"{point} (not reached)"] += 1
        if number % 2 or number == kills - 1:
            finish(out, processes)
            compare(out, whole)
            shutil.rmtree(out)
    print(f"{processes} processes, kills: {dict(said)}; every run ended as the undisturbed one")


def start(out: Path, processes: int, point: str, steps: int = LAST) -> psutil.Popen:
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    settings = SETTINGS | {"trainer.max_steps": str(steps)}
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    with out.with_suffix(".log").open("w") as log:
        return psutil.Popen(
            [*launcher, "tests.llave.train_worker", str(out), point, *words],
            cwd=out.parent,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def end(running: psutil.Popen) -> None:
    """Kill a process and its descendants, which torchrun puts into groups of their own."""
    try:
        family = [*running.children(recursive=True), running]
    except psutil.NoSuchProcess:
        family = []
    for process in family:
        process.kill()
    psutil.wait_procs(family)


def kill_after(seconds: float, out: Path, processes: int) -> bool:
    """Whether it still ran then."""
    running = start(out, processes, "none")
    try:
        running.wait(seconds)
    except psutil.TimeoutExpired:
        end(running)
        return True
    return False


def finish(out: Path, processes: int, steps: int = LAST) -> None:
    """Let the same command run to its end."""
    status = start(out, processes, "none", steps).wait()
    assert status == 0, f"status {status}:\n{out.with_suffix('.log').read_text()[-3000:]}"


def timed(out: Path, processes: int) -> tuple[float, float]:
    """Seconds of an undisturbed run before it opens its folder, and after."""
    began = time.monotonic()
    running = start(out, processes, "none")
    while not (out / "run.json").exists() and running.is_running():
        time.sleep(0.05)
    opened = time.monotonic()
    assert running.wait() == 0, out.with_suffix(".log").read_text()[-3000:]
    return opened - began, time.monotonic() - opened


def compare(out: Path, whole: Path) -> None:
    """The same names, model and losses."""
    assert names(out) == names(whole)
    for file in (whole / "model").rglob("*"):
        if file.is_file():
            found = out / file.relative_to(whole)
            assert found.read_bytes() == file.read_bytes(), f"{found} differs from {file}"
    assert losses(out) == losses(whole)


def names(folder: Path) -> set[str]:
    """What is in a run's folder, to its last name."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def losses(folder: Path) -> list[tuple[int, float]]:
    state = json.loads((folder / f"checkpoint-{LAST}" / "trainer_state.json").read_text())
    return [(row["step"], row["loss"]) for row in state["log_history"] if "loss" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        drill(Path(folder), kills=options.kills, seed=options.seed, processes=options.processes)


if __name__ == "__main__":
    main()
