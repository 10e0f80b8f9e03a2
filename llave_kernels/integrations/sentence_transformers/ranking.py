"""sentence-transformers' loss with in-batch negatives.

The host takes a softmax over up to four sets of pairs ("directions"). They share one softmax
("joint") or have one each ("per_direction"). Let ``Q`` be the queries, ``P`` their positives and
``C`` all candidates: the positives, then the mined negatives. Each direction is a log-sum-exp per
row. One call of ``contrastive_logsumexp`` gives them all:

| direction | log-sum-exp over | from |
|---|---|---|
| query_to_doc | row i of Q C^T, hardness-weighted | rows |
| doc_to_query | column i of Q C^T | ``symmetric`` |
| query_to_query | row i of Q Q^T but i | ``within`` "query" |
| doc_to_doc | row i of P C^T but i's own candidates | ``within`` "target" |

The positive's logit ``p`` stays out of these. A softmax that holds it k times, beside terms of
log-sum-exp ``n``, has the loss ``log(k e^p + e^n) - p = log k + softplus(n - p - log k)``. It holds
the positive once, from query_to_doc. A joint softmax holds it once more, from doc_to_query.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypedDict, get_args

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.sentence_transformer import losses as host
from torch import Tensor
from torch.nn.functional import normalize

from llave_kernels import checks, dispatch
from llave_kernels.agreement import Peer, Terms, agree, learns
from llave_kernels.distributed import checked, own_logsumexps
from llave_kernels.functional import hardness_weighted_contrastive_loss, logits_of
from llave_kernels.losses import direction_loss, joined
from llave_kernels.matryoshka import Matryoshka

Similarity = Callable[[Tensor, Tensor], Tensor]
Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
PartitionMode = Literal["joint", "per_direction"]
LogSumExps = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
HardnessMode = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]

# Our ``hardness`` by the host's ``hardness_mode``.
HARDNESS = {
    None: "in_batch",  # with a strength of 0
    "in_batch_negatives": "in_batch",
    "hard_negatives": "hard_negatives",
    "all_negatives": "all",
}
# The directions of pairs within a side.
WITHIN = {"query": "query_to_query", "target": "doc_to_doc"}
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


class OwnSettings(TypedDict, total=False):
    """What ``MultipleNegativesRankingLoss`` takes beyond the host, and states."""

    target_hardness_strength: float
    false_negative_margin: float | None
    backend: str


class ModelCard:
    """What the host's model cards print of a loss."""

    def get_config_dict(self) -> dict[str, Any]:
        """The host's settings, and our own where they differ from their defaults."""
        settings: dict[str, Any] = super().get_config_dict()  # type: ignore[misc]
        own = {name: getattr(self, name) for name in OWN_SETTINGS}
        return settings | {name: x for name, x in own.items() if x != OWN_SETTINGS[name]}

    @property
    def citation(self) -> str:
        """The host's citation and LLaVE's."""
        theirs: str = super().citation  # type: ignore[misc]
        return theirs + CITATION


