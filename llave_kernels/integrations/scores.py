"""The loss of an (N, M) matrix of similarities, for hosts that hand over nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from llave_kernels import checks, functional
from llave_kernels.reference import similarity_loss


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
        logit_scale: kappa = 1 / temperature, a positive float or a 0-d tensor. No default: it
            depends on what the host has done.
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
