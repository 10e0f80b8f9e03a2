"""The figure of similarities, and what is said where matplotlib is missing."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from llave_kernels import similarity_statistics
from llave_kernels.plots import draw_similarities


def test_the_figure_shows_the_shares_and_the_overlap() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    torch.manual_seed(0)
    query, target = (normalize(torch.rand(57, 5), dim=1) for _ in range(2))
    found = similarity_statistics(query, target, bins=30)
    axes = found.plot(title="a title")
    drawn = {patch.get_label(): patch for patch in axes.patches}
    assert axes.get_title() == "a title"
    similarity = query.double() @ target.double().T
    own = torch.eye(57, dtype=torch.bool)
    shares = {}
    for label, values in (("positives", similarity[own]), ("negatives", similarity[~own])):
        counts = np.histogram(values.numpy(), 30, (-1, 1))[0]
        heights, edges, _ = drawn[label].get_data()
        low = round((edges[0] + 1) * 15)
        shares[label] = np.zeros(30)
        shares[label][low : low + len(heights)] = heights
        np.testing.assert_allclose(shares[label], counts / counts.sum())
    assert edges[0] > -0.5  # empty outer bins are not drawn
    overlap = np.minimum(*shares.values()).sum()
    assert f"overlap {overlap:.3f}" in drawn
    assert 0 < overlap < 1


def test_axes_may_be_given_and_counts_may_be_zero() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    assert draw_similarities([0, 0], [0, 0], 0.0, axes=axes) is axes
    figure.canvas.draw()


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="a plot needs matplotlib: pip install matplotlib"):
        similarity_statistics(torch.eye(3), torch.eye(3)).plot()
