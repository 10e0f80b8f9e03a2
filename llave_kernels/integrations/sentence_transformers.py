"""sentence-transformers' in-batch negatives losses, fused.

A softmax that holds the positive k times, beside terms of log-sum-exp ``n``, has the loss
``log(k e^p + e^n) - p = log k + softplus(n - p - log k)``. With ``Q`` the anchors, ``P`` the
positives and ``C`` all candidates (positives, then mined negatives) the terms are

| direction | log-sum-exp over | kernel call |
|---|---|---|
| query_to_doc | row i of Q C^T, hardness-weighted; its positive is a term | (Q, C) |
| doc_to_query | column i of Q C^T; its positive is a term, once more where the softmax is joint | the target direction of (Q, C); gathered: (P, Q) |
| query_to_query | row i of Q Q^T but i | (Q, Q) |
| doc_to_doc | row i of P C^T but i's own candidates | (P, C) |
"""  # noqa: E501

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.sentence_transformer import losses as host
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from llave_kernels import checks, dispatch
from llave_kernels.agreement import Peer, Terms, agree, learns
from llave_kernels.functional import contrastive_logsumexp, hardness_weighted_contrastive_loss
from llave_kernels.integrations.minibatches import sliceable as _sliceable

Similarity = Callable[[Tensor, Tensor], Tensor]
Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
PartitionMode = Literal["joint", "per_direction"]
HardnessMode = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]

# With their defaults.
OWN_SETTINGS = {"target_hardness_strength": 0.0, "false_negative_margin": None, "backend": "auto"}
HARDNESS = {
    None: "in_batch",  # with a strength of 0
    "in_batch_negatives": "in_batch",
    "hard_negatives": "hard_negatives",
    "all_negatives": "all",
}
CITATION = """
@misc{lan2025llave,
    title={LLaVE: Large Language and Vision Embedding Models with Hardness-Weighted Contrastive Learning},
    author={Zhibin Lan and Liqiang Niu and Fandong Meng and Jie Zhou and Jinsong Su},
    year={2025},
    eprint={2503.04812},
    archivePrefix={arXiv},
    primaryClass={cs.CV}
}
"""  # noqa: E501


class _ModelCard:
    """What the host's model cards print."""

    def get_config_dict(self) -> dict[str, Any]:
        """The host's settings, and those of ours that are not at their defaults."""
        settings: dict[str, Any] = super().get_config_dict()  # type: ignore[misc]
        own = {name: getattr(self, name) for name in OWN_SETTINGS}
        return settings | {name: x for name, x in own.items() if x != OWN_SETTINGS[name]}

    @property
    def citation(self) -> str:
        """The host's citation and LLaVE's."""
        theirs: str = super().citation  # type: ignore[misc]
        return theirs + CITATION


