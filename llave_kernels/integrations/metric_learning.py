"""pytorch-metric-learning's NT-Xent and supervised contrastive losses, fused and weighted."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.reducers import AvgNonZeroReducer, MeanReducer
from torch import Tensor

from llave_kernels import checks, dispatch
from llave_kernels.functional import contrastive_logsumexp
from llave_kernels.group_losses import GroupLosses, group_losses, resolve
from llave_kernels.label_pairs import LabelPairs, similarities
from llave_kernels.losses import direction_loss
from llave_kernels.precision import autocast

Indices = tuple[Tensor, ...] | None
LossDict = dict[str, dict[str, Any]]


class _GroupLoss(BaseMetricLossFunction):  # type: ignore[misc]
    """What both losses share: a cosine or dot product over a temperature, and pairs by label."""

    def __init__(self, temperature: float, alpha: float, backend: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        distance = self.distance
        if not isinstance(distance, DotProductSimilarity) or distance.power != 1:
            raise ValueError(
                "distance must be CosineSimilarity or DotProductSimilarity of power 1, got "
                f"{distance}; use pytorch_metric_learning.losses.{type(self).__name__} for others"
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
        indices_tuple: Indices,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> LossDict:
        """The host's hook: the losses for the reducer."""
        if labels is None or ref_labels is None:
            name = "labels" if labels is None else "ref_labels"
            raise ValueError(f"{name} must be given, got None: negatives are found by label")
        pairs = LabelPairs(labels, ref_labels, itself=ref_labels is labels)  # the host's test
        listed = None
        if indices_tuple is not None:
            host = f"pytorch_metric_learning.losses.{type(self).__name__}"
            listed = pairs.accept(indices_tuple, host)
        query = self.distance.maybe_normalize(embeddings)
        target = query if ref_emb is embeddings else self.distance.maybe_normalize(ref_emb)
        return self._found(query, target, pairs, listed) or self.zero_losses()

    def _found(
        self,
        query: Tensor,
        target: Tensor,
        pairs: LabelPairs,
        listed: tuple[Tensor, Tensor] | None,
    ) -> LossDict | None:
        """The losses of normalised rows, or None for the host's 0.

        Args:
            listed: the positive pairs. None: all that ``pairs`` has.
        """
        raise NotImplementedError

    def _losses(
        self, query: Tensor, target: Tensor, pairs: LabelPairs, denominator: str
    ) -> GroupLosses:
        query, target = autocast(query, target)
        call = resolve(
            query, target, pairs.classes, pairs.ref_classes, pairs.own,
            logit_scale=1.0 / self.temperature, alpha=self.alpha, denominator=denominator,
            symmetric=False, backend=self.backend,
        )  # fmt: skip
        (found,) = group_losses(call)
        return found


