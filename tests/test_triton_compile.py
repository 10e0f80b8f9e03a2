"""Machine code of the Triton kernels, compiled for GPUs that need not be there.

Tensor-core instructions present, no spills, shared memory within the chip, for every tile of the
table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llave_kernels.backends import tiles

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may use

# Compiles one kernel and prints what was found, in a process without the interpreter.
SCRIPT = Path(__file__).with_name("compile_triton.py")


def machine_code(
    kernel: str, arch: int, dtype: str, tile: tiles.Tile, rules: str
) -> dict[str, int]:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, str(SCRIPT), kernel, str(arch), dtype, json.dumps(tile), rules]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


CASES = [
    (arch, dtype, tile)
    for arch in (80, 90)
    for dtype, itemsize in (("bf16", 2), ("fp32", 4))
    for tile in tiles.CANDIDATES[arch // 10, itemsize]
] + [(arch, "fp16", tiles.CANDIDATES[arch // 10, 2][0]) for arch in (80, 90)]


@pytest.mark.parametrize(("arch", "dtype", "tile"), CASES, ids=str)
@pytest.mark.parametrize("kernel", ["forward_kernel", "strip_kernel"])
def test_plain_path(kernel: str, arch: int, dtype: str, tile: tiles.Tile) -> None:
    found = machine_code(kernel, arch, dtype, tile, "plain")
    assert found["tensor_core"] > 0
    assert found["wgmma"] > 0 or arch < 90
    assert found["spills"] == 0
    assert found["shared"] <= SHARED_MEMORY[arch]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", ["forward_kernel", "strip_kernel"])
def test_every_rule_at_once(kernel: str, arch: int) -> None:
    found = machine_code(kernel, arch, "bf16", tiles.CANDIDATES[arch // 10, 2][1], "all")
    assert found["tensor_core"] > 0
    assert found["spills"] == 0


@pytest.mark.parametrize("kernel", ["combine_kernel", "positive_kernel"])
def test_small_kernels(kernel: str) -> None:
    assert machine_code(kernel, 90, "bf16", tiles.INTERPRETER, "plain")["spills"] == 0
