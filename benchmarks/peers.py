"""The losses under test: ours and what people use today, behind one call ``loss(query,
target)``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llave_kernels import available_backends, hardness_weighted_contrastive_loss

SCALE = 50.0
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Job:
    """What one measurement computes; ``alpha`` as asked for on the command line."""

    alpha: float
    symmetric: bool


@dataclass(frozen=True)
class Peer:
    """An implementation: how to build it, what it needs, and which loss it really computes.

    ``query_alpha`` and ``target_alpha`` say whether the hardness weight is applied in each
    direction: every implementation is held against the float64 value of its own formula.
    """

    build: Callable[[Job], Loss]
    package: str | None = None
    gpu_only: bool = False
    one_direction_only: bool = False
    query_alpha: bool = True
    target_alpha: bool = True

    def refusal(self, device: str, symmetric: bool) -> str | None:
        """Why it cannot take part, or None."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.gpu_only and not device.startswith("cuda"):
            return "needs a GPU"
        if self.one_direction_only and symmetric:
            return "computes one direction; add --one-direction"
        return None


def ours(backend: str) -> Callable[[Job], Loss]:
    def build(job: Job) -> Loss:
        return lambda query, target: hardness_weighted_contrastive_loss(
            query,
            target,
            logit_scale=SCALE,
            alpha=job.alpha,
            symmetric=job.symmetric,
            backend=backend,
        )

    return build


def _weighted_cross_entropy(similarity: Tensor, alpha: float) -> Tensor:
    """Cross-entropy with the detached hardness weight on all but the diagonal."""
    weight = alpha * similarity.detach()
    weight.fill_diagonal_(0)
    labels = torch.arange(len(similarity), device=similarity.device)
    return cross_entropy((SCALE * similarity + weight).float(), labels)


def authors(job: Job) -> Loss:
    """LLaVE's published loss: each direction from a product of its own."""

    def loss(query: Tensor, target: Tensor) -> Tensor:
        rows = _weighted_cross_entropy(query @ target.T, job.alpha)
        if not job.symmetric:
            return rows
        return (rows + _weighted_cross_entropy(target @ query.T, job.alpha)) / 2

    return loss


def dense(job: Job) -> Loss:
    """The same from one product, the transposed view serving the other direction."""

    def loss(query: Tensor, target: Tensor) -> Tensor:
        similarity = query @ target.T
        rows = _weighted_cross_entropy(similarity, job.alpha)
        if not job.symmetric:
            return rows
        return (rows + _weighted_cross_entropy(similarity.T, job.alpha)) / 2

    return loss


def compiled(job: Job) -> Loss:
    return torch.compile(dense(job))


def sentence_transformers(job: Job) -> Loss:
    """Their hardness-weighted ranking loss; it weights the query direction only."""
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import dot_score

    directions = ("query_to_doc", "doc_to_query") if job.symmetric else ("query_to_doc",)
    module = losses.MultipleNegativesRankingLoss(
        model=None,
        scale=SCALE,
        similarity_fct=dot_score,  # the inputs are unit rows; normalising again would cost time
        directions=directions,
        partition_mode="per_direction",
        hardness_mode="in_batch_negatives",
        hardness_strength=job.alpha,
    )
    return lambda query, target: module.compute_loss_from_embeddings([query, target], None)


def open_clip(job: Job) -> Loss:
    """ClipLoss: both directions, no weight."""
    from open_clip.loss import ClipLoss

    module = ClipLoss()
    return lambda query, target: module(query, target, SCALE)


def cut_cross_entropy(job: Job) -> Loss:
    """Exact variant: the default one drops most of a diffuse softmax's gradient."""
    from cut_cross_entropy import linear_cross_entropy

    def loss(query: Tensor, target: Tensor) -> Tensor:
        labels = torch.arange(len(query), device=query.device)
        return linear_cross_entropy(SCALE * query, target, labels, impl="cce_exact")

    return loss


def liger(job: Job) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss()

    def loss(query: Tensor, target: Tensor) -> Tensor:
        labels = torch.arange(len(query), device=query.device)
        return module(target, SCALE * query, labels)

    return loss


def inf_cl(job: Job) -> Loss:
    from inf_cl import cal_flash_loss

    return lambda query, target: (
        (cal_flash_loss(query, target, scale=SCALE) + cal_flash_loss(target, query, scale=SCALE))
        / 2
    )


UNWEIGHTED = {"query_alpha": False, "target_alpha": False}
PEERS: dict[str, Peer] = {
    "llave-torch": Peer(ours("torch")),
    "llave-triton": Peer(ours("triton"), gpu_only=True),
    "authors": Peer(authors),
    "dense": Peer(dense),
    "dense-compiled": Peer(compiled),
    "sentence-transformers": Peer(
        sentence_transformers, package="sentence_transformers", target_alpha=False
    ),
    "open-clip": Peer(open_clip, package="open_clip", **UNWEIGHTED),
    "inf-cl": Peer(inf_cl, package="inf_cl", gpu_only=True, **UNWEIGHTED),
    "cce-exact": Peer(
        cut_cross_entropy,
        package="cut_cross_entropy",
        gpu_only=True,
        one_direction_only=True,
        **UNWEIGHTED,
    ),
    "liger": Peer(
        liger, package="liger_kernel", gpu_only=True, one_direction_only=True, **UNWEIGHTED
    ),
}
# One product each way (2NMD), two gradient products (4NMD), and one recomputation where that is the
# method (2NMD). Symmetric losses of one product do the same work; TFLOP/s is counted alike for all.
FLOPS = {True: 8, False: 6}


def refusals(device: str, symmetric: bool) -> dict[str, str | None]:
    """Each implementation with None, or why it does not take part in this run."""
    found = {name: peer.refusal(device, symmetric) for name, peer in PEERS.items()}
    if not symmetric:
        found["open-clip"] = found["inf-cl"] = "computes both directions"
    if found["llave-triton"] is None:
        found["llave-triton"] = available_backends()["triton"]
    return found
