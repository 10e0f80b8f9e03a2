"""Draw the similarities of positives and negatives (paper, Figure 1). It needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def draw_similarities(
    positive: Sequence[int],
    negative: Sequence[int],
    overlap: float,
    *,
    axes: Any = None,
    title: str = "",
) -> Any:
    """Draw two histograms over [-1, 1] as shares of their pairs, and the area that both have.

    Args:
        positive, negative: counts in equal bins over [-1, 1]. Empty outer bins are not drawn.
        overlap: the area that both have, for the legend.
        axes: matplotlib ``Axes``. By default those of a new figure.
        title: the title.

    Returns:
        The ``Axes``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if axes is None:
        axes = pyplot().subplots()[1]
    shares = [np.asarray(counts) / max(1, sum(counts)) for counts in (negative, positive)]
    edges = np.linspace(-1, 1, len(positive) + 1)
    both = np.minimum(*shares)
    filled = np.flatnonzero(sum(shares))
    drawn = slice(filled[0], filled[-1] + 1) if len(filled) else slice(None)
    edges = edges[drawn.start : None if drawn.stop is None else drawn.stop + 1]
    for share, colour, label in zip(shares, ("C3", "C2"), ("negatives", "positives"), strict=True):
        axes.stairs(share[drawn], edges, fill=True, color=colour, alpha=0.5, label=label)
    axes.stairs(both[drawn], edges, color="0.2", label=f"overlap {overlap:.3f}")
    axes.set(title=title, xlabel="similarity", ylabel="share of pairs")
    axes.legend(fontsize=8)
    return axes


def pyplot() -> Any:
    """Return ``matplotlib.pyplot``. Raise ImportError with the remedy where there is none."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(f"a plot needs matplotlib: pip install matplotlib ({error})") from error
    return pyplot
