"""The error in each process when process 1 passes another argument than the rest."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

from llave_kernels import HardnessWeightedContrastiveLoss, agreement
from llave_kernels.distributed import distributed_contrastive_loss
from tests.processes.cases import said


def drifted(odd: bool) -> HardnessWeightedContrastiveLoss:
    """A module whose learnable scale is larger in one process."""
    module = HardnessWeightedContrastiveLoss(20.0, learnable=True, gather_group="world")
    with torch.no_grad():
        module.log_logit_scale.add_(0.125 * odd)
    return module


def with_precision(precision: str, *pair: Tensor) -> None:
    torch.set_float32_matmul_precision(precision)
    try:
        distributed_contrastive_loss(*pair)
    finally:
        torch.set_float32_matmul_precision("highest")


def with_autocast(enabled: bool, *pair: Tensor) -> None:
    with torch.autocast("cpu", enabled=enabled):
        distributed_contrastive_loss(*pair)


def hosts() -> dict[str, str]:
    """The integrations' errors, by the setting in which process 1 differs."""
    from sentence_transformers import util

    from llave_kernels.integrations import gradcache, sentence_transformers, vlm2vec
    from llave_kernels.integrations.open_clip import ClipLoss

    odd, world = dist.get_rank() == 1, dist.get_world_size()
    pair = [normalize(torch.randn(4, 5), dim=1) for _ in range(2)]
    scale = torch.tensor(50.0)

    def clip(local: bool = True, grad: bool = True, world: int = world, **given: Any) -> str:
        loss = ClipLoss(local, grad, world_size=world, **given)
        return said(lambda: loss(*pair, scale))

    def blocks(kind: Any, *, call: dict[str, Any] | None = None, **given: Any) -> str:
        return said(lambda: kind.DistributedContrastiveLoss(**given)(*pair, **(call or {})))

    def ranking(columns: int = 2, rows: int = 4, kind: str = "", **given: Any) -> str:
        loss = getattr(sentence_transformers, kind + "MultipleNegativesRankingLoss")(
            nn.Sequential(nn.Identity()), gather_across_devices=True, **given
        )
        embeddings = [torch.randn(rows, 5, requires_grad=True) for _ in range(columns)]
        if kind:
            return said(lambda: loss.calculate_loss([[x] for x in embeddings]))
        return said(lambda: loss.compute_loss_from_embeddings(embeddings))

    both = ("query_to_doc", "doc_to_query")
    weighted = {"hardness_mode": "all_negatives", "hardness_strength": 1.0}
    return {
        "local_loss": clip(local=odd),
        "local_loss, constants": clip(local=odd, grad=False),
        "gather_with_grad": clip(grad=odd),
        "world_size": clip(world=world + odd),
        "world_size, constants": clip(world=world + odd, grad=False),
        "alpha": clip(alpha=1.0 * odd),
        "alpha, constants": clip(alpha=1.0 * odd, grad=False),
        "class": clip() if odd else blocks(vlm2vec),
        "scale_loss": blocks(vlm2vec, scale_loss=odd),
        "temperature": blocks(vlm2vec, temperature=0.25 if odd else 0.5),
        "n_hard_negatives": blocks(gradcache, n_hard_negatives=int(odd)),
        "target": blocks(vlm2vec, call={"target": torch.arange(4)} if odd else None),
        "reduction": blocks(vlm2vec, call={"reduction": "sum" if odd else "mean"}),
        "unknown": blocks(vlm2vec, call={"ids": None} if odd else None),
        "scale": ranking(scale=20.0 + odd),
        "directions": ranking(directions=both if odd else both[:1]),
        "partition_mode": ranking(
            directions=both, partition_mode="joint" if odd else "per_direction"
        ),
        "hardness_mode": ranking(
            hardness_mode="all_negatives" if odd else "hard_negatives", hardness_strength=1.0
        ),
        "hardness_strength": ranking(**weighted | {"hardness_strength": 1.0 + odd}),
        "target_hardness_strength": ranking(
            directions=both, target_hardness_strength=2.0 * odd, **weighted
        ),
        "false_negative_margin": ranking(false_negative_margin=0.1 if odd else None),
        "backend of ranking": ranking(backend="torch" if odd else "auto"),
        "similarity_fct": ranking(similarity_fct=util.dot_score if odd else util.cos_sim),
        "who computes": ranking(
            similarity_fct=util.manhattan_sim if odd else util.cos_sim, kind="Cached"
        ),
        "columns": ranking(columns=2 + odd),
        "rows": ranking(rows=4 + odd),
        "afterwards": ranking() + clip() + blocks(gradcache),
    }


