"""The loss of LLaVE's published training code, fused."""

from __future__ import annotations

from torch import Tensor, nn

from llave_kernels import checks, dispatch
from llave_kernels.distributed_clip import Gather, gathered_clip_loss


class WeightedClipLoss(nn.Module):
    """The authors' class of that name, without the N x N logits: same arguments, same call.

    Args:
        local_loss, gather_with_grad, rank, world_size: how the processes gather embeddings.
            ``distributed_clip.Gather`` says what each setting gives. The paper's runs set both
            flags to True.
        cache_labels: no effect: there are no labels to build.
        backend: as in ``llave_kernels.hardness_weighted_contrastive_loss``.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.

    Example:
        >>> loss_fn = WeightedClipLoss()
        >>> query, target = (normalize(torch.randn(8, 16), dim=1) for _ in range(2))
        >>> loss = loss_fn(query, target, logit_scale=50.0, alpha=9.0)
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.local_loss = checks.flag("local_loss", local_loss)
        self.gather_with_grad = checks.flag("gather_with_grad", gather_with_grad)
        self.cache_labels = cache_labels
        self.rank = checks.count("rank", rank, 0)
        self.world_size = checks.count("world_size", world_size, 1)
        self.backend = dispatch.known(backend)

    def forward(
        self,
        query: Tensor,
        target: Tensor,
        logit_scale: float | Tensor,
        alpha: float = 0.5,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Loss of paired rows (N, D), unit length; 0-d, or ``{"contrastive_loss": loss}``.

        ``alpha`` defaults to 0.5 as in the published code. The paper's recipe passes 9.
        """
        gather = Gather(self.local_loss, self.gather_with_grad, self.world_size)
        loss = gathered_clip_loss(query, target, logit_scale, alpha, gather, self.backend)
        return {"contrastive_loss": loss} if output_dict else loss
