"""Print, as JSON, the keys for which Triton kernels are compiled in calls of many shapes.

A driver without a GPU stands in. Compilations are only recorded, and nothing runs.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from llave_kernels.backends import triton_backend
from llave_kernels.backends.protocol import LogSumExps
from llave_kernels.rules import Rules

SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 48, 50, 64, 100, 112, 128, 129, 160, 250, 256)
WIDTHS = (1, 33, 64, 100, 200, 256)

driver = SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
    is_active=lambda: True,
)


def layouts(n: int, d: int) -> list[torch.Tensor]:
    """Contiguous, transposed, every second column, and starting at no multiple of 16 bytes."""
    offset = torch.zeros(n * d + 1)[1:].view(n, d)
    return [torch.zeros(n, d), torch.zeros(d, n).T, torch.zeros(n, 2 * d)[:, ::2], offset]


def step(query: torch.Tensor, target: torch.Tensor) -> None:
    n, m = len(query), len(target)
    owners = torch.arange(m) % n
    rules = Rules(None, owners, *[None] * 6, 9.0, 9.0, "in_batch", None, True)
    scale = torch.tensor(50.0)
    kept = torch.empty(0)
    outputs = triton_backend.forward(query, target, scale, rules, kept)
    upstream = LogSumExps(*(torch.zeros_like(x) for x in outputs))
    triton_backend.backward(
        upstream, query, target, scale, outputs, kept, rules, scale_gradient=True
    )


def main() -> None:
    compiled: dict[str, set[str]] = {}

    def note(*, key: str, fn: Any, **_: Any) -> bool:
        compiled.setdefault(fn.name.split(".")[-1], set()).add(key)
        return True  # Triton does not compile

    triton.runtime.driver.set_active(driver)
    triton.knobs.runtime.jit_cache_hook = note
    for n in SIZES:
        for m in (n, 3 * n):
            step(torch.zeros(n, 64), torch.zeros(m, 64))
    for d in WIDTHS:
        for query, target in zip(layouts(32, d), layouts(50, d), strict=True):
            step(query, target)
    print(json.dumps({name: sorted(keys) for name, keys in compiled.items()}))


if __name__ == "__main__":
    main()
