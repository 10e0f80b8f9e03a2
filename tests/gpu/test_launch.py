"""Launches on a GPU: large shapes, streams, graphs, memory.

tests/llave_kernels/test_numerics.py tests the numerical contract, on the GPU if there is one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from llave_kernels import hardness_weighted_contrastive_loss
from llave_kernels.backends import strip_gemm
from tests.helpers import assert_contract, embeddings, fused

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HALF = (torch.bfloat16, torch.float16)


def on_gpu(n: int, m: int, d: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [x.cuda() for x in embeddings(n, m, d, dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("shape", [(129, 257, 65), (1500, 3000, 384), (4000, 4000, 200)])
def test_large_shapes(backend: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    assert_contract(*on_gpu(*shape, dtype), 50.0, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_gradients_over_several_strips(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strip_gemm, "WORKSPACE", 1 << 20)
    assert_contract(*on_gpu(1500, 1500, 200, dtype), 50.0, backend=backend)


def test_bit_determinism(backend: str) -> None:
    for n in (200, 3000):
        query, target = on_gpu(n, n, 200)
        first, *others = (fused(query, target, 50.0, backend=backend) for _ in range(5))
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_side_streams(backend: str) -> None:
    """Calls on different streams give the same results as calls one after the other."""
    inputs = [on_gpu(900 + i, 900 + i, 96) for i in range(4)]
    expected = [fused(q, t, 50.0, backend=backend) for q, t in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    results = []
    for (query, target), stream in zip(inputs, streams, strict=True):
        with torch.cuda.stream(stream):
            results.append(fused(query, target, 50.0, backend=backend))
    torch.cuda.synchronize()
    for ours, alone in zip(results, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current(backend: str) -> None:
    query, target = (x.to("cuda:1") for x in on_gpu(300, 300, 64))
    assert_contract(query, target, 50.0, backend=backend)
    assert torch.cuda.current_device() == 0


def test_cuda_graph_capture(backend: str) -> None:
    query, target = (x.requires_grad_() for x in on_gpu(500, 500, 64))

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


def test_memory_is_linear(backend: str) -> None:
    """Under 1 GB with both gradients, at N = 65,536 and D = 1,536."""
    few = [x.requires_grad_() for x in on_gpu(512, 512, 1536)]
    hardness_weighted_contrastive_loss(*few, backend=backend).backward()  # libraries' workspaces
    query, target = (
        normalize(
            torch.randn(65536, 1536, dtype=torch.bfloat16, device="cuda"), dim=1
        ).requires_grad_()
        for _ in range(2)
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    hardness_weighted_contrastive_loss(query, target, backend=backend).backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 1e9


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    script = Path(__file__).with_name("sanitize.sh")
    run = subprocess.run(
        ["bash", str(script), tool],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode == 3:
        pytest.skip(run.stderr.strip())
    assert run.returncode == 0, run.stdout + run.stderr
