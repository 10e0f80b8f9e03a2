"""Runs a function in several gloo processes on a CPU and collects the results."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
DIED = 7  # exit status of a process that a case kills


def run(module: str, function: str, world: int, *, timeout: float = 120) -> list[Any]:
    """The results of ``module.function()`` in ``world`` processes, by rank.

    The result is None for a process that died with status ``DIED``.

    Raises:
        TimeoutError: a process is still running after ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        parent = subprocess.Popen(
            [sys.executable, "-m", "tests.processes", module, function, folder, str(world)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            statuses, said = parent.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{function} in {world} processes: no end in {timeout} s") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)
        assert parent.returncode == 0, said
        results = []
        for rank, status in enumerate(statuses.split()):
            file = Path(folder) / f"{rank}.pt"
            if not file.exists():
                assert int(status) == DIED, (Path(folder) / f"{rank}.txt").read_text()
            results.append(torch.load(file, weights_only=False) if file.exists() else None)
        return results


def main(module: str, function: str, folder: str, world: str) -> None:
    """Fork the processes, so that they share one import. Print their exit statuses."""
    work = getattr(importlib.import_module(module), function)
    torch.set_num_threads(1)
    children = []
    for rank in range(int(world)):
        child = os.fork()
        if child == 0:
            return _child(work, Path(folder), rank, int(world))
        children.append(child)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


def _child(work: Any, folder: Path, rank: int, world: int) -> None:
    with (folder / f"{rank}.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=20),
    )
    result = work()
    beside = folder / f"{rank}.part"
    torch.save(result, beside)
    beside.rename(folder / f"{rank}.pt")
