"""sentence-transformers' gradient-cached loss with in-batch negatives."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import util
from sentence_transformers.sentence_transformer import losses as host
from torch import Tensor
from typing_extensions import Unpack

from llave_kernels import checks
from llave_kernels.integrations.sentence_transformers.minibatches import sliceable
from llave_kernels.integrations.sentence_transformers.ranking import (
    OWN_SETTINGS,
    Direction,
    HardnessMode,
    ModelCard,
    MultipleNegativesRankingLoss,
    OwnSettings,
    PartitionMode,
    Similarity,
)


class CachedMultipleNegativesRankingLoss(
    ModelCard,
    host.CachedMultipleNegativesRankingLoss,  # type: ignore[misc]
):
    """The host's ``CachedMultipleNegativesRankingLoss`` with our ``MultipleNegativesRankingLoss``.

    Same constructor, same call, same value and gradients for every setting. Embeddings are made in
    mini-batches. The loss itself needs none.

    A mini-batch holds the images of its samples. Some processors stack all images of a batch
    (LLaVA-OneVision's does, with any number per sample). ``pixel_values`` and ``image_sizes`` are
    then cut by images per sample. ``num_images_per_sample`` gives these counts where the features
    have it (the host's ``Transformer`` adds it to messages). Otherwise ``batch_num_images`` does,
    from transformers' processor.

    Args:
        model, scale, similarity_fct, gather_across_devices, directions, partition_mode,
            hardness_mode, hardness_strength: as in ``MultipleNegativesRankingLoss``.
        own: ``target_hardness_strength``, ``false_negative_margin`` and ``backend``, as there.
        mini_batch_size, mini_batch_num_tokens, show_progress_bar: as in the host.

    Raises:
        TypeError, ValueError: as in ``MultipleNegativesRankingLoss``. In the call, ValueError for a
            feature whose rows are not samples and that cannot be cut by sample.

    Example:
        >>> loss = CachedMultipleNegativesRankingLoss(model, scale=50.0, mini_batch_size=16)
    """

    _delegated_to_wrapped_loss = (
        host.CachedMultipleNegativesRankingLoss._delegated_to_wrapped_loss + tuple(OWN_SETTINGS)
    )

    def __init__(
        self,
        model: Any,
        scale: float = 20.0,
        similarity_fct: Similarity = util.cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: PartitionMode = "joint",
        show_progress_bar: bool = False,
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 0.0,
        **own: Unpack[OwnSettings],
    ) -> None:
        checks.count("mini_batch_size", mini_batch_size, 1)
        super().__init__(
            model, mini_batch_size=mini_batch_size, mini_batch_num_tokens=mini_batch_num_tokens,
            show_progress_bar=show_progress_bar,
        )  # fmt: skip
        self.loss = MultipleNegativesRankingLoss(
            model, scale, similarity_fct, gather_across_devices, directions, partition_mode,
            hardness_mode, hardness_strength, **own,
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        """Our settings live on the wrapped loss, as the host's do, whose names are properties."""
        found = super().__getattr__
        return getattr(found("loss"), name) if name in OWN_SETTINGS else found(name)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Loss of each column's mini-batches of embeddings, (mini_batch_size, D) each; 0-d.

        With ``with_backward`` the embeddings receive their gradients and the loss is detached.
        """
        embeddings = [torch.cat(column) for column in reps]
        if self.loss.fused_similarity is None:
            self.loss.fuses_everywhere(embeddings)
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        loss = self.loss.compute_loss_from_embeddings(embeddings, labels)
        if with_backward:
            loss.backward()  # type: ignore[no-untyped-call]
            loss = loss.detach()
        return loss

    def embed_minibatch(
        self, sentence_feature: dict[str, Any], begin: int, end: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """The host's, for features that its slicing cuts by sample."""
        features = sliceable(sentence_feature)
        return super().embed_minibatch(features, begin, end, *args, **kwargs)
