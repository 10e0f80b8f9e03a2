"""The size of the tiles, and the roads through the epilogues, in the simulation of the kernels."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from llave_kernels.backends.cuda import _cuda as simulated
from tests.conftest import BACKENDS
from tests.csrc import simulator
from tests.helpers import assert_contract, draw_rules, embeddings, fused, multiplicands

ROOT = Path(__file__).parents[2]
needs_simulation = pytest.mark.skipif(
    getattr(simulated, "device", "") != "cpu", reason="no simulation"
)
CUDA = [name for name in BACKENDS if name.startswith("cuda")]

SIZES = """
#include <cstdio>
#include "sizes.h"
using namespace llave;
int main() {
  int n, m, multiprocessors, largest;
  while (std::scanf("%d %d %d %d", &n, &m, &multiprocessors, &largest) == 4) {
    const Size size = choose_size(n, m, multiprocessors, static_cast<Size>(largest));
    std::printf("%dx%d ", tile_rows(size), tile_columns(size));
  }
}
"""
WIDEST, WIDE, LARGE = 0, 1, 2


@needs_simulation
def test_the_size_of_the_tiles_follows_the_rounds(tmp_path: Path) -> None:
    source, program = tmp_path / "program.cpp", tmp_path / "program"
    source.write_text(SIZES)
    includes = [f"-I{folder}" for folder in (ROOT / "csrc", *simulator.headers())]
    command = ["g++", "-std=c++17", *includes, source, "-o", program]
    subprocess.run(command, check=True)
    chosen = {
        (1, 1, 132, WIDEST): "64x128",
        (1280, 1280, 132, WIDEST): "64x128",  # 100 large tiles
        (2048, 2048, 132, WIDEST): "128x128",
        (4096, 4096, 132, WIDEST): "128x128",  # 5.3 rounds of the widest tiles
        (4096, 4096, 132, WIDE): "128x160",  # 6.3 of the wide ones
        (4096, 4096, 108, LARGE): "128x128",
        (16384, 16384, 132, WIDEST): "128x192",
        (2048, 65536, 132, WIDEST): "128x192",
        (2**31 - 257, 2**31 - 257, 132, WIDEST): "128x192",
    }
    lines = "\n".join(" ".join(map(str, case)) for case in chosen)
    run = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
    assert run.stdout.split() == list(chosen.values())


def far_apart(n: int, m: int, d: int) -> tuple[Tensor, Tensor]:
    """Some rows and columns are ten times as long as others. No shift serves all their logits."""
    query, target = embeddings(n, m, d)
    query[::5] *= 10
    target[1::7] *= 10
    return multiplicands(query), multiplicands(target)


@needs_simulation
@pytest.mark.parametrize("backend", CUDA, indirect=True)
class TestWideTiles:
    """The sizes give six rounds of wide tiles to the simulation's multiprocessors."""

    N, M, D = 700, 720, 6

    @pytest.mark.parametrize("kinds", [(), ("owners",), ("ids",), ("margin",), ("target_alpha",)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_rules(self, backend: str, kinds: tuple[str, ...], dtype: torch.dtype) -> None:
        query, target = (multiplicands(x) for x in embeddings(self.N, self.M, self.D, dtype))
        rules = draw_rules(self.N, self.M, kinds)
        assert_contract(query, target, 20.0, backend=backend, **rules)

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_logits_far_apart(self, backend: str, symmetric: bool) -> None:
        query, target = far_apart(self.N, self.M, self.D)
        assert_contract(query, target, 20.0, backend=backend, symmetric=symmetric)

    def test_rules_that_bite_nowhere_change_no_bit(self, backend: str) -> None:
        """A tile whose pairs are plain takes the same road with and without rules."""
        query, target = (normalize(x, dim=1) for x in embeddings(self.N, self.M, self.D))
        rules: dict[str, Any] = {
            "owners": torch.arange(self.M),
            "query_ids": torch.arange(self.N) + 9,
            "target_ids": torch.arange(self.M) + 9,
            "false_negative_margin": 3.0,
        }
        plain = fused(query, target, 20.0, backend=backend, owners=rules["owners"])
        ruled = fused(query, target, 20.0, backend=backend, **rules)
        assert all(torch.equal(a, b) for a, b in zip(plain, ruled, strict=True))
