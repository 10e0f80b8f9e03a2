"""Our losses with several positives an anchor against pytorch-metric-learning's, at random."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import relative_error
from tests.llave_kernels.integrations.test_metric_learning import rows, value_and_gradients

pytest.importorskip("pytorch_metric_learning")

from pytorch_metric_learning import distances, losses, miners, reducers
from pytorch_metric_learning.utils import loss_and_miner_utils

from llave_kernels import label_pairs, positive_pairs
from llave_kernels.integrations import metric_learning

NAMES = ["SupConLoss", "NTXentLoss"]


def both(name: str) -> tuple[Any, Any]:
    """The host's class and ours."""
    return getattr(losses, name), getattr(metric_learning, name)


def draw(most: int = 24) -> tuple[Any, dict[str, Any], bool]:
    """Embeddings with labels, settings of a loss, and whether all pairs are listed."""
    n, m, d, kinds = (int(x) for x in torch.randint(1, most, (4,)))
    d += 1  # the gradient through a cosine of one dimension is 0
    kind = (torch.int64, torch.int32, torch.float32)[int(torch.randint(3, ()))]
    labels, ref_labels = (torch.randint(-kinds, kinds, (x,)).to(kind) for x in (n, m))
    case = rows(n, d), labels, None, None
    if torch.rand(()) < 0.5:
        case = rows(n, d), labels, rows(m, d), ref_labels
    settings: dict[str, Any] = {"temperature": float(0.05 + torch.rand(()))}
    if torch.rand(()) < 0.3:
        settings["distance"] = distances.DotProductSimilarity(normalize_embeddings=False)
        case = tuple(x if x is None or i % 2 else x / d**0.5 for i, x in enumerate(case))
    kinds_of = (None, None, reducers.MeanReducer, reducers.AvgNonZeroReducer, reducers.SumReducer)
    if reducer := kinds_of[int(torch.randint(5, ()))]:
        settings["reducer"] = reducer()
    return case, settings, bool(torch.rand(()) < 0.3)


def results(
    kind: Any, dtype: torch.dtype, case: Any, listed: bool, settings: dict[str, Any]
) -> list[Tensor]:
    """The loss and its gradients. All pairs are given as ``indices_tuple`` if ``listed``."""

    def loss(x: Tensor, labels: Tensor, **reference: Any) -> Tensor:
        pairs = None
        if listed:
            other = reference.get("ref_labels")
            pairs = loss_and_miner_utils.get_all_pairs_indices(labels, other)
        # A batch without a positive depends on nothing.
        nothing = 0 * sum(y.sum() for y in (x, *reference.values()))
        return kind(**settings)(x, labels, pairs, **reference) + nothing

    return value_and_gradients(loss, case, dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("draws", [60, pytest.param(1000, marks=pytest.mark.long)])
def test_random_settings_equal_the_host(
    name: str, draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several blocks and strips. The host's float64 judges our float64 and float32, in turn."""
    for module, size, value in (
        (positive_pairs, "ROWS", 3),
        (positive_pairs, "COLUMNS", 5),
        (label_pairs, "STRIP", 20),
    ):
        monkeypatch.setattr(module, size, value)
    theirs, ours = both(name)
    for i in range(draws):
        case, settings, listed = draw()

        truth = results(theirs, torch.float64, case, listed, settings)
        dtype, bound = ((torch.float64, 1e-11), (torch.float32, 1e-5))[i % 2]
        found = results(ours, dtype, case, listed, settings)
        for a, b in zip(found, truth, strict=True):
            assert float((a - b).norm()) <= bound * max(float(b.norm()), 1e-2), settings


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_inside_cross_batch_memory(name: str, masked: bool) -> None:
    """The memory wraps around, and a batch stands in it too."""
    pair = [losses.CrossBatchMemory(f(), 8, 30) for f in both(name)]
    mask = torch.arange(12) < 6 if masked else None
    for _ in range(7):
        batch, labels = rows(12, 8), torch.randint(4, (12,))
        results = []
        for memory in pair:
            leaf = batch.clone().requires_grad_()
            loss = memory(leaf, labels, enqueue_mask=mask)
            loss.backward()
            results.append((loss, leaf.grad))
        for a, b in zip(*results, strict=True):
            assert relative_error(b, a) < 1e-5


def test_the_weight_acts_on_negatives_alone() -> None:
    x, labels = rows(20, 8).double(), torch.randint(5, (20,))
    leaf = x.clone().requires_grad_()
    unit = torch.nn.functional.normalize(leaf, dim=1)
    s = unit @ unit.T
    equal = labels[:, None] == labels
    z = (s / 0.2 + 9 * s.detach() * ~equal).fill_diagonal_(-torch.inf)
    pairs = equal.clone().fill_diagonal_(False)
    known = pairs.any(1)
    mean = (s / 0.2 * pairs).sum(1)[known] / pairs.sum(1)[known]
    expected = (z.logsumexp(1)[known] - mean).mean()
    expected.backward(torch.tensor(0.5, dtype=torch.float64))
    loss_fn = metric_learning.SupConLoss(0.2, 9.0)
    found = value_and_gradients(loss_fn, (x, labels, None, None), torch.float64)
    assert relative_error(found[0], expected) < 1e-12
    assert relative_error(found[1], leaf.grad) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_two_classes_never_make_all_similarities(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No product has more elements than a strip or a block."""
    sizes: list[int] = []
    for module in (positive_pairs, label_pairs):
        plain = module.product

        def product(a: Tensor, b: Tensor, plain: Any = plain) -> Tensor:
            sizes.append(len(a) * b.shape[1])
            return plain(a, b)

        monkeypatch.setattr(module, "product", product)
    monkeypatch.setattr(positive_pairs, "ROWS", 8)
    monkeypatch.setattr(positive_pairs, "COLUMNS", 16)
    monkeypatch.setattr(label_pairs, "STRIP", 128)
    case = rows(60, 6), torch.randint(2, (60,)), None, None
    for reducer in (None, reducers.SumReducer()):
        values = [value_and_gradients(f(reducer=reducer), case, torch.float64) for f in both(name)]
        assert relative_error(values[1][0], values[0][0]) < 1e-11
        assert relative_error(values[1][1], values[0][1]) < 1e-11
    assert max(sizes, default=0) <= 128


def test_what_cannot_be_expressed_is_refused() -> None:
    embeddings, labels = rows(20, 8), torch.randint(4, (20,))
    loss_fn = metric_learning.SupConLoss()
    with pytest.raises(ValueError, match=r"use pytorch_metric_learning.losses.SupConLoss for othe"):
        metric_learning.SupConLoss(distance=distances.LpDistance())
    with pytest.raises(ValueError, match="labels must be given, got None"):
        loss_fn(embeddings)
    mined = miners.MultiSimilarityMiner()(embeddings, labels)
    with pytest.raises(ValueError, match=r"leave the miner out, or use pytorch_metric_learning.lo"):
        loss_fn(embeddings, labels, mined)
    a, p, b, n = loss_and_miner_utils.get_all_pairs_indices(labels)
    message = f"or all but one of an anchor, got {len(a[::3])} of"
    with pytest.raises(ValueError, match=re.escape(message)):
        loss_fn(embeddings, labels, (a[::3], p[::3], b, n))
    with pytest.raises(ValueError, match="or all but one of an anchor"):
        loss_fn(embeddings, labels, (*(torch.cat([x, x[:1]]) for x in (a, p)), b, n))
