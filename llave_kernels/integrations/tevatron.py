"""The losses of tevatron, ``retriever/gc_trainer.py``, fused and hardness-weighted.

tevatron's trainer computes them with ``--grad_cache`` only. Without it the models compute the loss
from scores: ``llave_kernels.scores.CrossEntropyLoss`` takes the place of their ``cross_entropy``.
"""

from __future__ import annotations

from typing_extensions import Unpack

from llave_kernels.integrations.gradcache import BlockLoss, BlockSettings, DistributedBlockLoss


class SimpleContrastiveLoss(BlockLoss):
    """tevatron's ``SimpleContrastiveLoss`` without the N x M logits.

    Args:
        temperature: 1 / logit scale. Default 1: the host has none, and its ``--temperature`` does
            not reach its loss.
        settings: ``gradcache.BlockSettings``. ``gradcache.BlockLoss`` states the call.

    Raises:
        TypeError, ValueError: as in ``gradcache.BlockLoss``.

    Example:
        >>> loss_fn = SimpleContrastiveLoss(temperature=0.02, alpha=9.0)
        >>> x, y = (normalize(torch.randn(n, 16), dim=1) for n in (4, 12))
        >>> loss = loss_fn(x, y)  # query i's positive is row 3 i, its mined negatives follow
    """

    def __init__(self, *, temperature: float = 1.0, **settings: Unpack[BlockSettings]) -> None:
        super().__init__(temperature, **settings)


class DistributedContrastiveLoss(DistributedBlockLoss):
    """tevatron's ``DistributedContrastiveLoss``: all processes' rows, times the world size.

    Args:
        n_target: no effect, as in the host: the shapes say how many targets a query has.
        scale_loss, settings: as in ``gradcache.DistributedBlockLoss``, which states the call.
        temperature: as in ``SimpleContrastiveLoss``.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        TypeError, ValueError: as in ``gradcache.BlockLoss``.
    """

    def __init__(
        self,
        n_target: int = 0,
        scale_loss: bool = True,
        *,
        temperature: float = 1.0,
        **settings: Unpack[BlockSettings],
    ) -> None:
        super().__init__(temperature, scale_loss, **settings)
