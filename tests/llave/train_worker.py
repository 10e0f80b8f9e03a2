"""Trains a tiny model on texts and pictures.

``python -m tests.llave.train_worker OUT [KILL_AT_STEP [--section.setting value ...]]``
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer

from llave.training import build_model, fit, read_recipe

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
    return made


def pictured(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The batch with a picture in place of each anchor, in the colour of its words."""
    return batch | {"anchor": [Image.new("RGB", (16, 16), colour(t)) for t in batch["anchor"]]}


def colour(text: str) -> tuple[int, int, int]:
    first, second = (NUMBERS.index(word) for word in text.split(" and "))
    return (32 * first, 32 * second, 128)


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode()[:7], "big")


def train(out: str, *overrides: str) -> SentenceTransformer:
    """A run on one thread: sums of others round differently, which Adam makes visible."""
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


def main(out: str, kill_at: str = "0", *overrides: str) -> None:
    step, training_step = 0, SentenceTransformerTrainer.training_step

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal step
        step += 1
        if step == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
        return training_step(self, *args, **kwargs)

    SentenceTransformerTrainer.training_step = counted
    train(out, *overrides)


if __name__ == "__main__":
    main(*sys.argv[1:])
