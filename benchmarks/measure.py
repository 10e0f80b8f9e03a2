"""One measurement in a process of its own: ``measure.py JOB.json`` prints one JSON object.

Memory is what a step adds at its peak beyond the inputs, their gradients included: the growth of
peak resident memory on a CPU, of the allocator's peak on a GPU.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import PEERS, Job, Loss
from torch import Tensor

AT_LEAST = 5  # timed calls
PRODUCT_ROWS = {"cpu": 1024, "cuda": 8192}  # of the plain product timed beside the loss


def peak_memory(device: torch.device, call: Callable[[], object]) -> float | None:
    """MiB that ``call`` adds at its peak; None where the system does not tell."""
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
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed must not serve this one
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except (OSError, AttributeError):
        return None
    before = _kibibytes(status, "VmRSS")
    call()
    return (_kibibytes(status, "VmHWM") - before) / 1024


def _kibibytes(status: Path, field: str) -> float:
    return float(status.read_text().split(field + ":")[1].split()[0])


def times(
    device: torch.device, call: Callable[[], object], seconds: float, repeats: int
) -> list[float]:
    """Milliseconds of repeated calls: for about ``seconds``, ``AT_LEAST`` to ``repeats`` times."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < AT_LEAST or (time.perf_counter() < end and len(taken) < repeats):
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


def measure(
    loss: Loss, query: Tensor, target: Tensor, seconds: float, repeats: int
) -> tuple[dict[str, Any], list[Tensor]]:
    """Figures, and [loss, dQ, dT] for the comparison with the truth."""
    query, target = query.requires_grad_(), target.requires_grad_()
    result: list[Tensor] = []

    def clear() -> None:
        query.grad = target.grad = None

    def step() -> None:
        clear()
        value = loss(query, target)
        value.backward()
        result[:] = [value.detach()]

    def forward() -> None:
        with torch.no_grad():
            loss(query, target)

    few = [x.detach()[: PRODUCT_ROWS[x.device.type]] for x in (query, target)]

    def product() -> None:
        few[0] @ few[1].T

    step()  # compilers, libraries and thread pools are not the loss's time or memory
    forward()
    clear()
    memory = peak_memory(query.device, step)
    product()
    products = times(query.device, product, 0.0, AT_LEAST)
    both = times(query.device, step, seconds, repeats)
    computed = [*result, query.grad, target.grad]
    ahead = times(query.device, forward, seconds / 2, repeats)
    products += times(query.device, product, 0.0, AT_LEAST)
    low, *_, high = statistics.quantiles(both, n=5, method="inclusive")
    work = 2 * len(few[0]) ** 2 * query.shape[1]
    figures = {
        "loss": float(result[0]),
        "forward_ms": statistics.median(ahead),
        "step_ms": statistics.median(both),
        "step_p20_ms": low,
        "step_p80_ms": high,
        "steps": len(both),
        "extra_mib": memory,
        "product_tflops": work / statistics.median(products) / 1e9,
    }
    return figures, computed


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def main(job_file: str) -> None:
    options = json.loads(Path(job_file).read_text())
    loss = PEERS[options["impl"]].build(Job(options["alpha"], options["symmetric"]))
    inputs = torch.load(options["inputs"], weights_only=True)
    try:
        pair = (x.to(options["device"], getattr(torch, options["dtype"])) for x in inputs)
        figures, computed = measure(loss, *pair, options["seconds"], options["repeats"])
        if options["truth"]:
            truth = torch.load(options["truth"], weights_only=True)
            errors = [relative_error(a.cpu(), b) for a, b in zip(computed, truth, strict=True)]
            figures |= {"loss_error": errors[0], "gradient_error": max(errors[1:])}
        print(json.dumps(figures | {"status": "ok"}))
    except (torch.OutOfMemoryError, MemoryError):
        print(json.dumps({"status": "out of memory"}))
    except RuntimeError as error:  # a CPU's allocator reports it as a plain RuntimeError
        if "allocate memory" not in str(error):
            raise
        print(json.dumps({"status": "out of memory"}))


if __name__ == "__main__":
    main(sys.argv[1])
