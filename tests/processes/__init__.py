"""Runs a function in several gloo processes on a CPU and collects the results."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import tempfile
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from tests import forks

DIED = 7  # exit status of a process that a case kills


def run(module: str, function: str, world: int, *, timeout: float = 120) -> list[Any]:
    """The results of ``module.function()`` in ``world`` processes, by rank.

    The result is None for a process that died with status ``DIED``.

    Raises:
        TimeoutError: a process is still running after ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log, statuses = folder / "log.txt", folder / "statuses.txt"
        parent = forks.start(main, module, function, folder, world, log=log)
        parent.join(timeout)
        ended = parent.exitcode is not None
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.join()
        if not ended:
            raise TimeoutError(f"{function} in {world} processes: no end in {timeout} s")
        assert parent.exitcode == 0, log.read_text()
        results = []
        for rank, status in enumerate(statuses.read_text().split()):
            file = folder / f"{rank}.pt"
            if not file.exists():
                assert int(status) == DIED, (folder / f"{rank}.txt").read_text()
            results.append(torch.load(file, weights_only=False) if file.exists() else None)
        return results


def main(module: str, function: str, folder: Path, world: int) -> None:
    """Fork the processes, so that they share one import. Write their exit statuses."""
    work = getattr(importlib.import_module(module), function)
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            _child(work, folder, rank, world)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    (folder / "statuses.txt").write_text(" ".join(map(str, statuses)))


def _child(work: Any, folder: Path, rank: int, world: int) -> NoReturn:
    status = 1
    try:
        with (folder / f"{rank}.txt").open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        _work(work, folder, rank, world)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _work(work: Any, folder: Path, rank: int, world: int) -> None:
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
