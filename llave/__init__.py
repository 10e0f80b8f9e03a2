"""Embedding models from vision-language models, trained with the loss of ``llave_kernels``."""

from __future__ import annotations

from typing import Any

from llave_kernels import __version__

__all__ = ["__version__", "build", "load"]


def __getattr__(name: str) -> Any:
    # sentence-transformers takes seconds to import: only who builds or loads a model waits for it.
    if name in ("build", "load"):
        from llave import modeling

        return getattr(modeling, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
