"""Compiles kernels without a GPU and prints facts about their machine code.

Each line of the input is a JSON list: kernel, arch, dtype, tile, settings. The answer is one line
of JSON, with the key ``error`` if the compilation failed.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import machine_code
from llave_kernels.backends import tiles, triton_kernels, triton_sigmoid_kernel

# These arguments are None unless a call has such rules.
RULES = (
    "p_label", "p_owner", "p_query_id", "p_target_id", "p_row_limit", "p_column_limit",
    "p_query_bias", "p_target_bias", "target_alpha",
)  # fmt: skip
# And these unless similarities are kept, the scale learns or gradients are asked for.
OPTIONS = {
    "forward_kernel": ("p_similarity",),
    "strip_kernel": ("p_similarity", "p_row_sum"),
    "sigmoid_kernel": ("p_ds", "p_sums", "p_weight"),
}
INTEGERS = {"p_label", "p_owner", "p_query_id", "p_target_id"}


def argument_type(name: str, dtype: str) -> str:
    if name in ("p_q", "p_t", "p_ds"):
        return f"*{dtype}"
    if name in INTEGERS:
        return "*i64"
    if name.startswith("p_"):
        return "*fp32"
    return "fp32" if name.endswith("alpha") else "i32"


def compiled(
    name: str,
    arch: int,
    dtype: str,
    tile: tiles.Tile,
    *,
    absent: Collection[str] = (),
    options: Collection[str] = (),
    hardness: str = "in_batch",
    precision: str = "tf32",
) -> Any:
    """The kernel, compiled as a launch does it.

    Args:
        absent: arguments that are None.
        options: those of ``OPTIONS`` that are not.
    """
    module = triton_sigmoid_kernel if name == "sigmoid_kernel" else triton_kernels
    kernel = getattr(module, name)
    absent = [*absent, *(a for a in OPTIONS.get(name, ()) if a not in options)]
    values = dict.fromkeys(absent) | {
        "HARDNESS": hardness, "PRECISION": precision, "TILE": tile,
        "BM": tile.bm, "BK": tile.bk, "BLOCK": 128,
    }  # fmt: skip
    signature = {a: argument_type(a, dtype) for a in kernel.arg_names}
    constants = {a: values[a] for a in kernel.arg_names if a in values}
    signature |= dict.fromkeys(constants, "constexpr")
    # A launch finds out by itself which pointers and numbers are divisible by 16. It does not ask
    # for sizes.
    aligned = {
        (parameter.num,): [["tt.divisibility", 16]]
        for parameter in kernel.params
        if parameter.name not in constants
        and signature[parameter.name] != "fp32"
        and not parameter.do_not_specialize
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def facts(name: str, arch: int, dtype: str, tile: list[int], settings: dict[str, Any]) -> Any:
    kernel = compiled(name, arch, dtype, tiles.Tile(*tile), **settings)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        ((_, listing),) = machine_code.functions(cubin)
    return {
        "tensor_core": len(re.findall(r"\bHGMMA|\bHMMA", listing)),
        "wgmma": len(re.findall(r"\bHGMMA", listing)),
        "traps": len(re.findall(r"\bBPT\b", listing)),
        "spills": len(re.findall(r"\b(LDL|STL)\b", listing)),
        "shared": kernel.metadata.shared,
        "copies": len(re.findall(r"\bLDGSTS", listing)),
        "wide_copies": len(re.findall(r"\bLDGSTS\S*\.128\b", listing)),
    }


def main() -> None:
    for line in sys.stdin:
        try:
            answer = facts(*json.loads(line))
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
