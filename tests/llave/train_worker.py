"""Trains a tiny model on texts and pictures.

``python -m tests.llave.train_worker OUT [POINT:N[:SIGNAL:RANK] [--section.setting value ...]]``
kills itself when it reaches one of ``POINTS`` for the N-th time. With SIGNAL and RANK only that
process gets a signal. With ``none`` it runs to its end.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer

from llave import sealing
from llave.trainer import EmbeddingTrainer
from llave.training import build_model, fit, read_recipe

# (owner, name of a function, whether the process dies after the call, file names of its argument)
POINTS: dict[str, tuple[Any, ...]] = {
    "step": (SentenceTransformerTrainer, "training_step", False),
    "checkpoint": (EmbeddingTrainer, "_save_rng_state", False),  # within a checkpoint
    "seal": (sealing, "seal", False),  # before the seal of a checkpoint or the model
    "rename": (sealing, "seal", True),  # between the seal and the rename
    "tidy": (EmbeddingTrainer, "tidy", False),
    "discard": (shutil, "rmtree", False),  # before a folder is removed
    "model": (EmbeddingTrainer, "save_whole", False),  # between the last checkpoint and the model
    "replaced": (Path, "rename", True, "model.old"),  # between the renames of two models
    "saved": (EmbeddingTrainer, "save_whole", True),
}
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
RECIPE = """
model:
  scratch:
    vocabulary: 300
    tile: 16
    patch: 8
    vision: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
    text: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
      num_key_value_heads: 2}
  max_seq_length: 128
data: {train: none, subsets: [plus, minus], batch_size: 16, homogeneous: true, held_out: 8}
loss: {alpha: 9.0}
trainer: {output_dir: %s, max_steps: 12, learning_rate: 0.001,
    logging_steps: 1, save_steps: 4, eval_strategy: steps, eval_steps: 6, use_cpu: true,
    report_to: none, disable_tqdm: true}
"""


def subsets() -> dict[str, Dataset]:
    pairs = [(f"{a} and {b}", f"{a} plus {b}") for a in NUMBERS for b in NUMBERS]
    made = {}
    for name, swap in (("plus", False), ("minus", True)):
        anchor = [p[swap] for p in pairs]
        positive = [p[not swap] for p in pairs]
        ids = [[hash_of(text)] for text in positive]
        made[name] = Dataset.from_dict({"anchor": anchor, "positive": positive, "label": ids})
    made["pictures"] = made["plus"].with_transform(pictured)
    made["several"] = made["plus"].with_transform(several)
    return made


def pictured(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The batch with a picture in place of each anchor. The words of the anchor give its colour."""
    return batch | {"anchor": [Image.new("RGB", (16, 16), colour(t)) for t in batch["anchor"]]}


def several(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The batch with none, one or two pictures beside each anchor."""
    anchors: list[Any] = []
    for text in batch["anchor"]:
        images = [Image.new("RGB", (16, 16), colour(text))] * (len(text) % 3)
        anchors.append({"text": text, "image": images} if images else text)
    return batch | {"anchor": anchors}


def colour(text: str) -> tuple[int, int, int]:
    first, second = (NUMBERS.index(word) for word in text.split(" and "))
    return (32 * first, 32 * second, 128)


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode()[:7], "big")


def train(out: str, *overrides: str) -> SentenceTransformer:
    """Train on one thread. Other numbers round sums differently, and Adam magnifies that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train(out, *overrides)
    finally:
        torch.set_num_threads(threads)


def _train(out: str, *overrides: str) -> SentenceTransformer:
    data = subsets()
    recipe_file = Path(out).with_suffix(f".{os.environ.get('RANK', '0')}.yaml")
    recipe_file.write_text(RECIPE % out)
    recipe = read_recipe(str(recipe_file), list(overrides))
    texts = [*data["plus"]["anchor"], *data["plus"]["positive"]]
    model = build_model(recipe["model"], texts, seed=0)
    return fit(model, {name: data[name] for name in recipe["data"]["subsets"]}, recipe)


def main(out: str, point: str = "none", *overrides: str) -> None:
    name, times, number, rank = [*point.split(":"), "", "", ""][:4]
    if name != "none" and rank in ("", os.environ.get("RANK")):
        send = partial(os.kill, os.getpid(), signal.Signals[number or "SIGKILL"])
        die_at(name, int(times), send)
    train(out, *overrides)


def die_at(point: str, times: int, die: Callable[[], object], put: Any = setattr) -> None:
    """Call ``die`` at the ``times``-th arrival at ``point``. ``put`` patches the function."""
    owner, attribute, after, *names = POINTS[point]
    original, count = getattr(owner, attribute), 0

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        result = original(*args, **kwargs) if after else None
        if not names or Path(args[-1]).name in names:
            count += 1
            if count == times:
                die()
        return result if after else original(*args, **kwargs)

    put(owner, attribute, counted)


if __name__ == "__main__":
    main(*sys.argv[1:])
