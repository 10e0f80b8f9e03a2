"""The losses of GradCache, tevatron and VLM2Vec against the hosts' own, in one process and two."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import sys
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from llave_kernels import hardness_weighted_contrastive_loss
from llave_kernels.integrations import gradcache, tevatron, vlm2vec
from llave_kernels.integrations.vlm2vec import SimpleContrastiveLoss
from llave_kernels.reference import reference_loss
from llave_kernels.scores import CrossEntropyLoss
from tests.helpers import embeddings, relative_error
from tests.llave_kernels.integrations import hosts
from tests.processes import run

WORLD = 4
REDUCTIONS = ("mean", "sum")
OURS = {"gradcache": gradcache, "tevatron": tevatron, "vlm2vec": vlm2vec}
# (host, positional and named arguments of its class, numbers of mined negatives that fit)
SIMPLE: list[tuple[str, tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = [
    ("gradcache", (), {}, (0,)),
    ("gradcache", (2,), {}, (2,)),
    ("gradcache", (), {"n_hard_negatives": 2}, (2,)),
    ("tevatron", (), {}, (0, 2)),
    ("vlm2vec", (), {}, (0, 2)),
    ("vlm2vec", (0.05,), {}, (0, 2)),
    ("vlm2vec", (), {"temperature": 0.05}, (0, 2)),
]
DISTRIBUTED: list[tuple[str, tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = [
    ("gradcache", (), {}, (0,)),
    ("gradcache", (2,), {}, (2,)),
    ("gradcache", (), {"n_hard_negatives": 2}, (2,)),
    ("tevatron", (), {}, (0, 2)),
    ("tevatron", (2, False), {}, (0, 2)),
    ("tevatron", (), {"scale_loss": False}, (2,)),
    ("vlm2vec", (), {}, (0, 2)),
    ("vlm2vec", (2, True, 0.05), {}, (0, 2)),
    ("vlm2vec", (), {"scale_loss": False, "temperature": 0.05}, (2,)),
]


def grad_cache(module: str) -> Any:
    """A module of GradCache. It imports itself as ``grad_cache``; PyPI's is ``gradcache``."""
    if "grad_cache" not in sys.modules and importlib.util.find_spec("grad_cache") is None:
        sys.modules["grad_cache"] = pytest.importorskip("gradcache")
    return importlib.import_module(f"grad_cache.{module}")


def host(name: str) -> Any:
    return grad_cache("loss") if name == "gradcache" else getattr(hosts, name)


