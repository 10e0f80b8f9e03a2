"""The tables of the examples' runs, in markdown: mean and range over the seeds.

python examples/report.py examples/results/finetune_docstrings/runs.csv    # a row for each strength
python examples/report.py examples/results/emoji/runs.csv                  # a column for each
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from statistics import mean

METRICS = {"recall_at_1": "R@1", "recall_at_10": "R@10", "mrr": "MRR"}
OVERLAP_OF = "image_to_image"
Run = dict[str, str]


def read(path: Path) -> list[Run]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def strength(alpha: str) -> str:
    if not alpha:
        return "before"
    return f"alpha {float(alpha):g}" + (" (InfoNCE)" if float(alpha) == 0 else "")


def cell(runs: list[Run], column: str, digits: int) -> str:
    values = [float(run[column]) for run in runs]
    shown = f"{mean(values):.{digits}f}"
    if len(values) > 1:
        shown += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    return shown


def of_metrics(runs: list[Run]) -> list[list[str]]:
    lines = [["", *METRICS.values()]]
    for alpha in dict.fromkeys(run["alpha"] for run in runs):
        chosen = [run for run in runs if run["alpha"] == alpha]
        lines.append([strength(alpha), *(cell(chosen, metric, 3) for metric in METRICS)])
    return lines


def of_tasks(runs: list[Run]) -> list[list[str]]:
    alphas = list(dict.fromkeys(run["alpha"] for run in runs))

    def line(task: str, name: str, column: str, digits: int) -> list[str]:
        each = ([run for run in runs if (run["task"], run["alpha"]) == (task, a)] for a in alphas)
        return [name, *(cell(chosen, column, digits) for chosen in each)]

    lines = [["precision@1, %", *map(strength, alphas)]]
    lines += [line(task, f"`{task}`", "precision", 1) for task in sorted({r["task"] for r in runs})]
    return [*lines, line(OVERLAP_OF, f"overlap, `{OVERLAP_OF}`", "overlap", 3)]


def main(paths: list[str]) -> None:
    for path in paths:
        runs = read(Path(path))
        first, *rest = of_tasks(runs) if "task" in runs[0] else of_metrics(runs)
        for line in (first, ["---"] * len(first), *rest):
            print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
