"""Devices without kernels of ours: no float64, and half-precision products stay so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llave_kernels import similarity_statistics
from llave_kernels.backends import products, torch_backend
from llave_kernels.backends.protocol import LogSumExps
from llave_kernels.rules import Rules
from tests.helpers import assert_contract, draw_rules, embeddings, relative_error

HALF = (torch.float16, torch.bfloat16)


class NoFloat64(TorchDispatchMode):
    """Refuses float64, as Apple's GPUs do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            if x is torch.float64 or (isinstance(x, Tensor) and x.dtype == torch.float64):
                raise TypeError(f"{func} in float64")
        return out


class Products(TorchDispatchMode):
    """Records the dtypes of matrix products' factors, and the shapes made in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.factors: list[set[torch.dtype]] = []
        self.widened: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        # Fake tensors of several versions cannot add half precision to float32.
        out = kwargs["out"] if name == "baddbmm" else func(*args, **(kwargs or {}))
        if name in ("mm", "addmm", "addmm_", "baddbmm", "_linear_pointwise"):
            factors = [x.dtype for x in args if isinstance(x, Tensor)][-2:]
            self.factors.append(set(factors))
        if name == "_to_copy" and out.dtype == torch.float32:
            self.widened.append(tuple(out.shape))
        return out


def rules_of(n: int, m: int, *, symmetric: bool, **given: Any) -> Rules:
    labels = given.get("labels", torch.arange(n))
    return Rules(
        labels, given.get("owners"), given.get("query_ids"), given.get("target_ids"), None, None,
        given.get("query_bias"), given.get("target_bias"), 9.0, given.get("target_alpha", 9.0),
        "in_batch", given.get("false_negative_margin"),
        symmetric,
    )  # fmt: skip


def step(query: Tensor, target: Tensor, rules: Rules) -> None:
    """Run each pass of the ``torch`` backend once."""
    scale = torch.full((), 50.0, device=query.device)
    shape = torch_backend.kept_shape(query, target, rules)
    kept = query.new_empty(shape, dtype=torch.float32)
    outputs = torch_backend.forward(query, target, scale, rules, kept)
    upstream = LogSumExps(*(torch.ones_like(x) for x in outputs))
    torch_backend.backward(
        upstream, query, target, scale, outputs, kept, rules, scale_gradient=True
    )
    if not torch_backend.rounds_gradients(query):
        torch_backend.one_direction(query, target, scale, rules)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kinds", [set(), {"ids", "margin"}, {"labels", "owners", "target_alpha"}])
def test_nothing_needs_float64(dtype: torch.dtype, symmetric: bool, kinds: set[str]) -> None:
    n, m = 13, 29
    query, target = embeddings(n, m, 7, dtype)
    rules = rules_of(n, m, symmetric=symmetric, **draw_rules(n, m, kinds))
    with NoFloat64():
        step(query, target, rules)
        similarity_statistics(query, target)


def indexes_fake_tensors() -> bool:
    with FakeTensorMode():
        x = torch.zeros(2, device="cuda")
        try:
            x[torch.zeros(1, dtype=torch.int64, device="cuda")] = x[:1]
        except RuntimeError:
            return False
    return True


@pytest.mark.skipif(not indexes_fake_tensors(), reason="this torch asks a real GPU for that")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_gpu_multiplies_half_precision_as_it_is(dtype: torch.dtype, symmetric: bool) -> None:
    """This holds for any capability. A T4 and a V100 have no kernel of ours."""
    n, m, d = 300, 900, 64
    with FakeTensorMode(), Products() as seen:
        query, target = (torch.empty(k, d, dtype=dtype, device="cuda") for k in (n, m))
        rules = rules_of(n, m, symmetric=symmetric, labels=torch.arange(n, device="cuda"))
        step(query, target, rules)
    assert seen.factors
    assert all(factors == {dtype} for factors in seen.factors)
    assert (m, d) not in seen.widened


@pytest.mark.usefixtures("half_products")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 70, 129), (130, 300, 7)])
def test_half_products_keep_the_contract(
    dtype: torch.dtype, symmetric: bool, shape: tuple[int, int, int]
) -> None:
    for scale, reduction in ((50.0, "mean"), (100.0, "sum"), (20.0, "none")):
        assert_contract(
            *embeddings(*shape, dtype), scale, symmetric=symmetric, reduction=reduction,
            backend="torch",
        )  # fmt: skip


@pytest.mark.parametrize("types", [(a, b) for a in (*HALF, torch.float32) for b in HALF])
def test_elsewhere_half_precision_is_widened_in_parts(
    types: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "WIDENED", 1000)
    a, b = torch.randn(57, 301).to(types[0]), torch.randn(301, 23).to(types[1])
    truth = a.double() @ b.double()
    with Products() as seen:
        found = products.product(a, b)
    assert found.dtype == torch.float32
    assert relative_error(found, truth) < 1e-6
    assert max(rows * columns for rows, columns in seen.widened) <= 1000
    out = torch.ones(57, 23)
    products.add_product(out, a, b)
    assert relative_error(out, truth + 1) < 1e-6


def test_the_gain_is_a_power_of_two_that_finite_upstream_gradients_choose() -> None:
    for size in (1e-30, 3e-8, 1.0, 7e4, 1e30):
        upstream = size * torch.rand(50)
        found = products.gain(torch.tensor(50.0), upstream, upstream)
        assert float(found) == 2.0 ** round(float(found.log2()))
        if 1e-25 < size < 1e25:
            assert 2.0**14 <= float(found * 50 * 2 * upstream.max()) <= 2.0**15
        odd = torch.cat([upstream, torch.tensor([float("nan"), float("inf")])])
        assert products.gain(torch.tensor(50.0), odd, upstream) == found