class MultipleNegativesRankingLoss(
    ModelCard,
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
    | all but ``"doc_to_query"``, ``false_negative_margin=0.1`` | Qwen3-Embedding |

    Args:
        model, scale, directions, partition_mode, hardness_mode: as in the host.
        hardness_strength: as in the host. The weight is ``hardness_strength *
            stop_gradient(similarity)``, not scaled, in ``"query_to_doc"`` only.
        similarity_fct: ``cos_sim``, ``dot_score`` or ``model.similarity`` of such a model. For
            any other function the host's own code computes the loss, with one warning.
        gather_across_devices: as in the host: every process's candidates, with gradients.
        target_hardness_strength: the weight in ``"doc_to_query"``, of the pairs that
            ``hardness_mode`` selects. Default 0, as in the host.
        false_negative_margin, backend: as in ``llave_kernels.hardness_weighted_contrastive_loss``.
            In every direction the margin compares with the row's positive.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as in the host, and for settings that do not go together.
            ``target_hardness_strength`` needs ``"doc_to_query"`` and a ``hardness_mode`` that
            selects in-batch pairs. It and ``false_negative_margin`` need a ``similarity_fct`` that
            is fused.

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
        self.nested: Matryoshka | None = None
        self._warned = False
        self.fuses()  # an error or the warning now, not at the first step

    @property
    def fused_similarity(self) -> str | None:
        """``"cosine"``, ``"dot"``, or None for a ``similarity_fct`` that is neither."""
        function = self.similarity_fct
        model = getattr(function, "__self__", None)
        name = None
        if isinstance(model, SentenceTransformer) and function.__name__ == "similarity":
            name = model.similarity_fn_name
        elif function in (util.cos_sim, util.pytorch_cos_sim):
            name = "cosine"
        elif function == util.dot_score:
            name = "dot"
        return name if name in ("cosine", "dot") else None

    def fuses(self) -> bool:
        """Whether our kernels compute ``similarity_fct``. Warns once where they do not.

        Raises:
            ValueError: settings do not go together. They may be assigned at any time.
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
        if self.fused_similarity is not None:
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

    @contextmanager
    def over_prefixes(self, nested: Matryoshka) -> Iterator[None]:
        """Calls inside compute the loss over prefixes of the embeddings, if ``fuses``."""
        self.nested = nested
        try:
            yield
        finally:
            self.nested = None

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        """Loss of anchors, positives and any number of mined negatives, each (N, D); 0-d.

        float32, or float64 for float64 embeddings. ``labels`` is not used, as in the host.
        """
        fuses, peers = self._agreed(embeddings)
        if not fuses:
            return super().compute_loss_from_embeddings(embeddings, labels)
        # float32 at least, as the host's similarities are. Autocast may round them later.
        embeddings = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in embeddings]
        if self.fused_similarity == "cosine" and self.nested is None:  # it normalises prefixes
            embeddings = [normalize(x, dim=-1) for x in embeddings]
        return self._loss(embeddings, peers)

    def fuses_everywhere(self, embeddings: list[Tensor]) -> bool:
        """``fuses``, after a check of the embeddings, here and in the processes that gather."""
        return self._agreed(embeddings)[0]

    def _agreed(self, embeddings: list[Tensor]) -> tuple[bool, list[Peer] | None]:
        """``fuses``, and the processes that gather, None where nothing is gathered."""
        if self.gather_across_devices and dist.is_available() and dist.is_initialized():
            return agree(lambda: (self._fuses_here(embeddings), self._terms(embeddings)), None)
        return self._fuses_here(embeddings), None

    def _fuses_here(self, embeddings: list[Tensor]) -> bool:
        for i, x in enumerate(embeddings):
            checks.tensor(f"embeddings[{i}]", x)
        shapes = [tuple(x.shape) for x in embeddings]
        if len(shapes) < 2 or len({*shapes}) > 1 or len(shapes[0]) != 2:
            raise ValueError(f"embeddings must be 2 or more columns of equal shape, got {shapes}")
        return self.fuses()

    def _terms(self, embeddings: list[Tensor]) -> Terms:
        """What the processes tell each other before they gather."""
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
        settings |= self._prefixes()
        n = len(embeddings[0])
        return Terms(Peer(n, n), settings, torch.as_tensor(self.scale, dtype=torch.float64))

    def _loss(self, columns: list[Tensor], peers: list[Peer] | None) -> Tensor:
        """Mean loss of this process's rows; 0-d.

        Args:
            columns: queries, positives and mined negatives of this process, each (N, D).
            peers: the processes whose candidates count, None for this process alone.
        """
        query, candidates = columns[0], torch.cat(columns[1:])
        to_query = "doc_to_query" in self.directions
        rules: dict[str, Any] = {
            "alpha": self.hardness_strength if self.hardness_mode is not None else 0.0,
            "target_alpha": self.target_hardness_strength,
            "hardness": HARDNESS[self.hardness_mode],
            "false_negative_margin": self.false_negative_margin,
            "symmetric": to_query,
            "within": [side for side, name in WITHIN.items() if name in self.directions],
        }
        if peers is None and not to_query:
            return hardness_weighted_contrastive_loss(
                query, candidates, logit_scale=self.scale, backend=self.backend, **rules,
                **self._prefixes(),
            )  # fmt: skip
        logsumexps = self._here if peers is None else partial(self._over_processes, peers)
        positive, *found = logsumexps(query, candidates, **rules)
        terms = [lse for lse in found if lse is not None]
        if self.partition_mode == "per_direction":
            return self._mean(direction_loss(positive, torch.stack(terms)).mean(0))
        log_k = math.log(1 + to_query)  # the softmax holds the positive once or twice
        return self._mean(log_k + direction_loss(positive + log_k, joined(*terms)))

    def _mean(self, loss: Tensor) -> Tensor:
        """The mean () of a loss for each row, (N,) or (K, N) over prefixes."""
        return (loss if self.nested is None else self.nested.summed(loss)).mean()

    def _prefixes(self) -> dict[str, Any]:
        """The arguments of our functions that ask for the loss over prefixes."""
        if self.nested is None:
            return {}
        dims, weights = self.nested
        return {"matryoshka_dims": dims, "matryoshka_weights": weights}

    def _here(self, query: Tensor, target: Tensor, **rules: Any) -> LogSumExps:
        """The positives' logits, and log-sum-exps of rows, of their positives' columns, within."""
        dims = self.nested and self.nested.dims
        given = {"logit_scale": self.scale, "backend": self.backend, "dims": dims, **rules}
        found = logits_of(query, target, **given)
        column = None if found.target is None else found.target[..., : len(query)]
        return found.positive, found.query, column, found.within

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _over_processes(
        self, peers: list[Peer], query: Tensor, target: Tensor, **rules: Any
    ) -> LogSumExps:
        """The same over the rows of all processes, which all have as many."""
        given = {"logit_scale": self.scale, "backend": self.backend, **rules, **self._prefixes()}
        call, terms = checked(query, target, settings={}, **given)
        parts = [terms.part._replace(node=peer.node) for peer in peers]
        return own_logsumexps(call, None, parts)


OWN_SETTINGS: dict[str, Any] = MultipleNegativesRankingLoss.__init__.__kwdefaults__ or {}
