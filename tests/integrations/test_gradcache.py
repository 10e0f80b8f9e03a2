"""The GradCache family's losses against the packages themselves, alone and in two processes."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from llave_kernels import hardness_weighted_contrastive_loss
from llave_kernels.integrations.gradcache import (
    ContrastiveLoss,
    DistributedContrastiveLoss,
    UnscaledDistributedContrastiveLoss,
)
from llave_kernels.reference import reference_loss
from tests.helpers import embeddings, relative_error
from tests.processes import run

WORLD = 2
SCALED = [(reduction, scale) for reduction in ("mean", "sum") for scale in (True, False)]


def host(module: str) -> Any:
    """A module of GradCache, which PyPI installs as ``gradcache`` but imports as ``grad_cache``."""
    if "grad_cache" not in sys.modules and importlib.util.find_spec("grad_cache") is None:
        sys.modules["grad_cache"] = pytest.importorskip("gradcache")
    return importlib.import_module(f"grad_cache.{module}")


def value_and_gradients(loss_fn: Any, *inputs: Tensor, **arguments: Any) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = loss_fn(*leaves, **arguments)
    loss.backward(torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape))
    return [loss.detach(), *(x.grad for x in leaves)]


def divided(loss_fn: Any, temperature: float) -> Any:
    """A host's loss without a temperature, given one."""
    return lambda x, y, **arguments: loss_fn(x / temperature, y, **arguments)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_equals_the_host(temperature: float, width: int, explicit: bool, reduction: str) -> None:
    theirs = host("loss").SimpleContrastiveLoss(n_hard_negatives=width - 1)
    x, y = embeddings(17, 17 * width, 24)
    target = torch.randint(17 * width, (17,)) if explicit else None
    arguments = {"target": target, "reduction": reduction}
    expected = value_and_gradients(divided(theirs, temperature), x, y, **arguments)
    found = value_and_gradients(ContrastiveLoss(temperature), x, y, **arguments)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("width", [1, 3])
def test_bfloat16_is_not_worse_than_the_host(width: int) -> None:
    theirs = divided(host("loss").SimpleContrastiveLoss(width - 1), 0.05)
    x, y = embeddings(64, 64 * width, 32, torch.bfloat16)
    truth = value_and_gradients(theirs, x.double(), y.double())
    expected, found = (value_and_gradients(f, x, y) for f in (theirs, ContrastiveLoss(0.05)))
    for a, b, c in zip(found, expected, truth, strict=True):
        assert relative_error(a, c) <= relative_error(b, c)


