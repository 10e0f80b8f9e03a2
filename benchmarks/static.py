"""What the machine code says about our kernels, without a GPU: registers, spills, instructions.

    python benchmarks/static.py --out benchmarks/results/static

It reads the compiled extension, and compiles the Triton kernels for sm_90. It writes two files.
Nothing in them is measured.

``kernels.csv`` has a line for each kernel, element type and tile, for a call in both directions
without rules:

    spill_bytes       bytes that a thread's loads and stores of local memory move
    instructions      all of a thread's instructions in the kernel, each road through it included
    epilogue          instructions of the cheapest road from a tile's last product to the next
                      tile's first that takes an exponential for each of the thread's elements. In
                      the extension's forward also the shuffles of both directions: seven for eight
                      of the thread's columns
    per_element       ``epilogue`` for each element of the tile that the thread holds
    shared_bytes      of a block. Of the extension's kernels, their tiles of operands alone

The kernel "kept" is the backward that reads the similarities that a forward has kept. Its epilogue
is the whole kernel.

``predictions.csv`` has what ``prediction.py`` makes of that: milliseconds of a step, and TFLOP/s
counted as 8NMD.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # triton reads it at its first import

import torch

import llave_kernels
from benchmarks import machine_code, prediction
from llave_kernels.atomic_files import publish
from llave_kernels.backends import strip_gemm, tiles

KERNELS = [
    "label", "backend", "architecture", "kernel", "element", "tile", "threads", "registers",
    "spill_bytes", "instructions", "epilogue", "per_element", "shared_bytes", "resident",
    "cluster",
]  # fmt: skip
PREDICTIONS = [
    "label", "backend", "n", "m", "d", "element", "flops_convention", "forward_tile",
    "backward_tile", "keeps", "forward_ms", "backward_ms", "products_ms", "rounding_ms", "step_ms",
    "tflops", "assumed",
]  # fmt: skip
SIZES = tuple(itertools.product((4096, 16384, 65536), (384, 1536, 3584)))
ELEMENTS = {"bfloat16_t": "bfloat16", "half_t": "float16", "tfloat32_t": "tf32", "float": "tf32"}
TRITON_ELEMENTS = {"bf16": ("bfloat16", 2), "fp32": ("tf32", 4)}
NAMES = {"forward_kernel": "forward", "strip_kernel": "backward"}
# The main loop's stages and tile in a demangled name, then the element type.
CUTLASS = re.compile(
    r"MainloopSm(?P<architecture>\d+)\w*<(?P<stages>\d+), cute::tuple<cute::C<(?P<cluster>\d+)>.*?"
    r"cute::tuple<cute::C<(?P<bm>\d+)>, cute::C<(?P<bn>\d+)>, cute::C<(?P<bk>\d+)> ?>, "
    r"(?:cutlass::)?(?P<element>\w+),.*llave::(?P<kernel>\w+)Epilogue<"
)
KEPT = re.compile(r"kept_kernel<llave::BackwardEpilogue<llave::Warp, (?:cutlass::)?(\w+),")
KEPT_TILE = 64, 128  # csrc/tiles.h
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder of the two files")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [*_extension(), *_triton()]
    if not rows:
        raise SystemExit("nothing to read: the extension is not built, and triton not installed")
    rows.sort(key=lambda row: [str(row[name]) for name in KERNELS[1:6]])
    _write(options.out / "kernels.csv", KERNELS, rows)
    predicted = list(predictions(rows))
    _write(options.out / "predictions.csv", PREDICTIONS, predicted)
    for row in predicted:
        print("{backend:7} N={n:<6} D={d:<5} {tflops:4.0f} TFLOP/s, counted".format(**row))


def extension(path: Path) -> Iterator[Row]:
    """A row for each GEMM kernel of the compiled extension."""
    registers = machine_code.registers(path)
    for name, text in machine_code.functions(path):
        readable = _demangled(name)
        if kept := KEPT.search(readable):
            yield _kept(ELEMENTS[kept[1]], registers[name], text)
        found = CUTLASS.search(readable)
        if found is None:
            continue
        architecture, bm, bn, cluster = (
            int(found[key]) for key in ("architecture", "bm", "bn", "cluster")
        )
        ping_pong = "Pingpong" in name
        row = {
            "backend": "cuda",
            "architecture": architecture,
            "kernel": found["kernel"].lower(),
            "element": ELEMENTS[found["element"]],
            "tile": f"{bm}x{bn}",
            "threads": 128 if ping_pong else 256,
            "registers": registers[name],
            "shared_bytes": int(found["stages"]) * (bm + bn) * 128,
            "cluster": cluster,
        }
        row["resident"] = 2 if ping_pong else _resident(row)
        elements = bm * bn // row["threads"]
        # A thread holds elements of one row in 32.
        columns = elements // (bm // 32) if row["kernel"] == "forward" else 0
        yield row | _counts(text, elements, columns * 7 // 8)


def _kept(element: str, registers: int, text: str) -> Row:
    (bm, bn), threads = KEPT_TILE, 256
    target = re.findall(r"EF_CUDA_SM(\d+)", text)[0]
    row = {
        "backend": "cuda",
        "architecture": int(target),
        "kernel": "kept",
        "element": element,
        "tile": f"{bm}x{bn}",
        "threads": threads,
        "registers": registers,
        "shared_bytes": 0,
        "cluster": 1,
    }
    row["resident"] = _resident(row)
    return row | _counts(text, bm * bn // threads)


def triton_kernel(kernel: str, element: str, tile: tiles.Tile, *, kept: bool = False) -> Row:
    """The row of a kernel compiled for sm_90, for a call without rules.

    ``kept``: the backward that reads similarities.
    """
    from tests.llave_kernels.backends import compile_triton

    absent = (*compile_triton.RULES, "p_gain")
    options = ["p_similarity"] if kept else []
    compiled = compile_triton.compiled(kernel, 90, element, tile, absent=absent, options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        ((_, text),) = machine_code.functions(path)
        (registers,) = machine_code.registers(path).values()
    row = {
        "backend": "triton",
        "architecture": 90,
        "kernel": "kept" if kept else NAMES[kernel],
        "element": TRITON_ELEMENTS[element][0],
        "tile": f"{tile.bm}x{tile.bn}",
        "threads": 32 * tile.warps,
        "registers": registers,
        "shared_bytes": compiled.metadata.shared,
        "cluster": 1,
    }
    row["resident"] = _resident(row)
    return row | _counts(text, tile.bm * tile.bn // row["threads"])


def predictions(rows: list[Row]) -> Iterator[Row]:
    """A row for each backend and size, in both directions, with the tiles that it would take."""
    known = [r for r in rows if (r["architecture"], r["element"]) == (90, "bfloat16")]
    for backend, (n, d) in itertools.product(("cuda", "triton"), SIZES):
        chosen = {}
        for kernel in ("forward", "backward", "kept"):
            mine = [r for r in known if (r["backend"], r["kernel"]) == (backend, kernel)]
            if backend == "triton":
                tile = tiles.table(9, torch.bfloat16, d, n)
                mine = [r for r in mine if r["tile"] == f"{tile.bm}x{tile.bn}"]
            # The extension's own choice is not known here. The model's is taken.
            chosen[kernel] = min(mine, key=lambda r: _kernel(r).seconds(n, n, d), default=None)
        forward, backward, kept = (chosen[name] for name in ("forward", "backward", "kept"))
        if forward and backward and kept:
            keeps = strip_gemm.keeps(n, n, d, prediction.ITEMSIZE)
            yield {
                "label": "counted",
                "backend": backend,
                "n": n,
                "m": n,
                "d": d,
                "element": "bfloat16",
                "flops_convention": "8NMD",
                "forward_tile": forward["tile"],
                "backward_tile": (kept if keeps else backward)["tile"],
                "keeps": keeps,
                "assumed": prediction.ASSUMED,
            } | prediction.step(_kernel(forward), _kernel(backward), _kernel(kept), n, n, d)


def _kernel(row: Row) -> prediction.Kernel:
    bm, bn = map(int, row["tile"].split("x"))
    names = ("threads", "epilogue", "resident", "cluster")
    return prediction.Kernel(bm, bn, *(int(row[name]) for name in names))


def _extension() -> Iterator[Row]:
    path = next(Path(llave_kernels.__file__).parent.glob("_cuda*.so"), None)
    if path is None:
        print("the extension is not built; its kernels are left out", file=sys.stderr)
    else:
        yield from extension(path)


def _triton() -> Iterator[Row]:
    for kernel, (element, (_, itemsize)) in itertools.product(
        ("forward_kernel", "strip_kernel"), TRITON_ELEMENTS.items()
    ):
        for tile in tiles.CANDIDATES[tiles.Kind(9, itemsize)]:
            print(kernel, element, tuple(tile), file=sys.stderr)
            yield triton_kernel(kernel, element, tile)
            if kernel == "strip_kernel":
                yield triton_kernel(kernel, element, tile, kept=True)


def _counts(text: str, elements: int, shuffles: int = 0) -> Row:
    code = machine_code.Code(text)
    epilogue = code.epilogue(elements, shuffles)
    return {
        "label": "counted",
        "spill_bytes": code.spill_bytes,
        "instructions": len(code.instructions),
        "epilogue": epilogue,
        "per_element": epilogue and round(epilogue / elements, 1),
    }


def _resident(row: Row) -> int:
    return prediction.resident(row["registers"], row["threads"], row["shared_bytes"])


def _demangled(name: str) -> str:
    run = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True)
    return run.stdout


def _write(path: Path, columns: list[str], rows: list[Row]) -> None:
    def write(beside: Path) -> None:
        with beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(
                {
                    name: f"{value:.4g}" if isinstance(value, float) else value
                    for name, value in row.items()
                }
                for row in rows
            )

    publish(path, partial(write))


if __name__ == "__main__":
    main()
