"""Kill drills: a killed command that is started again ends with an undisturbed run's files.

``python -m tests.drills embed --kills 30 --seed 0`` is the long form. The test suite runs a short
one. SIGKILL hits a run at a random moment or at a point. A point is a call of a function. Only the
process to be killed patches that function, so the package has no code for drills.
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
from pathlib import Path
from typing import Any, NamedTuple

from tests import forks

LIMIT = 120  # seconds after which a run counts as stuck


class Point(NamedTuple):
    """Where a process kills itself.

    Attributes:
        function: the full name of a function, as its caller looks it up.
        after: whether the process dies after the call instead of before it.
    """

    function: str
    after: bool = False


def kill_at(point: Point, call: int) -> None:
    """Make this process die at the ``call``-th call of ``point``, counted from 1."""
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


def command(arguments: Sequence[str], point: Point | None, call: int) -> None:
    """Run one ``llave`` command in a child process."""
    from llave.cli import main

    if point is not None:
        kill_at(point, call)
    sys.exit(main(arguments))


def start(
    arguments: Sequence[str],
    log: Path,
    point: Point | None = None,
    call: int = 1,
    rank: int = 0,
    size: int = 1,
) -> Any:
    """Start a command as the process ``rank`` of ``size``. Returns the process."""
    own = log.with_suffix(f".{rank}") if rank else log
    variables = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return forks.start(command, arguments, point, call, log=own, **variables)


def finish(arguments: Sequence[str], log: Path, out: Path, size: int = 1) -> float:
    """Run a command to its end. Returns the seconds from the creation of ``out`` to the end."""
    running = [start(arguments, log, rank=rank, size=size) for rank in range(size)]
    wait_for(out, running[0])
    began = time.monotonic()
    for process in running:
        process.join(LIMIT)
        said = log.read_text(errors="replace")[-3000:]
        assert process.exitcode == 0, f"status {process.exitcode}:\n{said}"
    return time.monotonic() - began


def wait_for(out: Path, process: Any) -> None:
    """Wait until a folder exists or the process has ended."""
    while not out.exists() and process.is_alive():
        time.sleep(0.005)


def contents(folder: Path) -> dict[str, bytes]:
    """The contents of a folder's files, by relative name."""
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
    size: int = 1,
) -> Counter[str]:
    """Kill a command at named points and at random moments, and compare what it leaves.

    Each command is killed up to three times. Then it runs to its end. Of several processes any one
    is killed, and then all of them, as torchrun does. The undisturbed run is one process.

    Args:
        folder: holds the outputs and the log.
        arguments: gives the command that writes to a folder.
        points: the points by name.
        kills: number of kills.
        seed: chooses points and moments.
        size: number of processes of a command.

    Returns:
        The number of kills at each point and at random moments.

    Raises:
        AssertionError: a run failed, or its files differ from those of the undisturbed run.
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
            rank, call = draw.randrange(size), draw.randint(1, 3)
            others = [
                start(arguments(out), log, None, 1, r, size) for r in range(size) if r != rank
            ]
            process = start(arguments(out), log, point, call, rank, size)
            if point is None:
                wait_for(out, process)
                process.join(draw.uniform(0, lasting))
                if process.exitcode is None:
                    process.kill()
            process.join(LIMIT)
            for other in others:
                other.kill()
                other.join()
            if process.exitcode == 0:  # it ended before the kill
                continue
            assert process.exitcode == -signal.SIGKILL, log.read_text(errors="replace")[-3000:]
            done[name] += 1
        finish(arguments(out), log, out, size)
        found = contents(out)
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        assert found == expected
        shutil.rmtree(out)
    return done
