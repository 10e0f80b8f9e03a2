"""What a run leaves: a table on the screen, one CSV, and plots of time and memory against N.

python benchmarks/report.py RESULTS/*/loss_bench.csv    # a line for each size
python benchmarks/report.py --markdown CSV [CSV ...]    # a table of these files
python benchmarks/report.py --plot CSV [CSV ...]        # the plots of each file, beside it
"""

from __future__ import annotations

import argparse
import csv
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

from llave_kernels.atomic_files import publish

OUT_OF_MEMORY = "out of memory"
COLUMNS = [
    "loss_name", "data", "impl", "n", "m", "d",
    "dtype", "directions", "query_alpha", "target_alpha", "status",
    "forward_ms", "step_ms", "step_p20_ms", "step_p80_ms", "steps", "extra_mib",
    "tflops", "flops_convention", "floor_ms", "share", "ceiling_tflops", "ceiling_gb_s",
    "product_tflops", "loss", "loss_error", "gradient_error",
    "times_faster_than_authors",
    "machine", "cores", "python", "torch", "triton", "llave", "date", "command",
]  # fmt: skip
SHOWN = {
    "data": "{}", "n": "{}", "m": "{}", "d": "{}", "impl": "{}", "alphas": "{}",
    "forward_ms": "{:.3g}", "step_ms": "{:.4g}", "spread": "{}",
    "extra_mib": "{:.0f}", "tflops": "{:.3g}", "share": "{:.0%}",
    "loss_error": "{:.0e}", "gradient_error": "{:.0e}",
    "times_faster_than_authors": "{:.2f}x",
}  # fmt: skip
HEADINGS = {
    "forward_ms": "fwd ms", "step_ms": "fwd+bwd ms", "spread": "p20-p80", "extra_mib": "extra MiB",
    "tflops": "TFLOP/s", "share": "of floor",
    "loss_error": "loss err", "gradient_error": "grad err",
    "times_faster_than_authors": "vs authors",
}  # fmt: skip
AXES = {"n": "N, queries in the batch", "d": "D, width of the embeddings"}
MARKERS = "ov^D<>P*"
NAMES = {
    "llave-torch": "llave, torch backend",
    "llave-triton": "llave, triton backend",
    "llave-cuda": "llave, cuda backend",
    "authors": "LLaVE's published loss",
    "dense": "plain PyTorch, one product",
    "dense-compiled": "plain PyTorch, torch.compile",
    "sentence-transformers": "sentence-transformers",
    "open-clip": "OpenCLIP",
    "inf-cl": "Inf-CL",
    "memeff": "memory-efficient CLIP loss",
    "cce-exact": "Cut Cross-Entropy, no filter",
    "liger": "Liger Kernel",
    "quack": "QuACK",
}
Row = dict[str, Any]


def table(rows: list[Row]) -> str:
    """The figures in columns. A row without figures says why."""
    lines = [[HEADINGS.get(c, c) for c in SHOWN]]
    for row in rows:
        row = row | {"alphas": _alphas(row)}
        if row["status"] == "ok":
            row["spread"] = f"{row['step_p20_ms']:.4g}-{row['step_p80_ms']:.4g}"
        cells = [f.format(row[c]) if row.get(c) is not None else "-" for c, f in SHOWN.items()]
        lines.append(cells if row["status"] == "ok" else [*cells[:6], row["status"]])
    whole = [line for line in lines if len(line) == len(SHOWN)]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=False)) for line in lines
    )


def _alphas(row: Row) -> str:
    """The hardness strengths of one direction or two."""
    both = (row["query_alpha"], row["target_alpha"])
    return ", ".join(f"{alpha:g}" for alpha in both if alpha is not None)


