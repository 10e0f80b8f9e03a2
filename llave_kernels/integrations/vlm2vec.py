"""The losses of VLM2Vec, ``src/loss.py``, fused and hardness-weighted.

VLM2Vec's trainer computes them with several processes only. In one process the model computes the
loss from scores: ``llave_kernels.scores.CrossEntropyLoss`` takes the place of its
``cross_entropy``.
"""

from __future__ import annotations

from typing_extensions import Unpack

from llave_kernels.integrations.gradcache import BlockLoss, BlockSettings, DistributedBlockLoss


class SimpleContrastiveLoss(BlockLoss):
    """VLM2Vec's ``SimpleContrastiveLoss`` without the N x M logits.

    Args:
        temperature: 1 / logit scale. Default 0.02, as in the host.
        settings: ``gradcache.BlockSettings``. ``gradcache.BlockLoss`` states the call.

    Raises:
        TypeError, ValueError: as in ``gradcache.BlockLoss``.

    Example:
        >>> loss_fn = SimpleContrastiveLoss(temperature=0.02, alpha=9.0)
        >>> x, y = (normalize(torch.randn(n, 16), dim=1) for n in (4, 12))
        >>> loss = loss_fn(x, y)  # query i's positive is row 3 i, its mined negatives follow
    """

    def __init__(self, temperature: float = 0.02, **settings: Unpack[BlockSettings]) -> None:
        super().__init__(temperature, **settings)


class DistributedContrastiveLoss(DistributedBlockLoss):
    """VLM2Vec's ``DistributedContrastiveLoss``: all processes' rows, times the world size.

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
        temperature: float = 0.02,
        **settings: Unpack[BlockSettings],
    ) -> None:
        super().__init__(temperature, scale_loss, **settings)
