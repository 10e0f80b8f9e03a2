"""pytorch-metric-learning's NT-Xent loss, fused and hardness-weighted."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
from pytorch_metric_learning.losses import BaseMetricLossFunction
from torch import Tensor

from llave_kernels import checks, dispatch
from llave_kernels.functional import contrastive_logsumexp
from llave_kernels.losses import direction_loss


class NTXentLoss(BaseMetricLossFunction):  # type: ignore[misc]
    """``pytorch_metric_learning.losses.NTXentLoss`` without its (pairs x pairs) matrix.

    ``loss(embeddings, labels, ref_emb=None, ref_labels=None)``. Two rows of equal labels are a
    positive pair. Each positive pair has a loss against all rows of other labels, in one
    direction::

        z_j = (1 / temperature + alpha sg) s_aj     j of another label
        L_ap = softplus(log sum_j exp z_j - s_ap / temperature)

    At ``alpha=0`` loss and gradients are the host's, for any number of positives per anchor. An
    anchor without a positive has no loss. A pair without a negative has a loss of 0. Without
    ``ref_emb`` a row is not its own positive. In float32 the host's loss stops at 87, where its
    gradient vanishes. This one does not.

    The loss is float64 for float64 embeddings and float32 for all others. The host's loss has the
    embeddings' dtype. A batch without a positive pair has the host's 0, in the embeddings' dtype.
    Gradients have the embeddings' dtype.

    It works inside the host's ``SelfSupervisedLoss``, ``CrossBatchMemory`` and
    ``DistributedLossWrapper``. It accepts their list of all pairs as ``indices_tuple``. Memory is
    N + M embeddings and the pairs of equal labels. Where these pairs' embeddings would take more
    than the N x M similarities, it makes those instead. The wrappers' lists come on top.

    Args:
        temperature: 1 / logit scale, positive.
        alpha: hardness strength (LLaVE: 9). Default 0: the host's loss.
        backend: as in ``llave_kernels.hardness_weighted_contrastive_loss``.
        kwargs: the host's ``distance`` (``CosineSimilarity``, the default, or
            ``DotProductSimilarity``), ``reducer`` (default: mean over positive pairs),
            ``embedding_regularizer``, ``embedding_reg_weight``, ``collect_stats``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a wrong value; another distance. In the call: labels are missing, or
            ``indices_tuple`` leaves out negatives.

    Example:
        >>> loss_fn = NTXentLoss(temperature=0.07, alpha=9.0)
        >>> views = torch.randn(8, 16)  # two of each of four images
        >>> loss = loss_fn(views, torch.arange(4).repeat(2))
    """

    def __init__(
        self, temperature: float = 0.07, alpha: float = 0.0, *, backend: str = "auto", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        distance = self.distance
        if not isinstance(distance, DotProductSimilarity) or distance.power != 1:
            raise ValueError(
                "distance must be CosineSimilarity or DotProductSimilarity of power 1, got "
                f"{distance}; use pytorch_metric_learning.losses.NTXentLoss for others"
            )
        self.temperature = checks.positive("temperature", temperature)
        self.alpha = checks.strength("alpha", alpha)
        self.backend = dispatch.known(backend)
        self.add_to_recordable_attributes(list_of_names=["temperature", "alpha"], is_stat=False)

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> dict[str, dict[str, Any]]:
        """The host's hook: a loss per positive pair, for the reducer."""
        if labels is None or ref_labels is None:
            name = "labels" if labels is None else "ref_labels"
            raise ValueError(f"{name} must be given, got None: negatives are found by label")
        pairs = _Pairs(labels, ref_labels)
        if indices_tuple is not None:
            anchor, positive = pairs.accept(indices_tuple)
        else:
            anchor, positive = pairs.positives(other=ref_labels is labels)  # the host's test
        if not len(anchor):
            return self.zero_losses()
        query = self.distance.maybe_normalize(embeddings)
        target = query if ref_emb is embeddings else self.distance.maybe_normalize(ref_emb)
        logits = contrastive_logsumexp(
            query,
            target,
            logit_scale=1.0 / self.temperature,
            alpha=self.alpha,
            hardness="all",
            symmetric=False,
            labels=pairs.first,
            query_ids=pairs.classes,  # leaves out the row itself and its other positives
            target_ids=pairs.ref_classes,
            backend=self.backend,
        )
        # The anchor's sum over its negatives serves all its positives.
        positive_logit = _similarity(query, target, anchor, positive) / self.temperature
        losses = direction_loss(positive_logit, logits.query[anchor])
        indices = (anchor, positive)
        return {"loss": {"losses": losses, "indices": indices, "reduction_type": "pos_pair"}}


