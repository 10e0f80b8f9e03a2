"""The numerical contract and the launch contract on a GPU, for every GPU backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llave_kernels import available_backends, hardness_weighted_contrastive_loss
from tests.helpers import assert_contract, draw_rules, embeddings, fused

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BACKENDS = [name for name in available_backends() if name != "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_gpu(rules: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in rules.items()}


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (129, 257, 65), (1500, 3000, 384)])
def test_shapes(backend: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    query, target = (x.cuda() for x in embeddings(*shape, dtype))
    assert_contract(query, target, 50.0, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hardness", ["in_batch", "hard_negatives", "all"])
@pytest.mark.parametrize("kinds", [{"labels"}, {"owners"}, {"ids"}, {"margin"}, {"target_alpha"}])
def test_rules(backend: str, dtype: torch.dtype, hardness: str, kinds: set[str]) -> None:
    query, target = (x.cuda() for x in embeddings(200, 460, 72, dtype))
    rules = on_gpu(draw_rules(200, 460, kinds)) | {"hardness": hardness}
    for symmetric in (True, False):
        assert_contract(query, target, 20.0, backend=backend, symmetric=symmetric, **rules)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bit_determinism(backend: str) -> None:
    query, target = (x.cuda() for x in embeddings(3000, 3000, 200, torch.bfloat16))
    first, second = (fused(query, target, 50.0, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_graph_capture(backend: str) -> None:
    query, target = (x.cuda().requires_grad_() for x in embeddings(500, 500, 64, torch.bfloat16))

    def step() -> torch.Tensor:
        query.grad = target.grad = None
        loss = hardness_weighted_contrastive_loss(query, target, backend=backend)
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    query.grad = target.grad = None
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x, fresh in zip((query, target), embeddings(500, 500, 64), strict=True):
            x.copy_(fresh)
    graph.replay()
    gradient = query.grad
    assert gradient is not None
    replayed = captured.clone(), gradient.clone()
    assert torch.equal(replayed[0], step())
    assert torch.equal(replayed[1], query.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_is_linear(backend: str) -> None:
    n, d = 32768, 256
    query, target = (x.cuda().requires_grad_() for x in embeddings(n, n, d, torch.bfloat16))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    hardness_weighted_contrastive_loss(query, target, backend=backend).backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < (1 << 30)
