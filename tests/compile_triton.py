"""Compile one kernel for a GPU that need not be there; print what its machine code holds as JSON.

Usage: compile_triton.py KERNEL ARCH DTYPE TILE-AS-JSON FLAGS-AS-JSON
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llave_kernels.backends import triton_kernels

FLOATS = {"p_scale", "p_similarity", "p_row_limit", "p_column_limit", "p_gain"}
INTEGERS = {"p_label", "p_owner", "p_qid", "p_tid"}


def argument_type(name: str, dtype: str) -> str:
    if name in ("p_q", "p_t", "p_ds"):
        return f"*{dtype}"
    if name in INTEGERS:
        return "*i64"
    if name.startswith("p_"):
        return "*fp32"
    return "fp32" if name.endswith("alpha") else "i32"


def main(name: str, arch: str, dtype: str, tile_json: str, flags_json: str) -> None:
    bm, bn, bk, warps, stages = json.loads(tile_json)
    kernel = getattr(triton_kernels, name)
    flags = {
        "HARDNESS": 0, "HAS_OWNERS": False, "HAS_IDS": False, "HAS_MARGIN": False,
        "SYMMETRIC": True, "SAME_ALPHA": True, "PRECISION": "tf32",
        "BM": bm, "BN": bn, "BK": bk, "GROUP": 8, "BLOCK": 128, "s_qd": 1, "s_td": 1,
    } | json.loads(flags_json)  # fmt: skip
    signature = {a: argument_type(a, dtype) for a in kernel.arg_names}
    constants = {a: flags[a] for a in kernel.arg_names if a in flags}
    signature |= dict.fromkeys(constants, "constexpr")
    # What a launch finds out by itself: aligned pointers, sizes and strides divisible by 16.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, a in enumerate(kernel.arg_names)
        if a not in constants and signature[a] != "fp32" and a not in ("ROWS", "COLUMNS")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", int(arch), 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        listing = subprocess.run(
            [str(bundled), "-sass", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
    report = {
        "tensor_core": len(re.findall(r"\bHGMMA|\bHMMA", listing)),
        "wgmma": len(re.findall(r"\bHGMMA", listing)),
        "traps": len(re.findall(r"\bBPT\b", listing)),
        "spills": len(re.findall(r"\b(LDL|STL)\b", listing)),
        "shared": compiled.metadata.shared,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