def late() -> list[str]:
    """The errors of calls with a scale on a device.

    The copy to the host is simulated. On process 0 it has arrived at the first query, on process 1
    at the second.
    """
    rank = dist.get_rank()
    asked: list[int] = []

    class Event:
        def __init__(self, device: str) -> None:
            asked.append(0)

        def record(self) -> None:
            pass

        def query(self) -> bool:
            asked[-1] += 1
            return asked[-1] > rank

    pair = [normalize(torch.randn(4, 5), dim=1) for _ in range(2)]
    original = agreement._unread, torch.Event
    agreement._unread, torch.Event = (lambda scale: scale.ndim == 0), Event
    try:
        steps = [(50.0, 50.0), (49.0, 49.0), (48.0, 48.0), *[(50.0, 51.0)] * 4]
        scales = [torch.tensor(both[rank]) for both in steps]
        loss = partial(distributed_contrastive_loss, *pair)
        return [said(partial(loss, logit_scale=scale)) for scale in scales]
    finally:
        agreement._unread, torch.Event = original


def losses() -> dict[str, Any]:
    """The errors of the function, and of the module for a differing scale."""
    odd = dist.get_rank() == 1
    pair = [normalize(torch.randn(4, 5 + odd), dim=1) for _ in range(2)]
    good = [x[:, :5] for x in pair]
    loss = distributed_contrastive_loss
    return {
        "width": said(lambda: loss(*pair)),
        "dtype": said(lambda: loss(*(x.double() if odd else x for x in good))),
        "alpha": said(lambda: loss(*good, alpha=1.0 + odd)),
        "margin": said(lambda: loss(*good, false_negative_margin=0.1 if odd else None)),
        "ids": said(
            lambda: (
                loss(*good, **dict.fromkeys(("query_ids", "target_ids"), torch.arange(4)))
                if odd
                else loss(*good)
            )
        ),
        "a bias": said(lambda: loss(*good, target_bias=torch.ones(4) if odd else None)),
        "a bias's gradient": said(lambda: loss(*good, query_bias=torch.ones(4, requires_grad=odd))),
        "symmetric": said(lambda: loss(*good, symmetric=not odd)),
        "within": said(lambda: loss(*good, within=("query",) if odd else ())),
        "hardness": said(lambda: loss(*good, hardness="all" if odd else "in_batch")),
        "target_alpha": said(lambda: loss(*good, target_alpha=2.0 * odd)),
        "logit_scale": said(lambda: loss(*good, logit_scale=50.0 + odd)),
        "its gradient": said(
            lambda: loss(*good, logit_scale=torch.tensor(50.0, requires_grad=odd))
        ),
        "queries' gradient": said(lambda: loss(good[0].clone().requires_grad_(odd), good[1])),
        "gradient": said(lambda: loss(good[0], good[1].clone().requires_grad_(odd))),
        "reductions": said(lambda: loss(*good, reduction="mean" if odd else "sum")),
        "a scale's tensor": said(lambda: loss(*good, logit_scale=torch.tensor(50.0 + odd))),
        "the same as a tensor": said(lambda: loss(*good, logit_scale=torch.tensor(0.1)))
        if odd
        else said(lambda: loss(*good, logit_scale=0.1)),
        "drift": said(lambda: drifted(odd)(*good)),
        "backend": said(lambda: loss(*good, backend="torch" if odd else "auto")),
        "precision": said(lambda: with_precision("high" if odd else "highest", *good)),
        "autocast": said(lambda: with_autocast(odd, *good)),
        "group": said(lambda: loss(*good, group="world")),
        "transform": said(lambda: torch.func.grad(lambda q: loss(q, good[1]))(good[0])),
        "transform of one": said(
            lambda: torch.func.grad(lambda q: loss(q, good[1]))(good[0]) if odd else loss(*good)
        ),
        "refused": said(lambda: loss(*good, alpha=-1.0 if odd else 1.0)),
        "reduction": said(lambda: loss(*good, reduction="avg" if odd else "sum")),
        "zeros": said(lambda: loss(*good, alpha=-0.0 if odd else 0.0)),
        "late": late(),
        "afterwards": said(lambda: loss(*good)),
    }
