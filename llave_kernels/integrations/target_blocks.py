"""Queries against targets in blocks: GradCache's contrastive losses, and what grew out of them.

The hosts share one call, ``loss_fn(x, y, target=None, reduction="mean")``, and one way to gather:
each process computes the loss of everyone's rows and keeps the gradient of its own. They differ in
their constructors, and in what their ``DistributedContrastiveLoss`` does with the world size W,
where DDP's average of the gradients leaves 1 / W of the global batch's:

| host | temperature | times W |
|---|---|---|
| ``gradcache``: ``grad_cache/loss.py`` | none: 1 | never |
| ``tevatron``: ``retriever/gc_trainer.py`` | none: 1 | unless ``scale_loss=False`` |
| ``vlm2vec``: ``src/loss.py`` | 0.02 | unless ``scale_loss=False`` |
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llave_kernels import checks, dispatch, functional
from llave_kernels.distributed import loss_over
from llave_kernels.rules import HARDNESS_MODES


class BlockLoss:
    """A host's ``SimpleContrastiveLoss`` without the N x M logits.

    At ``alpha=0`` value and gradients are the host's: cross-entropy of ``x @ y.T / temperature``,
    in the query -> target direction (InfoNCE). Embeddings are not normalised.

    Args:
        temperature: 1 / logit scale, positive.
        alpha: hardness strength (LLaVE: 9). 0: the host's loss.
        symmetric: also compute the target -> query direction, and average. Default False, as there.
        hardness, target_alpha, false_negative_margin, backend: as in
            ``llave_kernels.hardness_weighted_contrastive_loss``.

    Raises:
        TypeError, ValueError: as in ``hardness_weighted_contrastive_loss``.
    """

    def __init__(
        self,
        temperature: float,
        alpha: float,
        *,
        symmetric: bool = False,
        hardness: str = "in_batch",
        target_alpha: float | None = None,
        false_negative_margin: float | None = None,
        backend: str = "auto",
    ) -> None:
        if target_alpha is not None:
            target_alpha = checks.strength("target_alpha", target_alpha)
        checks.one_of("hardness", hardness, HARDNESS_MODES)
        self.settings: dict[str, Any] = {
            "logit_scale": 1.0 / checks.positive("temperature", temperature),
            "alpha": checks.strength("alpha", alpha),
            "symmetric": checks.flag("symmetric", symmetric),
            "hardness": hardness,
            "target_alpha": target_alpha,
            "false_negative_margin": checks.margin(false_negative_margin),
            "backend": dispatch.known(backend),
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
                of M // N rows, a query's positive and then its mined negatives; rows left over are
                negatives of all. Blocks are a query's own with ``target`` too, where N divides M.
            reduction: ``"mean"``, ``"sum"`` or ``"none"`` (N,).
            query_ids, target_ids: (N,), (M,) int64 ids; a negative with its query's id is left out.
        """
        rules = self.blocks(x, y, target) | {"query_ids": query_ids, "target_ids": target_ids}
        return functional.hardness_weighted_contrastive_loss(
            x, y, reduction=reduction, **rules, **self.settings
        )

    def blocks(self, x: Tensor, y: Tensor, target: Tensor | None) -> dict[str, Any]:
        """``labels`` and ``owners`` of targets in blocks, None for their defaults."""
        checks.embeddings(*functional.autocast(x, y))
        n, m = len(x), len(y)
        if m == n:
            return {"labels": target, "owners": None}
        if m < n and target is None:
            raise ValueError(f"y has {m} rows for {n} queries, and each needs one; pass target")
        if target is None:
            whole = m - m % n
            labels = torch.arange(0, whole, whole // n, device=x.device)
            left_over = torch.arange(whole, m, device=x.device)
            owners = torch.cat([block_owners(labels, whole), left_over])
            return {"labels": labels, "owners": owners}
        labels = checks.columns("target", target, n, m, x.device)
        return {"labels": labels, "owners": block_owners(labels, m)}


def block_owners(labels: Tensor, m: int) -> Tensor:
    """(M,) owners of M columns in N blocks, given each row's positive (N,), wherever it stands.

    Where N does not divide M there are no blocks: every column is its own.
    """
    n, columns = len(labels), torch.arange(m, device=labels.device)
    if m % n:
        return columns
    width = m // n
    owners = columns[::width].index_put((labels // width,), labels)
    # A second positive in a block is its own.
    return owners.repeat_interleave(width).index_put((labels,), labels)


class DistributedBlockLoss(BlockLoss):
    """A host's ``DistributedContrastiveLoss``: the loss over all processes' rows.

    At ``alpha=0`` value and gradients are the host's in every process: the global loss, times the
    world size with ``scale_loss``, and the gradient of this process's rows. With ``scale_loss``
    DDP averages them to exactly the global batch's. The hosts compute the whole N x M loss in every
    process; here each computes its own rows of it, and targets alone are gathered
    (``llave_kernels.distributed``).

    Args:
        scale_loss: multiply by the world size. False leaves 1 / world size of the gradient.
        temperature, alpha, settings: as in ``BlockLoss``.

    Raises:
        RuntimeError: torch.distributed is not initialised.
    """

    def __init__(self, scale_loss: bool, temperature: float, alpha: float, **settings: Any) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialised: call torch.distributed.init_process_group, "
                "or use SimpleContrastiveLoss in a single process"
            )
        super().__init__(temperature, alpha, **settings)
        self.scale_loss = checks.flag("scale_loss", scale_loss)

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

        def arguments() -> dict[str, Any]:
            if target is not None:
                raise ValueError(
                    f"target must be None, got {checks.typed(target)}: it would count over the "
                    "rows of all processes; let each query's positive come first in its block"
                )
            checks.one_of("reduction", reduction, ("mean", "sum"))
            pair = {"query": x, "target": y, "reduction": reduction}
            return pair | self.blocks(x, y, None) | ids | self.settings

        settings = {"the loss": type(self).__name__, "scale_loss": self.scale_loss}
        own = loss_over(None, arguments, settings)
        total = own.detach().clone()
        dist.all_reduce(total)
        world = dist.get_world_size()
        # A mean's own part already carries the world size, and the parts sum to that many means.
        factor = (world if self.scale_loss else 1) / (world if reduction == "mean" else 1)
        return factor * (own + (total - own.detach()))
