"""The contrastive loss, ours and today's alternatives, as ``loss(query, target)``."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.peer import SCALE, Family, Job, Loss, Peer, backends
from llave_kernels import hardness_weighted_contrastive_loss


def _owners(n: int, m: int, device: torch.device) -> dict[str, Any]:
    """Those of a gathered batch: each target is its own."""
    return {"owners": torch.arange(m, device=device)}


def _ids(n: int, m: int, device: torch.device) -> dict[str, Any]:
    """Two neighbours have the same content."""
    sizes = {"query_ids": n, "target_ids": m}
    return {name: torch.arange(k, device=device) // 2 for name, k in sizes.items()}


def _margin(n: int, m: int, device: torch.device) -> dict[str, Any]:
    return {"false_negative_margin": 0.1}


def _all(n: int, m: int, device: torch.device) -> dict[str, Any]:
    every = (_owners, _ids, _margin)
    return {name: value for rule in every for name, value in rule(n, m, device).items()}


RULES = {"owners": _owners, "ids": _ids, "margin": _margin, "all": _all}


def ours(backend: str) -> Callable[[Job], Loss]:
    def build(job: Job) -> Loss:
        # Made once, as a trainer would do, and not timed.
        rules = lru_cache(RULES[job.rule] if job.rule else lambda n, m, device: {})
        return lambda query, target: hardness_weighted_contrastive_loss(
            query,
            target,
            logit_scale=SCALE,
            alpha=job.alpha,
            symmetric=job.symmetric,
            backend=backend,
            **rules(len(query), len(target), query.device),
        )

    return build


def _weighted_cross_entropy(similarity: Tensor, alpha: float) -> Tensor:
    """Mean cross-entropy of similarities (N, N), or (N, K N) with mined negatives.

    The hardness weight has no gradient and leaves out a row's own targets.
    """
    weight = alpha * similarity.detach()
    weight.unflatten(1, (-1, len(weight))).diagonal(dim1=0, dim2=2).zero_()
    labels = torch.arange(len(similarity), device=similarity.device)
    return cross_entropy((SCALE * similarity + weight).float(), labels)


def authors(job: Job) -> Loss:
    """LLaVE's published loss. It computes a product for each direction."""

    def loss(query: Tensor, target: Tensor) -> Tensor:
        rows = _weighted_cross_entropy(query @ target.T, job.alpha)
        if not job.symmetric:
            return rows
        return (rows + _weighted_cross_entropy(target @ query.T, job.alpha)) / 2

    return loss


def dense(job: Job) -> Loss:
    """The authors' loss from one product. Its transpose serves the other direction."""

    def loss(query: Tensor, target: Tensor) -> Tensor:
        similarity = query @ target.T
        rows = _weighted_cross_entropy(similarity, job.alpha)
        if not job.symmetric:
            return rows
        columns = similarity[:, : len(query)].T  # of the positives
        return (rows + _weighted_cross_entropy(columns, job.alpha)) / 2

    return loss


def compiled(job: Job) -> Loss:
    return torch.compile(dense(job), dynamic=False)


def sentence_transformers(job: Job) -> Loss:
    """Its hardness-weighted ranking loss, which weights the query direction only."""
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import dot_score

    directions = ("query_to_doc", "doc_to_query") if job.symmetric else ("query_to_doc",)
    module = losses.MultipleNegativesRankingLoss(
        model=None,
        scale=SCALE,
        similarity_fct=dot_score,  # the inputs have unit length already
        directions=directions,
        partition_mode="per_direction",
        hardness_mode="in_batch_negatives",
        hardness_strength=job.alpha,
    )
    return lambda query, target: module.compute_loss_from_embeddings(
        [query, *target.split(len(query))], None
    )


def open_clip(job: Job) -> Loss:
    """``ClipLoss``: both directions, without the weight."""
    from open_clip.loss import ClipLoss

    module = ClipLoss()
    return lambda query, target: module(query, target, SCALE)


def cut_cross_entropy(job: Job) -> Loss:
    """Without its filter, which by default drops most of a diffuse softmax's gradient."""
    from cut_cross_entropy import linear_cross_entropy

    def loss(query: Tensor, target: Tensor) -> Tensor:
        labels = torch.arange(len(query), device=query.device)
        return linear_cross_entropy(SCALE * query, target, labels, filter_eps=None)

    return loss


def liger(job: Job) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss()

    def loss(query: Tensor, target: Tensor) -> Tensor:
        labels = torch.arange(len(query), device=query.device)
        return module(target, SCALE * query, labels)

    return loss


def quack(job: Job) -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss(query: Tensor, target: Tensor) -> Tensor:
        labels = torch.arange(len(query), device=query.device)
        return chunked_linear_cross_entropy(SCALE * query, target, labels)

    return loss


def inf_cl(job: Job) -> Loss:
    """Inf-CL's single-GPU kernel. It returns a loss per row and takes D in heads up to 256."""
    from inf_cl import cal_flash_loss

    def rows(query: Tensor, target: Tensor) -> Tensor:
        head = math.gcd(256, query.shape[1])
        return cal_flash_loss(query, target, scale=SCALE, head_dim=head).mean()

    if not job.symmetric:
        return rows
    return lambda query, target: (rows(query, target) + rows(target, query)) / 2


def memeff(job: Job) -> Loss:
    """Its CLIP loss. The default ``stable=True`` would give another gradient."""
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(1 / SCALE, normalized_inputs=True, stable=False)


UNWEIGHTED = {"query_alpha": False, "target_alpha": False}
# These are losses of a language model's head, and the targets take the place of its words.
ONE_WAY = UNWEIGHTED | {"gpu_only": True, "directions": (1,), "negatives": True}
PEERS = backends(ours, negatives=True, rules=True) | {
    "authors": Peer(authors),
    "dense": Peer(dense, negatives=True),
    "dense-compiled": Peer(compiled, negatives=True),
    "sentence-transformers": Peer(
        sentence_transformers,
        package="sentence_transformers",
        target_alpha=False,
        negatives=True,
    ),
    "open-clip": Peer(open_clip, package="open_clip", directions=(2,), **UNWEIGHTED),
    "inf-cl": Peer(inf_cl, package="inf_cl", gpu_only=True, **UNWEIGHTED),
    "memeff": Peer(memeff, package="memeff", gpu_only=True, directions=(2,), **UNWEIGHTED),
    "cce-exact": Peer(cut_cross_entropy, package="cut_cross_entropy", **ONE_WAY),
    "liger": Peer(liger, package="liger_kernel", **ONE_WAY),
    "quack": Peer(quack, package="quack", **ONE_WAY),
}
# One direction takes the logits and two gradient products. Both take 2NMD more, which a loss that
# keeps no N x M matrix recomputes.
FAMILY = Family(PEERS, truth=None, flops={True: 8, False: 6})
