"""One implementation in a process of its own, timed on request: ``measure.py JOB.json``.

The process answers each line on standard input with one JSON line.

    prepare FILES    loads the inputs and warms up; answers with the memory and the errors of a step
    time SECONDS     answers with milliseconds of steps and of forward passes

The parent asks one process at a time, in turn, so that a slow spell of the machine falls on all.
Memory is what a step adds at its peak beyond the inputs. It includes the gradients. On a CPU it is
the growth of peak resident memory, on a GPU that of the allocator's peak.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from benchmarks.data import precision
from benchmarks.losses import LOSSES
from benchmarks.peer import Job, Loss

PRODUCT_ROWS = {"cpu": 1024, "cuda": 8192}  # of the plain product that is timed beside the loss


def peak_memory(device: torch.device, call: Callable[[], object]) -> float | None:
    """MiB that ``call`` adds at its peak. None where the system cannot say."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status = Path("/proc/self/status")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # this call must not live on what earlier ones freed
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except (OSError, AttributeError):
        return None
    before = _kibibytes(status, "VmRSS")
    call()
    return (_kibibytes(status, "VmHWM") - before) / 1024


def _kibibytes(status: Path, field: str) -> float:
    return float(status.read_text().split(field + ":")[1].split()[0])


def times(device: torch.device, call: Callable[[], object], seconds: float) -> list[float]:
    """Milliseconds of each call, repeated for about ``seconds`` and at least once."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        if device.type == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            call()
            events[1].record()
            events[1].synchronize()
            taken.append(events[0].elapsed_time(events[1]))
        else:
            start = time.perf_counter()
            call()
            taken.append(1e3 * (time.perf_counter() - start))
    return taken


class Measured:
    """A loss and its inputs, whose results, memory and time are measured."""

    def __init__(self, loss: Loss, query: Tensor, target: Tensor) -> None:
        self.loss = loss
        self.query, self.target = query.requires_grad_(), target.requires_grad_()
        self.value = query.new_zeros(())
        self.few = [x.detach()[: PRODUCT_ROWS[x.device.type]] for x in (query, target)]

    def step(self) -> None:
        self.query.grad = self.target.grad = None
        value = self.loss(self.query, self.target)
        value.backward()
        self.value = value.detach()

    def forward(self) -> None:
        with torch.no_grad():
            self.loss(self.query, self.target)

    def product(self) -> None:
        """A plain matrix product, which shows how fast the machine is just now."""
        self.few[0] @ self.few[1].T

    def prepare(self, truth_file: str | None) -> dict[str, Any]:
        # Compilers, libraries and thread pools must not count as the loss's time or memory.
        self.step()
        self.forward()
        self.product()
        self.query.grad = self.target.grad = None
        figures: dict[str, Any] = {"extra_mib": peak_memory(self.query.device, self.step)}
        figures["loss"] = float(self.value)
        if truth_file:
            truth = torch.load(truth_file, weights_only=True)
            computed = [self.value, self.query.grad, self.target.grad]
            errors = [relative_error(a.cpu(), b) for a, b in zip(computed, truth, strict=True)]
            figures |= {"loss_error": errors[0], "gradient_error": max(errors[1:])}
        return figures

    def time(self, seconds: float) -> dict[str, Any]:
        """Forward passes for a third of the time, steps for the rest."""
        device = self.query.device
        self.product()
        (product_ms,) = times(device, self.product, 0.0)
        forwards = times(device, self.forward, seconds / 3)
        steps = times(device, self.step, seconds * 2 / 3)
        if device.type == "cuda":
            self.query.grad = self.target.grad = None
            torch.cuda.empty_cache()  # the next process may need all of the GPU's memory
        work = 2 * len(self.few[0]) ** 2 * self.query.shape[1]
        return {"steps": steps, "forwards": forwards, "product_tflops": work / product_ms / 1e9}


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def serve(options: dict[str, Any], lines: TextIO) -> None:
    for line in lines:
        name, _, argument = line.partition(" ")
        if name == "prepare":
            files, measured = json.loads(argument), None  # frees the last inputs' memory
            build = LOSSES[options["loss"]].peers[options["impl"]].build
            loss = build(Job(*(options[name] for name in ("alpha", "symmetric", "rule"))))
            inputs = torch.load(files["inputs"], weights_only=True)
            pair = [x.to(options["device"], precision(options["dtype"])) for x in inputs]
            measured = Measured(loss, *pair)
            answer = measured.prepare(files["truth"])
        else:
            answer = measured.time(float(argument))
        print(json.dumps(answer), flush=True)


def main(job_file: str) -> None:
    options = json.loads(Path(job_file).read_text())
    try:
        serve(options, sys.stdin)
    except (torch.OutOfMemoryError, MemoryError):
        print(json.dumps({"status": "out of memory"}))
    except RuntimeError as error:  # the CPU allocator raises a plain RuntimeError
        if "allocate memory" not in str(error):
            raise
        print(json.dumps({"status": "out of memory"}))


if __name__ == "__main__":
    main(sys.argv[1])
