"""The loss with negatives within both sides, in one direction, as in Qwen3-Embedding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peer import SCALE, Family, Job, Loss, Peer, backends
from llave_kernels import contrastive_logsumexp, hardness_weighted_contrastive_loss
from llave_kernels.losses import direction_loss, joined
from llave_kernels.reference import reference_loss

SIDES = ("query", "target")


def ours(backend: str) -> Callable[[Job], Loss]:
    def build(job: Job) -> Loss:
        return lambda query, target: hardness_weighted_contrastive_loss(
            query, target, logit_scale=SCALE, alpha=job.alpha, symmetric=False, within=SIDES,
            backend=backend,
        )  # fmt: skip

    return build


def three_calls(job: Job) -> Loss:
    """Ours for each block of pairs, whole, with an autograd node and gradients of its own."""

    def loss(query: Tensor, target: Tensor) -> Tensor:
        n, m = len(query), len(target)
        ids = torch.arange(m, device=query.device) % n
        own = {"query_ids": ids[:n], "target_ids": ids}
        plain = {"logit_scale": SCALE, "symmetric": False, "alpha": 0.0}
        main = contrastive_logsumexp(query, target, **plain | {"alpha": job.alpha})
        queries = contrastive_logsumexp(query, query, **plain)
        targets = contrastive_logsumexp(target[:n], target, **plain, **own)
        rows = joined(main.query, queries.query, targets.query)
        return direction_loss(main.positive, rows).mean()

    return loss


def sentence_transformers(job: Job) -> Loss:
    """Its ranking loss, with three directions in one softmax."""
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import dot_score

    module = losses.MultipleNegativesRankingLoss(
        model=None,
        scale=SCALE,
        similarity_fct=dot_score,  # the inputs have unit length already
        directions=("query_to_doc", "query_to_query", "doc_to_doc"),
        hardness_mode="in_batch_negatives",
        hardness_strength=job.alpha,
    )
    return lambda query, target: module.compute_loss_from_embeddings(
        [query, *target.split(len(query))], None
    )


def dense(job: Job) -> Loss:
    return lambda query, target: reference_loss(
        query, target, logit_scale=SCALE, alpha=job.alpha, symmetric=False, within=SIDES
    )


FAMILY = Family(
    {
        **backends(ours, negatives=True),
        "llave-three-calls": Peer(three_calls, negatives=True),
        "sentence-transformers": Peer(
            sentence_transformers, package="sentence_transformers", negatives=True
        ),
    },
    truth=dense,
    directions=(1,),
)
