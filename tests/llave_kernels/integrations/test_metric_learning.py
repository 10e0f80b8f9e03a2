"""Our NT-Xent loss against pytorch-metric-learning's, alone and inside the host's wrappers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers import relative_error
from tests.processes import run

pytest.importorskip("pytorch_metric_learning")

from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from pytorch_metric_learning.utils import loss_and_miner_utils
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

from llave_kernels.integrations.metric_learning import NTXentLoss, SupConLoss

Case = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def rows(n: int, d: int) -> Tensor:
    return torch.randn(n, d) + 0.5


def two_views() -> Case:
    return rows(24, 16), torch.arange(12).repeat(2), None, None


def references_one_match() -> Case:
    return rows(10, 16), torch.randperm(30)[:10], rows(30, 16), torch.arange(30)


def few_classes() -> Case:
    """There are so many pairs that the similarities come from one product."""
    return rows(40, 64), torch.randint(4, (40,)), None, None


def some_positives() -> Case:
    """There are so few pairs that embeddings are gathered. Some anchors have none.

    The labels are no class numbers.
    """
    return rows(40, 3), torch.randint(-90, -60, (40,)), None, None


def references_some_positives() -> Case:
    labels, ref_labels = torch.randint(9, (20,)) / 2, torch.randint(12, (33,)) / 2
    return rows(20, 8), labels, rows(33, 8), ref_labels


CASES = [
    two_views,
    references_one_match,
    few_classes,
    some_positives,
    references_some_positives,
]


def value_and_gradients(loss_fn: Any, case: Case, dtype: torch.dtype) -> list[Tensor]:
    embeddings, labels, ref_emb, ref_labels = case
    given = [x for x in (embeddings, ref_emb) if x is not None]
    leaves = [x.detach().clone().to(dtype).requires_grad_() for x in given]
    reference = {} if ref_emb is None else {"ref_emb": leaves[1], "ref_labels": ref_labels}
    loss = loss_fn(leaves[0], labels, **reference)
    loss.backward(torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape))
    return [loss.detach(), *(x.grad for x in leaves)]


def by_hand(temperature: float, alpha: float) -> Any:
    """The mean over positive pairs, computed one by one."""

    def loss_fn(
        x: Tensor, labels: Tensor, ref_emb: Tensor | None = None, ref_labels: Any = None
    ) -> Tensor:
        y, ref_labels = (x, labels) if ref_emb is None else (ref_emb, ref_labels)
        s = torch.cosine_similarity(x[:, None], y, dim=2)
        z = s / temperature + alpha * s.detach()
        equal = labels[:, None] == ref_labels
        pairs = equal.clone().fill_diagonal_(False) if ref_emb is None else equal
        terms = [
            torch.logaddexp(z[i][~equal[i]].logsumexp(0), s[i, j] / temperature)
            - s[i, j] / temperature
            for i, j in pairs.nonzero().tolist()
        ]
        return torch.stack(terms).mean()

    return loss_fn


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"distance": distances.DotProductSimilarity(normalize_embeddings=False)},
        {"reducer": reducers.DoNothingReducer()},
        {"reducer": reducers.AvgNonZeroReducer()},
        {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.3},
    ],
)
def test_equals_the_host(case: Any, temperature: float, settings: dict[str, Any]) -> None:
    def result(loss_fn: Any) -> list[Tensor]:
        if isinstance(settings.get("reducer"), reducers.DoNothingReducer):
            whole = loss_fn
            loss_fn = lambda *a, **k: whole(*a, **k)["loss"]["losses"]  # noqa: E731
        return value_and_gradients(loss_fn, drawn, torch.float32)

    drawn = case()
    if "distance" in settings:  # the host's exponentials can bear these logits
        drawn = tuple(x if x is None or i % 2 else x / 4 for i, x in enumerate(drawn))
    expected, found = (result(f(temperature, **settings)) for f in (losses.NTXentLoss, NTXentLoss))
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_not_worse_than_the_host(case: Any) -> None:
    """There are several draws: a single loss of the host's may be right by luck."""
    worse = []
    for _ in range(8):
        drawn = tuple(x.bfloat16() if x is not None and x.dim() == 2 else x for x in case())
        truth = value_and_gradients(losses.NTXentLoss(), drawn, torch.float64)
        expected, found = (
            value_and_gradients(f(), drawn, torch.bfloat16) for f in (losses.NTXentLoss, NTXentLoss)
        )
        pairs = zip(found, expected, truth, strict=True)
        worse.append([relative_error(a, c) - relative_error(b, c) for a, b, c in pairs])
    assert (torch.tensor(worse).mean(0) <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    embeddings, labels, *_ = two_views()
    loss, gradient = value_and_gradients(NTXentLoss(), (embeddings, labels, None, None), dtype)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    without = NTXentLoss()(embeddings.to(dtype), torch.arange(len(embeddings)))
    assert without.dtype == dtype


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), torch.tensor([0.5])])
def test_every_kind_of_number_is_taken(number: Any) -> None:
    case = two_views()
    expected = value_and_gradients(losses.NTXentLoss(temperature=number), case, torch.float32)
    found = value_and_gradients(NTXentLoss(temperature=number), case, torch.float32)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-5
    weighted = NTXentLoss(0.5, number)(*case[:2])
    assert torch.equal(weighted, NTXentLoss(0.5, 0.5)(*case[:2]))