@pytest.mark.parametrize("hardness", ["in_batch", "hard_negatives", "all"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mined_negatives_are_told_by_their_block(hardness: str, symmetric: bool) -> None:
    """Against the package's own layout: all positives, then blocks of mined negatives."""
    n, width = 9, 3
    x, y = embeddings(n, n * width, 16)
    settings = {"hardness": hardness, "symmetric": symmetric, "false_negative_margin": 0.1}
    loss_fn = ContrastiveLoss(0.05, 9.0, **settings)
    ids = {"query_ids": torch.randint(5, (n,)), "target_ids": torch.randint(5, (n * width,))}
    found = value_and_gradients(loss_fn, x, y, **ids)
    order = torch.arange(n * width).view(n, width).T.flatten()

    def own_layout(x: Tensor, y: Tensor) -> Tensor:
        ours = {"query_ids": ids["query_ids"], "target_ids": ids["target_ids"][order]}
        return reference_loss(x, y[order], logit_scale=20.0, alpha=9.0, **settings, **ours)

    for a, b in zip(found, value_and_gradients(own_layout, x.double(), y.double()), strict=True):
        assert relative_error(a, b) < 1e-5
    # The same positives given by hand, and last in their blocks.
    last = torch.arange(width - 1, n * width, width)
    rolled = y.view(n, width, -1).roll(-1, 1).flatten(0, 1)
    ids["target_ids"] = ids["target_ids"].view(n, width).roll(-1, 1).flatten()
    assert relative_error(loss_fn(x, rolled, target=last, **ids), found[0]) < 1e-6


def test_without_blocks_every_other_target_is_in_batch() -> None:
    x, y = embeddings(4, 10, 3)
    labels = torch.tensor([9, 2, 2, 0])
    found = ContrastiveLoss(0.05, 9.0)(x, y, target=labels)
    expected = hardness_weighted_contrastive_loss(
        x, y, logit_scale=20.0, labels=labels, owners=torch.arange(10), symmetric=False
    )
    assert relative_error(found, expected) < 1e-6


def encoders() -> list[nn.Module]:
    torch.manual_seed(1)
    widths = (11, 16), (7, 16)
    return [nn.Sequential(nn.Linear(i, o), nn.Tanh(), nn.Linear(o, 12)) for i, o in widths]


def unit(x: Tensor) -> Tensor:
    return normalize(x, dim=1)


@pytest.mark.parametrize("ids", [False, True])
def test_inside_the_gradient_cache(ids: bool) -> None:
    """Chunks through the real wrapper give the gradients of the whole batch at once."""
    loss_fn = ContrastiveLoss(0.05, 9.0)
    inputs = torch.randn(10, 11), torch.randn(20, 7)
    given = {"query_ids": torch.arange(10) % 7, "target_ids": torch.arange(20) % 9} if ids else {}
    whole, cached = encoders(), encoders()
    expected = loss_fn(*(unit(f(x)) for f, x in zip(whole, inputs, strict=True)), **given)
    expected.backward()
    cache = host("grad_cache").GradCache(cached, [3, 6], loss_fn, get_rep_fn=unit)
    assert relative_error(cache(*inputs, **given), expected) < 1e-6
    for a, b in zip(cached, whole, strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert relative_error(p.grad, q.grad) < 1e-5


def global_batch(width: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(width)
    return embeddings(6 * WORLD, 6 * WORLD * width, 8)


def own_rows(*tensors: Tensor) -> list[Tensor]:
    return [x.chunk(WORLD)[dist.get_rank()] for x in tensors]


def in_processes() -> dict[Any, Any]:
    """What each process finds: the hosts' own distributed losses beside ours."""
    found: dict[Any, Any] = {}
    gradcache, tevatron = host("loss"), importlib.import_module("tevatron.loss")
    for width, (reduction, scale) in itertools.product((1, 3), SCALED):
        x, y = own_rows(*global_batch(width))
        theirs = tevatron.DistributedContrastiveLoss(width, scale)
        pair = [divided(theirs, 0.05), DistributedContrastiveLoss(width, scale, 0.05)]
        found["tevatron", width, reduction, scale] = [
            value_and_gradients(f, x, y, reduction=reduction) for f in pair
        ]
        theirs = gradcache.DistributedContrastiveLoss(width - 1)
        pair = [theirs, UnscaledDistributedContrastiveLoss(width - 1)]
        found["gradcache", width, reduction, scale] = [
            value_and_gradients(f, x, y, reduction=reduction) for f in pair
        ]
    x, y = own_rows(*global_batch(3))
    ids = dict(zip(("query_ids", "target_ids"), own_rows(*global_ids()), strict=True))
    for symmetric in (False, True):
        loss_fn = DistributedContrastiveLoss(alpha=9.0, temperature=0.05, symmetric=symmetric)
        found["weighted", symmetric] = value_and_gradients(loss_fn, x, y, **ids)
    found["cached"] = cached_step()
    return found


def global_ids() -> tuple[Tensor, Tensor]:
    return torch.arange(6 * WORLD) % 5, torch.arange(18 * WORLD) % 7


def cached_inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(5 * WORLD, 11), torch.randn(10 * WORLD, 7)


def cached_step() -> list[Tensor]:
    """Gradients after the wrapper's chunks and DDP's average."""
    models = [DistributedDataParallel(f) for f in encoders()]
    loss_fn = DistributedContrastiveLoss(alpha=9.0, temperature=0.05)
    cache = host("grad_cache").GradCache(models, 2, loss_fn, get_rep_fn=unit)
    cache(*own_rows(*cached_inputs()), no_sync_except_last=True)
    return [p.grad for f in models for p in f.parameters()]


@lru_cache
def results() -> list[dict[Any, Any]]:
    host("loss")
    pytest.importorskip("tevatron.loss")
    return run(__name__, "in_processes", WORLD, timeout=60)


@pytest.mark.parametrize("name", ["tevatron", "gradcache"])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize(("reduction", "scale"), SCALED)
def test_each_process_has_its_hosts_value_and_gradients(
    name: str, width: int, reduction: str, scale: bool
) -> None:
    for found in results():
        theirs, ours = found[name, width, reduction, scale]
        for a, b in zip(ours, theirs, strict=True):
            assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("symmetric", [False, True])
def test_scaled_gradients_average_to_those_of_one_process(symmetric: bool) -> None:
    query_ids, target_ids = global_ids()
    loss_fn = ContrastiveLoss(0.05, 9.0, symmetric=symmetric)
    expected = value_and_gradients(
        loss_fn, *global_batch(3), query_ids=query_ids, target_ids=target_ids
    )
    parts = zip(*(found["weighted", symmetric] for found in results()), strict=True)
    loss, *gradients = parts
    for value in loss:
        assert relative_error(value, WORLD * expected[0]) < 1e-6
    for rows, b in zip(gradients, expected[1:], strict=True):
        assert relative_error(torch.cat(rows) / WORLD, b) < 1e-5


def test_gradient_cache_and_ddp_give_the_global_batch() -> None:
    models, loss_fn = encoders(), ContrastiveLoss(0.05, 9.0)
    loss_fn(*(unit(f(x)) for f, x in zip(models, cached_inputs(), strict=True))).backward()
    for found in results():
        parameters = [p for f in models for p in f.parameters()]
        for a, p in zip(found["cached"], parameters, strict=True):
            assert relative_error(a, p.grad) < 1e-5


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        ContrastiveLoss(0.0)
    with pytest.raises(RuntimeError, match="or use ContrastiveLoss in a single process"):
        DistributedContrastiveLoss()
    x, y = embeddings(4, 10, 3)
    with pytest.raises(ValueError, match="y has 10 rows for 4 queries, which is not a multiple"):
        ContrastiveLoss()(x, y)
    with pytest.raises(ValueError, match="target must be columns of target, 0 to 9"):
        ContrastiveLoss()(x, y, target=torch.tensor([0, 1, 2, 10]))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    loss_fn = DistributedContrastiveLoss()
    with pytest.raises(ValueError, match="target must be None"):
        loss_fn(x, y, target=torch.arange(4))
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, got 'none'"):
        loss_fn(x, y, reduction="none")