class MultipleNegativesRankingLoss(
    _ModelCard,
    host.MultipleNegativesRankingLoss,  # type: ignore[misc]
):
    """The host's ``MultipleNegativesRankingLoss`` without its similarity matrices.

    Same constructor, same call, same value and gradients for every setting. The loss is float32, or
    float64 for float64 embeddings.

    | setting | in the literature |
    |---|---|
    | default | InfoNCE |
    | ``directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"`` | CLIP |
    | the same with ``hardness_mode="in_batch_negatives"``, both strengths 9, ``scale=50`` | LLaVE |
    | ``hardness_mode="hard_negatives", hardness_strength=5`` | EmbeddingGemma |
    | all four directions, ``partition_mode="joint"`` | GTE |

    Args:
        model, scale, directions, partition_mode, hardness_mode, hardness_strength: as in the host.
            The weight is ``hardness_strength * stop_gradient(similarity)``, not scaled, in
            ``"query_to_doc"`` only.
        similarity_fct: ``cos_sim``, ``dot_score`` or ``model.similarity`` of such a model. For
            any other function the host's own code computes the loss, with one warning.
        gather_across_devices: as in the host: every process's candidates, with gradients.
        target_hardness_strength: the weight in ``"doc_to_query"`` too, of the pairs that
            ``hardness_mode`` selects. Default 0, as in the host.
        false_negative_margin: leave out negatives of other rows that are more similar than the
            positive by more than this (Qwen3-Embedding: 0.1). Default: none are left out.
        backend: as in ``llave_kernels.hardness_weighted_contrastive_loss``.

    Raises:
        ValueError: as in the host; ``target_hardness_strength`` where it would have no effect;
            ``false_negative_margin`` with ``"query_to_query"`` or ``"doc_to_doc"``, which hold no
            positive to compare with; either of the two with a ``similarity_fct`` that the host
            computes.

    Example:
        >>> loss = MultipleNegativesRankingLoss(
        ...     model, scale=50.0, hardness_mode="in_batch_negatives", hardness_strength=9.0
        ... )
        >>> SentenceTransformerTrainer(model=model, train_dataset=pairs, loss=loss).train()
    """

    def __init__(
        self,
        model: Any,
        scale: float = 20.0,
        similarity_fct: Similarity = util.cos_sim,
        gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: PartitionMode = "joint",
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 0.0,
        *,
        target_hardness_strength: float = 0.0,
        false_negative_margin: float | None = None,
        backend: str = "auto",
    ) -> None:
        learnable = isinstance(scale, Tensor) and scale.requires_grad
        number = scale if learnable else checks.number("scale", scale, torch.float32)
        if not callable(similarity_fct):
            raise TypeError(
                f"similarity_fct must be a function, got {checks.typed(similarity_fct)}"
            )
        for direction in directions if isinstance(directions, (tuple, list, set)) else [directions]:
            checks.one_of("directions", direction, get_args(Direction))
        checks.flag("gather_across_devices", gather_across_devices)
        checks.one_of("partition_mode", partition_mode, get_args(PartitionMode))
        if hardness_mode is not None:
            checks.one_of("hardness_mode", hardness_mode, get_args(HardnessMode))
        hardness_strength = checks.strength("hardness_strength", hardness_strength)
        super().__init__(
            model, number, similarity_fct, gather_across_devices, directions, partition_mode,
            hardness_mode, hardness_strength,
        )  # fmt: skip
        if not learnable:
            checks.positive("scale", scale)
        self.target_hardness_strength = checks.strength(
            "target_hardness_strength", target_hardness_strength
        )
        self.false_negative_margin = checks.margin(false_negative_margin)
        self.backend = dispatch.known(backend)
        self._warned = False
        self.fuses()  # an error or the warning now, not at the first step

    def fuses(self) -> bool:
        """Whether our kernels compute ``similarity_fct``; warns once if they do not.

        Raises:
            ValueError: settings, which may be assigned at any time, do not go together.
        """
        strength, margin = self.target_hardness_strength, self.false_negative_margin
        if strength > 0 and (
            "doc_to_query" not in self.directions or self.hardness_mode in (None, "hard_negatives")
        ):
            raise ValueError(
                f"target_hardness_strength={strength} has no effect: it needs 'doc_to_query' in "
                "directions and hardness_mode 'in_batch_negatives' or 'all_negatives', got "
                f"{self.directions} and {self.hardness_mode!r}"
            )
        same_type = sorted({"query_to_query", "doc_to_doc"}.intersection(self.directions))
        if margin is not None and same_type:
            raise ValueError(
                f"false_negative_margin={margin} compares queries with documents; leave "
                f"{', '.join(same_type)} out of directions"
            )
        if _similarity_name(self.similarity_fct) is not None:
            return True
        name = util.similarity_fct_name(self.similarity_fct)
        if strength > 0 or margin is not None:
            raise ValueError(
                "target_hardness_strength and false_negative_margin need similarity_fct cos_sim or "
                f"dot_score, got {name}"
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"similarity_fct={name} is neither cosine nor dot product: "
                "sentence-transformers computes the loss, from dense similarity matrices",
                stacklevel=3,
            )
        return False

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        """Loss of anchors, positives and any number of mined negatives, each (N, D); 0-d.

        float32, or float64 for float64 embeddings. ``labels`` is not used, as in the host.
        """
        if not self.fuses_all(embeddings):
            return super().compute_loss_from_embeddings(embeddings, labels)
        # In float32 at least, like the host's similarities; autocast has its own say later.
        embeddings = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in embeddings]
        if _similarity_name(self.similarity_fct) == "cosine":
            embeddings = [normalize(x, dim=-1) for x in embeddings]
        (query, positive), gathered, first = embeddings[:2], embeddings, 0
        if self.gather_across_devices:
            first = util.get_rank() * len(query)
            gathered = [util.all_gather_with_grad(x) for x in embeddings]
        rows = torch.arange(first, first + len(query), device=query.device)
        return self._loss(query, positive, gathered, rows)

    def fuses_all(self, embeddings: list[Tensor]) -> bool:
        """``fuses``, of good embeddings; the processes have agreed on what they gather."""
        if self.gather_across_devices and dist.is_available() and dist.is_initialized():
            return agree(lambda: (self._fuses(embeddings), self._terms(embeddings)), None)[0]
        return self._fuses(embeddings)

    def _fuses(self, embeddings: list[Tensor]) -> bool:
        for i, x in enumerate(embeddings):
            checks.tensor(f"embeddings[{i}]", x)
        shapes = [tuple(x.shape) for x in embeddings]
        if len(shapes) < 2 or len({*shapes}) > 1 or len(shapes[0]) != 2:
            raise ValueError(f"embeddings must be 2 or more columns of equal shape, got {shapes}")
        return self.fuses()

    def _terms(self, embeddings: list[Tensor]) -> Terms:
        """What the processes tell each other before they gather. None has a part of its own."""
        settings: dict[str, Any] = {
            "the loss": "MultipleNegativesRankingLoss",
            "the number of columns": len(embeddings),
            "their shape": tuple(embeddings[0].shape),
            "their dtypes": [str(x.dtype) for x in embeddings],
            "their requires_grad": [learns(x) for x in embeddings],
            "similarity_fct": util.similarity_fct_name(self.similarity_fct),
        }
        names = "directions", "partition_mode", "hardness_mode", "hardness_strength", *OWN_SETTINGS
        settings |= {name: getattr(self, name) for name in names}
        rows = len(embeddings[0])
        return Terms(Peer(rows, rows), settings, torch.as_tensor(self.scale, dtype=torch.float64))

    def _loss(
        self, query: Tensor, positive: Tensor, gathered: list[Tensor], rows: Tensor
    ) -> Tensor:
        """Loss of this process's ``query`` and ``positive`` (N, D), at ``rows`` of ``gathered``."""
        queries, target = gathered[0], torch.cat(gathered[1:])
        owners = torch.arange(len(target), device=rows.device) % len(queries)
        to_query, to_same_query, to_same_doc = (
            name in self.directions for name in ("doc_to_query", "query_to_query", "doc_to_doc")
        )
        settings: dict[str, Any] = {
            "logit_scale": self.scale,
            "hardness": HARDNESS[self.hardness_mode],
            "false_negative_margin": self.false_negative_margin,
            "backend": self.backend,
            "labels": rows,
        }
        one_way = settings | {"symmetric": False, "alpha": 0.0}
        main = settings | {
            "alpha": self.hardness_strength if self.hardness_mode is not None else 0.0,
            "target_alpha": self.target_hardness_strength,
            # Gathered, the columns of this process's documents are not complete.
            "symmetric": to_query and len(queries) == len(query),
            "owners": None if len(target) == len(query) else owners,
        }
        if not (to_query or to_same_query or to_same_doc):
            return hardness_weighted_contrastive_loss(query, target, **main)

        logits = contrastive_logsumexp(query, target, **main)
        terms = [logits.query]
        if logits.target is not None:
            terms.append(logits.target[rows])
        elif to_query:
            back = one_way | {"alpha": self.target_hardness_strength}
            back["owners"] = owners[: len(queries)]
            terms.append(contrastive_logsumexp(positive, queries, **back).query)
        if self.partition_mode == "per_direction":
            return -logsigmoid(logits.positive - torch.stack(terms)).mean()
        if to_same_query:
            terms.append(contrastive_logsumexp(query, queries, **one_way).query)
        if to_same_doc:
            one_way |= {"query_ids": rows, "target_ids": owners}
            terms.append(contrastive_logsumexp(positive, target, **one_way).query)
        # Of a batch of one every term is -inf, where the gradient of logsumexp is NaN.
        finite = torch.stack(terms).clamp(min=torch.finfo(logits.positive.dtype).min)
        several = math.log(1 + to_query)  # the softmax holds the positive once or twice
        return several - logsigmoid(logits.positive + several - finite.logsumexp(0)).mean()