def write_csv(rows: list[Row], path: Path, columns: list[str] = COLUMNS) -> None:
    """One row for each measurement."""

    def write(beside: Path) -> None:
        with beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    publish(path, write)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a run's CSV.

    Those of early runs lack columns. They are of the contrastive loss, with as many targets as
    queries.
    """
    with path.open(newline="") as file:
        return [
            dict.fromkeys(COLUMNS, "") | {"loss_name": "contrastive", "m": row["n"]} | row
            for row in csv.DictReader(file)
        ]


def numbers(row: dict[str, str]) -> Row:
    """A row of a CSV with numbers for ``plots``. A figure that is not there is None."""
    sizes = {name: int(row[name]) for name in ("n", "m", "d")}
    figures = {name: float(row[name]) if row[name] else None for name in ("step_ms", "extra_mib")}
    return row | sizes | figures


def markdown(rows: list[dict[str, str]]) -> str:
    """A table of milliseconds and memory: a line for each implementation, a column for each size.

    Implementations and sizes keep the order of their first rows.
    """
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        way = {"1": "one direction", "2": "both"}[row["directions"]]
        n, m, d = (f"{int(row[name]):,}" for name in ("n", "m", "d"))
        size = f"{way}, N = {n}{'' if m == n else f', M = {m}'}, D = {d}"
        if row["loss_name"] != "contrastive":
            size = f"{row['loss_name']}, {size}"
        figures = row["status"]
        if row["step_ms"]:
            figures = f"{float(row['step_ms']):,.0f} ms, {float(row['extra_mib']):,.0f} MiB"
        cells.setdefault(size, {})[row["impl"]] = figures
    lines = [["forward + backward", *cells], ["---"] * (1 + len(cells))]
    for name in dict.fromkeys(row["impl"] for row in rows):
        lines.append([name, *(column.get(name, "-") for column in cells.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def digest(rows: list[dict[str, str]]) -> list[str]:
    """One line for each data set and size of a CSV: our fastest, and its speed over the others.

    A line counts the rows without figures, so that a failure is not overlooked.
    """
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        size = "{data} N={n} M={m} D={d} {dtype}, {directions} direction(s)".format(**row)
        groups.setdefault(size, []).append(row)
    lines = []
    for size, here in groups.items():
        done = sorted(
            (row for row in here if row["step_ms"]), key=lambda row: float(row["step_ms"])
        )
        ours = next((row for row in done if row["impl"].startswith("llave")), None)
        parts = [f"{len(here) - len(done)} of {len(here)} without figures"]
        if ours:
            share = f", {float(ours['share']):.0%} of floor" if ours["share"] else ""
            fastest = f"{ours['impl']} {float(ours['step_ms']):.4g} ms"
            rate = f", {float(ours['tflops']):.3g} TFLOP/s" if ours["tflops"] else ""
            parts.insert(0, f"{fastest}{rate}{share}")
            parts += [
                f"{float(row['step_ms']) / float(ours['step_ms']):.2f}x {row['impl']}"
                for row in done
                if row is not ours
            ]
        lines.append(f"{size}: {'; '.join(parts)}")
    return lines


def plots(rows: list[Row], folder: Path) -> list[Path]:
    """Time and memory against N for each D of several sizes, and against D for each N. Log-log.

    One size of one width has a plot too. Lines are random embeddings, squares are real ones. A
    cross at the top is out of memory.
    """
    written = []
    alone = len({(row["n"], row["d"]) for row in rows}) == 1
    for against, fixed in (("n", "d"), ("d", "n")):
        for value in sorted({row[fixed] for row in rows}):
            here = [row for row in rows if row[fixed] == value]
            if len({row[against] for row in here}) > 1 or (alone and against == "n"):
                path = folder / f"loss_bench_{fixed.upper()}{value}.png"
                _plot(here, against, f"{fixed.upper()} = {value:,}", path)
                written.append(path)
    return written


def _plot(rows: list[Row], against: str, title: str, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6))
    ticks = sorted({row[against] for row in rows})
    for axis, column, quantity in (
        (axes[0], "step_ms", "forward + backward, milliseconds"),
        (axes[1], "extra_mib", "extra peak memory, MiB"),
    ):
        _draw(axis, rows, against, column)
        if all(row.get(column) is None for row in rows):
            axis.set_ylim(1, 10)  # crosses alone give a log axis no limits
        axis.set(xscale="log", yscale="log", xlabel=AXES[against], ylabel=quantity)
        low, high = axis.get_ylim()
        if any(row["status"] == OUT_OF_MEMORY for row in rows):
            high *= (high / low) ** 0.28  # the top fifth is for the crosses
            axis.set_ylim(low, high)
        axis.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}")
        axis.minorticks_off()
        axis.grid(True, alpha=0.25)
    lines, names = axes[0].get_legend_handles_labels()
    figure.suptitle(title, fontsize=10)
    figure.legend(lines, names, fontsize=8, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.04 + 0.04 * -(-len(names) // 3), 1, 1))
    publish(path, partial(figure.savefig, format="png", dpi=130))
    plt.close(figure)


def _draw(axis: Any, rows: list[Row], against: str, column: str) -> None:
    for number, impl in enumerate(dict.fromkeys(row["impl"] for row in rows)):
        mine = [row for row in rows if row["impl"] == impl]
        look = {"color": f"C{number}", "marker": MARKERS[number % len(MARKERS)]}  # also in print
        look["lw"] = 2.5 if impl.startswith("llave") else 1.2
        axis.plot([], [], label=NAMES.get(impl, impl), **look)
        for kind in dict.fromkeys(row["data"] for row in mine):
            done = [r for r in mine if r["data"] == kind and r.get(column) is not None]
            done.sort(key=lambda row: row[against])
            real = {} if kind == "random" else {"marker": "s", "ls": ""}
            axis.plot([r[against] for r in done], [r[column] for r in done], **look | real)
        lost = [row[against] for row in mine if row["status"] == OUT_OF_MEMORY]
        # Heights are parts of the axis' height. They differ so that no cross hides another.
        heights = [0.97 - 0.04 * number] * len(lost)
        crosses = look | {"marker": "x", "ls": "", "ms": 9, "mew": 2}
        axis.plot(lost, heights, transform=axis.get_xaxis_transform(), **crosses)
    if any(row["status"] == OUT_OF_MEMORY for row in rows):
        axis.plot([], [], "kx", ms=9, mew=2, label="out of memory")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="CSV")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--markdown", action="store_true", help="one table of all files")
    kinds.add_argument("--plot", action="store_true", help="draw the plots beside each file")
    options = parser.parse_args()
    if options.markdown:
        print(markdown([row for name in options.files for row in read_csv(name)]))
    elif options.plot:
        for name in options.files:
            print(*plots([numbers(row) for row in read_csv(name)], name.parent), sep="\n")
    else:
        for name in options.files:
            print(name, *digest(read_csv(name)), sep="\n  ")
