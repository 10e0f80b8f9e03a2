"""What a process receives and holds for the loss of a global batch. Counted, nothing is measured.

    python benchmarks/traffic.py --out benchmarks/results/static  # traffic.csv and traffic.png
    python benchmarks/traffic.py --markdown  # the table of docs/distributed.md

Every process has N queries and N targets of width D in bfloat16. The symmetric loss is computed.

    llave         the grid that ``llave_kernels.grid`` chooses
    llave, C = 1  each process gathers all targets
    OpenCLIP      ``ClipLoss(local_loss=True, gather_with_grad=True)``: gathers both sides, and
                  scatters the gradients of both
    GradCache     ``DistributedContrastiveLoss``: gathers both sides without a gradient, and
                  computes the whole matrix in every process
    Inf-CL        ``cal_inf_loss`` in both directions: passes one side around a ring in float32,
                  then again with its gradients

The times are bytes over a rate. They leave out latencies. Our loss's own time is 8 N M D operations
at a rate that ``predictions.csv`` expects of large calls. All times are of the whole step.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.report import write_csv
from llave_kernels.atomic_files import publish
from llave_kernels.grid import row_length

N, D, ITEMSIZE, PER_NODE = 1024, 1536, 2, 8
PROCESSES = [1 << k for k in range(11)]
RATES = {"ms_at_50_gb_s": 50e9, "ms_at_400_gb_s": 400e9}
LOSS_RATE = 750e12  # FLOP/s
COLUMNS = [
    "label", "way", "processes", "grid", "n", "m", "d", "itemsize", "received_mib", *RATES,
    "loss_ms", "held_mib",
]  # fmt: skip
MIB = 1 << 20
Row = dict[str, Any]


def received(
    processes: int, c: int, n: int, m: int, d: int, itemsize: int, *, symmetric: bool = True
) -> int:
    """Bytes that a process receives for a step of ours without ids, owners and margin.

    Embeddings and gradients have ``itemsize`` bytes, log-sum-exps and their gradients 4.
    """
    r = processes // c
    rows, columns = (c - 1) * n, (r - 1) * m
    return 2 * (rows + columns) * d * itemsize + 2 * (rows + symmetric * columns) * 4


def held(processes: int, c: int, n: int, m: int, d: int, itemsize: int) -> int:
    """Bytes of the embeddings of a process's block, and of their gradients."""
    return 2 * (c * n + processes // c * m) * d * itemsize


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="the folder of the two files")
    what.add_argument("--markdown", action="store_true", help="print the table")
    options = parser.parse_args(argv)
    found = [row for processes in PROCESSES for row in rows(processes)]
    if options.markdown:
        print(markdown(found))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(found, options.out / "traffic.csv", COLUMNS)
    plot(found, options.out / "traffic.png")


def rows(p: int) -> Iterator[Row]:
    """A line for each way. What a way holds leaves out its logits."""
    side, one = N * D * ITEMSIZE, N * D * 4
    c = row_length(p, N, N, min(p, PER_NODE))
    ways = {
        "llave": (f"{p // c} x {c}", *(f(p, c, N, N, D, ITEMSIZE) for f in (received, held))),
        "llave, C = 1": (f"{p} x 1", *(f(p, 1, N, N, D, ITEMSIZE) for f in (received, held))),
        "OpenCLIP": ("", 4 * (p - 1) * side, 4 * p * side),
        "GradCache": ("", 2 * (p - 1) * side, 2 * p * side),
        # Queries, keys, keys on their way, gradients of both, and key gradients on their way.
        "Inf-CL": ("", 2 * (3 * p - 2) * one if p > 1 else 0, 6 * one),
    }
    for way, (grid, got, kept) in ways.items():
        yield {
            "label": "counted", "way": way, "processes": p, "grid": grid, "n": N, "m": N, "d": D,
            "itemsize": ITEMSIZE, "received_mib": f"{got / MIB:.6g}",
            **{name: f"{1e3 * got / rate:.4g}" for name, rate in RATES.items()},
            "loss_ms": f"{1e3 * 8 * N * p * N * D / LOSS_RATE:.4g}",
            "held_mib": f"{kept / MIB:.6g}",
        }  # fmt: skip


def markdown(found: list[Row]) -> str:
    """A line for each number of processes, a column for what each way receives."""
    ways = list(dict.fromkeys(row["way"] for row in found))
    heads = ["processes", "R x C", *(f"{way}, MiB" for way in ways)]
    heads += ["llave at 50 / 400 GB/s, ms", "our loss's products, ms"]
    lines = [heads, ["---"] * len(heads)]
    for p in PROCESSES[1:]:
        here = {row["way"]: row for row in found if row["processes"] == p}
        ours = here["llave"]
        times = " / ".join(f"{float(ours[name]):.2g}" for name in RATES)
        received = [f"{float(here[way]['received_mib']):,.0f}" for way in ways]
        loss = f"{float(ours['loss_ms']):.2g}"
        lines.append([f"{p:,}", ours["grid"], *received, times, loss])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(found: list[Row], path: Path) -> None:
    """What a process receives and holds, against the number of processes, log-log."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for axis, column, title in (
        (axes[0], "received_mib", "received by a process in a step, MiB (counted)"),
        (axes[1], "held_mib", "embeddings and gradients it holds, MiB (counted)"),
    ):
        for number, way in enumerate(dict.fromkeys(row["way"] for row in found)):
            mine = [row for row in found if row["way"] == way and row["processes"] > 1]
            axis.plot(
                [row["processes"] for row in mine], [float(row[column]) for row in mine],
                "o-" if way.startswith("llave") else "o--",  # two lines are nearly the same
                label=way, color=f"C{number}", lw=2.5 if way == "llave" else 1.2,
            )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="processes", title=title)
        axis.set_xticks(PROCESSES[1:], labels=[f"{p:,}" for p in PROCESSES[1:]], fontsize=8)
        axis.minorticks_off()
        axis.grid(True, alpha=0.25)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    publish(path, partial(figure.savefig, format="png", dpi=130))
    plt.close(figure)


if __name__ == "__main__":
    main()
