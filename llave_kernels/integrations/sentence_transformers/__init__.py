"""The losses of sentence-transformers with in-batch negatives, fused."""

from llave_kernels.integrations.sentence_transformers.cached import (
    CachedMultipleNegativesRankingLoss,
)
from llave_kernels.integrations.sentence_transformers.matryoshka import MatryoshkaLoss
from llave_kernels.integrations.sentence_transformers.ranking import MultipleNegativesRankingLoss

__all__ = [
    "CachedMultipleNegativesRankingLoss",
    "MatryoshkaLoss",
    "MultipleNegativesRankingLoss",
]
