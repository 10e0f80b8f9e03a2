"""Our loss beside today's alternatives on this machine: time, memory, accuracy.

    python benchmarks/loss_bench.py                        # random and real embeddings, two minutes
    python benchmarks/loss_bench.py --sizes 8192 --dims 384 1024 --data random
    python benchmarks/loss_bench.py --data pairs.npz       # your own ``query`` and ``target``
    python benchmarks/loss_bench.py --loss NAME            # another loss, of ``benchmarks/losses``

Each implementation runs in its own process. They take turns of a few steps, so that a slow spell of
the machine falls on all of them. TFLOP/s counts 8NMD for both directions and 6NMD for one, whatever
an implementation really does. The floor is the longer of two times: that work at the rate of a
large product, and the inputs and gradients moved at the rate of a large copy. Not every peer
applies the hardness weight, so each is compared with float64 values of the loss it really computes.
The CSV is rewritten after every turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import llave_kernels
from benchmarks import data, report, workers
from benchmarks.losses import LOSSES
from benchmarks.peer import SCALE
from benchmarks.peers import RULES

# Beyond so many rows the float64 values take longer than the measurements. They are left out there.
TRUTH_LIMIT = {"cpu": 8192, "cuda": 32768}
DENSE_LIMIT = 4096  # the same for float64 values from a dense formula, which take memory too
ROUNDS = 5  # turns of each implementation, of one step or more
NOISY = 1.5  # a comparison is not fair where the plain product's rate varies by more than this


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {value}")
    return value


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=["float32", "tf32", "bfloat16", "float16"])
    parser.add_argument("--sizes", type=_positive, nargs="+", help="N of the random embeddings")
    parser.add_argument("--dims", type=_positive, nargs="+", help="D of the random embeddings")
    parser.add_argument("--loss", choices=list(LOSSES), default="contrastive")
    parser.add_argument("--impl", nargs="+", metavar="NAME", help="default: all that can run")
    parser.add_argument(
        "--negatives", type=int, default=0, help="mined negatives per query, with --data random"
    )
    parser.add_argument(
        "--rule", choices=list(RULES), help="a rule about which pairs count; only ours take it"
    )
    parser.add_argument("--alpha", type=float, default=9.0)
    parser.add_argument("--one-direction", action="store_true", help="query -> target only")
    parser.add_argument(
        "--data", default="all", help="random, docstrings, a file, or all (default)"
    )
    parser.add_argument(
        "--seconds", type=float, default=1.0, help=f"timing of each measurement, in {ROUNDS} turns"
    )
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="CSV and plots")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not gpu:
        parser.error("--device cuda: torch sees no GPU")
    if options.negatives < 0 or (options.negatives and options.data != "random"):
        parser.error(f"--negatives {options.negatives}: 0 or more, and --data random")
    family = LOSSES[options.loss]
    if unknown := sorted(set(options.impl or []) - set(family.peers)):
        parser.error(f"--impl {unknown[0]}: not one of {', '.join(family.peers)}")
    if (2 - options.one_direction) not in family.directions:
        remedy = "leave out" if options.one_direction else "add"
        parser.error(
            f"--loss {options.loss}: has one number of directions; {remedy} --one-direction"
        )
    gpu = options.device == "cuda"
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    options.sizes = options.sizes or ([1024, 4096, 16384, 32768] if gpu else [1024, 4096])
    options.dims = options.dims or ([1536] if gpu else [384])
    return options


def datasets(options: argparse.Namespace) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, query, target) of each data set that the options ask for."""
    if options.data in ("random", "all"):
        for d in options.dims:
            for n in options.sizes:
                yield "random", *data.random(n, d, options.negatives)
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


Alphas = tuple[float, float | None]  # of the target direction: None where it is not computed


def alphas(impl: str, options: argparse.Namespace) -> Alphas:
    """The hardness strength that ``impl`` really applies in each direction."""
    peer = LOSSES[options.loss].peers[impl]
    target_alpha = None if options.one_direction else options.alpha * peer.target_alpha
    return options.alpha * peer.query_alpha, target_alpha


def _truth_limit(options: argparse.Namespace) -> int:
    dense = LOSSES[options.loss].truth is not None
    return DENSE_LIMIT if dense else TRUTH_LIMIT[options.device]


