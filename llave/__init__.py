"""Embedding models from vision-language models, trained with the loss of ``llave_kernels``."""

from llave_kernels import __version__

__all__ = ["__version__"]