def value_and_gradients(loss_fn: Any, *inputs: Tensor, **arguments: Any) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = loss_fn(*leaves, **arguments)
    loss.backward(torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape))
    return [loss.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("kind", ["SimpleContrastiveLoss", "DistributedContrastiveLoss"])
def test_has_the_hosts_signature(kind: str, name: str) -> None:
    def positional(module: Any) -> list[tuple[str, Any]]:
        parameters = inspect.signature(getattr(module, kind)).parameters.values()
        return [
            (p.name, p.default)
            for p in parameters
            if p.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
        ]

    assert positional(OURS[name]) == positional(host(name))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("case", SIMPLE, ids=repr)
def test_equals_the_host(case: Any, explicit: bool, reduction: str) -> None:
    name, args, kwargs, counts = case
    losses = [m.SimpleContrastiveLoss(*args, **kwargs) for m in (host(name), OURS[name])]
    for negatives in counts:
        x, y = embeddings(17, 17 * (1 + negatives), 24)
        target = torch.randint(len(y), (17,)) if explicit else None
        expected, found = (
            value_and_gradients(f, x, y, target=target, reduction=reduction) for f in losses
        )
        for a, b in zip(found, expected, strict=True):
            assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("name", ["tevatron", "vlm2vec"])
def test_targets_left_over_are_negatives_of_all(name: str) -> None:
    x, y = embeddings(4, 11, 6)
    losses = [m.SimpleContrastiveLoss() for m in (host(name), OURS[name])]
    expected, found = (value_and_gradients(f, x, y) for f in losses)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("negatives", [0, 2])
def test_with_a_query_closure(negatives: int) -> None:
    x, y = embeddings(7, 7 * (1 + negatives), 12)
    theirs, ours = (
        m.ContrastiveLossWithQueryClosure(negatives) for m in (grad_cache("loss"), gradcache)
    )
    expected = value_and_gradients(lambda x, y: theirs(y, query_closure=lambda: 2 * x), x, y)
    found = value_and_gradients(lambda x, y: ours(y, query_closure=lambda: 2 * x), x, y)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-5
    assert relative_error(ours(x, y), theirs(x, y)) < 1e-5
    for wrong in ((x, y, y), (x,), ()):
        with pytest.raises(ValueError, match="expected queries and targets, or targets and query_"):
            ours(*wrong)
    with pytest.raises(ValueError, match="got 2 tensors and a query_closure"):
        ours(x, y, query_closure=lambda: x)


@pytest.mark.parametrize("width", [1, 3])
def test_bfloat16_is_not_worse_than_the_host(width: int) -> None:
    theirs = hosts.vlm2vec.SimpleContrastiveLoss(0.05)
    x, y = embeddings(64, 64 * width, 32, torch.bfloat16)
    truth = value_and_gradients(theirs, x.double(), y.double())
    expected, found = (value_and_gradients(f, x, y) for f in (theirs, SimpleContrastiveLoss(0.05)))
    for a, b, c in zip(found, expected, truth, strict=True):
        assert relative_error(a, c) <= relative_error(b, c)


@pytest.mark.parametrize("hardness", ["in_batch", "hard_negatives", "all"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mined_negatives_are_told_by_their_block(hardness: str, symmetric: bool) -> None:
    """The package's own layout gives the same: all positives, then blocks of mined negatives."""
    n, width = 9, 3
    x, y = embeddings(n, n * width, 16)
    settings = {"hardness": hardness, "symmetric": symmetric, "false_negative_margin": 0.1}
    loss_fn = SimpleContrastiveLoss(0.05, alpha=9.0, **settings)
    ids = {"query_ids": torch.randint(5, (n,)), "target_ids": torch.randint(5, (n * width,))}
    found = value_and_gradients(loss_fn, x, y, **ids)
    order = torch.arange(n * width).view(n, width).T.flatten()

    def own_layout(x: Tensor, y: Tensor) -> Tensor:
        ours = {"query_ids": ids["query_ids"], "target_ids": ids["target_ids"][order]}
        return reference_loss(x, y[order], logit_scale=20.0, alpha=9.0, **settings, **ours)

    for a, b in zip(found, value_and_gradients(own_layout, x.double(), y.double()), strict=True):
        assert relative_error(a, b) < 1e-5
    # The same positives are last in their blocks and given by hand.
    last = torch.arange(width - 1, n * width, width)
    rolled = y.view(n, width, -1).roll(-1, 1).flatten(0, 1)
    ids["target_ids"] = ids["target_ids"].view(n, width).roll(-1, 1).flatten()
    assert relative_error(loss_fn(x, rolled, target=last, **ids), found[0]) < 1e-6


def test_every_kind_of_number_is_taken() -> None:
    x, y = embeddings(4, 12, 6)
    expected = SimpleContrastiveLoss(0.5, alpha=0.5, target_alpha=0.5, symmetric=True)(x, y)
    for number in (np.float32(0.5), np.float64(0.5), torch.tensor([0.5]), torch.tensor(0.5)):
        loss_fn = SimpleContrastiveLoss(number, alpha=number, target_alpha=number, symmetric=True)
        assert torch.equal(loss_fn(x, y), expected)
        theirs = hosts.vlm2vec.SimpleContrastiveLoss(number)(x, y)
        assert relative_error(SimpleContrastiveLoss(number)(x, y), theirs) < 1e-5
    for number in (np.int64(2), np.array(2), torch.tensor(2), torch.tensor([2])):
        assert gradcache.SimpleContrastiveLoss(number)(x, y).isfinite()


@pytest.mark.parametrize("m", [4, 12, 14])
def test_compiles_in_one_graph(m: int) -> None:
    x, y = embeddings(4, m, 6)
    loss_fn = SimpleContrastiveLoss(alpha=9.0)
    compiled = torch.compile(loss_fn.__call__, fullgraph=True, backend="eager")
    assert relative_error(compiled(x, y), loss_fn(x, y)) < 1e-6


def test_without_blocks_every_other_target_is_in_batch() -> None:
    x, y = embeddings(4, 10, 3)
    labels = torch.tensor([9, 2, 2, 0])
    found = SimpleContrastiveLoss(0.05, alpha=9.0)(x, y, target=labels)
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
    """Chunks through GradCache's own wrapper give the gradients of the whole batch at once."""
    loss_fn = SimpleContrastiveLoss(0.05, alpha=9.0)
    inputs = torch.randn(10, 11), torch.randn(20, 7)
    given = {"query_ids": torch.arange(10) % 7, "target_ids": torch.arange(20) % 9} if ids else {}
    whole, cached = encoders(), encoders()
    expected = loss_fn(*(unit(f(x)) for f, x in zip(whole, inputs, strict=True)), **given)
    expected.backward()
    cache = grad_cache("grad_cache").GradCache(cached, [3, 6], loss_fn, get_rep_fn=unit)
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
    """In each process: the hosts' own distributed losses beside ours."""
    found: dict[Any, Any] = {}
    for (name, args, kwargs, counts), reduction in itertools.product(DISTRIBUTED, REDUCTIONS):
        pair = [m.DistributedContrastiveLoss(*args, **kwargs) for m in (host(name), OURS[name])]
        for negatives in counts:
            x, y = own_rows(*global_batch(1 + negatives))
            found[name, str(args), str(kwargs), negatives, reduction] = [
                value_and_gradients(f, x, y, reduction=reduction) for f in pair
            ]
    x, y = own_rows(*global_batch(3))
    ids = dict(zip(("query_ids", "target_ids"), own_rows(*global_ids()), strict=True))
    for symmetric in (False, True):
        loss_fn = vlm2vec.DistributedContrastiveLoss(
            alpha=9.0, temperature=0.05, symmetric=symmetric
        )
        found["weighted", symmetric] = value_and_gradients(loss_fn, x, y, **ids)
    found["cached"] = cached_step()
    return found


def global_ids() -> tuple[Tensor, Tensor]:
    return torch.arange(6 * WORLD) % 5, torch.arange(18 * WORLD) % 7


def cached_inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(5 * WORLD, 11), torch.randn(10 * WORLD, 7)


def cached_step() -> list[Tensor]:
    """The parameters' gradients after the wrapper's chunks and DDP's average."""
    models = [DistributedDataParallel(f) for f in encoders()]
    loss_fn = vlm2vec.DistributedContrastiveLoss(alpha=9.0, temperature=0.05)
    cache = grad_cache("grad_cache").GradCache(models, 2, loss_fn, get_rep_fn=unit)
    cache(*own_rows(*cached_inputs()), no_sync_except_last=True)
    return [p.grad for f in models for p in f.parameters()]


@lru_cache
def results() -> list[dict[Any, Any]]:
    grad_cache("loss")
    return run(__name__, "in_processes", WORLD, timeout=60)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", DISTRIBUTED, ids=repr)
def test_each_process_has_its_hosts_value_and_gradients(case: Any, reduction: str) -> None:
    name, args, kwargs, counts = case
    for found, negatives in itertools.product(results(), counts):
        theirs, ours = found[name, str(args), str(kwargs), negatives, reduction]
        for a, b in zip(ours, theirs, strict=True):
            assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("symmetric", [False, True])
def test_scaled_gradients_average_to_those_of_one_process(symmetric: bool) -> None:
    query_ids, target_ids = global_ids()
    loss_fn = SimpleContrastiveLoss(0.05, alpha=9.0, symmetric=symmetric)
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
    models, loss_fn = encoders(), SimpleContrastiveLoss(0.05, alpha=9.0)
    loss_fn(*(unit(f(x)) for f, x in zip(models, cached_inputs(), strict=True))).backward()
    for found in results():
        parameters = [p for f in models for p in f.parameters()]
        for a, p in zip(found["cached"], parameters, strict=True):
            assert relative_error(a, p.grad) < 1e-5


def test_a_model_trains_alike_with_and_without_the_gradient_cache() -> None:
    """The hosts have two losses: one in the cache, one in the model."""
    inputs = torch.randn(6, 11), torch.randn(18, 11)
    gradients = {}
    for alpha, cached, ours in itertools.product((0.0, 9.0), (False, True), (False, True)):
        if alpha and not ours:
            continue
        model = hosts.BiEncoder(0.05)
        if cached:
            module: Any = vlm2vec if ours else hosts.vlm2vec
            loss_fn = module.SimpleContrastiveLoss(0.05, **({"alpha": alpha} if ours else {}))
            cache = grad_cache("grad_cache").GradCache([model.encode] * 2, 3, loss_fn)
            cache(*inputs)
        else:
            if ours:
                model.cross_entropy = CrossEntropyLoss(model.temperature, alpha=alpha)
            model(*inputs).backward()
        assert set(model.state_dict()) == {"encoder.weight", "encoder.bias"}
        gradients[alpha, cached, ours] = model.encoder.weight.grad
    for (alpha, _, _), found in gradients.items():
        assert relative_error(found, gradients[alpha, True, True]) < 1e-5
    assert relative_error(gradients[0.0, True, True], gradients[9.0, True, True]) > 0.01


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        SimpleContrastiveLoss(0.0)
    for module in OURS.values():
        with pytest.raises(RuntimeError, match="or use SimpleContrastiveLoss in a single process"):
            module.DistributedContrastiveLoss()
    x, y = embeddings(4, 10, 3)
    with pytest.raises(ValueError, match="y has 4 rows for 10 queries, and each needs one"):
        SimpleContrastiveLoss()(y, x)
    with pytest.raises(ValueError, match="target must be columns from 0 to 9"):
        SimpleContrastiveLoss()(x, y, target=torch.tensor([0, 1, 2, 10]))
    with pytest.raises(ValueError, match="y has 10 rows for 4 queries, expected 12 with n_hard_ne"):
        gradcache.SimpleContrastiveLoss(2)(x, y)
    wrong_settings: list[dict[str, Any]] = [
        {"target_alpha": -1.0},
        {"false_negative_margin": "0.1"},
        {"hardness": "hard"},
        {"symmetric": 1},
    ]
    for wrong_setting in wrong_settings:  # when it is made, not in the first step
        with pytest.raises((TypeError, ValueError), match=f"{next(iter(wrong_setting))} must be"):
            SimpleContrastiveLoss(**wrong_setting)
    for wrong in (0.02, -1, "2"):
        with pytest.raises(ValueError, match="n_hard_negatives must be an integer >= 0, got"):
            gradcache.SimpleContrastiveLoss(wrong)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    loss_fn = vlm2vec.DistributedContrastiveLoss()
    with pytest.raises(ValueError, match="target must be None"):
        loss_fn(x, y, target=torch.arange(4))
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, got 'none'"):
        loss_fn(x, y, reduction="none")
