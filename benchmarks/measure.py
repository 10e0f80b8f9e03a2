"""One measurement in a process of its own: ``measure.py JOB.json`` prints one JSON object.

Memory is what a call adds beyond the inputs, its gradients included: the growth of peak resident
memory on a CPU, of the allocator's peak on a GPU.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import PEERS, SCALE, Job, Loss
from torch import Tensor

from llave_kernels.reference import reference_loss

WARM_UP_ROWS = 256


def reference(
    query: Tensor, target: Tensor, alpha: float, target_alpha: float, symmetric: bool
) -> Any:
    """float64 loss and gradients of the inputs as given."""
    query, target = (x.double().requires_grad_() for x in (query, target))
    loss = reference_loss(
        query,
        target,
        logit_scale=SCALE,
        alpha=alpha,
        target_alpha=target_alpha,
        symmetric=symmetric,
    )
    loss.backward()
    return loss.detach(), query.grad, target.grad


def peak_memory(device: torch.device, call: Callable[[], object]) -> float:
    """MiB that ``call`` adds at its peak."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _kibibytes(status, "VmRSS")
    call()
    return (_kibibytes(status, "VmHWM") - before) / 1024


def _kibibytes(status: Path, field: str) -> float:
    return float(status.read_text().split(field + ":")[1].split()[0])


def times(device: torch.device, call: Callable[[], object], seconds: float) -> list[float]:
    """Milliseconds of repeated calls: at least 3, then for about ``seconds``."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 3 or (time.perf_counter() < end and len(taken) < 200):
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
    loss: Loss, query: Tensor, target: Tensor, seconds: float
) -> tuple[dict[str, Any], Any]:
    """Figures, and (loss, dQ, dT) for the comparison with the reference."""
    query, target = query.requires_grad_(), target.requires_grad_()
    result: list[Tensor] = []

    def step() -> None:
        query.grad = target.grad = None
        value = loss(query, target)
        value.backward()
        result[:] = [value.detach()]

    def forward() -> None:
        with torch.no_grad():
            loss(query, target)

    few = [x.detach()[:WARM_UP_ROWS].clone().requires_grad_() for x in (query, target)]
    loss(*few).backward()  # libraries and thread pools are not the loss's memory
    memory = peak_memory(query.device, step)
    step()  # a compiled loss is recompiled for this size before it is timed
    both = times(query.device, step, seconds)
    forward()
    low, *_, high = statistics.quantiles(both, n=5)
    figures = {
        "forward_ms": statistics.median(times(query.device, forward, seconds / 2)),
        "step_ms": statistics.median(both),
        "step_p20_ms": low,
        "step_p80_ms": high,
        "extra_mib": memory,
    }
    return figures, (*result, query.grad, target.grad)


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def main(job_file: str) -> None:
    options = json.loads(Path(job_file).read_text())
    peer = PEERS[options["impl"]]
    job = Job(options["alpha"], options["symmetric"])
    inputs = torch.load(options["inputs"], weights_only=True)
    query, target = (x.to(options["device"], getattr(torch, options["dtype"])) for x in inputs)
    try:
        figures, computed = measure(peer.build(job), query, target, options["seconds"])
        if options["reference"]:
            alphas = [job.alpha * used for used in (peer.query_alpha, peer.target_alpha)]
            truth = reference(query.detach(), target.detach(), *alphas, job.symmetric)
            errors = [relative_error(a, b) for a, b in zip(computed, truth, strict=True)]
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
