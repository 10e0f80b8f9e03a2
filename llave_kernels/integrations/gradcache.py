"""The losses of GradCache, ``grad_cache/loss.py``, fused and hardness-weighted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from llave_kernels import checks
from llave_kernels.integrations.target_blocks import BlockLoss, DistributedBlockLoss


class _CountedNegatives(BlockLoss):
    """Targets in blocks of the width that the constructor tells."""

    target_per_qry: int

    def _count(self, n_hard_negatives: int) -> None:
        remedy = "; a temperature is passed by name"
        self.target_per_qry = (
            checks.count("n_hard_negatives", n_hard_negatives, 0, remedy=remedy) + 1
        )

    def blocks(self, x: Tensor, y: Tensor, target: Tensor | None) -> dict[str, Any]:
        expected = len(x) * self.target_per_qry
        if target is None and len(y) != expected:
            raise ValueError(
                f"y has {len(y)} rows for {len(x)} queries, expected {expected} with "
                f"n_hard_negatives={self.target_per_qry - 1}"
            )
        return super().blocks(x, y, target)


class SimpleContrastiveLoss(_CountedNegatives):
    """GradCache's ``SimpleContrastiveLoss`` without the N x M logits.

    Args:
        n_hard_negatives: mined negatives after each query's positive in ``y``.
        temperature: 1 / logit scale. Default 1: the host has none.
        alpha: hardness strength (LLaVE: 9). Default 0: the host's loss.
        settings: as in ``target_blocks.BlockLoss``, which also tells the call.

    Raises:
        ValueError: as in ``BlockLoss``; in the call without ``target``, where ``y`` does not hold
            ``n_hard_negatives + 1`` rows for each query.

    Example:
        >>> loss_fn = SimpleContrastiveLoss(2, temperature=0.02, alpha=9.0)
        >>> x, y = (normalize(torch.randn(n, 16), dim=1) for n in (4, 12))
        >>> loss = loss_fn(x, y)  # query i's positive is row 3 i, its mined negatives follow
    """

    def __init__(
        self,
        n_hard_negatives: int = 0,
        *,
        temperature: float = 1.0,
        alpha: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(temperature, alpha, **settings)
        self._count(n_hard_negatives)


class DistributedContrastiveLoss(_CountedNegatives, DistributedBlockLoss):
    """GradCache's ``DistributedContrastiveLoss``: all processes' rows, not times the world size.

    Args:
        n_hard_negatives, temperature, alpha, settings: as in ``SimpleContrastiveLoss``;
            ``target_blocks.DistributedBlockLoss`` tells the call.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: as in ``SimpleContrastiveLoss``.
    """

    def __init__(
        self,
        n_hard_negatives: int = 0,
        *,
        temperature: float = 1.0,
        alpha: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(False, temperature, alpha, **settings)
        self._count(n_hard_negatives)


class ContrastiveLossWithQueryClosure(SimpleContrastiveLoss):
    """GradCache's class of that name: ``SimpleContrastiveLoss`` that can compute queries itself.

    Example:
        >>> loss = ContrastiveLossWithQueryClosure()(y, query_closure=lambda: encoder(texts))
    """

    def __call__(  # type: ignore[override]
        self,
        *reps: Tensor,
        query_closure: Callable[[], Tensor] | None = None,
        target: Tensor | None = None,
        reduction: str = "mean",
        **ids: Tensor | None,
    ) -> Tensor:
        """Loss of queries and targets, or of targets alone and a ``query_closure``."""
        if len(reps) != (2 if query_closure is None else 1):
            raise ValueError(
                f"expected queries and targets, or targets and query_closure, got {len(reps)} "
                f"tensors {'without' if query_closure is None else 'and a'} query_closure"
            )
        x = reps[0] if query_closure is None else query_closure()
        return super().__call__(x, reps[-1], target, reduction, **ids)
