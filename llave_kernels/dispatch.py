"""Which backend runs a call: ``"auto"`` never fails, a name runs or says why it cannot."""

from __future__ import annotations

import os
from types import ModuleType

from torch import Tensor

from llave_kernels.backends import cuda, torch_strips, triton_backend
from llave_kernels.rules import Rules

BACKENDS: dict[str, ModuleType] = {m.NAME: m for m in (torch_strips, triton_backend, cuda)}
OVERRIDE = "LLAVE_BACKEND"


def available_backends() -> dict[str, str | None]:
    """Each backend's name with None, or with the reason it cannot run on this machine."""
    return {name: module.unavailable() for name, module in BACKENDS.items()}


def choose(backend: str, query: Tensor, target: Tensor, rules: Rules) -> str:
    """The name of the backend that runs this call.

    ``"auto"`` takes ``LLAVE_BACKEND`` where that is set (and then as strictly as an argument), else
    ``triton`` for tensors on a GPU it supports, else ``torch``.

    Raises:
        ValueError: unknown name, or a named backend that does not support this call.
        RuntimeError: a named backend that cannot run on this machine.
    """
    source = "backend"
    if backend == "auto" and os.environ.get(OVERRIDE, "auto") != "auto":
        backend, source = os.environ[OVERRIDE], OVERRIDE
    if backend == "auto":
        # The interpreter is for tests: on CPU tensors it must be asked for by name.
        fits = query.device.type != "cpu" and _refusal(triton_backend, query, target, rules) is None
        return triton_backend.NAME if fits else torch_strips.NAME
    if backend not in BACKENDS:
        names = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"{source}={backend!r} is not a backend; choose one of {names}")
    module = BACKENDS[backend]
    if (reason := module.unavailable()) is not None:
        raise RuntimeError(f"{source}={backend!r} cannot run on this machine: {reason}")
    if (reason := module.supports(query, target, rules)) is not None:
        raise ValueError(f"{source}={backend!r} does not support this call: {reason}")
    return backend


def _refusal(module: ModuleType, query: Tensor, target: Tensor, rules: Rules) -> str | None:
    return module.unavailable() or module.supports(query, target, rules)
