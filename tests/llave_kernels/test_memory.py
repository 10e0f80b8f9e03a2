"""Extra memory is linear in N and under the stated bounds.

On a CPU it is measured, each case in its own process. For a GPU it is counted.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llave_kernels import hardness_weighted_contrastive_loss
from tests.llave_kernels import accounting

MEASURE = """
import torch
from pathlib import Path
from torch.nn.functional import normalize
from llave_kernels import sigmoid_contrastive_loss, supervised_contrastive_loss
from llave_kernels import hardness_weighted_contrastive_loss as loss

def status(field):
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024 / 1e6

def pair(n):
    return [normalize(torch.randn(n, {d}), dim=1).requires_grad_() for _ in range(2)]

loss(*pair(512)).backward()  # libraries, thread pools and the GEMM's own workspace
query, target = pair({n})
Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
before = status("VmRSS")
{call}.backward()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("n", "d", "symmetric", "limit_mb"),
    [
        (8192, 384, True, 200),
        pytest.param(8192, 1024, True, 200, marks=pytest.mark.long),
        pytest.param(8192, 384, False, 150, marks=pytest.mark.long),
        pytest.param(8192, 1024, False, 230, marks=pytest.mark.long),
        pytest.param(16384, 384, True, 235, marks=pytest.mark.long),
    ],
)
def test_extra_memory(n: int, d: int, symmetric: bool, limit_mb: float) -> None:
    """The N x M similarities would take 268 MB at N = 8,192 and 1,074 at 16,384.

    The gradients count as extra. At N = 8,192 and D = 1,024 they take 67 MB. One direction holds
    them twice: as computed in the forward, and scaled by the upstream gradient. Both directions
    keep up to 101 MB of similarities. A case's peaks, measured five times, differ by up to 40 MB.
    """
    call = f"loss(query, target, symmetric={symmetric})"
    assert measured(n, d, call) < limit_mb


def measured(n: int, d: int, call: str) -> float:
    """MB that a call with its backward takes, in a process of its own."""
    code = MEASURE.format(n=n, d=d, call=call)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(run.stdout)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("denominator", ["all", "pair"])
def test_extra_memory_of_two_groups(denominator: str) -> None:
    """Half of all pairs are positives. The N x M similarities would take 268 MB."""
    groups = "torch.arange(8192) % 2"
    call = f"supervised_contrastive_loss(query, query_groups={groups}, denominator={denominator!r})"
    assert measured(8192, 384, call) < 200


@pytest.mark.parametrize("learnable", [False, True], ids=["fixed", "learnable"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_extra_memory_on_a_gpu(
    backend: str, dtype: torch.dtype, learnable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under 1 GB beyond the inputs and their gradients at N = 65,536 and D = 1,536."""
    accounts = accounting.pretend(monkeypatch, backend)
    query, target = (
        torch.empty(65536, 1536, dtype=dtype, device="meta", requires_grad=True) for _ in range(2)
    )
    scale = torch.tensor(50.0, device="meta", requires_grad=learnable)
    with accounts:
        loss = hardness_weighted_contrastive_loss(query, target, logit_scale=scale, backend=backend)
        loss.backward()
    assert query.grad is not None
    assert target.grad is not None
    extra = accounts.peak(without=[query.grad, target.grad])
    # dT in float32 and a strip of dS, then a strip of dQ in float32 if that is not the last step
    bound = 65536 * 1536 * 4 + (256 << 20)
    if dtype == torch.float16 or learnable:
        bound += 2048 * 1536 * 4
    assert bound < extra < bound + 5e6 < 1e9


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_extra_memory_with_similarities_that_are_kept(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most the workspace once for the similarities and once for dS."""
    accounts = accounting.pretend(monkeypatch, backend)
    query, target = (
        torch.empty(8192, 1536, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for _ in range(2)
    )
    with accounts:
        hardness_weighted_contrastive_loss(query, target, backend=backend).backward()
    assert query.grad is not None
    assert target.grad is not None
    extra = accounts.peak(without=[query.grad, target.grad])
    bound = 8192 * 8192 * (4 + 2)
    assert bound < extra < bound + 5e6 < 2 * (256 << 20)