def truths(names: list[str], inputs: Path, options: argparse.Namespace) -> dict[Alphas, str]:
    """Files with the float64 loss and gradients, by the pair of alphas."""
    kinds = list(dict.fromkeys(alphas(name, options) for name in names))
    files = {str(inputs.with_name(f"truth{i}.pt")): kind for i, kind in enumerate(kinds)}
    job = {"inputs": str(inputs), "device": options.device, "dtype": options.dtype}
    job["loss"] = options.loss
    if failure := workers.run("truth", job | {"scale": SCALE, "files": files}, inputs.parent):
        tqdm.write(f"errors left out, no float64 values: {failure}", file=sys.stderr)
        return {}
    return {kind: file for file, kind in files.items()}


def measure(
    group: dict[str, dict[str, Any]],
    files: dict[str, dict[str, Any]],
    running: dict[str, workers.Worker],
    options: argparse.Namespace,
    folder: Path,
) -> Iterator[str]:
    """Fill each implementation's row of ``group``. Yields what has just been done.

    Args:
        group: rows of the CSV, by implementation.
        files: the inputs and the truth, by implementation.
        running: the processes, by implementation. Missing ones are started.
    """

    def ask(name: str, line: str) -> dict[str, Any]:
        answer = running[name].ask(line)
        if "status" in answer:  # something went wrong, and the process is lost
            running.pop(name).close()
        return answer

    shared = {"device": options.device, "dtype": options.dtype, "alpha": options.alpha}
    shared |= {"symmetric": not options.one_direction, "rule": options.rule, "loss": options.loss}
    for name in group:
        if name not in running:
            running[name] = workers.Worker("measure", shared | {"impl": name}, folder)
    timings: dict[str, list[dict[str, Any]]] = {name: [] for name in group}
    for name, row in group.items():
        row |= {"status": "ok"} | ask(name, f"prepare {json.dumps(files[name])}")
        yield f"{name}: prepared"
    for turn in range(ROUNDS):
        for name, row in group.items():
            if row["status"] == "ok":
                answer = ask(name, f"time {options.seconds / ROUNDS}")
                if "status" in answer:
                    row |= answer
                else:
                    timings[name].append(answer)
                    row |= summary(timings[name])
            yield f"{name}: turn {turn + 1} of {ROUNDS}"


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and quantiles over the turns so far. Each turn has the same weight."""
    steps = [statistics.median(turn["steps"]) for turn in turns]
    low, *_, high = (
        statistics.quantiles(steps, n=5, method="inclusive") if len(steps) > 1 else steps * 2
    )
    return {
        "forward_ms": statistics.median(statistics.median(turn["forwards"]) for turn in turns),
        "step_ms": statistics.median(steps),
        "step_p20_ms": low,
        "step_p80_ms": high,
        "steps": sum(len(turn["steps"]) for turn in turns),
        "product_tflops": statistics.median(turn["product_tflops"] for turn in turns),
    }


def ceilings(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What the machine reaches at best, or an empty dict where that could not be measured."""
    job = {"device": options.device, "dtype": options.dtype}
    worker = workers.Worker("ceilings", job, folder)
    found = worker.ask("")
    worker.close()
    if "status" in found:
        tqdm.write(f"shares left out, no ceilings: {found['status']}", file=sys.stderr)
        return {}
    return found


