"""The benchmark's child processes, which answer line by line or run to their end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.report import OUT_OF_MEMORY

CHILD_LIMIT = 900  # seconds for one answer
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1"}


def run(module: str, job: dict[str, Any], folder: Path) -> str | None:
    """Run one of this package's modules to its end. Returns None, or what went wrong."""
    worker = Worker(module, job, folder)
    answer = worker.ask("")
    worker.close()
    return answer["status"] if worker.process.returncode else None


class Worker:
    """One of this package's modules as a child process, which starts at once."""

    def __init__(self, module: str, job: dict[str, Any], folder: Path) -> None:
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".json", delete=False) as file:
            json.dump(job, file)
        self.errors = tempfile.TemporaryFile("w+", dir=folder)  # noqa: SIM115 (closed in close)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", f"benchmarks.{module}", file.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=ENVIRONMENT,
        )

    def ask(self, line: str) -> dict[str, Any]:
        """The answer, or ``{"status": what went wrong}``."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        expired = threading.Event()

        def give_up() -> None:
            expired.set()
            self.process.kill()

        late = threading.Timer(CHILD_LIMIT, give_up)
        late.start()
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            late.cancel()
        return json.loads(answer) if answer else {"status": self._failure(expired.is_set())}

    def _failure(self, timed_out: bool) -> str:
        code = self.process.wait()
        if timed_out:
            return f"failed: no answer after {CHILD_LIMIT} s"
        if code == -signal.SIGKILL:  # the kernel's own out-of-memory killer
            return OUT_OF_MEMORY
        self.errors.seek(0)
        last = (self.errors.read().strip() or f"exit status {code}").splitlines()[-1]
        return f"failed: {last[:120]}"

    def close(self) -> None:
        """End the process and wait for that. One that is at work ends after its answer."""
        self.dismiss()
        self.process.wait()
        self.errors.close()

    def dismiss(self) -> None:
        """Let the process end, without waiting for it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


def close(workers: Iterable[Worker]) -> None:
    """End all of them at the same time."""
    workers = list(workers)
    for worker in workers:
        worker.dismiss()
    for worker in workers:
        worker.close()
