"""The loss of an (N, M) matrix of similarities, for hosts that hand over nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llave_kernels import checks, functional
from llave_kernels.integrations.target_blocks import block_owners
from llave_kernels.reference import similarity_loss
from llave_kernels.rules import HARDNESS_MODES


def scores_loss(
    scores: Tensor,
    *,
    logit_scale: float | Tensor,
    alpha: float = 9.0,
    hardness: str = "in_batch",
    symmetric: bool = True,
    target_alpha: float | None = None,
    labels: Tensor | None = None,
    owners: Tensor | None = None,
    query_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    false_negative_margin: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``hardness_weighted_contrastive_loss`` of similarities that are already computed.

    Plain dense PyTorch: the matrix is there, so there is nothing to fuse, and several of its size
    are made. It keeps the precision of the positive's logit outside the log-sum-exp. Where the
    embeddings are at hand, call ``hardness_weighted_contrastive_loss``.

    Args:
        scores: (N, M) similarities *before* the scale, ``s_ij``: cosines for unit-length
            embeddings. Divide a host's logits by its scale first: the hardness weight and the
            margin act on similarities. float32, bfloat16, float16 or float64; half precision is
            computed in float32.
        logit_scale: kappa = 1 / temperature, a positive float or a tensor of one element. No
            default: it depends on what the host has done.
        alpha, hardness, symmetric, target_alpha, labels, owners, query_ids, target_ids,
        false_negative_margin, reduction: as in ``hardness_weighted_contrastive_loss``, columns of
            ``scores`` being the targets. By default row i's positive is column i.

    Returns:
        0-d tensor, or (N,) with ``reduction="none"``. float32, or float64 for float64 scores.

    Raises:
        TypeError, ValueError: as in ``hardness_weighted_contrastive_loss``.

    Example:
        >>> scores = query @ target.T
        >>> loss = scores_loss(scores, logit_scale=50.0, alpha=9.0)
    """
    checks.tensor("scores", scores)
    if scores.dim() != 2:
        raise ValueError(f"scores must have shape (N, M), got {tuple(scores.shape)}")
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    n_targets = scores.shape[1]
    shape_of_targets = scores.new_empty(()).expand(n_targets, n_targets)
    scale, rules = functional.resolve(
        scores, shape_of_targets, logit_scale, alpha, hardness, symmetric, target_alpha, labels,
        owners, query_ids, target_ids, false_negative_margin,
    )  # fmt: skip
    return similarity_loss(
        scores.to(torch.promote_types(scores.dtype, torch.float32)),
        logit_scale=scale,
        alpha=rules.alpha,
        hardness=rules.hardness,
        symmetric=rules.symmetric,
        target_alpha=rules.target_alpha,
        labels=rules.labels,
        owners=rules.owners,
        query_ids=rules.query_ids,
        target_ids=rules.target_ids,
        false_negative_margin=rules.margin,
        reduction=reduction,
    )


class CrossEntropyLoss(nn.Module):
    """In place of the ``torch.nn.CrossEntropyLoss()`` a host applies to its logits and targets.

    tevatron's, VLM2Vec's and FlagEmbedding's models hold one as ``cross_entropy``. At ``alpha=0``
    value and gradient are its. Else ``scores_loss`` with what those hosts leave to be inferred:
    their targets are a query's positive and then its mined negatives, query after query, and they
    train the query -> target direction.

    Args:
        temperature: what the host has divided its similarities by.
        alpha: hardness strength (LLaVE: 9). Default 0: the host's loss.
        hardness, false_negative_margin: as in ``hardness_weighted_contrastive_loss``.

    Raises:
        TypeError, ValueError: as in ``hardness_weighted_contrastive_loss``.

    Example:
        >>> model.cross_entropy = CrossEntropyLoss(temperature=model.temperature, alpha=9.0)
    """

    def __init__(
        self,
        temperature: float,
        alpha: float = 0.0,
        *,
        hardness: str = "in_batch",
        false_negative_margin: float | None = None,
    ) -> None:
        super().__init__()
        self.temperature = checks.positive("temperature", temperature)
        self.alpha = checks.strength("alpha", alpha)
        checks.one_of("hardness", hardness, HARDNESS_MODES)
        self.hardness = hardness
        self.false_negative_margin = checks.margin(false_negative_margin)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean loss of (N, M) logits, given each row's positive column (N,); 0-d.

        Columns are in N blocks of M / N, a query's own in its positive's block; where N does not
        divide M, every column but the positive is in-batch. Rows that all have the same positive
        column hold candidates of their own, each with mined negatives only.
        """
        checks.tensor("logits", logits)
        if logits.dim() != 2:
            raise ValueError(f"logits must have shape (N, M), got {tuple(logits.shape)}")
        n, m = logits.shape
        labels = checks.columns("target", target, n, m, logits.device)
        # A look at the values, as a condition, would make the host wait for a GPU.
        alike = (labels == labels[0]).all()
        owners = torch.where(alike, labels[0], block_owners(labels, m))
        return scores_loss(
            logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.temperature,
            logit_scale=1 / self.temperature,
            alpha=self.alpha,
            hardness=self.hardness,
            symmetric=False,
            labels=labels,
            owners=owners,
            false_negative_margin=self.false_negative_margin,
        )
