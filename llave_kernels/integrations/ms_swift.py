"""ms-swift's InfoNCE loss of embedding models, fused and hardness-weighted."""

from __future__ import annotations

import os
from typing import Any

import torch
from swift.loss import embedding
from swift.sequence_parallel import sequence_parallel
from swift.utils import get_dist_setting
from torch import Tensor

from llave_kernels import checks, dispatch
from llave_kernels.distributed import distributed_contrastive_loss
from llave_kernels.functional import hardness_weighted_contrastive_loss


class InfonceLoss(embedding.InfonceLoss):  # type: ignore[misc]
    """ms-swift's ``InfonceLoss`` without the N x M similarities, for its ``loss_map``.

    The host's environment variables have the host's effect: ``INFONCE_TEMPERATURE``,
    ``INFONCE_USE_BATCH``, ``INFONCE_HARD_NEGATIVES``, ``INFONCE_MASK_FAKE_NEGATIVE``,
    ``INFONCE_FAKE_NEG_MARGIN``, ``INFONCE_INCLUDE_QQ``, ``INFONCE_INCLUDE_DD``. At ``alpha=0``
    value and gradients are the host's. With several processes so are the gradients that DDP
    averages, and the average of the values. Their numbers of rows may differ.

    With ``INFONCE_MASK_FAKE_NEGATIVE`` or ``INFONCE_INCLUDE_DD`` the host treats mined negatives as
    in-batch ones, so the weight applies to them, too. With ``INFONCE_USE_BATCH=False`` there are no
    in-batch negatives, and the host's own code computes the loss.

    Args:
        args, trainer: the host's.
        alpha: hardness strength of the in-batch negatives (LLaVE: 9). Default 0: the host's loss.
        backend: as in ``llave_kernels.hardness_weighted_contrastive_loss``.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value. In the call:
            ``INFONCE_INCLUDE_DD`` with ``INFONCE_MASK_FAKE_NEGATIVE``, Megatron or sequence
            parallelism, which are not supported.

    Example:
        >>> loss_map["infonce"] = partial(InfonceLoss, alpha=9.0)
    """

    def __init__(
        self, args: Any, trainer: Any, *, alpha: float = 0.0, backend: str = "auto"
    ) -> None:
        super().__init__(args, trainer)
        self.alpha = checks.strength("alpha", alpha)
        self.backend = dispatch.known(backend)

    def __call__(self, outputs: dict[str, Tensor], labels: Tensor, **kwargs: Any) -> Tensor:
        """Mean loss (0-d) of ``outputs["last_hidden_state"]`` (rows, D), unit length.

        Each sample has a query, its positive and its mined negatives, in this order. ``labels`` has
        a 1 for each positive and a 0 for each negative.
        """
        if not _flag("INFONCE_USE_BATCH", True):
            return super().__call__(outputs, labels, **kwargs)
        masks = _flag("INFONCE_MASK_FAKE_NEGATIVE", False)
        sides = {"query": "INFONCE_INCLUDE_QQ", "target": "INFONCE_INCLUDE_DD"}
        within = [side for side, name in sides.items() if _flag(name, False)]
        self._refuse_unsupported(masks, within)
        kept = os.environ.get("INFONCE_HARD_NEGATIVES")
        samples = embedding._parse_multi_negative_sentences(
            outputs["last_hidden_state"], labels, None if kept is None else int(kept)
        )
        query = torch.stack([sample[0] for sample in samples])
        target = torch.cat([sample[1:] for sample in samples])
        widths = torch.tensor([len(sample) - 1 for sample in samples], device=query.device)
        positives = widths.cumsum(0) - widths
        # A row's own negatives would escape the margin, and not be compared with its positive.
        alike = masks or "target" in within
        margin = float(os.environ.get("INFONCE_FAKE_NEG_MARGIN", "0.1"))
        many = get_dist_setting()[2] > 1
        loss_fn = distributed_contrastive_loss if many else hardness_weighted_contrastive_loss
        return loss_fn(
            query,
            target,
            logit_scale=1 / float(os.environ.get("INFONCE_TEMPERATURE", "0.1")),
            alpha=self.alpha,
            symmetric=False,
            labels=positives,
            within=within,
            owners=range(len(target)) if alike else positives.repeat_interleave(widths),
            false_negative_margin=margin if masks else None,
            backend=self.backend,
        )

    def _refuse_unsupported(self, masks: bool, within: list[str]) -> None:
        if masks and "target" in within:
            raise ValueError(
                "INFONCE_INCLUDE_DD is not supported with INFONCE_MASK_FAKE_NEGATIVE, because the "
                "host masks no pair of documents; unset one of them"
            )
        if self.is_megatron or getattr(sequence_parallel, "dp_group", None) is not None:
            raise ValueError(
                "Megatron and sequence parallelism are not supported; train with DDP, FSDP or "
                "DeepSpeed, or use ms-swift's InfonceLoss"
            )


def _flag(name: str, default: bool) -> bool:
    return bool(embedding.strtobool(os.environ.get(name, str(default))))
