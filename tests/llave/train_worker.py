"""Trains a tiny model on texts: ``python -m tests.llave.train_worker OUT [KILL_AT_STEP]``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer

from llave import scratch
from llave.modeling import build
from llave.training import fit, read_recipe

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
RECIPE = """
model: {scratch: {}}
data: {train: none, batch_size: 16, homogeneous: true, held_out: 8}
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
    return made


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode()[:7], "big")


def main(out: str, kill_at: str = "0") -> None:
    torch.set_num_threads(1)
    data = subsets()
    heads = {"num_attention_heads": 2}
    backbone = scratch.llava_onevision(
        [*data["plus"]["anchor"], *data["plus"]["positive"]],
        vocabulary=300,
        tile=16,
        patch=8,
        vision=SMALL | heads,
        text=SMALL | heads | {"num_key_value_heads": 2},
    )
    model = build(backbone, max_seq_length=64, device="cpu")
    recipe_file = Path(out).with_suffix(f".{os.environ.get('RANK', '0')}.yaml")
    recipe_file.write_text(RECIPE % out)
    step, training_step = 0, SentenceTransformerTrainer.training_step

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal step
        step += 1
        if step == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
        return training_step(self, *args, **kwargs)

    SentenceTransformerTrainer.training_step = counted
    fit(model, data, read_recipe(str(recipe_file)))


if __name__ == "__main__":
    main(*sys.argv[1:])