class CachedMultipleNegativesRankingLoss(
    _ModelCard,
    host.CachedMultipleNegativesRankingLoss,  # type: ignore[misc]
):
    """The host's ``CachedMultipleNegativesRankingLoss`` with our ``MultipleNegativesRankingLoss``.

    Same constructor, same call, same value and gradients for every setting. Embeddings are made in
    mini-batches; the loss itself needs none.

    Mini-batches of images: where a processor stacks all images of a batch (LLaVA-OneVision: any
    number per sample), ``pixel_values`` and ``image_sizes`` are cut by images per sample, which
    ``num_images_per_sample`` tells (the host's ``Transformer`` adds it to messages), or else
    ``batch_num_images`` (from transformers' processor).

    Args:
        model, scale, similarity_fct, gather_across_devices, directions, partition_mode,
            hardness_mode, hardness_strength, target_hardness_strength, false_negative_margin,
            backend: as in ``MultipleNegativesRankingLoss``.
        mini_batch_size, mini_batch_num_tokens, show_progress_bar: as in the host.

    Raises:
        ValueError: as in ``MultipleNegativesRankingLoss``; in the call, a feature that is not
            indexed by sample and cannot be cut.

    Example:
        >>> loss = CachedMultipleNegativesRankingLoss(model, scale=50.0, mini_batch_size=16)
    """

    _delegated_to_wrapped_loss = (
        host.CachedMultipleNegativesRankingLoss._delegated_to_wrapped_loss + tuple(OWN_SETTINGS)
    )

    def __init__(
        self,
        model: Any,
        scale: float = 20.0,
        similarity_fct: Similarity = util.cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: PartitionMode = "joint",
        show_progress_bar: bool = False,
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 0.0,
        *,
        target_hardness_strength: float = 0.0,
        false_negative_margin: float | None = None,
        backend: str = "auto",
    ) -> None:
        checks.count("mini_batch_size", mini_batch_size, 1)
        super().__init__(
            model, mini_batch_size=mini_batch_size, mini_batch_num_tokens=mini_batch_num_tokens,
            show_progress_bar=show_progress_bar,
        )  # fmt: skip
        self.loss = MultipleNegativesRankingLoss(
            model, scale, similarity_fct, gather_across_devices, directions, partition_mode,
            hardness_mode, hardness_strength, target_hardness_strength=target_hardness_strength,
            false_negative_margin=false_negative_margin, backend=backend,
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        """Ours live on the wrapped loss, beside the host's, which are properties."""
        found = super().__getattr__
        return getattr(found("loss"), name) if name in OWN_SETTINGS else found(name)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Loss of each column's mini-batches of embeddings, (mini_batch_size, D) each; 0-d.

        With ``with_backward`` the embeddings receive their gradients and the loss is detached.
        """
        embeddings = [torch.cat(column) for column in reps]
        if _similarity_name(self.loss.similarity_fct) is None:
            self.loss.fuses_all(embeddings)
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        loss = self.loss.compute_loss_from_embeddings(embeddings, labels)
        if with_backward:
            loss.backward()  # type: ignore[no-untyped-call]
            loss = loss.detach()
        return loss

    def embed_minibatch(
        self, sentence_feature: dict[str, Any], begin: int, end: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """The host's, for features that its slicing cuts by sample."""
        features = _sliceable(sentence_feature)
        return super().embed_minibatch(features, begin, end, *args, **kwargs)


def _similarity_name(similarity_fct: Any) -> str | None:
    """``"cosine"``, ``"dot"``, or None for what is neither."""
    model = getattr(similarity_fct, "__self__", None)
    name = None
    if isinstance(model, SentenceTransformer) and similarity_fct.__name__ == "similarity":
        name = model.similarity_fn_name
    elif similarity_fct in (util.cos_sim, util.pytorch_cos_sim):
        name = "cosine"
    elif similarity_fct == util.dot_score:
        name = "dot"
    return name if name in ("cosine", "dot") else None
