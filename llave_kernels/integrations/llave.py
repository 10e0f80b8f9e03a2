"""The former path of ``llave_kernels.integrations.llave_trainer``."""

from llave_kernels.integrations.llave_trainer import WeightedClipLoss

__all__ = ["WeightedClipLoss"]
