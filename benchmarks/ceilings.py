"""What this machine reaches at best, in a process of its own: ``ceilings.py JOB.json``.

The answer is one JSON line with two medians: TFLOP/s of a large square product in the job's dtype,
and GB/s of a large copy. A copied byte counts twice, as read and as written.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import torch

from benchmarks.data import precision
from benchmarks.measure import times
from llave_kernels.backends.products import product

SIDE = {"cpu": 2048, "cuda": 8192}
COPIED = {"cpu": 2**27, "cuda": 2**30}  # bytes, more than any cache holds
SECONDS = 0.5


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    side, copied = SIDE[device.type], COPIED[device.type]
    left, right = torch.randn(2, side, side, device=device, dtype=dtype)
    source = torch.randint(100, (copied,), device=device, dtype=torch.uint8)
    sink = torch.empty_like(source)
    calls = lambda: product(left, right), lambda: sink.copy_(source)
    for call in calls:
        call()
    product_ms, copy_ms = (statistics.median(times(device, call, SECONDS)) for call in calls)
    return {
        "ceiling_tflops": 2 * side**3 / product_ms / 1e9,
        "ceiling_gb_s": 2 * copied / copy_ms / 1e6,
    }


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps(ceilings(torch.device(job["device"]), precision(job["dtype"]))))
