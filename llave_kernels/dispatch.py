"""Which backend runs a call: ``"auto"`` never fails, a name runs or says why it cannot."""

from __future__ import annotations

import os
from typing import cast

from torch import Tensor

from llave_kernels import checks
from llave_kernels.backends import cuda, torch_backend, triton_backend
from llave_kernels.backends.protocol import Backend, OneDirection
from llave_kernels.rules import Rules

# In order of preference. The last supports every call. Of the two for GPUs, Triton's comes first
# until benchmarks/results say which is faster.
BACKENDS: list[Backend] = [triton_backend, cuda, torch_backend]
OVERRIDE = "LLAVE_BACKEND"


def names() -> list[str]:
    """What ``backend=`` takes beside ``"auto"``."""
    return [backend.NAME for backend in BACKENDS]


def available_backends() -> dict[str, str | None]:
    """Each backend's name with None, or with the reason it cannot run on this machine."""
    return {backend.NAME: backend.unavailable() for backend in BACKENDS}


def known(name: str, source: str = "backend") -> str:
    """The name of a backend, or ``"auto"``; ValueError for others."""
    if not isinstance(name, str) or name not in ("auto", *names()):
        choices = ", ".join(["auto", *names()])
        raise ValueError(f"{source}={checks.short(name)} is not a backend; choose one of {choices}")
    return name


def named(name: str, source: str = "backend") -> Backend:
    """The backend of that name.

    Raises:
        ValueError: there is none.
        RuntimeError: it cannot run on this machine.
    """
    checks.one_of(source, name, names())
    (backend,) = [backend for backend in BACKENDS if name == backend.NAME]
    if (reason := backend.unavailable()) is not None:
        raise RuntimeError(f"{source}={name!r} cannot run on this machine: {reason}")
    return backend


def supporting(
    name: str, query: Tensor, target: Tensor, rules: Rules, source: str = "backend"
) -> Backend:
    """``named``, with a ValueError where the backend does not support the call."""
    backend = named(name, source)
    if (reason := backend.supports(query, target, rules)) is not None:
        raise ValueError(f"{source}={name!r} does not support this call: {reason}")
    return backend


def choose(name: str, query: Tensor, target: Tensor, rules: Rules) -> str:
    """The name of the backend that runs this call.

    ``"auto"`` takes ``LLAVE_BACKEND`` where that is set and not empty (and then as strictly as an
    argument). Otherwise it takes the first in the order of ``BACKENDS`` that supports the call. On
    a CPU it takes the last: the others run there for tests, and must be asked for by name.

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
        for backend in preferred:  # a loop, which torch 2.8 traces
            if backend.unavailable() is None and backend.supports(query, target, rules) is None:
                return backend.NAME
    return everywhere.NAME


def one_direction(name: str, query: Tensor) -> OneDirection | None:
    """The named backend, where it makes loss and gradients of such queries in one pass."""
    backend = named(name)
    merges = getattr(backend, "merges_gradients", None)
    return cast(OneDirection, backend) if merges is not None and merges(query) else None
