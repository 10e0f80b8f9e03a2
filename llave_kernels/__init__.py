"""Fused kernels for the hardness-weighted contrastive loss of LLaVE (arXiv 2503.04812)."""

from llave_kernels.diagnostics import SimilarityStatistics, similarity_statistics
from llave_kernels.dispatch import available_backends
from llave_kernels.functional import (
    contrastive_logsumexp,
    hardness_weighted_contrastive_loss,
    matryoshka_logsumexp,
)
from llave_kernels.logits import ContrastiveLogits
from llave_kernels.modules import (
    HardnessWeightedContrastiveLoss,
    SigmoidContrastiveLoss,
    SupervisedContrastiveLoss,
)
from llave_kernels.rules import RuleArguments, RuleSettings, RuleTensors
from llave_kernels.sigmoid import SigmoidPairs, sigmoid_contrastive_loss
from llave_kernels.supervised import supervised_contrastive_loss
from llave_kernels.version import __version__

__all__ = [
    "ContrastiveLogits",
    "HardnessWeightedContrastiveLoss",
    "RuleArguments",
    "RuleSettings",
    "RuleTensors",
    "SigmoidContrastiveLoss",
    "SigmoidPairs",
    "SimilarityStatistics",
    "SupervisedContrastiveLoss",
    "__version__",
    "available_backends",
    "contrastive_logsumexp",
    "hardness_weighted_contrastive_loss",
    "matryoshka_logsumexp",
    "sigmoid_contrastive_loss",
    "similarity_statistics",
    "supervised_contrastive_loss",
]
