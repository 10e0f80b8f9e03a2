"""The loss over prefixes of the embeddings, ours in one call or in one for each, and others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from benchmarks.peer import SCALE, Family, Job, Loss, Peer, backends
from benchmarks.peers import dense
from llave_kernels import hardness_weighted_contrastive_loss

SHARES = 12, 6, 3, 1.5, 1  # 64, 128, 256, 512 and 768 of 768 columns


def dims_of(query: Tensor) -> list[int]:
    return [max(1, int(query.shape[1] / share)) for share in SHARES]


def ours(backend: str) -> Callable[[Job], Loss]:
    def build(job: Job) -> Loss:
        return lambda query, target: hardness_weighted_contrastive_loss(
            query,
            target,
            logit_scale=SCALE,
            alpha=job.alpha,
            symmetric=job.symmetric,
            backend=backend,
            matryoshka_dims=dims_of(query),
        )

    return build


def summed(of_rows: Loss) -> Loss:
    """The sum of a loss of the truncated, normalised rows."""

    def loss(query: Tensor, target: Tensor) -> Tensor:
        losses = [
            of_rows(*(normalize(x[:, :d], dim=1) for x in (query, target))) for d in dims_of(query)
        ]
        return torch.stack(losses).sum()

    return loss


def by_dim(job: Job) -> Loss:
    """Our loss, called for each dim."""
    return summed(
        lambda query, target: hardness_weighted_contrastive_loss(
            query, target, logit_scale=SCALE, alpha=job.alpha, symmetric=job.symmetric
        )
    )


class Given(nn.Module):
    """A model whose embeddings are its inputs."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return features

    def get_embedding_dimension(self) -> None:
        return None


def sentence_transformers(job: Job) -> Loss:
    """Its ``MatryoshkaLoss`` around its ranking loss, in the direction that this can weight."""
    from sentence_transformers.sentence_transformer import losses

    model = Given()
    ranking = losses.MultipleNegativesRankingLoss(
        model=model,
        scale=SCALE,
        hardness_mode="in_batch_negatives",
        hardness_strength=job.alpha,
    )

    def loss(query: Tensor, target: Tensor) -> Tensor:
        module = losses.MatryoshkaLoss(model, ranking, dims_of(query))
        columns = [query, *target.split(len(query))]
        return module([{"sentence_embedding": x} for x in columns], None)

    return loss


FAMILY = Family(
    backends(ours, negatives=True)
    | {
        "llave-by-dim": Peer(by_dim, negatives=True),
        "dense": Peer(lambda job: summed(dense(job)), negatives=True),
        "sentence-transformers": Peer(
            sentence_transformers,
            package="sentence_transformers",
            directions=(1,),
            negatives=True,
        ),
    },
    truth=lambda job: summed(dense(job)),
)
