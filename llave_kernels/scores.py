"""The loss from an (N, M) similarity matrix, for trainers that pass nothing else."""

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

    This is dense PyTorch and makes several matrices of the scores' size. If you have the
    embeddings, call ``hardness_weighted_contrastive_loss``. Small losses keep their precision in
    both.

    Args:
        scores: (N, M) similarities ``s_ij`` *before* the scale. They are cosines for unit-length
            embeddings. The hardness weight and the margin act on similarities, so divide a
            trainer's logits by its scale first. float32, bfloat16, float16 or float64. Half
            precision is computed in float32.
        logit_scale: kappa = 1 / temperature, a positive float or a tensor of one element. It has no
            default, because it depends on the trainer.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (a loss per row).
        rules: as in ``hardness_weighted_contrastive_loss``. The targets are the columns of
            ``scores``. By default row i's positive is column i.

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
        at_least_float32, logit_scale=scale, reduction=reduction, **resolved.arguments(m)
    )


class CrossEntropyLoss(nn.Module):
    """Replaces the ``torch.nn.CrossEntropyLoss()`` that a model applies to its logits.

    The models of tevatron, VLM2Vec and FlagEmbedding hold it as ``cross_entropy``. At ``alpha=0``,
    value and gradient equal those of cross-entropy. Otherwise this is ``scores_loss`` in the query
    -> target direction. The targets are grouped by query. The positive comes first, then the mined
    negatives.

    Args:
        temperature: the number by which the trainer has divided its similarities.
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
        """Mean loss (0-d) of logits (N, M), given each row's positive column (N,).

        The columns form N blocks of M / N. A query owns the block that holds its positive. If N
        does not divide M, every column but the positive is an in-batch negative. If all rows have
        the same positive column, each row has candidates of its own. All its negatives are then
        mined.
        """
        _check_matrix("logits", logits)
        n, m = logits.shape
        labels = checks.columns("target", target, n, m, logits.device)
        # torch.where, because an if would make the host wait for the GPU.
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
