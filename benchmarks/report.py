"""What a run leaves: a table on the screen, one CSV, and plots of time and memory against N."""

from __future__ import annotations

import csv
import os
import tempfile
from pathlib import Path
from typing import Any

COLUMNS = [
    "data", "impl", "n", "d", "dtype", "directions", "alpha", "status",
    "forward_ms", "step_ms", "step_p20_ms", "step_p80_ms", "extra_mib", "tflops", "flops_counted",
    "loss_error", "gradient_error", "times_faster_than_authors",
    "machine", "cores", "python", "torch", "triton", "llave", "date", "command",
]  # fmt: skip
SHOWN = {
    "data": "{}", "n": "{}", "d": "{}", "impl": "{}", "forward_ms": "{:.1f}", "step_ms": "{:.1f}",
    "extra_mib": "{:.0f}", "tflops": "{:.2f}", "loss_error": "{:.0e}", "gradient_error": "{:.0e}",
    "times_faster_than_authors": "{:.2f}x",
}  # fmt: skip
HEADINGS = {
    "forward_ms": "fwd ms", "step_ms": "fwd+bwd ms", "extra_mib": "extra MiB",
    "tflops": "TFLOP/s", "loss_error": "loss err", "gradient_error": "grad err",
    "times_faster_than_authors": "vs authors",
}  # fmt: skip
Row = dict[str, Any]


def table(rows: list[Row]) -> str:
    """The figures in columns; a row without figures says why."""
    lines = [[HEADINGS.get(c, c) for c in SHOWN]]
    for row in rows:
        cells = [f.format(row[c]) if row.get(c) is not None else "-" for c, f in SHOWN.items()]
        lines.append(cells if row["status"] == "ok" else [*cells[:4], row["status"]])
    whole = [line for line in lines if len(line) == len(SHOWN)]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=False)) for line in lines
    )


def write_csv(rows: list[Row], path: Path) -> None:
    """One row a measurement; written beside, then renamed."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, newline="") as beside:
        writer = csv.DictWriter(beside, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.chmod(beside.name, 0o644)
    os.replace(beside.name, path)


def plots(rows: list[Row], folder: Path) -> list[Path]:
    """Time and memory against N, log-log, a figure per width; an open mark on top: out of
    memory."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for d in sorted({row["d"] for row in rows}):
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
        for axis, column, title in (
            (axes[0], "step_ms", "forward + backward, ms"),
            (axes[1], "extra_mib", "extra peak memory, MiB"),
        ):
            _draw(axis, [row for row in rows if row["d"] == d], column)
            axis.set(xscale="log", yscale="log", xlabel="N = M", title=f"{title}, D = {d}")
            axis.grid(True, which="both", alpha=0.25)
        axes[0].legend(fontsize=8)
        path = folder / f"loss_bench_D{d}.png"
        figure.tight_layout()
        figure.savefig(path, dpi=130)
        plt.close(figure)
        written.append(path)
    return written


def _draw(axis: Any, rows: list[Row], column: str) -> None:
    done = [row for row in rows if row["status"] == "ok"]
    top = 2 * max((row[column] for row in done), default=1.0)
    for name in dict.fromkeys(row["impl"] for row in rows):
        points = sorted((row["n"], row[column]) for row in done if row["impl"] == name)
        width = 2.5 if name.startswith("llave") else 1.2
        (line,) = axis.plot(
            [n for n, _ in points], [v for _, v in points], "o-", label=name, lw=width
        )
        lost = [r["n"] for r in rows if r["impl"] == name and r["status"] == "out of memory"]
        axis.plot(lost, [top] * len(lost), "x", ms=10, color=line.get_color())
