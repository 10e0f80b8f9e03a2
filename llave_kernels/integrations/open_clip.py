"""OpenCLIP's losses, fused: the contrastive one, hardness-weighted, and SigLIP's."""

from __future__ import annotations

from typing import Any

import open_clip.loss
from torch import Tensor

from llave_kernels import checks, dispatch, distributed_sigmoid
from llave_kernels.distributed_clip import Gather, check_pairs, check_world, gathered_clip_loss
from llave_kernels.sigmoid import sigmoid_contrastive_loss

EXCHANGES = ("bidir", "shift", "reduce", "gather")


class ClipLoss(open_clip.loss.ClipLoss):  # type: ignore[misc]
    """``open_clip.loss.ClipLoss`` without the N x N logits: same arguments, same call.

    In ``open_clip_train/main.py`` of the releases it takes the place of what ``create_loss``
    returns. In the newest source ``create_task`` builds the loss, and it takes the place of
    ``task.loss``.

    At ``alpha=0`` value and gradients are the host's for every setting. ``distributed_clip.Gather``
    says what each setting gives. ``local_loss=True, gather_with_grad=True`` is exact and the
    cheapest: it computes one block and gathers only what that needs.

    Args:
        local_loss, gather_with_grad, rank, world_size: as in the host.
        cache_labels: no effect: there are no labels to build.
        use_horovod: refused.
        alpha: hardness strength of both directions (LLaVE: 9). Default 0: CLIP's loss.
        backend: as in ``llave_kernels.hardness_weighted_contrastive_loss``.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value; ``use_horovod=True``.

    Example:
        >>> loss_fn = ClipLoss(local_loss=True, gather_with_grad=True, alpha=9.0)
        >>> image, text = (normalize(torch.randn(8, 16), dim=1) for _ in range(2))
        >>> loss = loss_fn(image, text, logit_scale=torch.tensor(50.0))
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        alpha: float = 0.0,
        backend: str = "auto",
    ) -> None:
        if use_horovod:
            raise ValueError("use_horovod=True is not supported; run under torch.distributed")
        super().__init__(
            checks.flag("local_loss", local_loss),
            checks.flag("gather_with_grad", gather_with_grad),
            cache_labels,
            checks.count("rank", rank, 0),
            checks.count("world_size", world_size, 1),
        )
        self.alpha = checks.strength("alpha", alpha)
        self.backend = dispatch.known(backend)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Loss of paired rows (N, D), unit length; 0-d, or ``{"contrastive_loss": loss}``.

        ``logit_bias`` is added to every logit and cancels in a softmax. Its gradient is 0.
        """
        gather = Gather(self.local_loss, self.gather_with_grad, self.world_size)
        loss = gathered_clip_loss(
            image_features, text_features, logit_scale, self.alpha, gather, self.backend
        )
        if isinstance(logit_bias, Tensor):
            loss = loss + 0.0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(open_clip.loss.SigLipLoss):  # type: ignore[misc]
    """``open_clip.loss.SigLipLoss`` without the N x N logits: same arguments, same call.

    It takes the place of the host's class as ``ClipLoss`` does. Value and gradients are the host's.
    From four processes on, the gradients of scale and bias are the host's after they are averaged.

    Args:
        cache_labels: no effect: there are no labels to build.
        rank, world_size: as in the host.
        dist_impl: ``"bidir"``, ``"shift"``, ``"reduce"`` or ``"gather"``. In the host they are four
            ways to exchange the texts, with one result. Here the texts are gathered once.
        backend: as in ``llave_kernels.sigmoid_contrastive_loss``.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.

    Example:
        >>> loss_fn = SigLipLoss()
        >>> image, text = (normalize(torch.randn(8, 16), dim=1) for _ in range(2))
        >>> loss = loss_fn(image, text, logit_scale=torch.tensor(10.0), logit_bias=-10.0)
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        if dist_impl is not None:
            checks.one_of("dist_impl", dist_impl, EXCHANGES)
        rank = checks.count("rank", rank, 0)
        world_size = checks.count("world_size", world_size, 1)
        super().__init__(cache_labels, rank, world_size, dist_impl)
        self.backend = dispatch.known(backend)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Loss of paired rows (N, D), unit length; 0-d, or ``{"contrastive_loss": loss}``."""
        bias = 0.0 if logit_bias is None else logit_bias
        scales: dict[str, Any] = {"logit_scale": logit_scale, "logit_bias": bias}
        pair = image_features, text_features
        if self.world_size == 1:
            check_pairs(*pair)
            loss = sigmoid_contrastive_loss(*pair, **scales, backend=self.backend)
        else:
            loss = self._over_processes(*pair, scales)
        return {"contrastive_loss": loss} if output_dict else loss

    def _over_processes(self, query: Tensor, target: Tensor, scales: dict[str, Any]) -> Tensor:
        def arguments() -> dict[str, Any]:
            check_pairs(query, target)
            check_world(self.world_size)
            return {"query": query, "target": target, **scales, "backend": self.backend}

        return distributed_sigmoid.loss_over(None, arguments)
