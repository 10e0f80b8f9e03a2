"""How much of the time the model works, and how much it waits for pictures.

    python benchmarks/feeding.py --out benchmarks/results/cpu/feeding

A small random LLaVA-OneVision embeds pictures as ``llave embed`` does. Busy is the share of the
time that passes within the model's forward. The device is this machine's CPU, which the workers
use too, or a stand-in that sleeps as long as a GPU would work and leaves the CPU to the workers.
The slow decoder waits before each picture, as for a network disk. The ways take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from benchmarks import loss_bench, report
from llave import scratch
from llave.batching import Lengths, planned
from llave.encoding import Encoder
from llave.images import declared_size, open_rgb
from llave.modeling import build

BATCH = 32
COLUMNS = [
    "device", "decoder_ms", "workers", "busy", "pictures_per_s", "pictures", "turns", "machine",
    "cores", "python", "torch", "llave", "date", "command",
]  # fmt: skip


def pictures(folder: Path, count: int) -> list[Path]:
    """Make pictures of two sizes and return their files."""
    draw = np.random.default_rng(0)
    made = []
    for number in range(count):
        coarse = draw.integers(0, 256, (12, 16, 3), np.uint8)
        size = (320, 240) if number % 2 else (640, 240)
        made.append(folder / f"{number}.jpg")
        Image.fromarray(coarse).resize(size).save(made[-1])
    return made


def model() -> SentenceTransformer:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4}
    return build(
        scratch.llava_onevision(
            ["a picture"] * 4,
            tile=64,
            patch=8,
            vision=sizes | heads,
            text=sizes | heads | {"num_key_value_heads": 2},
        ),
        device="cpu",
    )


def stand_in(made: SentenceTransformer, milliseconds: float) -> None:
    """Let the model's forward sleep instead of computing."""
    width = made.get_embedding_dimension()

    def forward(features: dict[str, Any], **_: Any) -> dict[str, Any]:
        time.sleep(milliseconds / 1e3)
        rows = len(features["input_ids"])
        return {"sentence_embedding": torch.ones(rows, width or 1)}

    made.forward = forward  # type: ignore[method-assign]


def measure(
    made: SentenceTransformer, files: list[Path], decoder_ms: float, workers: int
) -> tuple[float, float]:
    """Embed the files. Returns the busy share and the pictures per second.

    The time counts from the first forward on, so the start of the workers does not.
    """
    spans: list[tuple[float, float]] = []

    def load(file: Path) -> tuple[str, Any]:
        time.sleep(decoder_ms / 1e3)
        return file.name, open_rgb(file)

    encoder = Encoder(made, load, workers=workers)
    forward = encoder._forward

    def timed(features: dict[str, Any]) -> Any:
        began = time.perf_counter()
        found = forward(features)
        spans.append((began, time.perf_counter()))
        return found

    encoder._forward = timed  # type: ignore[method-assign]
    length = Lengths(made)
    lengths = [length("", declared_size(file)) for file in files]
    for _ in encoder.run(planned(files, lengths, BATCH)):
        pass
    lasting = spans[-1][1] - spans[0][0]
    return sum(end - began for began, end in spans) / lasting, len(files) / lasting


def ways(workers: Iterable[int], stand_in_ms: float, slow_ms: float) -> list[dict[str, Any]]:
    devices = {"cpu": 0.0, f"stand-in, {stand_in_ms:g} ms a batch": stand_in_ms}
    return [
        {"device": name, "sleeps": sleeps, "decoder_ms": decoder_ms, "workers": count}
        for name, sleeps in devices.items()
        for decoder_ms in (0.0, slow_ms)
        for count in workers
    ]


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="a folder of pictures (default: generated)")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--slow", type=float, default=10.0, help="ms that the slow decoder waits")
    parser.add_argument("--stand-in", type=float, default=500.0, help="ms a batch")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for feeding.csv")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.images is None:
            files = pictures(Path(folder), options.pictures)
        else:
            files = sorted(options.images.rglob("*.png"))[: options.pictures]
        rows = ways(options.workers, options.stand_in, options.slow)
        found: list[list[tuple[float, float]]] = [[] for _ in rows]
        for _ in range(options.turns):
            for row, each in zip(rows, found, strict=True):
                made = model()
                if row["sleeps"]:
                    stand_in(made, row["sleeps"])
                each.append(measure(made, files, row["decoder_ms"], row["workers"]))
    for row, each in zip(rows, found, strict=True):
        busy, rate = (statistics.median(values) for values in zip(*each, strict=True))
        row |= {"busy": round(busy, 3), "pictures_per_s": round(rate, 1)}
        row |= {"pictures": len(files), "turns": options.turns}
        print(
            f"{row['device']:26} decoder +{row['decoder_ms']:g} ms  {row['workers']} workers  "
            f"busy {busy:5.1%}  {rate:7.1f} pictures/s"
        )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        about = loss_bench.where("cpu", ["benchmarks/feeding.py", *(given or sys.argv[1:])])
        report.write_csv([row | about for row in rows], options.out / "feeding.csv", COLUMNS)


if __name__ == "__main__":
    main()
