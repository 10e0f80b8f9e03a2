"""Train the tiny recipe on the emoji data with several hardness strengths and seeds, and compare.

    python examples/emoji/build.py emoji
    python examples/emoji/sweep.py emoji              # 3 strengths x 3 seeds, half an hour
    python examples/emoji/sweep.py emoji --quick      # 1 strength, 1 seed, 1 task, a minute

A run is what ``llave train tiny`` and ``llave evaluate`` do. It trains a small LLaVA-OneVision from
random weights for one epoch of the four tasks. The concepts of the evaluation are never trained on.
Neither are one vendor's drawings, which the tasks with ``held_out`` in their names ask for. The
runs of one seed see the same batches and differ only in alpha. As many runs as there are threads
run at the same time. They write to ``--out``:

    runs.csv      a row for each run and task: precision@1 among at most 50 candidates (chance is
                  2 %), R@5, R@10, and the overlap of positives' and negatives' similarities
    overlap.png   histograms of the similarities (paper, Figure 1), image to image, first seed,
                  before training and after it
    precision.png precision@1 against alpha
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
import torch

from llave.evaluation import Result, evaluate
from llave.files import publish, refuse_existing
from llave.plots import similarity_figure
from llave.training import read_recipe, train

mpl.use("Agg")
import matplotlib.pyplot as plt

HELD_OUT = "_held_out"
FILES = ("runs.csv", "precision.png", "overlap.png")
SCORES = ("task", "rows", "precision", "recall_5", "recall_10", "ties", "overlap")
COLUMNS = ("alpha", "seed", "seconds", *SCORES)  # the seconds are those of the whole run
SHOWN = "image_to_image"  # the task of the histograms, and the only one of --quick
QUICK = {"data.subsets": f"[{SHOWN}]", "trainer.max_steps": 120}
UNTRAINED = {"trainer.max_steps": 1, "trainer.learning_rate": 0}


def run(data: Path, quick: bool, alpha: float | None, seed: int) -> tuple[list[Result], float]:
    """The results of one training run, and the seconds that it took.

    Without ``alpha`` the weights stay as they are before training, and only SHOWN is scored.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "data.train": data / "train",
            "data.images": data / "images",
            "loss.alpha": alpha or 0.0,
            "trainer.output_dir": f"{folder}/run",
            "trainer.seed": seed,
            "trainer.report_to": "none",
            "trainer.disable_tqdm": "true",
            "trainer.logging_steps": 100,
        }
        settings |= (QUICK if quick else {}) | (UNTRAINED if alpha is None else {})
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        recipe = read_recipe("tiny", words)
        recipe["model"]["scratch"]["seed"] = seed
        trained = [path.stem for path in sorted((data / "train").glob("*.parquet"))]
        tasks = [path.stem for path in sorted((data / "eval").glob("*.parquet"))]
        chosen = recipe["data"]["subsets"] or trained
        asked = [task for task in tasks if task.removesuffix(HELD_OUT) in chosen]
        results = evaluate(
            train(recipe),
            [SHOWN] if alpha is None else asked,
            data=data / "eval",
            images=data / "images",
            out=f"{folder}/results",
            batch_size=64,
        )
    return results, round(time.perf_counter() - start, 1)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def plot_precision(path: Path, rows: list[dict[str, Any]]) -> None:
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    alphas = sorted({row["alpha"] for row in rows})
    for number, task in enumerate(sorted({row["task"] for row in rows})):
        values = [
            [row["precision"] for row in rows if (row["alpha"], row["task"]) == (alpha, task)]
            for alpha in alphas
        ]
        style = {"color": f"C{number}", "ls": ":" if task.endswith(HELD_OUT) else "-"}
        axis.plot(alphas, [mean(v) for v in values], label=task, **style)
        for alpha, seeds in zip(alphas, values, strict=True):
            axis.plot([alpha] * len(seeds), seeds, f"C{number}o", mfc="none")
    axis.axhline(2, color="0.5", ls="--", label="chance")
    axis.set(xlabel="hardness strength alpha", ylabel="precision@1, %", ylim=(0, None))
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder made by build.py")
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.0, 5.0, 9.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="alpha 9, one seed, one task")
    parser.add_argument("--out", type=Path, default=Path("emoji-results"))
    options = parser.parse_args(argv)
    if options.quick:
        options.alpha, options.seeds = [9.0], 1
    try:
        refuse_existing(options.out, FILES)
    except ValueError as error:
        parser.error(f"--out: {error}")
    options.out.mkdir(parents=True, exist_ok=True)
    runs_csv, precision, overlap = (options.out / name for name in FILES)
    plan: list[tuple[float | None, int]] = [(None, 0)]
    plan += [(alpha, seed) for seed in range(options.seeds) for alpha in options.alpha]
    rows: list[dict[str, Any]] = []
    panels: list[tuple[str, Result]] = []
    threads = torch.get_num_threads()
    jobs = min(threads, len(plan))
    with ProcessPoolExecutor(
        jobs, get_context("spawn"), torch.set_num_threads, (threads // jobs,)
    ) as pool:
        runs = pool.map(partial(run, options.data, options.quick), *zip(*plan, strict=True))
        for (alpha, seed), (results, seconds) in zip(plan, runs, strict=True):
            if alpha is None:
                panels.append(("before training", *results))
                continue
            for result in results:
                scores = (getattr(result, name) for name in SCORES)
                rounded = (round(x, 4) if isinstance(x, float) else x for x in scores)
                values = (alpha, seed, seconds, *rounded)
                rows.append(dict(zip(COLUMNS, values, strict=True)))
                print(rows[-1], flush=True)
                if seed == 0 and result.task == SHOWN:
                    panels.append((f"alpha {alpha:g}", result))
            publish(runs_csv, lambda path: write_csv(path, rows))
            publish(precision, lambda path: plot_precision(path, rows))
    publish(overlap, lambda path: save(similarity_figure(panels), path))


if __name__ == "__main__":
    main()
