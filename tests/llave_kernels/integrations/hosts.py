"""The losses of hosts that cannot be installed beside this package.

They follow the hosts' sources, argument for argument: tevatron at dd06310, VLM2Vec at 6e1e1d4,
FlagEmbedding at 7ed43d6. OpenCLIP is at 89fb801, which is newer than its releases.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def gather(x: Tensor) -> Tensor:
    """Every process's rows. Only this process's rows carry a gradient."""
    rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, x.detach().contiguous())
    rows[dist.get_rank()] = x
    return torch.cat(rows)


class _Simple:
    temperature = 1.0

    def __call__(
        self, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: str = "mean"
    ) -> Tensor:
        if target is None:
            target = torch.arange(len(x)) * (len(y) // len(x))
        return cross_entropy(x @ y.T / self.temperature, target, reduction=reduction)


class _Distributed(_Simple):
    scale_loss: bool

    def __call__(self, x: Tensor, y: Tensor, **arguments: Any) -> Tensor:
        loss = super().__call__(gather(x), gather(y), **arguments)
        return loss * dist.get_world_size() if self.scale_loss else loss


class tevatron:
    """``tevatron.retriever.gc_trainer``."""

    class SimpleContrastiveLoss(_Simple):
        def __init__(self) -> None:
            pass

    class DistributedContrastiveLoss(_Distributed):
        def __init__(self, n_target: int = 0, scale_loss: bool = True) -> None:
            self.scale_loss = scale_loss


class vlm2vec:
    """``src.loss``."""

    class SimpleContrastiveLoss(_Simple):
        def __init__(self, temperature: float = 0.02) -> None:
            self.temperature = temperature

    class DistributedContrastiveLoss(_Distributed):
        def __init__(
            self, n_target: int = 0, scale_loss: bool = True, temperature: float = 0.02
        ) -> None:
            self.scale_loss = scale_loss
            self.temperature = temperature


class BiEncoder(nn.Module):
    """What the models of tevatron, VLM2Vec and FlagEmbedding do in training, in one process.

    This is tevatron's ``EncoderModel.forward``, and the in-batch loss of FlagEmbedding's
    ``AbsEmbedderModel``. With ``in_batch=False`` it is the latter's loss of each query's own
    passages.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Linear(11, 12)
        self.temperature = temperature
        self.cross_entropy: nn.Module = nn.CrossEntropyLoss(reduction="mean")

    def encode(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(self.encoder(x), dim=1)

    def forward(self, query: Tensor, passage: Tensor, in_batch: bool = True) -> Tensor:
        x, y = self.encode(query), self.encode(passage)
        width = len(y) // len(x)
        scores = x @ y.T / self.temperature
        target = torch.arange(len(x)) * width
        if not in_batch:
            scores = torch.stack([row[i * width : (i + 1) * width] for i, row in enumerate(scores)])
            target = torch.zeros_like(target)
        return self.cross_entropy(scores, target)


class CLIPTask(nn.Module):
    """``open_clip.task.CLIPTask``, which calls its ``loss`` with keywords."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.trainable_module = model
        self.loss = loss

    def forward(self, batch: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        output = self.trainable_module(image=batch["image"], text=batch["text"])
        losses = self.loss(**output, output_dict=True)
        losses["loss"] = sum(value for key, value in losses.items() if key.endswith("_loss"))
        return losses, {"logit_scale": output["logit_scale"]}