class _Pairs:
    """The pairs of equal labels between N anchors and M references, without an N x M matrix.

    Args:
        labels, ref_labels: (N,), (M,) any dtype.

    Attributes:
        classes, ref_classes: (N,), (M,) int64, the labels numbered from 0.
        first: (N,) a reference of each anchor's class. Any reference where the class has none.
        by_class: (M,) the references, class after class.
        start, counts: (N,) where in ``by_class`` each anchor's class starts, and its size.
    """

    def __init__(self, labels: Tensor, ref_labels: Tensor) -> None:
        both = torch.cat([labels, ref_labels.to(labels.device)])
        values, numbers = torch.unique(both, return_inverse=True)
        self.classes, self.ref_classes = numbers[: len(labels)], numbers[len(labels) :]
        sizes = self.ref_classes.bincount(minlength=len(values))
        self.by_class = self.ref_classes.argsort(stable=True)
        self.start = (sizes.cumsum(0) - sizes)[self.classes]
        self.counts = sizes[self.classes]
        self.first = self.by_class[self.start.clamp(max=len(ref_labels) - 1)]

    def positives(self, *, other: bool) -> tuple[Tensor, Tensor]:
        """The (anchor, reference) of all positive pairs, in the host's order.

        Args:
            other: leave out the pairs of a row with itself.
        """
        counts = self.counts
        rows = torch.arange(len(counts), device=counts.device)
        anchor = rows.repeat_interleave(counts)
        begin = self.start - (counts.cumsum(0) - counts)
        place = torch.arange(len(anchor), device=counts.device) + begin[anchor]
        positive = self.by_class[place]
        if other:
            keep = anchor != positive
            anchor, positive = anchor[keep], positive[keep]
        return anchor, positive

    def accept(self, indices_tuple: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The positive pairs of a tuple that lists every negative pair once."""
        remedy = (
            "leave the miner out, or use pytorch_metric_learning.losses.NTXentLoss; all pairs of "
            "different labels are negatives here"
        )
        if len(indices_tuple) != 4:
            raise ValueError(
                f"indices_tuple must be None or hold 4 tensors, got {len(indices_tuple)} (mined "
                f"triplets); {remedy}"
            )
        anchor, positive, negatives_anchor, negative = indices_tuple
        n, m = len(self.classes), len(self.ref_classes)
        expected = n * m - int(self.counts.sum())
        number = negatives_anchor * m + negative
        if (
            len(number) != expected
            or not bool((number[1:] > number[:-1]).all())
            or bool((self.classes[negatives_anchor] == self.ref_classes[negative]).any())
            or bool((self.classes[anchor] != self.ref_classes[positive]).any())
        ):
            raise ValueError(
                "indices_tuple must be None or list all pairs of different labels in order, with "
                f"positives of equal labels, got {len(number)} negative pairs where there are "
                f"{expected}, or pairs of other labels; {remedy}"
            )
        return anchor, positive


def _similarity(query: Tensor, target: Tensor, anchor: Tensor, positive: Tensor) -> Tensor:
    """(pairs,) similarities in float32 or better, in the way that needs less memory."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        query, target = query.to(dtype), target.to(dtype)
        if len(anchor) * query.shape[1] > len(query) * len(target):
            return (query @ target.T)[anchor, positive]
        return torch.linalg.vecdot(query[anchor], target[positive])
