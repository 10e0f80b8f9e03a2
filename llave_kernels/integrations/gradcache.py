"""The losses of GradCache, ``grad_cache/loss.py``, fused and hardness-weighted.

tevatron and VLM2Vec took GradCache's losses over, so theirs derive from the classes here. They
share one call, ``loss_fn(x, y, target=None, reduction="mean")``, and one way to gather: each
process computes the loss of all rows and keeps the gradient of its own. They differ in their
constructors. They also differ in whether ``DistributedContrastiveLoss`` multiplies the loss by the
number of processes W. DDP averages gradients, which without the factor leaves 1 / W of the global
batch's.

| host | temperature | times W |
|---|---|---|
| GradCache: ``grad_cache/loss.py`` | none: 1 | never |
| tevatron: ``retriever/gc_trainer.py`` | none: 1 | unless ``scale_loss=False`` |
| VLM2Vec: ``src/loss.py`` | 0.02 | unless ``scale_loss=False`` |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Unpack

from llave_kernels import checks, dispatch
from llave_kernels.distributed import loss_over
from llave_kernels.functional import hardness_weighted_contrastive_loss
from llave_kernels.precision import autocast
from llave_kernels.rules import RuleSettings, RuleTensors, block_owners


class BlockSettings(RuleSettings, total=False):
    """What the losses of this family take by keyword, beside their hosts' arguments.

    ``alpha`` defaults to 0 and ``symmetric`` to False: the host's loss.

    Attributes:
        backend: as in ``llave_kernels.hardness_weighted_contrastive_loss``.
    """

    backend: str


class BlockLoss:
    """A ``SimpleContrastiveLoss`` of this family, without the N x M logits.

    At ``alpha=0`` value and gradients are the host's: cross-entropy of ``x @ y.T / temperature`` in
    the query -> target direction (InfoNCE). Embeddings are not normalised.

    Args:
        temperature: 1 / logit scale, positive.
        settings: ``BlockSettings``.

    Raises:
        TypeError, ValueError: an argument of the wrong name, type or value. In the call, as in
            ``hardness_weighted_contrastive_loss``.
    """

    def __init__(
        self, temperature: float, *, backend: str = "auto", **settings: Unpack[RuleSettings]
    ) -> None:
        self.logit_scale = 1.0 / checks.positive("temperature", temperature)
        held: RuleSettings = {"alpha": 0.0, "symmetric": False}
        held.update(settings)
        self.settings = checks.rule_settings(**held)
        self.backend = dispatch.known(backend)

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        target: Tensor | None = None,
        reduction: str = "mean",
        *,
        query_ids: Tensor | None = None,
        target_ids: Tensor | None = None,
        query_bias: Tensor | None = None,
        target_bias: Tensor | None = None,
    ) -> Tensor:
        """Loss of queries ``x`` (N, D) against targets ``y`` (M, D).

        Args:
            target: (N,) row of ``y`` that is each query's positive. By default ``y`` holds N blocks
                of M // N rows, a query's positive and then its mined negatives. Rows left over are
                negatives of all queries. Where N divides M, the block of a query's positive is the
                query's own also when ``target`` is given.
            reduction: ``"mean"``, ``"sum"`` or ``"none"`` (N,).
            query_ids, target_ids: (N,), (M,) int64. A negative with its query's id is left out.
            query_bias, target_bias: (N,), (M,). They are added to the logits (``RuleTensors``).
        """
        pairs = self.blocks(x, y, target)
        pairs.update({"query_ids": query_ids, "target_ids": target_ids})
        pairs.update({"query_bias": query_bias, "target_bias": target_bias})
        return hardness_weighted_contrastive_loss(
            x, y, logit_scale=self.logit_scale, reduction=reduction, backend=self.backend,
            **pairs, **self.settings,
        )  # fmt: skip

    def blocks(self, query: Tensor, target: Tensor, labels: Tensor | None) -> RuleTensors:
        """Labels and owners of targets in blocks, given each row's positive (N,) or None."""
        checks.embeddings(*autocast(query, target))
        n, m, device = len(query), len(target), query.device
        if labels is not None:
            labels = checks.columns("target", labels, n, m, device)
            return {"labels": labels, "owners": None if m == n else block_owners(labels, m)}
        if m == n:
            return {}
        if m < n:
            raise ValueError(f"y has {m} rows for {n} queries, and each needs one; pass target")
        whole = m - m % n
        labels = torch.arange(0, whole, whole // n, device=device)
        left_over = torch.arange(whole, m, device=device)
        return {"labels": labels, "owners": torch.cat([block_owners(labels, whole), left_over])}


class DistributedBlockLoss(BlockLoss):
    """A ``DistributedContrastiveLoss`` of this family: the loss over all processes' rows.

    At ``alpha=0`` value and gradients are the host's in every process: the global loss, times the
    world size with ``scale_loss``, and the gradient of this process's rows. With ``scale_loss``
    DDP averages them to exactly the global batch's. The hosts compute the whole N x M loss in every
    process. Here each process computes one block and gathers only what that needs
    (``llave_kernels.distributed``).

    Args:
        temperature: 1 / logit scale, positive.
        scale_loss: multiply by the world size. False leaves 1 / world size of the gradient.
        settings: ``BlockSettings``.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        TypeError, ValueError: as in ``BlockLoss``.
    """

    def __init__(
        self, temperature: float, scale_loss: bool, **settings: Unpack[BlockSettings]
    ) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialised: call torch.distributed.init_process_group, "
                "or use SimpleContrastiveLoss in a single process"
            )
        super().__init__(temperature, **settings)
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

        Raises:
            ValueError: ``target`` is given, or ``reduction="none"``: other processes hold the rows.
        """

        def arguments() -> dict[str, object]:
            if target is not None:
                raise ValueError(
                    f"target must be None, got {checks.typed(target)}: it would count over the "
                    "rows of all processes; let each query's positive come first in its block"
                )
            checks.one_of("reduction", reduction, ("mean", "sum"))
            return {
                "query": x,
                "target": y,
                "logit_scale": self.logit_scale,
                "reduction": reduction,
                "backend": self.backend,
                **self.blocks(x, y, None),
                **ids,
                **self.settings,
            }

        told = {"the loss": type(self).__name__, "scale_loss": self.scale_loss}
        own = loss_over(None, arguments, told)
        total = own.detach().clone()
        dist.all_reduce(total)
        world = dist.get_world_size()
        # A mean's own part already carries the world size, and the parts sum to that many means.
        factor = (world if self.scale_loss else 1) / (world if reduction == "mean" else 1)
        return factor * (own + (total - own.detach()))


class _CountedNegatives(BlockLoss):
    """Targets in blocks of the width that the constructor says."""

    target_per_qry: int

    def _count(self, n_hard_negatives: int) -> None:
        remedy = "; a temperature is passed by name"
        negatives = checks.count("n_hard_negatives", n_hard_negatives, 0, remedy=remedy)
        self.target_per_qry = negatives + 1

    def blocks(self, query: Tensor, target: Tensor, labels: Tensor | None) -> RuleTensors:
        expected = len(query) * self.target_per_qry
        if labels is None and len(target) != expected:
            raise ValueError(
                f"y has {len(target)} rows for {len(query)} queries, expected {expected} with "
                f"n_hard_negatives={self.target_per_qry - 1}"
            )
        return super().blocks(query, target, labels)


class SimpleContrastiveLoss(_CountedNegatives):
    """GradCache's ``SimpleContrastiveLoss`` without the N x M logits.

    Args:
        n_hard_negatives: mined negatives after each query's positive in ``y``.
        temperature: 1 / logit scale. Default 1: the host has none.
        settings: ``BlockSettings``. ``BlockLoss`` states the call.

    Raises:
        TypeError, ValueError: as in ``BlockLoss``. In the call, ValueError where ``y`` does not
            hold ``n_hard_negatives + 1`` rows for each query and ``target`` is not given.

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
        **settings: Unpack[BlockSettings],
    ) -> None:
        super().__init__(temperature, **settings)
        self._count(n_hard_negatives)


class DistributedContrastiveLoss(_CountedNegatives, DistributedBlockLoss):
    """GradCache's ``DistributedContrastiveLoss``: all processes' rows, not times the world size.

    Args:
        n_hard_negatives, temperature, settings: as in ``SimpleContrastiveLoss``.
            ``DistributedBlockLoss`` states the call.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        TypeError, ValueError: as in ``SimpleContrastiveLoss``.
    """

    def __init__(
        self,
        n_hard_negatives: int = 0,
        *,
        temperature: float = 1.0,
        **settings: Unpack[BlockSettings],
    ) -> None:
        super().__init__(temperature, scale_loss=False, **settings)
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
