"""The pairs of equal labels between anchors and references, without an N x M matrix."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from llave_kernels.backends.products import add_product, product
from llave_kernels.precision import accumulation_dtype
from llave_kernels.rules import ELSEWHERE

STRIP = 1 << 21  # similarities made at a time: 8 MiB of float32


class LabelPairs:
    """The pairs of equal labels between N anchors and M references.

    Args:
        labels, ref_labels: (N,), (M,) any dtype.
        itself: whether anchor i is reference i. The two are then no pair.

    Attributes:
        classes, ref_classes: (N,), (M,) int64, the labels numbered from 0.
        own: (N,) a reference that is no pair of the anchor. ``ELSEWHERE`` for none.
        counts: (N,) how many references have each anchor's label.
        first: (N,) a reference of each anchor's class. Any reference where the class has none.
    """

    def __init__(self, labels: Tensor, ref_labels: Tensor, *, itself: bool) -> None:
        n, m = len(labels), len(ref_labels)
        both = torch.cat([labels, ref_labels.to(labels.device)])
        values, numbers = torch.unique(both, return_inverse=True)
        self.classes, self.ref_classes = numbers[:n], numbers[n:]
        sizes = self.ref_classes.bincount(minlength=len(values))
        self._by_class = self.ref_classes.argsort(stable=True)
        self._start = (sizes.cumsum(0) - sizes)[self.classes]
        self.counts = sizes[self.classes]
        self.first = self._by_class[self._start.clamp(max=m - 1)]
        self.own = torch.full_like(self.classes, ELSEWHERE)
        if itself:
            self.own = torch.arange(n, device=labels.device)

    def any_positive(self) -> bool:
        return bool((self.counts > (self.own >= 0)).any())

    def any_negative(self) -> bool:
        return bool((self.counts < len(self.ref_classes)).any())

    def positives(self) -> tuple[Tensor, Tensor]:
        """The (anchor, reference) of all positive pairs, in the host's order."""
        counts = self.counts
        rows = torch.arange(len(counts), device=counts.device)
        anchor = rows.repeat_interleave(counts)
        begin = self._start - (counts.cumsum(0) - counts)
        place = torch.arange(len(anchor), device=counts.device) + begin[anchor]
        positive = self._by_class[place]
        keep = positive != self.own[anchor]
        return anchor[keep], positive[keep]

    def leave_out_rest(self, anchor: Tensor, positive: Tensor) -> bool:
        """Set ``own`` to what these pairs leave out.

        Returns:
            Whether they leave out at most one pair of each anchor, and repeat none.
        """
        number = (anchor * len(self.ref_classes) + positive).sort().values
        missing = self.counts - anchor.bincount(minlength=len(self.counts))
        if (number[1:] == number[:-1]).any() or (missing > 1).any():
            return False
        # The sum of a class's references, without those in the pairs, is the missing one.
        places = torch.arange(len(self.ref_classes), device=anchor.device)
        totals = places.new_zeros(len(self.classes) + len(places))
        totals.index_add_(0, self.ref_classes, places)
        rest = totals[self.classes].index_add(0, anchor, -positive)
        self.own = torch.where(missing == 1, rest, ELSEWHERE)
        return True

    def accept(self, indices_tuple: tuple[Tensor, ...], host: str) -> tuple[Tensor, Tensor]:
        """The positive pairs of a tuple that lists every negative pair once.

        Args:
            host: the class that takes other tuples.
        """
        remedy = (
            f"leave the miner out, or use {host}; all pairs of different labels are negatives here"
        )
        if len(indices_tuple) != 4:
            raise ValueError(
                f"indices_tuple must be None or hold 4 tensors, got {len(indices_tuple)} (mined "
                f"triplets); {remedy}"
            )
        anchor, positive, negatives_anchor, negative = indices_tuple
        n, m = len(self.classes), len(self.ref_classes)
        expected = n * m - int(self.counts.sum())
        number = negatives_anchor * m + negative
        if (
            len(number) != expected
            or not bool((number[1:] > number[:-1]).all())
            or bool((self.classes[negatives_anchor] == self.ref_classes[negative]).any())
            or bool((self.classes[anchor] != self.ref_classes[positive]).any())
        ):
            raise ValueError(
                "indices_tuple must be None or list all pairs of different labels in order, with "
                f"positives of equal labels, got {len(number)} negative pairs where there are "
                f"{expected}, or pairs of other labels; {remedy}"
            )
        return anchor, positive


def similarities(query: Tensor, target: Tensor, anchor: Tensor, positive: Tensor) -> Tensor:
    """(pairs,) similarities in float32 or better, in the way that needs less memory."""
    dtype = accumulation_dtype(query.dtype)
    with torch.autocast(query.device.type, enabled=False):
        query, target = query.to(dtype), target.to(dtype)
        if len(anchor) * query.shape[1] > STRIP:
            found: Tensor = _Similarities.apply(query, target, anchor, positive)
            return found
        return torch.linalg.vecdot(query[anchor], target[positive])


class _Similarities(Function):
    """(pairs,) similarities, from the product of some rows and all columns at a time."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, target: Tensor, anchor: Tensor, positive: Tensor
    ) -> Tensor:
        ctx.save_for_backward(query, target, anchor, positive)
        found = query.new_empty(len(anchor))
        for rows, chosen, place in _strips(query, target, anchor, positive):
            found[chosen] = product(query[rows], target.T)[place]
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, target, anchor, positive = ctx.saved_tensors
        dq, dt = torch.zeros_like(query), torch.zeros_like(target)
        for rows, chosen, place in _strips(query, target, anchor, positive):
            ds = query.new_zeros((len(query[rows]), len(target)))
            ds.index_put_(place, gradient[chosen], accumulate=True)
            dq[rows] = product(ds, target)
            add_product(dt, ds.T, query[rows])
        return dq, dt, None, None


def _strips(
    query: Tensor, target: Tensor, anchor: Tensor, positive: Tensor
) -> Iterator[tuple[slice, Tensor, tuple[Tensor, Tensor]]]:
    """Some rows at a time: which pairs are theirs, and where these are in the rows' product."""
    step = max(1, STRIP // len(target))
    in_order, order = anchor.sort(stable=True)
    starts = torch.arange(0, len(query) + step, step, device=anchor.device)
    bounds = torch.searchsorted(in_order, starts).tolist()
    for strip, (begin, end) in enumerate(pairwise(bounds)):
        chosen = order[begin:end]
        place = anchor[chosen] - strip * step, positive[chosen]
        yield slice(strip * step, (strip + 1) * step), chosen, place
