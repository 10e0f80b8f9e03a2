"""sentence-transformers' loss over several prefixes of the embeddings."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from sentence_transformers.sentence_transformer.losses import matryoshka as host
from torch import Tensor, nn

from llave_kernels import checks, matryoshka
from llave_kernels.integrations.sentence_transformers.cached import (
    CachedMultipleNegativesRankingLoss,
)
from llave_kernels.integrations.sentence_transformers.ranking import MultipleNegativesRankingLoss
from llave_kernels.matryoshka import Matryoshka


class MatryoshkaLoss(host.MatryoshkaLoss):  # type: ignore[misc]
    """The host's ``MatryoshkaLoss``. Around our ranking losses all dims share one product.

    Same constructor, same call, same value and gradients. Around ``MultipleNegativesRankingLoss``
    or ``CachedMultipleNegativesRankingLoss`` of this package, one call of our kernels computes all
    dims. The host's own code runs dim after dim around any other loss, with a ``similarity_fct``
    that is neither cosine nor dot product, and where ``gather_across_devices`` meets the direction
    ``"query_to_query"`` or ``"doc_to_doc"``.

    Args:
        model, loss, matryoshka_dims, matryoshka_weights: as in the host.
        n_dims_per_step: as in the host. It draws the same dims from the same state of ``random``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as in the host. Also a length that comes twice in ``matryoshka_dims``.

    Example:
        >>> ranking = MultipleNegativesRankingLoss(model, scale=20.0)
        >>> loss = MatryoshkaLoss(model, ranking, [768, 512, 256, 128, 64])
    """

    def __init__(
        self,
        model: Any,
        loss: nn.Module,
        matryoshka_dims: Sequence[int],
        matryoshka_weights: Sequence[float] | Sequence[int] | None = None,
        n_dims_per_step: int = -1,
    ) -> None:
        matryoshka.checked(matryoshka_dims, matryoshka_weights)
        checks.count("n_dims_per_step", n_dims_per_step, -1)
        super().__init__(model, loss, matryoshka_dims, matryoshka_weights, n_dims_per_step)
        if isinstance(loss, CachedMultipleNegativesRankingLoss):
            cached: Any = loss
            cached.calculate_loss = _CachedLossDecorator(cached.calculate_loss, cached.loss)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The weighted sum of the losses of the dims; 0-d."""
        ranking = self._ranking()
        if ranking is None:
            return super().forward(sentence_features, labels)
        with ranking.over_prefixes(self._chosen()):
            return self.loss(sentence_features, labels)

    def _ranking(self) -> MultipleNegativesRankingLoss | None:
        """The loss that computes all dims at once. A subclass may compute something else."""
        found = self.loss
        if isinstance(found, CachedMultipleNegativesRankingLoss):
            found = found.loss
        method = "compute_loss_from_embeddings"
        ours = getattr(MultipleNegativesRankingLoss, method)
        if getattr(type(found), method, None) is not ours or found.fused_similarity is None:
            return None
        within = {"query_to_query", "doc_to_doc"}.intersection(found.directions)
        return None if within and found.gather_across_devices else found

    def _chosen(self) -> Matryoshka:
        """The dims of this step."""
        indices: Sequence[int] = range(len(self.matryoshka_dims))
        if 0 < self.n_dims_per_step < len(indices):
            indices = random.sample(indices, self.n_dims_per_step)
        pairs = sorted((self.matryoshka_dims[i], self.matryoshka_weights[i]) for i in indices)
        return Matryoshka(*zip(*pairs, strict=True))


class _CachedLossDecorator:
    """The host's decorator of a cached loss, unless that computes all dims at once."""

    def __init__(
        self, decorated: host.CachedLossDecorator, ranking: MultipleNegativesRankingLoss
    ) -> None:
        self.decorated, self.ranking = decorated, ranking

    def __call__(self, reps: list[list[Tensor]], *args: Any, **kwargs: Any) -> Tensor:
        function = self.decorated if self.ranking.nested is None else self.decorated.fn
        return function(reps, *args, **kwargs)