def environment(options: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """The columns that say where a row of the CSV comes from."""
    return where(options.device, ["benchmarks/loss_bench.py", *argv]) | {
        "loss_name": options.loss,
        "dtype": options.dtype,
        "directions": 1 if options.one_direction else 2,
    }


def where(device: str, command: list[str]) -> dict[str, Any]:
    """The machine, the versions, the date and the command."""
    gpu = device == "cuda"
    return {
        "machine": torch.cuda.get_device_name() if gpu else _cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "llave": llave_kernels.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": shlex.join(["python", *command]),
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
    if there := sorted(path.name for path in options.out.glob("loss_bench*")):
        raise SystemExit(
            f"--out: {options.out} has {', '.join(there)} already; choose another folder"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    symmetric = not options.one_direction
    family = LOSSES[options.loss]
    reasons = family.refusals(options.device, symmetric, options.negatives > 0, options.rule)
    asked = options.impl or list(family.peers)
    for name in asked:
        if reasons[name] is not None:
            print(f"{name} left out: {reasons[name]}", file=sys.stderr)
    names = [name for name in asked if reasons[name] is None]
    if not names:
        raise SystemExit("nothing to measure: none of the implementations asked for can run")
    sets = list(datasets(options))
    flops = None if family.flops is None else family.flops[symmetric]
    about = environment(options, sys.argv[1:] if argv is None else argv)
    file = options.out / "loss_bench.csv"
    rows: list[dict[str, Any]] = []
    progress = tqdm(total=len(sets) * len(names) * (1 + ROUNDS), unit="turn", file=sys.stderr)
    running: dict[str, workers.Worker] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        about |= ceilings(options, folder)
        try:
            for label, query, target in sets:
                (n, d), m = query.shape, len(target)
                label = f"{label} {options.rule}" if options.rule else label
                progress.set_description(f"{label} N={n} D={d} float64")
                inputs = folder / "inputs.pt"
                torch.save((query, target), inputs)
                known = n <= _truth_limit(options) and options.rule is None
                truth = truths(names, inputs, options) if known else {}
                group, files = {}, {}
                for name in names:
                    kind = alphas(name, options)
                    group[name] = about | {"data": label, "impl": name, "n": n, "m": m, "d": d}
                    group[name] |= {"query_alpha": kind[0], "target_alpha": kind[1]}
                    files[name] = {"inputs": str(inputs), "truth": truth.get(kind)}
                for done in measure(group, files, running, options, folder):
                    progress.set_description(f"{label} N={n} D={d} {done}")
                    progress.update()
                    report.write_csv(rows + _derived(list(group.values()), flops), file)
                rows += group.values()
        finally:
            workers.close(running.values())
    progress.close()
    print(report.table(rows))
    print(*_notes(rows, options, about["machine"]), sep="\n")
    print("written:", *map(str, [file, *report.plots(rows, options.out)]))


def _derived(group: list[dict[str, Any]], flops: int | None) -> list[dict[str, Any]]:
    """The group with rates, and with ratios to the authors' loss where that ran."""
    baseline = next((r.get("step_ms") for r in group if r["impl"] == "authors"), None)
    for row in group:
        row["flops_convention"] = flops and f"{flops}NMD"
        if "step_ms" in row and flops:
            work = flops * row["n"] * row["m"] * row["d"]
            row["tflops"] = work / row["step_ms"] / 1e9
            if "ceiling_tflops" in row:
                size = 2 if "16" in row["dtype"] else 4
                moved = 2 * (row["n"] + row["m"]) * row["d"] * size  # inputs and gradients
                bounds = work / row["ceiling_tflops"] / 1e9, moved / row["ceiling_gb_s"] / 1e6
                row["floor_ms"] = max(bounds)
                row["share"] = row["floor_ms"] / row["step_ms"]
        if "step_ms" in row:
            row["times_faster_than_authors"] = baseline and baseline / row["step_ms"]
    return group


def _notes(rows: list[dict[str, Any]], options: argparse.Namespace, machine: str) -> Iterator[str]:
    """What a reader needs beside the table."""
    flops = LOSSES[options.loss].flops
    counted = f" TFLOP/s counts {flops[not options.one_direction]}NMD." if flops else ""
    yield f"{machine}, {options.dtype}.{counted}"
    if flops and rows and "ceiling_tflops" in rows[0]:
        yield (
            f"A large product ran at {rows[0]['ceiling_tflops']:.3g} TFLOP/s, a large copy at "
            f"{rows[0]['ceiling_gb_s']:.3g} GB/s: the floor that the share is of."
        )
    yield "Extra MiB: peak beyond the inputs in one forward + backward, the two gradients included."
    yield "Errors: by norm, against float64 values of the loss with the alphas shown."
    if options.rule:
        yield "No errors with a rule: the float64 values are of the loss without."
    limit = _truth_limit(options)
    if any(row["n"] > limit for row in rows):
        yield f"No errors beyond N = {limit}: the float64 values would take too long."
    for key in dict.fromkeys((row["data"], row["n"], row["d"]) for row in rows):
        rates = [
            row["product_tflops"]
            for row in rows
            if (row["data"], row["n"], row["d"]) == key and row["status"] == "ok"
        ]
        if rates and max(rates) > NOISY * min(rates):
            yield (
                f"NOISY: {key[0]} N={key[1]} D={key[2]}: a plain matrix product ran at "
                f"{min(rates):.2f} to {max(rates):.2f} TFLOP/s beside the implementations. "
                "Something else was running; measure again before comparing."
            )


if __name__ == "__main__":
    main()
