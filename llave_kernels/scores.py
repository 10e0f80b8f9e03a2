"""The loss of an (N, M) matrix of similarities, for trainers that hand over nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from llave_kernels import checks, functional
from llave_kernels.reference import similarity_loss
from llave_kernels.rules import HARDNESS_MODES, RuleArguments, block_owners


@functional.shows_rules
def scores_loss(
    scores: Tensor,
    *,
    logit_scale: float | Tensor,
    reduction: str = "mean",
    **rules: Unpack[RuleArguments],
) -> Tensor:
    """``hardness_weighted_contrastive_loss`` of similarities that are already computed.

    This is dense PyTorch and makes several matrices of the scores' size. Where the embeddings are
    at hand, call ``hardness_weighted_contrastive_loss``. Small losses keep their precision, as
    there.

    Args:
        scores: (N, M) similarities *before* the scale, ``s_ij``: cosines for unit-length
            embeddings. The hardness weight and the margin act on similarities, so divide a
            trainer's logits by its scale first. float32, bfloat16, float16 or float64. Half
            precision is computed in float32.
        logit_scale: kappa = 1 / temperature, a positive float or a tensor of one element. There is
            no default: it depends on what the trainer has done.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (a loss per row).
        rules: as in ``hardness_weighted_contrastive_loss``, where the columns of ``scores`` are the
            targets. By default row i's positive is column i.

    Returns:
        0-d tensor, or (N,) with ``reduction="none"``. float32, or float64 for float64 scores.

    Raises:
        TypeError, ValueError: as in ``hardness_weighted_contrastive_loss``.

    Example:
        >>> scores = query @ target.T
        >>> loss = scores_loss(scores, logit_scale=50.0, alpha=9.0)
    """
    _check_matrix("scores", scores)
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    m = scores.shape[1]
    shape_of_targets = scores.new_empty(()).expand(m, m)
    scale, resolved = functional.resolve(scores, shape_of_targets, logit_scale, **rules)
    at_least_float32 = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return similarity_loss(
        at_least_float32, logit_scale=scale, reduction=reduction, **resolved.arguments()
    )


class CrossEntropyLoss(nn.Module):
    """Takes the place of the ``torch.nn.CrossEntropyLoss()`` that a model applies to its logits.

    The models of tevatron, VLM2Vec and FlagEmbedding hold one as ``cross_entropy``. At ``alpha=0``
    value and gradient are its. Otherwise this is ``scores_loss`` in the query -> target direction.
    The targets are a query's positive and then its mined negatives, query after query.

    Args:
        temperature: what the trainer has divided its similarities by.
        alpha: hardness strength (LLaVE: 9). Default 0: cross-entropy.
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

        Columns are in N blocks of M / N. A query's own columns are the block of its positive. Where
        N does not divide M, every column but the positive is in-batch. Rows that all have the same
        positive column hold candidates of their own, each with mined negatives only.
        """
        _check_matrix("logits", logits)
        n, m = logits.shape
        labels = checks.columns("target", target, n, m, logits.device)
        # torch.where and not an if: the host would wait for a GPU to read the values.
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


def _check_matrix(name: str, value: Tensor) -> None:
    checks.tensor(name, value)
    if value.dim() != 2:
        raise ValueError(f"{name} must have shape (N, M), got {tuple(value.shape)}")
