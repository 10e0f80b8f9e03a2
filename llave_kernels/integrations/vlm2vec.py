"""The losses of VLM2Vec, ``src/loss.py``, fused and hardness-weighted.

Its trainer computes them with several processes only. In one, its model computes its own from
scores: ``scores.CrossEntropyLoss`` takes the place of its ``cross_entropy``.
"""

from __future__ import annotations

from typing import Any

from llave_kernels.integrations.target_blocks import BlockLoss, DistributedBlockLoss


class SimpleContrastiveLoss(BlockLoss):
    """VLM2Vec's ``SimpleContrastiveLoss`` without the N x M logits.

    Args:
        temperature: 1 / logit scale. Default 0.02, as there.
        alpha: hardness strength (LLaVE: 9). Default 0: the host's loss.
        settings: as in ``target_blocks.BlockLoss``, which also tells the call.

    Example:
        >>> loss_fn = SimpleContrastiveLoss(temperature=0.02, alpha=9.0)
        >>> x, y = (normalize(torch.randn(n, 16), dim=1) for n in (4, 12))
        >>> loss = loss_fn(x, y)  # query i's positive is row 3 i, its mined negatives follow
    """

    def __init__(self, temperature: float = 0.02, *, alpha: float = 0.0, **settings: Any) -> None:
        super().__init__(temperature, alpha, **settings)


class DistributedContrastiveLoss(DistributedBlockLoss):
    """VLM2Vec's ``DistributedContrastiveLoss``: all processes' rows, times the world size.

    Args:
        n_target: no effect, as there: the shapes tell how many targets a query has.
        scale_loss, temperature, alpha, settings: as in ``target_blocks.DistributedBlockLoss``,
            which also tells the call. Default temperature 0.02, as there.

    Raises:
        RuntimeError: torch.distributed is not initialised.
    """

    def __init__(
        self,
        n_target: int = 0,
        scale_loss: bool = True,
        temperature: float = 0.02,
        *,
        alpha: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(scale_loss, temperature, alpha, **settings)
