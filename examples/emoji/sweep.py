"""Train the tiny recipe on the emoji data with several hardness strengths and seeds, and compare.

    python examples/emoji/build.py emoji
    python examples/emoji/sweep.py emoji              # 3 strengths x 3 seeds, some 12 minutes
    python examples/emoji/sweep.py emoji --quick      # 1 strength, 1 seed, a minute and a half

The task is image -> image across vendors: concepts of the evaluation are never trained on, and one
vendor's drawings neither (``image_to_image_held_out``). A run is a small LLaVA-OneVision from
random weights; the runs of one seed see the same batches and differ in alpha alone. Written to
``--out``:

    runs.csv      a row a run: precision@1 among 50 candidates (chance is 2), similarity overlap
    overlap.png   similarity histograms of positives and negatives (paper, Figure 1), first seed
    precision.png precision@1 against alpha
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

from llave.data import Images, load_evaluation, make_input
from llave.evaluation import evaluate
from llave.training import read_recipe, train
from llave_kernels import similarity_statistics

mpl.use("Agg")
import matplotlib.pyplot as plt

TASKS = ("image_to_image", "image_to_image_held_out")
COLUMNS = ("alpha", "seed", *TASKS, "overlap", "steps", "seconds")
STEPS = 120
BATCH = 64


def run(data: Path, alpha: float, seed: int) -> tuple[dict[str, Any], Any]:
    """One training run: its row of the table, and the similarity statistics of its evaluation."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "data.train": data / "train",
            "data.images": data / "images",
            "data.subsets": f"[{TASKS[0]}]",
            "data.batch_size": BATCH,
            "loss.alpha": alpha,
            "trainer.output_dir": f"{folder}/run",
            "trainer.max_steps": STEPS,
            "trainer.learning_rate": 2.0e-3,
            "trainer.seed": seed,
            "trainer.save_strategy": "'no'",
            "trainer.report_to": "none",
            "trainer.disable_tqdm": "true",
            "trainer.logging_steps": 40,
        }
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        recipe = read_recipe("tiny", words)
        recipe["model"]["scratch"]["seed"] = seed
        model = train(recipe)
        results = evaluate(
            model, TASKS, data=data / "eval", images=data / "images", out=folder, batch_size=BATCH
        )
    rows = load_evaluation(data / "eval", TASKS[0])
    images = Images(data / "images")
    query, target = (
        model.encode(
            [make_input(*item, images) for item in side],
            batch_size=BATCH,
            convert_to_tensor=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        for side in zip(*((row.query, row.targets[0]) for row in rows), strict=True)
    )
    statistics = similarity_statistics(query, target)
    row: dict[str, Any] = {"alpha": alpha, "seed": seed, "steps": STEPS}
    row |= {result.task: round(result.precision, 2) for result in results}
    row["overlap"] = round(float(statistics.overlap), 4)
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row, statistics


def replace(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside, then rename."""
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    write(beside)
    os.replace(beside, path)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def plot_precision(path: Path, rows: list[dict[str, Any]]) -> None:
    figure, axis = plt.subplots(figsize=(5.5, 4))
    for task, colour in zip(TASKS, ("C0", "C1"), strict=True):
        alphas = sorted({row["alpha"] for row in rows})
        values = [[row[task] for row in rows if row["alpha"] == alpha] for alpha in alphas]
        axis.plot(alphas, [sum(v) / len(v) for v in values], colour, label=task)
        for alpha, seeds in zip(alphas, values, strict=True):
            axis.plot([alpha] * len(seeds), seeds, f"{colour}o", mfc="none")
    axis.axhline(2, color="0.5", ls="--", label="chance")
    axis.set(xlabel="hardness strength alpha", ylabel="precision@1, %", ylim=(0, None))
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=130)
    plt.close(figure)


def plot_overlap(path: Path, found: dict[float, Any]) -> None:
    figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), 3.4), squeeze=False)
    for axis, (alpha, statistics) in zip(axes[0], found.items(), strict=True):
        for kind, colour in (("negative", "C3"), ("positive", "C2")):
            counts = getattr(statistics, kind).double()
            axis.stairs((counts / counts.sum()).tolist(), statistics.edges.tolist(), fill=True,
                        color=colour, alpha=0.5, label=kind)  # fmt: skip
        axis.set(title=f"alpha {alpha:g}: overlap {float(statistics.overlap):.3f}", xlabel="cosine")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder made by build.py")
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.0, 5.0, 9.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="alpha 9 and one seed")
    parser.add_argument("--out", type=Path, default=Path("emoji-results"))
    options = parser.parse_args(argv)
    if options.quick:
        options.alpha, options.seeds = [9.0], 1
    options.out.mkdir(parents=True, exist_ok=True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    rows: list[dict[str, Any]] = []
    histograms: dict[float, Any] = {}
    for seed in range(options.seeds):
        for alpha in options.alpha:
            row, statistics = run(options.data, alpha, seed)
            rows.append(row)
            if seed == 0:
                histograms[alpha] = statistics
            print(row, flush=True)
            replace(options.out / "runs.csv", lambda path: write_csv(path, rows))
            replace(options.out / "precision.png", lambda path: plot_precision(path, rows))
            replace(options.out / "overlap.png", lambda path: plot_overlap(path, histograms))


if __name__ == "__main__":
    main()
