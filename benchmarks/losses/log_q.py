"""The two-tower loss of recommenders: a softmax over the batch with the log-Q correction.

Items stand in a batch as often as they are clicked. ``-log q_j`` is added to their logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.peer import SCALE, Family, Job, Loss, Peer, backends
from llave_kernels import hardness_weighted_contrastive_loss


def correction(target: Tensor) -> Tensor:
    """(M,) ``-log q_j`` of items whose probability falls with their number, as in Zipf's law."""
    rank = torch.arange(1, len(target) + 1, device=target.device).to(
        torch.promote_types(target.dtype, torch.float32)
    )
    return rank.log() + (1 / rank).sum().log()


def ours(backend: str) -> Callable[[Job], Loss]:
    def build(job: Job) -> Loss:
        return lambda query, target: hardness_weighted_contrastive_loss(
            query, target, logit_scale=SCALE, alpha=0.0, symmetric=False, backend=backend,
            owners=range(len(target)), target_bias=correction(target),
        )  # fmt: skip

    return build


def extra_column(job: Job) -> Loss:
    """Our loss without its biases. A further column of the embeddings carries the correction."""

    def loss(query: Tensor, target: Tensor) -> Tensor:
        column = (correction(target) / SCALE).to(target.dtype)[:, None]
        return hardness_weighted_contrastive_loss(
            torch.cat([query, torch.ones_like(query[:, :1])], 1),
            torch.cat([target, column], 1),
            logit_scale=SCALE,
            alpha=0.0,
            symmetric=False,
            owners=range(len(target)),
        )

    return loss


def dense(job: Job) -> Loss:
    """What recommenders write."""

    def loss(query: Tensor, target: Tensor) -> Tensor:
        logits = SCALE * query @ target.T + correction(target)
        return cross_entropy(logits, torch.arange(len(query), device=query.device))

    return loss


FAMILY = Family(
    backends(ours, query_alpha=False, negatives=True)
    | {
        "llave-extra-column": Peer(extra_column, query_alpha=False, negatives=True),
        "dense": Peer(dense, query_alpha=False, negatives=True),
    },
    truth=dense,
    flops={False: 6},
    directions=(1,),
)
