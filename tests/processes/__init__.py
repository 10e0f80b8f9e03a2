"""Runs a function in several gloo processes on a CPU and collects the results."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]


def run(module: str, function: str, world: int, *, timeout: float = 120) -> list[Any]:
    """The results of ``module.function()`` in ``world`` processes, by rank.

    The result is None for a process that died with status ``DIED``.

    Raises:
        TimeoutError: a process is still running after ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.processes", module, function, folder, str(world)]
        children = [
            subprocess.Popen(
                [*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True
            )
            for rank in range(world)
        ]
        try:
            said = [child.communicate(timeout=timeout)[1] for child in children]
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{function} in {world} processes: no end in {timeout} s") from None
        finally:
            for child in children:
                child.kill()
        results = []
        for rank, child in enumerate(children):
            file = Path(folder) / f"{rank}.pt"
            assert file.exists() or child.returncode == DIED, said[rank]
            results.append(torch.load(file, weights_only=False) if file.exists() else None)
        return results


DIED = 7  # exit status of a process that a case kills


def main(module: str, function: str, folder: str, world: str, rank: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=int(rank),
        world_size=int(world),
        timeout=timedelta(seconds=20),
    )
    result = getattr(importlib.import_module(module), function)()
    beside = Path(folder) / f"{rank}.part"
    torch.save(result, beside)
    beside.rename(Path(folder) / f"{rank}.pt")