class SupConLoss(_GroupLoss):
    """``pytorch_metric_learning.losses.SupConLoss`` without its N x M matrices.

    ``loss(embeddings, labels, ref_emb=None, ref_labels=None)``. The loss of a row is that of
    ``llave_kernels.supervised_contrastive_loss`` with ``denominator="all"``. At ``alpha=0`` loss
    and gradients are the host's. Without ``ref_emb`` a row is neither its own positive nor its own
    negative. The host's reducer leaves out losses that are 0. In float32 the host rounds losses
    below 1e-7 to 0, and this class does not. A batch with one positive and one negative pair at
    most has loss 0 at the host, and its real loss here.

    It works inside the host's wrappers, as ``NTXentLoss`` does. ``indices_tuple`` may leave out one
    positive of each anchor, which the wrappers do for the anchor itself. The dtypes are as there.

    Args:
        temperature: 1 / logit scale, positive.
        alpha: hardness strength of the negatives. Default 0: the host's loss.
        backend: as in ``llave_kernels.hardness_weighted_contrastive_loss``.
        kwargs: as in ``NTXentLoss``. The default ``reducer`` is the host's, the mean over the
            losses above 0.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a wrong value; another distance. In the call: labels are missing, or
            ``indices_tuple`` leaves out other pairs.

    Example:
        >>> loss_fn = SupConLoss(temperature=0.1)
        >>> views = torch.randn(8, 16)  # four of each of two classes
        >>> loss = loss_fn(views, torch.arange(2).repeat(4))
    """

    def __init__(
        self, temperature: float = 0.1, alpha: float = 0.0, *, backend: str = "auto", **kwargs: Any
    ) -> None:
        super().__init__(temperature, alpha, backend, **kwargs)

    def get_default_reducer(self) -> AvgNonZeroReducer:
        return AvgNonZeroReducer()

    def _found(
        self,
        query: Tensor,
        target: Tensor,
        pairs: LabelPairs,
        listed: tuple[Tensor, Tensor] | None,
    ) -> LossDict | None:
        if listed is not None and not pairs.leave_out_rest(*listed):
            raise ValueError(
                "indices_tuple must list all pairs of equal labels, or all but one of an anchor, "
                f"got {len(listed[0])} of {int(pairs.counts.sum())}; leave the miner out, or use "
                "pytorch_metric_learning.losses.SupConLoss"
            )
        if not pairs.any_positive() or not pairs.any_negative():
            return None
        losses = self._losses(query, target, pairs, "all").losses
        rows = torch.arange(len(losses), device=losses.device)
        return {"loss": {"losses": losses, "indices": rows, "reduction_type": "element"}}


class NTXentLoss(_GroupLoss):
    """``pytorch_metric_learning.losses.NTXentLoss`` without its (pairs x pairs) matrix.

    ``loss(embeddings, labels, ref_emb=None, ref_labels=None)``. Two rows of equal labels are a
    positive pair. Each positive pair has a loss against all rows of other labels, in one
    direction::

        z_j = (1 / temperature + alpha sg) s_aj     j of another label
        L_ap = softplus(log sum_j exp z_j - s_ap / temperature)

    At ``alpha=0`` loss and gradients are the host's, for any number of positives per anchor. An
    anchor without a positive has no loss. A pair without a negative has a loss of 0. Without
    ``ref_emb`` a row is not its own positive. In float32 the host's loss stops at 87, where its
    gradient vanishes. This one does not. A batch with one positive and one negative pair at most
    has loss 0 at the host, and its real loss here.

    The loss is float64 for float64 embeddings and float32 for all others. The host's loss has the
    embeddings' dtype. A batch without a positive pair has the host's 0, in the embeddings' dtype.
    Gradients have the embeddings' dtype.

    It works inside the host's ``SelfSupervisedLoss``, ``CrossBatchMemory`` and
    ``DistributedLossWrapper``. It accepts their list of all pairs as ``indices_tuple``. With the
    default reducer, memory is N + M embeddings. Other reducers get a loss for each pair of equal
    labels, and memory grows with these pairs. The wrappers' lists come on top.

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
        super().__init__(temperature, alpha, backend, **kwargs)

    def _found(
        self,
        query: Tensor,
        target: Tensor,
        pairs: LabelPairs,
        listed: tuple[Tensor, Tensor] | None,
    ) -> LossDict | None:
        whole = listed is None or pairs.leave_out_rest(*listed)
        if whole and type(self.reducer) is MeanReducer:
            if not pairs.any_positive():
                return None
            found = self._losses(query, target, pairs, "pair")
            mean = (found.losses * found.counts).sum() / found.counts.sum()
            return {"loss": {"losses": mean, "indices": None, "reduction_type": "already_reduced"}}
        anchor, positive = pairs.positives() if listed is None else listed
        if not len(anchor):
            return None
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
        positive_logit = similarities(query, target, anchor, positive) / self.temperature
        losses = direction_loss(positive_logit, logits.query[anchor])
        indices = (anchor, positive)
        return {"loss": {"losses": losses, "indices": indices, "reduction_type": "pos_pair"}}
