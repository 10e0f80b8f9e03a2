"""The former path of ``llave_kernels.scores``."""

from llave_kernels.scores import CrossEntropyLoss, scores_loss

__all__ = ["CrossEntropyLoss", "scores_loss"]
