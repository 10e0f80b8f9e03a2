"""The supervised contrastive loss: classes of eight rows, each in two views."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from benchmarks.peer import SCALE, Family, Job, Loss, Peer, backends
from llave_kernels import supervised_contrastive_loss

ROWS = 8  # of a class, so a row has 15 positives

Labelled = Callable[[Tensor, Tensor], Tensor]  # a loss of all rows and their classes


def _of_views(loss: Labelled) -> Loss:
    """The loss of two views (N, D) as one batch that stands against itself."""

    @lru_cache
    def labels(n: int, device: torch.device) -> Tensor:
        return (torch.arange(n, device=device) // ROWS).repeat(2)

    return lambda query, target: loss(torch.cat([query, target]), labels(len(query), query.device))


def ours(backend: str) -> Callable[[Job], Loss]:
    def build(job: Job) -> Loss:
        settings = {"logit_scale": SCALE, "alpha": job.alpha, "backend": backend}
        loss = partial(supervised_contrastive_loss, **settings)
        return _of_views(lambda rows, labels: loss(rows, query_groups=labels))

    return build


def host(job: Job) -> Loss:
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.losses import SupConLoss

    distance = DotProductSimilarity(normalize_embeddings=False)
    return _of_views(SupConLoss(temperature=1 / SCALE, distance=distance))


def dense(job: Job) -> Loss:
    """Khosla et al.'s formula."""

    def loss(rows: Tensor, labels: Tensor) -> Tensor:
        similarity = rows @ rows.T
        equal = labels[:, None] == labels
        weight = job.alpha * similarity.detach() * ~equal
        itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        logits = (SCALE * similarity + weight).masked_fill(itself, -torch.inf)
        pairs = equal & ~itself
        positives = (SCALE * similarity * pairs).sum(1) / pairs.sum(1).clamp(min=1)
        return (logits.logsumexp(1) - positives)[pairs.any(1)].mean()

    return _of_views(loss)


FAMILY = Family(
    peers=backends(ours, directions=(1,))
    | {
        "pytorch-metric-learning": Peer(
            host, package="pytorch_metric_learning", directions=(1,), query_alpha=False
        ),
        "dense": Peer(dense, directions=(1,)),
    },
    truth=dense,
    directions=(1,),
)
