"""Our losses of two views against lightly's, alone and in two processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers import relative_error
from tests.processes import run

pytest.importorskip("lightly")

from lightly import loss as host
from lightly.loss.dcl_loss import negative_mises_fisher_weights

from llave_kernels.integrations import lightly as ours

NAMES = ["NTXentLoss", "DCLLoss"]


def both(name: str, **settings: Any) -> list[Any]:
    return [getattr(module, name)(**settings) for module in (host, ours)]


def value_and_gradients(loss_fn: Any, views: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in views]
    loss = loss_fn(*leaves)
    loss.backward()
    return [loss.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("draws", [60, pytest.param(1000, marks=pytest.mark.long)])
def test_random_settings_equal_the_host(name: str, draws: int) -> None:
    for i in range(draws):
        n, d = (int(x) for x in torch.randint(2, 24, (2,)))
        settings: dict[str, Any] = {"temperature": float(0.05 + torch.rand(()))}
        if name == "DCLLoss" and torch.rand(()) < 0.5:
            settings["weight_fn"] = negative_mises_fisher_weights
        views = [torch.randn(n, d, dtype=torch.float64) for _ in range(2)]
        theirs, mine = both(name, **settings)
        truth = value_and_gradients(theirs, views)
        dtype, bound = ((torch.float64, 1e-11), (torch.float32, 1e-5))[i % 2]
        found = value_and_gradients(mine, [x.to(dtype) for x in views])
        for a, b in zip(found, truth, strict=True):
            assert float((a - b).norm()) <= bound * max(float(b.norm()), 1e-1), settings


def test_a_memory_bank() -> None:
    """It fills, wraps around, and stays as it is without a gradient."""
    pair = both("NTXentLoss", temperature=0.2, memory_bank_size=(20, 6))
    pair[1].memory_bank.bank.copy_(pair[0].memory_bank.bank)
    for step in range(6):
        views = [torch.randn(7, 6) for _ in range(2)]
        if step == 3:
            values = [[loss_fn(*views)] for loss_fn in pair]
        else:
            values = [value_and_gradients(loss_fn, views) for loss_fn in pair]
        for a, b in zip(*values, strict=True):
            assert relative_error(b, a) < 1e-5
    assert torch.equal(pair[0].memory_bank.bank, pair[1].memory_bank.bank)


def gathered() -> list[list[list[Tensor]]]:
    """What each process finds with ``gather_distributed``."""
    torch.manual_seed(0)
    views = [torch.randn(dist.get_world_size(), 5, 6)[dist.get_rank()] for _ in range(2)]
    settings = {"gather_distributed": True}
    return [[value_and_gradients(f, views) for f in both(name, **settings)] for name in NAMES]


def test_gathering_equals_the_host_in_every_process() -> None:
    for found in run(__name__, "gathered", 2, timeout=60):
        for theirs, mine in found:
            for a, b in zip(mine, theirs, strict=True):
                assert relative_error(a, b) < 1e-5


def test_the_weight_acts_on_negatives() -> None:
    views = [torch.randn(9, 6, dtype=torch.float64) for _ in range(2)]
    rows = torch.nn.functional.normalize(torch.cat(views), dim=1)
    s = rows @ rows.T
    place = torch.arange(9)
    other = torch.cat([place + 9, place])
    z = 5 * s + 9 * s
    z[torch.arange(18), other] = 5 * s[torch.arange(18), other]
    expected = torch.nn.functional.cross_entropy(z.fill_diagonal_(-torch.inf), other)
    assert relative_error(ours.NTXentLoss(0.2, alpha=9.0)(*views), expected) < 1e-12


def test_mistakes_are_named() -> None:
    for name in NAMES:
        with pytest.raises(ValueError, match="temperature must be positive"):
            getattr(ours, name)(temperature=-0.5)
        with pytest.raises(ValueError, match="alpha must be >= 0"):
            getattr(ours, name)(alpha=-1.0)
