"""The kill drill of a tiny training, in one process or under torchrun.

``python -m tests.drills train --kills 20 --processes 2``
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import psutil

from tests.llave import train_worker
from tests.llave.train_worker import POINTS

ROOT = Path(__file__).parents[2]
LAST, SHORTER = 12, 8  # both steps are evaluated and saved. An epoch has 6 steps
# A constant rate gives a longer run the losses of a shorter one. Old checkpoints are removed. A log
# entry covers two checkpoints.
SETTINGS = {
    "trainer.lr_scheduler_type": "constant",
    "trainer.save_total_limit": "1",
    "trainer.save_steps": "2",
    "trainer.logging_steps": "4",
    "trainer.eval_steps": "4",
}


def run(folder: Path, *, kills: int, seed: int, processes: int = 1) -> Counter[str]:
    """Kill runs at named points and at random moments, and compare what they leave.

    Each run is killed up to twice.

    Args:
        folder: holds the runs.
        kills: number of kills.
        seed: chooses points and moments.
        processes: number of processes of each run.

    Returns:
        The number of kills at each point and at random moments.

    Raises:
        AssertionError: a run failed, or its results differ from those of the undisturbed run.
    """
    draw = random.Random(seed)
    points: list[str] = []
    whole = folder / "whole"
    lasting = timed(whole, processes)
    said: Counter[str] = Counter()
    while said.total() < kills:
        out = folder / f"run-{said.total()}"
        for _ in range(min(2, kills - said.total())):
            if not points:
                points = [*POINTS, *["moment"] * len(POINTS)]
                draw.shuffle(points)
            point = points.pop()
            if point == "replaced":  # this point needs a model of fewer steps
                finish(out, processes, steps=SHORTER)
            times = draw.randint(1, 2) if point in ("step", "checkpoint", "seal", "rename") else 1
            running = start(out, processes, "none" if point == "moment" else f"{point}:{times}")
            if point == "moment":
                wait_for_folder(running, out)
                status = wait(running, draw.uniform(0, lasting))
                end(running)
            else:
                status = wait(running)
            if status == 0:
                break
            said[point] += 1
        finish(out, processes)
        compare(out, whole)
        shutil.rmtree(out)
    return said


def start(out: Path, processes: int, point: str, steps: int = LAST) -> psutil.Process:
    """Start the command. A single process is a fork of this one, which has imported everything."""
    settings = SETTINGS | {"trainer.max_steps": str(steps)}
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    with out.with_suffix(".log").open("w") as log:
        if processes == 1:
            child = os.fork()
            if child == 0:
                for stream in (1, 2):
                    os.dup2(log.fileno(), stream)
                status = 1
                try:
                    train_worker.main(str(out), point, *words)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    os._exit(status)
            return psutil.Process(child)
        return psutil.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *(f"--nproc_per_node={processes}", "-m", "tests.llave.train_worker"),
                *(str(out), point, *words),
            ],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def wait(running: psutil.Process, seconds: float | None = None) -> int | None:
    """The exit status, or None if it still runs after ``seconds``."""
    try:
        status: int = running.wait(seconds)
    except psutil.TimeoutExpired:
        return None
    return status


def wait_for_folder(running: psutil.Process, out: Path) -> None:
    """Wait until one of the run's processes has opened the lock file, or the run has ended."""
    lock = str(out / ".run.lock")
    while running.is_running() and running.status() != psutil.STATUS_ZOMBIE:
        for process in (running, *running.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                if any(file.path == lock for file in process.open_files()):
                    return
        time.sleep(0.02)


def end(running: psutil.Process) -> None:
    """Kill a process and its descendants. torchrun puts these into other process groups."""
    try:
        family = [*running.children(recursive=True), running]
    except psutil.NoSuchProcess:
        return
    for process in family:
        process.kill()
    psutil.wait_procs(family)


def finish(out: Path, processes: int, steps: int = LAST) -> None:
    """Run the same command to its end."""
    status = wait(start(out, processes, "none", steps))
    assert status == 0, f"status {status}:\n{out.with_suffix('.log').read_text()[-3000:]}"


def timed(out: Path, processes: int) -> float:
    """The seconds of an undisturbed run after it has opened its folder."""
    running = start(out, processes, "none")
    wait_for_folder(running, out)
    opened = time.monotonic()
    assert wait(running) == 0, out.with_suffix(".log").read_text()[-3000:]
    return time.monotonic() - opened


def compare(out: Path, whole: Path) -> None:
    """Assert that names, model and losses are the same."""
    assert names(out) == names(whole), names(out) ^ names(whole)
    for file in (whole / "model").rglob("*"):
        if file.is_file():
            found = out / file.relative_to(whole)
            assert found.read_bytes() == file.read_bytes(), f"{found} differs from {file}"
    assert losses(out) == losses(whole)


def names(folder: Path) -> set[str]:
    """The relative names of all files and folders in a run's folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def losses(folder: Path) -> list[tuple[int, float]]:
    state = json.loads((folder / f"checkpoint-{LAST}" / "trainer_state.json").read_text())
    return [(row["step"], row["loss"]) for row in state["log_history"] if "loss" in row]
