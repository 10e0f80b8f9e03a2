"""Which pairs count, and which of them carry the hardness weight.

A new pair rule starts here, as an argument in ``RuleArguments`` and a field of ``Rules``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypedDict, get_args, get_type_hints

import torch
from torch import Tensor

Hardness = Literal["in_batch", "hard_negatives", "all"]
HARDNESS_MODES: tuple[str, ...] = get_args(Hardness)
# For backends only: the pairs of one side. No pair carries the weight, so both alphas are 0, and a
# row's own columns do not count.
WITHIN = "within"
ELSEWHERE = -1  # a label: the row's positive is in another process's block


class RuleSettings(TypedDict, total=False):
    """The pair rules that hold for a whole training.

    Attributes:
        alpha: hardness strength, >= 0. 0 gives InfoNCE. Default: 9, as in the paper.
        hardness: which negatives carry the weight. ``"in_batch"`` (default): columns owned by other
            rows, as in the paper. ``"hard_negatives"``: the row's own mined negatives
            (EmbeddingGemma, alpha 5). ``"all"``: both.
        symmetric: also compute the target -> query direction, and average both. Default: True.
        target_alpha: hardness strength of the target -> query direction. Default: ``alpha``.
        false_negative_margin: leave out a negative owned by another row if its similarity exceeds
            the positive's by more than this (Qwen3-Embedding: 0.1). In the target direction, the
            positive is the column's own. The margin never leaves out a row's own mined negatives. A
            margin of 0 keeps ties with the positive, with an allowance for rounding
            (docs/numerics.md). Default: none.
    """

    alpha: float
    hardness: str
    symmetric: bool
    target_alpha: float | None
    false_negative_margin: float | None


class RuleTensors(TypedDict, total=False):
    """The pair rules of one batch of queries (N, D) and targets (M, D), on their device.

    Attributes:
        labels: (N,) integer, column of each row's positive. Default: ``arange(N)``.
        owners: (M,) integer, the column of the positive that each column belongs to. A positive
            belongs to itself. ``range(M)`` says that every column is its own owner, as in a
            gathered batch without mined negatives. It costs less than the same tensor. Default:
            ``arange(M) % N``.
        query_ids: (N,) int64 content ids. A negative with its row's id duplicates the positive and
            is left out. Needs ``target_ids``. Default: none.
        target_ids: (M,) int64 content ids. Needs ``query_ids``.
        query_bias: (N,) float32, or float64 for float64 embeddings, finite. It is added to every
            logit of its row. It may require grad. Default: none.
        target_bias: (M,) the same for the columns. ``-log q_j`` corrects for targets that are
            sampled with the probability ``q_j``.
    """

    labels: Tensor | None
    owners: Tensor | range | None
    query_ids: Tensor | None
    target_ids: Tensor | None
    query_bias: Tensor | None
    target_bias: Tensor | None


class RuleArguments(RuleSettings, RuleTensors, total=False):
    """What the losses take as ``**rules``: ``RuleSettings`` and ``RuleTensors``."""


class Rules(NamedTuple):
    """The pair rules of one call, validated and resolved to what a backend needs.

    Column ``j`` is row ``i``'s own when ``owners[j] == labels[i]``. It is row ``i``'s positive when
    ``j == labels[i]``. Every other column is a negative unless an id or the margin leaves it out.

    Attributes:
        labels: (N,) int64, the column of each row's positive. None: row i's is column i. Backends
            can be faster then. ``ELSEWHERE``: none of the columns is the row's positive or its own.
            All are negatives, and its ``positive`` is NaN.
        owners: (M,) int64, the column of the positive that each column belongs to. None: every
            column is its own owner (no mined negatives). Backends can be faster then.
        query_ids: (N,) int64 content ids, or None. Given together with ``target_ids``.
        target_ids: (M,) int64 content ids, or None.
        row_limit: (N,) the ``margin_limit`` of each row's positive pair. It is given if other
            processes hold some of these pairs. None: it follows from the rows and their labels.
            Backends read it only with a margin.
        column_limit: (M,) the same of each column's positive pair, infinite for a column without
            one. None: it follows from the limits of the rows.
        query_bias: (N,) what is added to the logits of each row, in the accumulation dtype, or
            None. The margin and the hardness weight do not see it.
        target_bias: (M,) the same for each column.
        alpha: hardness strength of the query -> target direction.
        target_alpha: hardness strength of the target -> query direction.
        hardness: one of ``HARDNESS_MODES``, or ``WITHIN``.
        margin: ``false_negative_margin``, or None.
        symmetric: whether the target -> query direction is computed.
    """

    labels: Tensor | None
    owners: Tensor | None
    query_ids: Tensor | None
    target_ids: Tensor | None
    row_limit: Tensor | None
    column_limit: Tensor | None
    query_bias: Tensor | None
    target_bias: Tensor | None
    alpha: float
    target_alpha: float
    hardness: str
    margin: float | None
    symmetric: bool

    @property
    def shared_logits(self) -> bool:
        """Whether a pair has the same logit in both directions. They then share an exponential."""
        return self.margin is None and self.alpha == self.target_alpha

    def arguments(self, m: int) -> RuleArguments:
        """The rules as ``functional.resolve`` takes them for ``m`` columns."""
        # Written out, because torch 2.8 can trace neither _asdict nor zip.
        return {
            "alpha": self.alpha,
            "hardness": self.hardness,
            "symmetric": self.symmetric,
            "target_alpha": self.target_alpha,
            "false_negative_margin": self.margin,
            "labels": self.labels,
            "owners": range(m) if self.owners is None else self.owners,
            "query_ids": self.query_ids,
            "target_ids": self.target_ids,
            "query_bias": self.query_bias,
            "target_bias": self.target_bias,
        }

    def of_prefix(self, k: int) -> Rules:
        """The rules of prefix ``k``, if the limits are (K, N) and (K, M) for K prefixes."""
        if self.row_limit is None:
            return self
        columns = None if self.column_limit is None else self.column_limit[k]
        return self._replace(row_limit=self.row_limit[k], column_limit=columns)

    def labels_of(self, query: Tensor) -> Tensor:
        """(N,) labels. Where they are None, row i's is i."""
        if self.labels is not None:
            return self.labels
        return torch.arange(len(query), device=query.device)

    def add_biases(self, positive: Tensor) -> Tensor:
        """Add the biases to the rows' positives (..., N), in place."""
        if self.query_bias is not None:
            positive += self.query_bias
        if self.target_bias is not None:
            positive += at_labels(self.target_bias, self.labels, positive.shape[-1])
        return positive

    def bias_gradients(self, asked: bool) -> tuple[Tensor | None, Tensor | None]:
        """Zeros for the gradients of the biases that are given, if they are asked for."""
        query, target = biases_of(self)
        return (
            torch.zeros_like(query) if asked and query is not None else None,
            torch.zeros_like(target) if asked and target is not None else None,
        )

    def row_limits(
        self,
        query: Tensor,
        target: Tensor,
        limit: Callable[[Tensor, Tensor, Tensor | None, float], Tensor],
    ) -> Tensor | None:
        """(N,) limits of the rows, or None without a margin. ``limit``: see ``margin_limit``."""
        if self.margin is None:
            return None
        if self.row_limit is not None:
            return self.row_limit
        return limit(query, target, self.labels, self.margin)

    def column_limits(self, rows: Tensor, m: int) -> Tensor:
        """(..., M) limits of the columns, from the limits of the rows (..., N).

        A column takes the limit of the row whose positive it is. Without such a row it is infinite.
        """
        if self.column_limit is not None:
            return self.column_limit
        limits = rows.new_full((*rows.shape[:-1], m + 1), math.inf)
        if self.labels is None:
            limits[..., : rows.shape[-1]] = rows
        else:
            known, safe = inside(self.labels, m)
            columns = torch.where(known, safe, m).expand_as(rows)  # labels outside go to entry m
            limits.scatter_(-1, columns, rows)
        return limits[..., :m]