@pytest.mark.parametrize("case", CASES)
def test_the_weight_acts_on_all_negatives(case: Any) -> None:
    drawn = case()
    expected = value_and_gradients(by_hand(0.07, 9.0), drawn, torch.float64)
    found = value_and_gradients(NTXentLoss(0.07, 9.0), drawn, torch.float32)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("symmetric", [False, True])
def test_inside_self_supervised_loss(symmetric: bool) -> None:
    views = rows(12, 16), rows(12, 16)
    pair = [losses.SelfSupervisedLoss(f(), symmetric) for f in (losses.NTXentLoss, NTXentLoss)]
    expected, found = (f(*views) for f in pair)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("masked", [False, True])
def test_inside_cross_batch_memory(masked: bool) -> None:
    """The steps fill the memory and wrap around."""
    pair = [losses.CrossBatchMemory(f(), 8, 30) for f in (losses.NTXentLoss, NTXentLoss)]
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


def wrapped() -> list[list[list[Tensor]]]:
    """What each of two processes finds inside the host's distributed wrapper."""
    torch.manual_seed(0)
    batch, labels = rows(20, 8), torch.randint(4, (20,))
    own = (*(x.chunk(2)[dist.get_rank()] for x in (batch, labels)), None, None)
    return [
        [
            value_and_gradients(DistributedLossWrapper(f(), efficient), own, torch.float32)
            for f in pair
        ]
        for efficient in (False, True)
        for pair in ((losses.NTXentLoss, NTXentLoss), (losses.SupConLoss, SupConLoss))
    ]


def test_inside_the_distributed_wrapper() -> None:
    for found in run(__name__, "wrapped", 2, timeout=60):
        for theirs, ours in found:
            for a, b in zip(ours, theirs, strict=True):
                assert relative_error(a, b) < 1e-5


def test_positives_alone_may_be_chosen() -> None:
    embeddings, labels, *_ = few_classes()
    a, p, b, n = loss_and_miner_utils.get_all_pairs_indices(labels)
    some = a[::3], p[::3], b, n
    expected, found = (f()(embeddings, labels, some) for f in (losses.NTXentLoss, NTXentLoss))
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("labels", [torch.arange(6), torch.zeros(6, dtype=torch.int64)])
def test_no_positives_or_no_negatives_is_zero(labels: Tensor) -> None:
    for loss, gradient in (
        value_and_gradients(f(), (rows(6, 4), labels, None, None), torch.float32)
        for f in (losses.NTXentLoss, lambda: NTXentLoss(alpha=9.0))
    ):
        assert loss == 0
        assert not gradient.any()


def test_a_large_loss_keeps_its_gradient() -> None:
    """The host adds the smallest float to its ratio, so its gradient is 0 above a loss of 87."""
    embeddings = torch.tensor([[1.0, 0], [-1, 0], [1, 0], [-1, 0]])
    labels = torch.tensor([0, 0, 1, 1])
    slight = embeddings + 0.1 * torch.randn(4, 2)
    loss, gradient = value_and_gradients(
        NTXentLoss(0.01), (slight, labels, None, None), torch.float32
    )
    truth = value_and_gradients(by_hand(0.01, 0.0), (slight, labels, None, None), torch.float64)
    assert loss > 100
    assert relative_error(loss, truth[0]) < 1e-5
    assert relative_error(gradient, truth[1]) < 1e-5


def test_what_cannot_be_expressed_is_refused() -> None:
    embeddings, labels, *_ = few_classes()
    loss_fn = NTXentLoss(alpha=9.0)
    with pytest.raises(ValueError, match="distance must be CosineSimilarity or DotProductSimil"):
        NTXentLoss(distance=distances.LpDistance())
    with pytest.raises(ValueError, match="power 1"):
        NTXentLoss(distance=distances.CosineSimilarity(power=2))
    with pytest.raises(ValueError, match="temperature must be positive"):
        NTXentLoss(temperature=-1.0)
    with pytest.raises(ValueError, match="labels must be given, got None"):
        loss_fn(embeddings)
    with pytest.raises(ValueError, match="ref_labels must be given, got None"):
        loss_fn(embeddings, labels, ref_emb=embeddings)
    mined = miners.MultiSimilarityMiner()(embeddings, labels)
    message = f"got {len(mined[2])} negative pairs where there are"
    with pytest.raises(ValueError, match=re.escape(message) + ".*leave the miner out"):
        loss_fn(embeddings, labels, mined)
    with pytest.raises(ValueError, match=r"got 3 \(mined triplets\); leave the miner out"):
        loss_fn(embeddings, labels, miners.TripletMarginMiner()(embeddings, labels))
    a, p, b, n = loss_and_miner_utils.get_all_pairs_indices(labels)
    for wrong in ((a, p, b, n.roll(1)), (b, n, b, n), (a, p, b.flip(0), n.flip(0))):
        with pytest.raises(ValueError, match="indices_tuple must be None or list all pairs"):
            loss_fn(embeddings, labels, wrong)
