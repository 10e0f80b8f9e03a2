"""Embedding models from vision-language models, trained with the loss of ``llave_kernels``."""

from __future__ import annotations

from typing import Any

__all__ = ["__version__", "build", "load"]


def __getattr__(name: str) -> Any:
    # torch and sentence-transformers take seconds to import, so they are imported on first use.
    if name == "__version__":
        from llave_kernels import __version__

        return __version__
    if name in ("build", "load"):
        from llave import modeling

        return getattr(modeling, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
