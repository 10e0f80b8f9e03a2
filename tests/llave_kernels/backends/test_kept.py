"""What the GPU backends keep of a forward for its backward: when, and that nothing else changes."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from llave_kernels import autograd, dispatch
from llave_kernels.backends import strip_gemm
from llave_kernels.backends.protocol import LogSumExps
from llave_kernels.rules import Rules
from tests.conftest import BACKENDS
from tests.helpers import assert_contract, draw_rules, embeddings, fused, relative_error
from tests.llave_kernels import accounting

PLAIN = Rules(*[None] * 8, 9.0, 9.0, "in_batch", None, True)
KINDS = [
    (),
    ("labels", "owners"),
    ("ids",),
    ("owners", "margin"),
    ("labels", "owners", "ids", "margin", "target_alpha"),
]
gpu_backends = pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if name != "torch"], indirect=True
)


@pytest.fixture
def keeping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Similarities are kept whatever the width of the embeddings."""
    monkeypatch.setattr(strip_gemm, "KEPT_ROW", 0)
    monkeypatch.setattr(strip_gemm, "KEPT_ROW_IN_L2", 0)


@pytest.mark.parametrize(
    ("n", "m", "d", "dtype", "kept"),
    [
        (8192, 8192, 1024, torch.bfloat16, True),
        (8192, 8193, 1024, torch.bfloat16, False),
        (8192, 8192, 1016, torch.bfloat16, False),
        (8192, 8192, 512, torch.float32, True),
        (2048, 2048, 640, torch.float16, True),
        (2048, 2049, 640, torch.float16, False),
        (2048, 2048, 632, torch.float16, False),
        (3, 5, 320, torch.float32, True),
        (3, 5, 319, torch.float32, False),
        (1, 1 << 26, 2048, torch.bfloat16, True),
    ],
)
def test_when_similarities_are_kept(n: int, m: int, d: int, dtype: torch.dtype, kept: bool) -> None:
    query, target = (torch.empty(k, d, dtype=dtype, device="meta") for k in (n, m))
    found = strip_gemm.kept_shape(query, target)
    assert found == ((n, -(-m // 16) * 16) if kept else (0,))
    if kept:
        assert 4 * found[0] * found[1] <= 256 << 20
        assert strip_gemm.strip_rows(n, m, dtype.itemsize) == n  # the backward has one strip


@gpu_backends
@pytest.mark.usefixtures("keeping")
@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
@pytest.mark.parametrize("shape", [(1, 1, 3), (66, 131, 9), (140, 141, 17)], ids=str)
def test_the_contract_holds(
    backend: str, shape: tuple[int, int, int], kinds: tuple[str, ...]
) -> None:
    n, m, d = shape
    if backend == "triton" and n > 128 and not torch.cuda.is_available():
        pytest.skip("the interpreter takes a minute, and its tile is smaller than 66 x 131")
    for dtype, symmetric, reduction in (
        (torch.float32, True, "mean"),
        (torch.float16, True, "none"),
        (torch.float16, False, "sum"),
    ):
        rules: dict[str, Any] = draw_rules(n, m, kinds)
        rules |= {"symmetric": symmetric, "reduction": reduction}
        assert_contract(*embeddings(n, m, d, dtype), 50.0, backend=backend, **rules)


@gpu_backends
@pytest.mark.usefixtures("keeping")
def test_large_logits_and_nan(backend: str) -> None:
    query, target = embeddings(70, 140, 16, unit=False)
    assert_contract(4 * query, 4 * target, 16.0, backend=backend)  # |z| near 1e4
    query[3, 1] = float("nan")
    loss, d_query, d_target, d_scale = fused(query, target, 20.0, backend=backend)
    assert loss.isnan()
    assert d_scale.isnan()
    assert d_query.isnan().any()
    assert d_target.isnan().any()


def passes(module: ModuleType, rows: int) -> tuple[Any, ...]:
    """A forward and a backward of the plain rules on random inputs, and all of their tensors."""
    query, target = embeddings(rows, rows + 13, 40)
    scale = torch.tensor(20.0)
    shape = module.kept_shape(query, target, PLAIN)
    kept = query.new_full(shape, float("nan"))
    outputs = module.forward(query, target, scale, PLAIN, kept)
    upstream = LogSumExps(*(torch.rand_like(x) for x in outputs))
    arguments = (target, scale, outputs, kept, PLAIN)
    found = module.backward(upstream, query, *arguments, scale_gradient=True)
    return query, upstream, arguments, found


@gpu_backends
@pytest.mark.usefixtures("keeping")
@pytest.mark.parametrize("rows", [50, 200])
def test_the_backward_reads_what_the_forward_kept(backend: str, rows: int) -> None:
    module: Any = dispatch.named(backend)
    query, upstream, arguments, found = passes(module, rows)
    target, _, _, kept, _ = arguments
    assert relative_error(kept[:, : len(target)], query.double() @ target.double().T) < 1e-6
    # dQ = dS T does not need the queries once the similarities are known.
    nowhere = torch.full_like(query, float("nan"))
    again = module.backward(upstream, nowhere, *arguments, scale_gradient=False)
    assert torch.equal(again.query, found.query)


@gpu_backends
def test_kept_or_computed_again_gives_the_same(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to rounding: the tiles differ."""
    for n, m in ((61, 200), (150, 260)):
        query, target = embeddings(n, m, 30)
        again = fused(query, target, 50.0, backend=backend)
        with monkeypatch.context() as patch:
            patch.setattr(strip_gemm, "KEPT_ROW_IN_L2", 0)
            kept = fused(query, target, 50.0, backend=backend)
        for a, b in zip(kept, again, strict=True):
            assert relative_error(a, b) < 2e-6


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_only_a_call_that_learns_keeps(
    backend: str, learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    accounts = accounting.pretend(monkeypatch, backend)
    query, target = (
        torch.empty(2048, 640, dtype=torch.bfloat16, device="meta", requires_grad=learns)
        for _ in range(2)
    )
    module: Any = dispatch.named(backend)
    with accounts:
        total = autograd.total_loss(query, target, 50.0, module, PLAIN, 1.0)
    assert total.requires_grad == learns
    assert (accounts.peak() > 2048 * 2048 * 4) == learns
