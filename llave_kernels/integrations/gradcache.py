"""The contrastive losses of GradCache, VLM2Vec and tevatron, fused and hardness-weighted.

The three share one call, ``loss_fn(x, y, target=None, reduction="mean")``, and one way to gather:
each process computes the loss of everyone's rows and keeps the gradient of its own. They differ in
what their ``DistributedContrastiveLoss`` does with the world size W, where DDP's average of the
gradients leaves 1 / W of the global batch's:

| host | temperature | times W | here |
|---|---|---|---|
| GradCache, ``grad_cache/loss.py`` | none (1) | never | ``UnscaledDistributedContrastiveLoss`` |
| VLM2Vec, ``src/loss.py`` | 0.02 | unless ``scale_loss=False`` | ``DistributedContrastiveLoss`` |
| tevatron, ``retriever/gc_trainer.py`` | none (1) | unless ``scale_loss=False`` | the same |

Their models without gradient caching, in VLM2Vec and tevatron, multiply by W too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llave_kernels import checks, functional
from llave_kernels.distributed import distributed_contrastive_loss


class ContrastiveLoss:
    """``SimpleContrastiveLoss`` of the three hosts without the N x M logits.

    At ``alpha=0`` value and gradients are theirs: cross-entropy of ``x @ y.T / temperature``, in
    the query -> target direction (InfoNCE). Embeddings are not normalised.

    Args:
        temperature: 1 / logit scale, positive. Default 0.02 as in VLM2Vec; GradCache and tevatron
            have none: pass 1.
        alpha: hardness strength (LLaVE: 9). Default 0: the hosts' loss.
        symmetric: also compute the target -> query direction, and average. Default False, as there.
        hardness, target_alpha, false_negative_margin, backend: as in
            ``llave_kernels.hardness_weighted_contrastive_loss``.

    Raises:
        TypeError, ValueError: as in ``hardness_weighted_contrastive_loss``.

    Example:
        >>> loss_fn = ContrastiveLoss(temperature=0.02, alpha=9.0)
        >>> x, y = (normalize(torch.randn(n, 16), dim=1) for n in (4, 12))
        >>> loss = loss_fn(x, y)  # query i's positive is row 3 i, its mined negatives follow
    """

    def __init__(
        self,
        temperature: float = 0.02,
        alpha: float = 0.0,
        *,
        symmetric: bool = False,
        hardness: str = "in_batch",
        target_alpha: float | None = None,
        false_negative_margin: float | None = None,
        backend: str = "auto",
    ) -> None:
        checks.positive("temperature", temperature)
        self.settings: dict[str, Any] = {
            "logit_scale": 1.0 / temperature,
            "alpha": alpha,
            "symmetric": symmetric,
            "hardness": hardness,
            "target_alpha": target_alpha,
            "false_negative_margin": false_negative_margin,
            "backend": backend,
        }

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        target: Tensor | None = None,
        reduction: str = "mean",
        *,
        query_ids: Tensor | None = None,
        target_ids: Tensor | None = None,
    ) -> Tensor:
        """Loss of queries ``x`` (N, D) against targets ``y`` (M, D).

        Args:
            target: (N,) row of ``y`` that is each query's positive. Default: ``y`` holds N blocks
                of M / N rows, a query's positive and then its mined negatives. Blocks are a query's
                own with ``target`` too, where N divides M.
            reduction: ``"mean"``, ``"sum"`` or ``"none"`` (N,).
            query_ids, target_ids: (N,), (M,) int64 ids; a negative with its query's id is left out.
        """
        rules = _blocks(x, y, target) | {"query_ids": query_ids, "target_ids": target_ids}
        return functional.hardness_weighted_contrastive_loss(
            x, y, reduction=reduction, **rules, **self.settings
        )


class DistributedContrastiveLoss(ContrastiveLoss):
    """``DistributedContrastiveLoss`` of VLM2Vec and tevatron: the loss over all processes' rows.

    At ``alpha=0`` value and gradients are theirs in every process: the global loss, times the world
    size with ``scale_loss``, and the gradient of this process's rows, which DDP then averages to
    exactly the global batch's. They compute the whole N x M loss in every process; here each
    computes its own rows of it, and targets alone are gathered (``llave_kernels.distributed``).

    Args:
        n_target: no effect, as there: the shapes tell how many targets a query has.
        scale_loss: multiply by the world size. False leaves 1 / world size of the gradient.
        temperature, alpha, settings: as in ``ContrastiveLoss``. tevatron has no temperature: 1.

    Raises:
        RuntimeError: torch.distributed is not initialised.

    Example:
        >>> loss_fn = DistributedContrastiveLoss(temperature=0.02, alpha=9.0)
        >>> loss = loss_fn(x, y)  # this process's rows
    """

    def __init__(
        self,
        n_target: int = 0,
        scale_loss: bool = True,
        temperature: float = 0.02,
        alpha: float = 0.0,
        **settings: Any,
    ) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialised: call torch.distributed.init_process_group, "
                "or use ContrastiveLoss in a single process"
            )
        super().__init__(temperature, alpha, **settings)
        checks.flag("scale_loss", scale_loss)
        self.scale_loss = scale_loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        target: Tensor | None = None,
        reduction: str = "mean",
        **ids: Tensor | None,
    ) -> Tensor:
        """Loss of all processes' rows, given this process's ``x`` (N, D), ``y`` (M, D) and ids.

        ValueError where ``target`` is given, or ``reduction="none"``: others hold its rows.
        """
        if target is not None:
            raise ValueError(
                f"target must be None, got a tensor of shape {tuple(target.shape)}: it would count "
                "over the rows of all processes; let each query's positive come first in its block"
            )
        checks.one_of("reduction", reduction, ("mean", "sum"))
        rules = _blocks(x, y, None) | ids
        own = distributed_contrastive_loss(x, y, reduction=reduction, **rules, **self.settings)
        total = own.detach().clone()
        dist.all_reduce(total)
        world = dist.get_world_size()
        # A mean's own part already carries the world size, and the parts sum to that many means.
        factor = (world if self.scale_loss else 1) / (world if reduction == "mean" else 1)
        return factor * (own + (total - own.detach()))


class UnscaledDistributedContrastiveLoss(DistributedContrastiveLoss):
    """GradCache's ``DistributedContrastiveLoss``: never multiplied by the world size.

    Args:
        n_hard_negatives: no effect: the shapes tell.
        temperature, alpha, settings: as in ``ContrastiveLoss``. Default temperature 1, as there.
    """

    def __init__(
        self,
        n_hard_negatives: int = 0,
        temperature: float = 1.0,
        alpha: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(n_hard_negatives, False, temperature, alpha, **settings)


def _blocks(x: Tensor, y: Tensor, target: Tensor | None) -> dict[str, Any]:
    """``labels`` and ``owners`` of targets in blocks, None for their defaults."""
    checks.embeddings(*functional.autocast(x, y))
    n, m = len(x), len(y)
    if m == n:
        return {"labels": target, "owners": None}
    if m % n and target is None:
        raise ValueError(f"y has {m} rows for {n} queries, which is not a multiple; pass target")
    width = 1 if m % n else m // n
    labels = torch.arange(0, m, width, device=x.device)
    owners = labels
    if target is not None:
        labels = checks.columns("target", target, n, m, x.device)
        owners = owners.index_put((labels // width,), labels)
    # A second positive in a block is its own.
    owners = owners.repeat_interleave(width).index_put((labels,), labels)
    return {"labels": labels, "owners": owners}
