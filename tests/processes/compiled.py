"""A training step under ``torch.compile`` with every loss that gathers across processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

from llave_kernels import HardnessWeightedContrastiveLoss
from llave_kernels.integrations import gradcache, tevatron, vlm2vec
from llave_kernels.integrations.llave_trainer import WeightedClipLoss
from llave_kernels.integrations.open_clip import ClipLoss
from llave_kernels.integrations.sentence_transformers import MultipleNegativesRankingLoss

D_IN, D, ROWS = 6, 5, 4
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def losses() -> Iterator[tuple[str, Loss]]:
    """(name, loss) pairs. Each loss takes queries, targets and a learnable scale."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for name, group in (("world", "world"), ("group", dist.group.WORLD)):
        for symmetric in (True, False):
            module = HardnessWeightedContrastiveLoss(20.0, symmetric=symmetric, gather_group=group)
            yield f"module {name} {symmetric=}", lambda q, t, k, module=module: module(q * k, t)
    for local, with_grad in itertools.product((True, False), repeat=2):
        setting = f"{local=} {with_grad=}"
        clip = ClipLoss(local, with_grad, False, rank, world)
        yield f"ClipLoss {setting}", clip
        weighted = WeightedClipLoss(local, with_grad, False, rank, world)
        yield f"WeightedClipLoss {setting}", lambda q, t, k, loss=weighted: loss(q, t, k, 9.0)
    for host in (gradcache, tevatron, vlm2vec):
        blocks = host.DistributedContrastiveLoss(alpha=9.0)
        yield host.__name__.split(".")[-1], lambda q, t, k, loss=blocks: loss(q * k, t)
    for directions in (("query_to_doc",), ("query_to_doc", "doc_to_query")):
        ranking = MultipleNegativesRankingLoss(
            nn.Identity(), gather_across_devices=True, directions=directions
        )
        yield (
            f"sentence_transformers {directions}",
            lambda q, t, k, loss=ranking: loss.compute_loss_from_embeddings([q * k, t]),
        )


def step(encoder: nn.Module, loss: Loss, scale: Tensor, batch: Tensor) -> Tensor:
    query, target = (normalize(encoder(x), dim=1) for x in batch)
    return loss(query, target, scale)


def steps() -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """This process's loss and gradients, from the plain step and from the compiled step."""
    results = {}
    for name, loss in losses():
        torch.manual_seed(dist.get_rank())
        batch = torch.randn(2, ROWS, D_IN)
        both = []
        for run in (step, torch.compile(step, backend="aot_eager")):
            torch.manual_seed(9)
            encoder, scale = nn.Linear(D_IN, D), torch.tensor(20.0, requires_grad=True)
            value = run(encoder, loss, scale, batch)
            value.backward()
            gradients: list[Any] = [p.grad for p in encoder.parameters()]
            both.append([value.detach(), *gradients, scale.grad])
        results[name] = both[0], both[1]
    return results
