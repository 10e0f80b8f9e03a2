"""Similarity statistics: how far apart positives and negatives are (paper, Figure 1)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llave_kernels import checks
from llave_kernels.backends.torch_strips import STRIP_BUDGET
from llave_kernels.plots import draw_similarities
from llave_kernels.precision import accumulation_dtype

RANGE = (-1.0, 1.0)
MOST_BINS = 2**24  # float32 has no finer edges


class SimilarityStatistics(NamedTuple):
    """Histograms of the similarities of a batch.

    Attributes:
        edges: (bins + 1,) bin edges from -1 to 1. Similarities outside fall into the outer bins.
        positive: (bins,) int64 counts of the N positive pairs.
        negative: (bins,) int64 counts of the negative pairs.
        positive_mean, negative_mean: 0-d means; NaN where there is no such pair.
        overlap: 0-d area that the two normalised histograms share: 0 if separate, 1 if equal.
    """

    edges: Tensor
    positive: Tensor
    negative: Tensor
    positive_mean: Tensor
    negative_mean: Tensor
    overlap: Tensor

    def plot(self, axes: Any = None, *, title: str = "") -> Any:
        """Draw both histograms as shares of their pairs, and the overlap.

        Args:
            axes: matplotlib ``Axes``. By default those of a new figure.
            title: the title. By default none.

        Returns:
            The ``Axes``.

        Raises:
            ImportError: matplotlib is not installed.
        """
        histograms = self.positive.tolist(), self.negative.tolist()
        return draw_similarities(*histograms, float(self.overlap), axes=axes, title=title)


@torch.no_grad()
def similarity_statistics(
    query: Tensor,
    target: Tensor,
    *,
    labels: Tensor | None = None,
    query_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    bins: int = 100,
) -> SimilarityStatistics:
    """Histograms of ``q_i . t_j`` over positives and negatives.

    The matrix is computed in strips. That takes O(M) memory, not O(N M).

    Args:
        query: (N, D). Rows of unit length give cosine similarities.
        target: (M, D), same dtype and device.
        labels: (N,) column of each row's positive. Default ``arange(N)``.
        query_ids, target_ids: (N,) and (M,) int64 content ids. A negative with its row's id is not
            counted.
        bins: number of histogram bins over [-1, 1], at most 2^24.

    Raises:
        TypeError, ValueError: as in ``hardness_weighted_contrastive_loss``; ``bins`` out of range;
            a similarity that is not finite.
    """
    checks.tensor("query", query)
    checks.tensor("target", target)
    checks.embeddings(query, target)
    if query.is_meta:
        raise ValueError("query must hold numbers, got device meta; move it to another")
    n, m, device = len(query), len(target), query.device
    bins = checks.count("bins", bins, 1, MOST_BINS)
    if labels is None:
        if m < n:
            raise ValueError(f"target has {m} rows for {n} queries; pass labels")
        labels = torch.arange(n, device=device)
    labels = checks.columns("labels", labels, n, m, device)
    checks.ids(query_ids, target_ids, n, m, device)

    dtype = accumulation_dtype(query.dtype)
    positive, negative_counts = (
        torch.zeros(bins, dtype=torch.int64, device=device) for _ in range(2)
    )
    sums = []  # one pair per strip, added at the end: float32 is precise enough for that
    step = max(1, STRIP_BUDGET // (m * dtype.itemsize))
    transposed = target.to(dtype).T
    for start in range(0, n, step):
        rows = slice(start, start + step)
        similarity = query[rows].to(dtype) @ transposed
        if not similarity.isfinite().all():
            raise ValueError(
                f"similarities of query rows {start} to {min(start + step, n) - 1} are not finite; "
                "check query and target"
            )
        own = similarity.gather(1, labels[rows, None])
        counted = torch.ones_like(similarity, dtype=torch.bool).scatter_(
            1, labels[rows, None], False
        )
        if query_ids is not None and target_ids is not None:
            counted &= query_ids[rows, None] != target_ids
        negative = similarity[counted]
        for histogram, values in ((positive, own), (negative_counts, negative)):
            histogram += _bin(values, bins)
        sums.append(torch.stack([own.sum(), negative.sum()]))
    density = [h / h.sum().clamp(min=1) for h in (positive, negative_counts)]
    counts = torch.stack([positive.sum(), negative_counts.sum()])
    means = torch.stack(sums).sum(0) / counts
    return SimilarityStatistics(
        torch.linspace(*RANGE, bins + 1, device=device),
        positive,
        negative_counts,
        means[0],
        means[1],
        torch.minimum(*density).sum(),
    )


def _bin(values: Tensor, bins: int) -> Tensor:
    low, high = RANGE
    index = ((values.flatten() - low) * (bins / (high - low))).floor().clamp(0, bins - 1)
    return torch.bincount(index.long(), minlength=bins)
