"""Which backend runs a call: ``"auto"`` never fails, a name runs or says why it cannot."""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from llave_kernels import checks
from llave_kernels.backends import cuda, torch_strips, triton_backend
from llave_kernels.rules import Rules

BACKENDS: dict[str, ModuleType] = {m.NAME: m for m in (torch_strips, triton_backend, cuda)}
OVERRIDE = "LLAVE_BACKEND"
# Which of the two GPU backends "auto" tries first: by input dtype, from so many rows on. To come
# from benchmarks/results/h200; nothing is measured there yet, so triton.
FASTER: dict[torch.dtype, tuple[tuple[int, str], ...]] = {
    torch.bfloat16: ((0, triton_backend.NAME),),
    torch.float16: ((0, triton_backend.NAME),),
    torch.float32: ((0, triton_backend.NAME),),
}


def available_backends() -> dict[str, str | None]:
    """Each backend's name with None, or with the reason it cannot run on this machine."""
    return {name: module.unavailable() for name, module in BACKENDS.items()}


def known(backend: str, source: str = "backend") -> str:
    """The name of a backend, or ``"auto"``; ValueError for others."""
    if not isinstance(backend, str) or backend not in ("auto", *BACKENDS):
        names = ", ".join(["auto", *BACKENDS])
        raise ValueError(
            f"{source}={checks.short(backend)} is not a backend; choose one of {names}"
        )
    return backend


def choose(backend: str, query: Tensor, target: Tensor, rules: Rules) -> str:
    """The name of the backend that runs this call.

    ``"auto"`` takes ``LLAVE_BACKEND`` where that is set and not empty (and then as strictly as an
    argument), else the first in ``FASTER``'s order that supports tensors on a GPU, else ``torch``.

    Raises:
        ValueError: unknown name, or a named backend that does not support this call.
        RuntimeError: a named backend that cannot run on this machine.
    """
    source, asked = "backend", known(backend)
    if asked == "auto" and (override := os.environ.get(OVERRIDE, "").strip()):
        source, asked = OVERRIDE, known(override, OVERRIDE)
    if asked == "auto":
        # Interpreter and simulation are for tests: on CPU tensors they must be asked for by name.
        order = [] if query.device.type == "cpu" else _gpu_order(query)
        for name in order:  # a loop, which torch 2.8 traces
            if _refusal(BACKENDS[name], query, target, rules) is None:
                return name
        return torch_strips.NAME
    module = BACKENDS[asked]
    if (reason := module.unavailable()) is not None:
        raise RuntimeError(f"{source}={asked!r} cannot run on this machine: {reason}")
    if (reason := module.supports(query, target, rules)) is not None:
        raise ValueError(f"{source}={asked!r} does not support this call: {reason}")
    return asked


def _gpu_order(query: Tensor) -> list[str]:
    sizes = FASTER.get(query.dtype, ())
    first = [name for rows, name in sizes if rows <= len(query)][-1:]
    return first + [m.NAME for m in (triton_backend, cuda) if m.NAME not in first]


def _refusal(module: ModuleType, query: Tensor, target: Tensor, rules: Rules) -> str | None:
    return module.unavailable() or module.supports(query, target, rules)
