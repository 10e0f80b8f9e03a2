"""The choice of the backend that runs a call.

``"auto"`` always finds one, unless ``LLAVE_BACKEND`` names one that does not fit. A named backend
runs the call or raises an error that says why not.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import cast

import torch
from torch import Tensor

from llave_kernels import checks
from llave_kernels.backends import (
    cuda,
    cuda_sigmoid,
    torch_backend,
    torch_sigmoid,
    triton_backend,
    triton_sigmoid,
)
from llave_kernels.backends.protocol import Backend, OneDirection, SigmoidLoss
from llave_kernels.rules import Rules

# In order of preference, but for what ``_first`` says. The last one supports every call.
BACKENDS: list[Backend] = [triton_backend, cuda, torch_backend]
SIGMOID: dict[str, SigmoidLoss] = {
    triton_backend.NAME: triton_sigmoid,
    cuda.NAME: cuda_sigmoid,
    torch_backend.NAME: torch_sigmoid,
}
OVERRIDE = "LLAVE_BACKEND"


def names() -> list[str]:
    """The names that ``backend=`` takes besides ``"auto"``."""
    return [backend.NAME for backend in BACKENDS]


def available_backends() -> dict[str, str | None]:
    """Each backend's name, with None or the reason why it cannot run on this machine."""
    return {backend.NAME: backend.unavailable() for backend in BACKENDS}


def known(name: str, source: str = "backend") -> str:
    """The name of a backend, or ``"auto"``. ValueError for any other value."""
    if not isinstance(name, str) or name not in ("auto", *names()):
        choices = ", ".join(["auto", *names()])
        raise ValueError(f"{source}={checks.short(name)} is not a backend; choose one of {choices}")
    return name


def named(name: str, source: str = "backend") -> Backend:
    """The backend of that name.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: it cannot run on this machine.
    """
    checks.one_of(source, name, taken := names())
    backend = BACKENDS[taken.index(name)]
    if (reason := backend.unavailable()) is not None:
        raise RuntimeError(f"{source}={name!r} cannot run on this machine: {reason}")
    return backend


def supporting(
    name: str, query: Tensor, target: Tensor, rules: Rules, source: str = "backend"
) -> Backend:
    """``named``, with a ValueError if the backend does not support the call."""
    backend = named(name, source)
    if (reason := backend.supports(query, target, rules)) is not None:
        raise ValueError(f"{source}={name!r} does not support this call: {reason}")
    return backend


def choose(name: str, query: Tensor, target: Tensor, rules: Rules) -> str:
    """The name of the backend that runs this call.

    ``"auto"`` takes the backend that ``LLAVE_BACKEND`` names, if that is set and not empty. It then
    raises the errors of a named backend. Otherwise it takes the first of ``BACKENDS`` that supports
    the call. On a CPU it takes the last. The others run there only for tests, by name.

    Raises:
        ValueError: unknown name, or a named backend that does not support this call.
        RuntimeError: a named backend that cannot run on this machine.
    """
    source, asked = "backend", known(name)
    if asked == "auto" and (override := os.environ.get(OVERRIDE, "").strip()):
        source, asked = OVERRIDE, known(override, OVERRIDE)
    if asked != "auto":
        return supporting(asked, query, target, rules, source).NAME
    *preferred, everywhere = BACKENDS
    if query.device.type != "cpu":
        first = _first(query)
        preferred.sort(key=lambda backend: backend is not first)
        for backend in preferred:  # torch 2.8 can trace a loop
            if backend.unavailable() is None and backend.supports(query, target, rules) is None:
                return backend.NAME
    return everywhere.NAME


def _first(query: Tensor) -> Backend | None:
    """The backend that comes first for such inputs, whatever the order of ``BACKENDS``.

    ``cuda`` leads at every D on sm_90 in half precision. That is counted from its machine code
    (benchmarks/results/static), not measured.
    """
    half_on_gpu = query.device.type == "cuda" and query.dtype.itemsize == 2
    if half_on_gpu and torch.cuda.get_device_capability(query.device)[0] == 9:
        return cuda
    return None


def one_direction(name: str, query: Tensor) -> OneDirection | None:
    """The named backend if it computes loss and gradients of such queries in one pass, or None."""
    backend = named(name)
    merges = getattr(backend, "merges_gradients", None)
    return cast(OneDirection, backend) if merges is not None and merges(query) else None


def choose_sigmoid(name: str, query: Tensor, target: Tensor, rules: Rules) -> str:
    """``choose`` for the sigmoid loss. A backend without it is passed over by ``"auto"``."""
    found = choose(name, query, target, rules)
    if found in SIGMOID:
        return found
    if name != "auto":
        raise ValueError(
            f"backend={name!r} has no sigmoid loss; choose one of {', '.join(SIGMOID)}"
        )
    return BACKENDS[-1].NAME


def running_on(query: Tensor) -> AbstractContextManager[object]:
    """Run on the device of ``query`` with autocast off. The public functions have applied it."""
    kind, device = query.device.type, query.device.index
    casts = torch.is_autocast_enabled(kind) if torch.amp.is_autocast_available(kind) else False
    elsewhere = kind == "cuda" and device != torch.cuda.current_device()
    if not casts and not elsewhere:
        return nullcontext()
    stack = ExitStack()
    if casts:
        stack.enter_context(torch.autocast(kind, enabled=False))
    if elsewhere:
        stack.enter_context(torch.cuda.device(device))
    return stack
