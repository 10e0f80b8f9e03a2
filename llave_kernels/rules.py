"""Which pairs count, and which of them carry the hardness weight."""

from __future__ import annotations

import math
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

HARDNESS_MODES = ("in_batch", "hard_negatives", "all")


class Rules(NamedTuple):
    """The pair rules of one call, validated and resolved to what a backend needs.

    Column ``j`` is row ``i``'s own when ``owners[j] == labels[i]``. It is row ``i``'s positive when
    ``j == labels[i]``. Every other column is a negative unless an id or the margin leaves it out.

    Attributes:
        labels: (N,) int64, the column of each row's positive.
        owners: (M,) int64, the column of the positive each column goes with, or None where every
            column is its own owner (no mined negatives), which backends can treat faster.
        query_ids: (N,) int64 content ids, or None. Given together with ``target_ids``.
        target_ids: (M,) int64 content ids, or None.
        column_limit: (M,) the ``margin_limit`` of each column's positive pair, infinite where it
            has none, where rows elsewhere hold some of these pairs; None: the rows at hand tell.
            Read with a margin only.
        alpha: hardness strength of the query -> target direction.
        target_alpha: hardness strength of the target -> query direction.
        hardness: one of ``HARDNESS_MODES``.
        margin: ``false_negative_margin``, or None.
        symmetric: whether the target -> query direction is computed.
    """

    labels: Tensor
    owners: Tensor | None
    query_ids: Tensor | None
    target_ids: Tensor | None
    column_limit: Tensor | None
    alpha: float
    target_alpha: float
    hardness: str
    margin: float | None
    symmetric: bool

    @property
    def shared_logits(self) -> bool:
        """Whether a pair has the same logit in both directions: one exponential serves both."""
        return self.margin is None and self.alpha == self.target_alpha

    def column_limits(self, rows: Tensor, m: int) -> Tensor:
        """(M,) the limits of the rows (N,) whose positives the columns are; infinite where a column
        is nobody's."""
        if self.column_limit is not None:
            return self.column_limit
        known, safe = inside(self.labels, m)
        place = torch.where(known, safe, m)  # labels outside go where nobody looks
        return rows.new_full((m + 1,), math.inf).scatter_(0, place, rows)[:m]


# The fields in the language of operator schemas. Tensors come first.
_KINDS = {
    Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", float | None: "float?",
    str: "str", bool: "bool",
}  # fmt: skip
_FIELDS = {name: _KINDS[hint] for name, hint in get_type_hints(Rules).items()}
SCHEMA = ", ".join(f"{kind} {name}" for name, kind in _FIELDS.items())
TENSORS = sum(kind.startswith("Tensor") for kind in _FIELDS.values())


def inside(labels: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Whether labels (N,) name one of the ``m`` columns, and what to read: any column for those
    outside. On a device their values are not checked, and no backend may read beyond its tensors.
    """
    known = (labels >= 0) & (labels < m)  # Inductor's C++ of torch 2.15 fails for a clamp
    return known, torch.where(known, labels, 0)


def at_labels(columns: Tensor, labels: Tensor) -> Tensor:
    """(N,) the columns' values (M,) at the labels, NaN for a label outside."""
    known, safe = inside(labels, len(columns))
    return torch.where(known, columns[safe], math.nan)


def default_owners(n: int, m: int, device: torch.device) -> Tensor | None:
    """``j mod N``: N positives first, then blocks of N mined negatives. None when M == N."""
    return None if m == n else torch.arange(m, device=device) % n