# Functions, because torch 2.8 cannot trace a property of a NamedTuple.
def biases_of(rules: Rules) -> tuple[Tensor | None, Tensor | None]:
    """``query_bias`` and ``target_bias``."""
    return rules.query_bias, rules.target_bias


def biased(rules: Rules) -> bool:
    """Whether there are biases."""
    return rules.query_bias is not None or rules.target_bias is not None


# One direction without weights. Every column is its own owner.
_PLAIN = dict.fromkeys(Rules._fields) | {
    "alpha": 0.0, "target_alpha": 0.0, "hardness": "in_batch", "symmetric": False,
}  # fmt: skip


def plain_rules(**given: object) -> Rules:
    """Rules of one direction without weights, but for the fields that are given."""
    return Rules(**{**_PLAIN, **given})  # type: ignore[arg-type]


# The fields of ``Rules`` as an operator schema. Tensors come first.
_KINDS = {
    Tensor | None: "Tensor?", float: "float", float | None: "float?", str: "str", bool: "bool",
}  # fmt: skip
_FIELDS = {name: _KINDS[hint] for name, hint in get_type_hints(Rules).items()}
SCHEMA = ", ".join(f"{kind} {name}" for name, kind in _FIELDS.items())
TENSORS = sum(kind.startswith("Tensor") for kind in _FIELDS.values())


def inside(labels: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Whether labels (N,) name one of the ``m`` columns, and labels that are safe to read.

    A label outside becomes 0. On a device the values of labels are not checked, and no backend may
    read beyond its tensors.
    """
    known = (labels >= 0) & (labels < m)  # a clamp fails in Inductor's C++ of torch 2.15
    return known, torch.where(known, labels, 0)


def at_labels(columns: Tensor, labels: Tensor | None, n: int) -> Tensor:
    """(..., N) values of the columns (..., M) at the rows' labels. NaN for a label outside."""
    if labels is None:
        return columns[..., :n]
    known, safe = inside(labels, columns.shape[-1])
    return torch.where(known, columns[..., safe], math.nan)


def default_owners(n: int, m: int, device: torch.device) -> Tensor | None:
    """``j mod N`` for N positives followed by blocks of N mined negatives. None when M == N."""
    return None if m == n else torch.arange(m, device=device) % n


def block_owners(labels: Tensor, m: int) -> Tensor:
    """(M,) owners of columns that form N blocks of M / N. A block belongs to the positive in it.

    If N does not divide M, there are no blocks, and every column is its own owner.

    Args:
        labels: (N,) int64, the column of each row's positive.
    """
    n, columns = len(labels), torch.arange(m, device=labels.device)
    if m % n:
        return columns
    width = m // n
    owners = columns[::width].index_put((labels // width,), labels)
    # A second positive in a block is its own owner.
    return owners.repeat_interleave(width).index_put((labels,), labels)
