"""Our loss beside today's alternatives on this machine: time, memory, accuracy.

    python benchmarks/loss_bench.py                        # random and real embeddings, two minutes
    python benchmarks/loss_bench.py --sizes 8192 --dims 384 1024 --data random
    python benchmarks/loss_bench.py --data pairs.npz       # your own ``query`` and ``target``

Each implementation runs in a process of its own, one after the other. TFLOP/s counts 8NMD for both
directions and 6NMD for one, whatever an implementation really does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import data
import report
import torch
from peers import FLOPS, PEERS, refusals
from torch import Tensor
from tqdm import tqdm

import llave_kernels

REFERENCE_LIMIT = 8192  # rows; beyond it the float64 reference needs tens of GB and is left out


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--sizes", type=int, nargs="+", help="N = M of the random embeddings")
    parser.add_argument("--dims", type=int, nargs="+", help="D of the random embeddings")
    parser.add_argument("--impl", nargs="+", choices=list(PEERS), help="default: all that can run")
    parser.add_argument("--alpha", type=float, default=9.0)
    parser.add_argument("--one-direction", action="store_true", help="query -> target only")
    parser.add_argument(
        "--data", default="all", help="random, docstrings, a file, or all (default)"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="timing of each measurement")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="CSV and plots")
    options = parser.parse_args(argv)
    gpu = options.device.startswith("cuda")
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    options.sizes = options.sizes or ([1024, 4096, 16384, 32768] if gpu else [1024, 4096])
    options.dims = options.dims or ([1536] if gpu else [384])
    return options


def datasets(options: argparse.Namespace) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, query, target) of everything asked for."""
    if options.data in ("random", "all"):
        for d in options.dims:
            for n in options.sizes:
                yield "random", *data.random(n, d)
    if options.data in ("docstrings", "all"):
        try:
            yield "docstrings", *data.docstrings()
        except ModuleNotFoundError as error:
            if options.data == "docstrings":
                raise SystemExit(f"--data docstrings: {error}; pip install '.[bench]'") from None
            print(f"real embeddings left out: {error}; pip install '.[bench]'", file=sys.stderr)
    if options.data not in ("random", "docstrings", "all"):
        path = Path(options.data)
        if not path.exists():
            raise SystemExit(f"--data {path}: no such file; or one of random, docstrings, all")
        try:
            yield path.stem, *data.from_file(path)
        except ValueError as error:
            raise SystemExit(str(error)) from None


def run(impl: str, inputs: Path, n: int, options: argparse.Namespace) -> dict[str, Any]:
    """One measurement in a child process."""
    job = {
        "impl": impl,
        "inputs": str(inputs),
        "device": options.device,
        "dtype": options.dtype,
        "alpha": options.alpha,
        "symmetric": not options.one_direction,
        "seconds": options.seconds,
        "reference": n <= REFERENCE_LIMIT,
    }
    file = inputs.with_suffix(".json")
    file.write_text(json.dumps(job))
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(Path(__file__).with_name("measure.py")),
        str(file),
    ]
    child = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    if child.returncode == -9:  # the kernel's own out-of-memory killer
        return {"status": "out of memory"}
    if child.returncode:
        return {"status": "failed: " + child.stderr.strip().splitlines()[-1][:120]}
    return json.loads(child.stdout.splitlines()[-1])


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """What every row of the CSV says about where it comes from."""
    gpu = options.device.startswith("cuda")
    return {
        "machine": torch.cuda.get_device_name() if gpu else _cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "llave": llave_kernels.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": shlex.join(["python", "benchmarks/loss_bench.py", *sys.argv[1:]]),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    symmetric = not options.one_direction
    reasons = refusals(options.device, symmetric)
    names = options.impl or [name for name, reason in reasons.items() if reason is None]
    for name, reason in reasons.items():
        if reason is not None and (options.impl is None or name in options.impl):
            print(f"{name} left out: {reason}", file=sys.stderr)
    names = [name for name in names if reasons[name] is None]
    sets = list(datasets(options))
    about = environment(options)
    rows: list[dict[str, Any]] = []
    progress = tqdm(total=len(sets) * len(names), unit="run", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        for label, query, target in sets:
            inputs = Path(folder) / "inputs.pt"
            torch.save((query, target), inputs)
            n, d = query.shape
            group = []
            for name in names:
                progress.set_description(f"{label} N={n} D={d} {name}")
                row = run(name, inputs, n, options) | {"data": label, "impl": name, "n": n, "d": d}
                row |= {"dtype": options.dtype, "alpha": options.alpha * PEERS[name].query_alpha}
                group.append(row | about | {"directions": 2 if symmetric else 1})
                progress.update()
            rows += _derived(group, symmetric)
    progress.close()
    options.out.mkdir(parents=True, exist_ok=True)
    report.write_csv(rows, options.out / "loss_bench.csv")
    images = report.plots(rows, options.out)
    print(report.table(rows))
    print(f"TFLOP/s counts {FLOPS[symmetric]}NMD. {options.dtype}, {about['machine']}.")
    print("written:", *map(str, [options.out / "loss_bench.csv", *images]))


def _derived(group: list[dict[str, Any]], symmetric: bool) -> list[dict[str, Any]]:
    """Rates, and ratios to the authors' loss where that ran."""
    baseline = next((r.get("step_ms") for r in group if r["impl"] == "authors"), None)
    for row in group:
        row["flops_counted"] = f"{FLOPS[symmetric]}NMD"
        if row["status"] == "ok":
            work = FLOPS[symmetric] * row["n"] ** 2 * row["d"]
            row["tflops"] = work / row["step_ms"] / 1e9
            row["times_faster_than_authors"] = baseline and baseline / row["step_ms"]
    return group


if __name__ == "__main__":
    main()
