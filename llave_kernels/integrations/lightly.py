"""lightly's losses of two views, fused and hardness-weighted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import lightly.loss
import torch
from lightly.utils import dist
from torch import Tensor
from torch.nn.functional import normalize

from llave_kernels import checks, dispatch
from llave_kernels.distributed_supervised import distributed_supervised_loss
from llave_kernels.functional import hardness_weighted_contrastive_loss
from llave_kernels.supervised import supervised_contrastive_loss

PER_PROCESS = 1 << 32  # images of a process, which are numbered


class NTXentLoss(lightly.loss.NTXentLoss):  # type: ignore[misc]
    """``lightly.loss.NTXentLoss`` without its N x M logits: same arguments, same call.

    At ``alpha=0`` value and gradients are the host's, with and without a memory bank, and in each
    process with ``gather_distributed``. The loss is float64 for float64 embeddings and float32 for
    all others.

    Args:
        temperature: 1 / logit scale, positive. The host also takes negative ones.
        memory_bank_size, gather_distributed: as in the host.
        alpha: hardness strength of the negatives. Default 0: the host's loss.
        backend: as in ``llave_kernels.hardness_weighted_contrastive_loss``.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.

    Example:
        >>> loss_fn = NTXentLoss(temperature=0.5)
        >>> loss = loss_fn(torch.randn(8, 16), torch.randn(8, 16))
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        alpha: float = 0.0,
        backend: str = "auto",
    ) -> None:
        temperature = checks.positive("temperature", temperature)
        super().__init__(temperature, memory_bank_size, gather_distributed)
        self.alpha = checks.strength("alpha", alpha)
        self.backend = dispatch.known(backend)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Mean loss of two views (N, D) of N images, as a 0-d tensor."""
        out0, out1 = (normalize(x, dim=1) for x in (out0, out1))
        out1, bank = self.memory_bank.forward(out1, update=out0.requires_grad)
        if bank is None:
            return _of_views(self, out0, out1, "all")
        target = torch.cat([out1, bank.T.to(out0)])
        images = torch.zeros(len(out0), dtype=torch.int64, device=out0.device)
        rows = torch.arange(len(target), device=out0.device)
        return hardness_weighted_contrastive_loss(
            out0,
            target,
            logit_scale=1 / self.temperature,
            alpha=self.alpha,
            symmetric=False,
            owners=range(len(target)),
            query_ids=images,  # leaves out the other images of the batch
            target_ids=(rows >= len(out0)).long(),
            backend=self.backend,
        )


class DCLLoss(lightly.loss.DCLLoss):  # type: ignore[misc]
    """``lightly.loss.DCLLoss`` without its N x M logits: same arguments, same call.

    At ``alpha=0`` value and gradients are the host's, in each process with ``gather_distributed``.

    Args:
        temperature: 1 / logit scale, positive.
        weight_fn, gather_distributed: as in the host. ``DCLWLoss`` is
            ``DCLLoss(weight_fn=lightly.loss.dcl_loss.negative_mises_fisher_weights)``.
        alpha, backend: as in ``NTXentLoss``.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.

    Example:
        >>> loss_fn = DCLLoss(temperature=0.1)
        >>> loss = loss_fn(torch.randn(8, 16), torch.randn(8, 16))
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
        *,
        alpha: float = 0.0,
        backend: str = "auto",
    ) -> None:
        temperature = checks.positive("temperature", temperature)
        super().__init__(temperature, weight_fn, gather_distributed)
        self.alpha = checks.strength("alpha", alpha)
        self.backend = dispatch.known(backend)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Mean loss of two views (N, D) of N images, as a 0-d tensor."""
        out0, out1 = (normalize(x, dim=1) for x in (out0, out1))
        loss = _of_views(self, out0, out1, "negatives")
        if self.weight_fn is None:
            return loss
        # The weights of both directions, on the positives' logits alone.
        weight = (self.weight_fn(out0, out1) + self.weight_fn(out1, out0)) / 2
        positive = (out0 * out1).sum(1) / self.temperature
        return loss + (positive * (1 - weight)).mean()


def _of_views(host: NTXentLoss | DCLLoss, out0: Tensor, out1: Tensor, denominator: str) -> Tensor:
    """The loss of both views as one batch, in which an image's views are a group."""
    images = torch.arange(len(out0), device=out0.device).repeat(2)
    loss = supervised_contrastive_loss
    if host.gather_distributed and dist.world_size() > 1:
        images += dist.rank() * PER_PROCESS
        loss = distributed_supervised_loss
    return loss(
        torch.cat([out0, out1]),
        query_groups=images,
        logit_scale=1 / host.temperature,
        alpha=host.alpha,
        denominator=denominator,
        backend=host.backend,
    )
