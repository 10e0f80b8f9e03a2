"""Kill drills: a command that is killed and started again ends as one that nobody disturbed.

``python -m tests.drills embed --kills 30 --seed 0`` is the long form; the suite runs a short one.
A run is killed with SIGKILL at a random moment, or where it reaches a point, which is a function
that is patched in that process alone: nothing in the package knows of drills.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Processes that have imported everything and no threads: their forks start at once.
processes = get_context("forkserver")
processes.set_forkserver_preload(
    [__name__, "llave.cli", "llave.embedding", "llave.evaluation", "llave.modeling"]
)
LIMIT = 120  # seconds that no run takes


class Point(NamedTuple):
    """Where a process kills itself.

    Attributes:
        function: its full name, where it is looked up when it is called.
        after: whether the call is made first.
    """

    function: str
    after: bool = False


def kill_at(point: Point, call: int) -> None:
    """Let this process die at the ``call``-th call of a function, counted from 1."""
    module, name = point.function.rsplit(".", 1)
    owner, calls = import_module(module), count(1)
    original: Callable[..., Any] = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        last = next(calls) == call
        if last and not point.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)


def command(arguments: Sequence[str], log: Path, point: Point | None, call: int) -> None:
    """What a child process does: one ``llave`` command, in a process group of its own."""
    from llave.cli import main

    os.setsid()
    torch.set_num_threads(1)
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if point is not None:
        kill_at(point, call)
    status = main(arguments)
    sys.stdout.flush()
    os._exit(status)


def start(arguments: Sequence[str], log: Path, point: Point | None = None, call: int = 1) -> Any:
    """A command under way; ``join`` it, its status is ``exitcode``."""
    process = processes.Process(target=command, args=(arguments, log, point, call))
    process.start()
    return process


def finish(arguments: Sequence[str], log: Path, out: Path) -> float:
    """Let a command run to its end; the seconds it took from when ``out`` was there."""
    process = start(arguments, log)
    wait_for(out, process)
    began = time.monotonic()
    process.join(LIMIT)
    assert process.exitcode == 0, f"status {process.exitcode}:\n{log.read_text()[-3000:]}"
    return time.monotonic() - began


def wait_for(out: Path, process: Any) -> None:
    """Until a folder is there, or the process has ended."""
    while not out.exists() and process.is_alive():
        time.sleep(0.005)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def drill(
    folder: Path,
    arguments: Callable[[Path], Sequence[str]],
    points: dict[str, Point],
    *,
    kills: int,
    seed: int,
) -> Counter[str]:
    """Kill a command, at named points and at random moments, up to three times before it may end.

    Args:
        folder: for the outputs and logs.
        arguments: the command that writes to a given folder.
        points: by name.
        kills: how many.
        seed: of the points and moments.

    Returns:
        How often a run was killed at each point, or at a moment.

    Raises:
        AssertionError: a run failed, or left other files than the undisturbed one.
    """
    draw = random.Random(seed)
    whole, log = folder / "whole", folder / "log"
    lasting = finish(arguments(whole), log, whole)
    expected = contents(whole)
    done: Counter[str] = Counter()
    order: list[str] = []
    while done.total() < kills:
        out = folder / "killed"
        for _ in range(min(draw.randint(1, 3), kills - done.total())):
            if not order:
                order = [*points, *["a moment"] * len(points)]
                draw.shuffle(order)
            name = order.pop()
            point = points.get(name)
            process = start(arguments(out), log, point, draw.randint(1, 3))
            if point is None:
                wait_for(out, process)
                process.join(draw.uniform(0, lasting))
                if process.exitcode is None:
                    process.kill()
            process.join(LIMIT)
            if process.exitcode == 0:  # it was done before
                break
            assert process.exitcode == -signal.SIGKILL, log.read_text()[-3000:]
            done[name] += 1
        finish(arguments(out), log, out)
        found = contents(out)
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        assert found == expected
        shutil.rmtree(out)
    return done
