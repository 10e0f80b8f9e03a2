"""Machine code of the Triton kernels. Compiling it needs no GPU.

For every tile of the table the code must have tensor-core instructions, asynchronous copies of 16
bytes and no spills, and its shared memory must fit the chip.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import triton

from llave_kernels.backends import tiles, triton_backend
from tests.llave_kernels.backends.compile_triton import RULES

ROOT = Path(__file__).parents[3]
FUSION = "TRITON_DEFAULT_FP_FUSION"
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may use

MODULE = "tests.llave_kernels.backends.compile_triton"


@lru_cache
def compiler() -> subprocess.Popen[str]:
    """A process without the interpreter, which compiles for all tests. It ends with this one."""
    return subprocess.Popen(
        [sys.executable, "-m", MODULE],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def machine_code(
    kernel: str,
    arch: int,
    dtype: str,
    tile: tiles.Tile,
    absent: Sequence[str] = RULES,
    **more: str | Sequence[str],
) -> dict[str, int]:
    if dtype != "fp16":
        absent = [*absent, "p_gain"]
    process = compiler()
    assert process.stdin is not None
    assert process.stdout is not None
    settings = {"absent": absent} | more
    print(json.dumps([kernel, arch, dtype, tile, settings]), file=process.stdin, flush=True)
    found = json.loads(process.stdout.readline())
    assert "error" not in found, found["error"]
    assert found["traps"] == 0
    return found


@lru_cache
def keys(**environment: str) -> dict[str, list[str]]:
    """The compilation keys that ``count_compilations`` prints. A UserWarning is an error."""
    command = [
        sys.executable,
        "-W",
        "error::UserWarning",
        "-m",
        "tests.llave_kernels.backends.count_compilations",
    ]
    known = {k: v for k, v in os.environ.items() if k != FUSION}
    known |= {"TRITON_INTERPRET": "0"} | environment
    run = subprocess.run(command, env=known, capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_inputs_of_every_shape_and_layout_share_one_kernel() -> None:
    found = keys()
    assert {name: len(each) for name, each in found.items()} == dict.fromkeys(
        ("positive_kernel", "forward_kernel", "combine_kernel", "strip_kernel"), 1
    )


@pytest.mark.parametrize("fusion", ["0", "1"])
def test_the_environment_does_not_change_the_arithmetic(fusion: str) -> None:
    assert keys(**{FUSION: fusion}) == keys()


# Half precision takes the tiles for masks. Calls with labels, ids and upstream gradients of rows
# compile all of the kernel.
SIGMOID = [
    pytest.param(arch, dtype, tile, absent, marks=() if dtype == "bf16" else pytest.mark.long)
    for arch in (80, 90)
    for dtype, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4))
    for tile in tiles.CANDIDATES[tiles.Kind(arch // 10, itemsize)]
    if itemsize == 4 or tile != tiles.TABLE[tiles.Kind(arch // 10, 2)].plain
    for absent in ((), ("p_label", "p_query_id", "p_target_id"))
    if dtype != "bf16" or tile.bm == 128
]


@pytest.mark.parametrize(("arch", "dtype", "tile", "absent"), SIGMOID, ids=str)
def test_sigmoid_kernel(arch: int, dtype: str, tile: tiles.Tile, absent: tuple[str, ...]) -> None:
    options = ["p_ds", "p_sums", *([] if absent else ["p_weight"])]
    found = machine_code("sigmoid_kernel", arch, dtype, tile, absent, options=options)
    assert found["tensor_core"] > 0
    assert found["wgmma"] > 0 or arch < 90
    assert 0 < found["copies"] == found["wide_copies"]
    assert found["spills"] == 0
    assert found["shared"] <= SHARED_MEMORY[arch]


CASES = [
    (arch, dtype, tile)
    for arch in (80, 90)
    for dtype, itemsize in (("bf16", 2), ("fp32", 4))
    for tile in tiles.CANDIDATES[tiles.Kind(arch // 10, itemsize)]
] + [(arch, "fp16", tiles.TABLE[tiles.Kind(arch // 10, 2)].plain) for arch in (80, 90)]
# Most calls take these tiles. Only `make test-long` compiles the others.
USUAL = [(arch, "bf16", tiles.TABLE[tiles.Kind(arch // 10, 2)].plain) for arch in (80, 90)]
MARKED = [case if case in USUAL else pytest.param(*case, marks=pytest.mark.long) for case in CASES]


@pytest.mark.parametrize(("arch", "dtype", "tile"), MARKED, ids=str)
@pytest.mark.parametrize("kernel", ["forward_kernel", "strip_kernel"])
def test_plain_path(kernel: str, arch: int, dtype: str, tile: tiles.Tile) -> None:
    found = machine_code(kernel, arch, dtype, tile)
    assert found["tensor_core"] > 0
    assert found["wgmma"] > 0 or arch < 90
    assert 0 < found["copies"] == found["wide_copies"]  # asynchronous, 16 bytes each
    assert found["spills"] == 0
    assert found["shared"] <= SHARED_MEMORY[arch]


EVERY_RULE = {
    "owners": (),
    "no owners": ("p_owner",),
    "one alpha": ("target_alpha",),
    "ids": [name for name in RULES if "id" not in name],
}


@pytest.mark.long
@pytest.mark.parametrize("absent", EVERY_RULE.values(), ids=EVERY_RULE)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", ["forward_kernel", "strip_kernel"])
def test_many_rules_at_once(kernel: str, arch: int, absent: Sequence[str]) -> None:
    """These cases need the most registers. With one alpha, both ways of a tile are compiled."""
    tile = tiles.TABLE[tiles.Kind(arch // 10, 2)].masked
    found = machine_code(kernel, arch, "bf16", tile, absent)
    assert found["tensor_core"] > 0
    assert found["spills"] == 0


LARGEST = [("p_owner",), ("p_label",)]
if not tiles.masked(torch.bfloat16, ids=True, margin=False):
    LARGEST.append(("p_label", "p_owner", "p_query_id", "p_target_id"))


@pytest.mark.long
@pytest.mark.parametrize("rules", LARGEST, ids="+".join)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", ["forward_kernel", "strip_kernel"])
def test_rules_on_the_largest_tile(kernel: str, arch: int, rules: Sequence[str]) -> None:
    tile = tiles.TABLE[tiles.Kind(arch // 10, 2)].plain
    absent = [name for name in RULES if name not in rules]
    spills = machine_code(kernel, arch, "bf16", tile, absent)["spills"]
    assert spills <= (2 if triton.__version__.startswith("3.6.") and rules == ("p_owner",) else 0)


@pytest.mark.long
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("which", ["plain", "small"])
@pytest.mark.parametrize("kernel", ["forward_kernel", "strip_kernel"])
def test_exact_float32(kernel: str, which: str, arch: int) -> None:
    """torch's default float32 precision has no tensor-core instruction."""
    tile = getattr(tiles.TABLE[tiles.Kind(arch // 10, 4)], which)
    assert machine_code(kernel, arch, "fp32", tile, precision="ieee")["spills"] == 0


KEPT = [("forward_kernel", ("p_similarity",)), ("strip_kernel", ("p_similarity",))]


@pytest.mark.parametrize(
    ("which", "absent"),
    [("small", RULES), ("masked", ()), ("plain", RULES), ("plain", LARGEST[-1])],
    ids=["small", "every rule", "largest", "rules on the largest"],
)
@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.long), 90])
@pytest.mark.parametrize(("kernel", "options"), [*KEPT, ("strip_kernel", ("p_row_sum",))], ids=str)
def test_similarities_that_are_kept_and_a_scale_that_learns(
    kernel: str, options: Sequence[str], arch: int, which: str, absent: Sequence[str]
) -> None:
    tile = getattr(tiles.TABLE[tiles.Kind(arch // 10, 2)], which)
    if which == "plain" and "p_row_sum" in options:
        assert tile.bm * tile.bn > triton_backend.SUM_TILE  # the products make that sum
        return
    if absent == LARGEST[-1]:
        absent = [name for name in RULES if name not in absent]
    found = machine_code(kernel, arch, "bf16", tile, absent, options=options)
    assert found["spills"] == 0
    reads = kernel == "strip_kernel" and "p_similarity" in options
    assert (found["tensor_core"] == 0) == reads


@pytest.mark.parametrize("kernel", ["combine_kernel", "positive_kernel"])
def test_small_kernels(kernel: str) -> None:
    assert machine_code(kernel, 90, "bf16", tiles.INTERPRETER, ())["spills"] == 0
