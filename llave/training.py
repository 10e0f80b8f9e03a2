"""Recipes to trained models: sentence-transformers' trainer with the paper's settings."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, DatasetDict, concatenate_datasets
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator

from llave import scratch
from llave.data import load_training, texts_of
from llave.files import publish
from llave.losses import CachedLLaVELoss, LLaVELoss
from llave.modeling import build
from llave.subsets import aligned
from llave.trainer import EmbeddingTrainer
from llave_kernels import similarity_statistics

# Trainer settings that follow from others.
OURS = ("per_device_train_batch_size", "accelerator_config", "dataloader_drop_last")
# What a recipe may say, with defaults; None: no default, the recipe must say it or leave it out.
SECTIONS: dict[str, dict[str, Any]] = {
    "model": {
        "backbone": None,  # folder or hub name, or:
        "scratch": None,  # arguments of llave.scratch.llava_onevision
        "pinpoints": None,
        "max_seq_length": 4096,
        # Of the weights, which the optimizer updates in it: half precision, in which backbones are
        # published, loses small updates. With trainer.bf16 the products are in bfloat16 anyway.
        "dtype": "float32",
        "frozen": None,  # parameters with this in their name are not trained
        # Arguments of peft.LoraConfig. Checkpoints hold the adapters alone; the model that is saved
        # at the end has them merged into its weights and needs neither peft nor the backbone.
        "lora": None,
    },
    "data": {
        "train": None,  # folder of MMEB training files, or hub name
        "images": None,
        "split": "train",  # of a hub dataset
        "subsets": None,  # default all of a folder
        "cap": 50_000,
        "batch_size": 256,  # of all processes together
        # Every batch from one subset; otherwise subsets are mixed, and mined negatives, which not
        # all of them have, are left out.
        "homogeneous": True,
        "held_out": 0,  # pairs of each subset kept for the similarity overlap
        "on_error": "raise",
    },
    "loss": {
        "scale": 50.0,
        "alpha": 9.0,
        "false_negative_margin": None,
        "mini_batch_size": None,  # gradient caching
        "backend": "auto",
    },
    # fsdp (version 2) and deepspeed (untried) shard the weights. Parts that are frozen as a whole
    # FSDP leaves unsharded; the others every process must run in each forward, so a column of a
    # subset should have images in all its rows or in none.
    "trainer": {
        field.name: field.default if field.default is not dataclasses.MISSING else None
        for field in dataclasses.fields(SentenceTransformerTrainingArguments)
        if field.init and field.name not in OURS
    },
}
Recipe = dict[str, dict[str, Any]]


def read_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """A recipe from a YAML file or by the name of one of ours, checked and completed.

    Args:
        name: a path, or ``llave-0.5b``, ``llave-2b``, ``llave-7b``, ``tiny``.
        overrides: ``["--loss.alpha", "5", ...]``; values are read as YAML.

    Raises:
        ValueError: an unknown section or setting, or an override that is not ``--section.setting
            value``.
        FileNotFoundError: no such file or recipe.
    """
    ours = files("llave") / "recipes"
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        names = sorted(r.name.removesuffix(".yaml") for r in ours.iterdir())
        if name not in names:
            raise FileNotFoundError(f"no recipe {name!r}; there are {', '.join(names)}, or a path")
        text = (ours / f"{name}.yaml").read_text()
    else:
        text = path.read_text()
    given = yaml.safe_load(text)
    if not isinstance(given, dict):
        raise ValueError(f"{name} holds no sections; expected {', '.join(SECTIONS)}")
    words = overrides or []
    if len(words) % 2:
        raise ValueError(f"overrides come in pairs, --section.setting value; got {words}")
    for key, value in zip(words[::2], words[1::2], strict=True):
        section, dot, setting = key.removeprefix("--").partition(".")
        if not key.startswith("--") or not dot:
            raise ValueError(
                f"{key!r} is no override; expected --section.setting, e.g. --loss.alpha"
            )
        given.setdefault(section, {})[setting] = yaml.safe_load(value)
    recipe: Recipe = {section: {} for section in SECTIONS}
    for section, settings in given.items():
        if section not in SECTIONS:
            raise ValueError(f"section {section!r} of {name} is none of {', '.join(SECTIONS)}")
        for setting in settings or {}:
            if setting not in SECTIONS[section]:
                known = ", ".join(SECTIONS[section])
                raise ValueError(f"{section}.{setting} of {name} is no setting; there are {known}")
        recipe[section] = settings or {}
    for section in ("model", "data", "loss"):
        recipe[section] = SECTIONS[section] | recipe[section]
    for section, setting in (("data", "train"), ("trainer", "output_dir")):
        if recipe[section].get(setting) is None:
            raise ValueError(f"{section}.{setting} of {name} is missing")
    if (recipe["model"]["backbone"] is None) == (recipe["model"]["scratch"] is None):
        raise ValueError(f"model of {name} needs one of backbone and scratch")
    return recipe


def train(recipe: Recipe) -> SentenceTransformer:
    """Train by a recipe; the whole model is saved in ``output_dir/model``, adapters merged.

    A run that was cut off goes on from its last complete checkpoint, with the losses it would have
    had. Under torchrun every process trains on its share of each global batch.
    """
    data = recipe["data"]
    subsets = load_training(
        data["train"],
        images=data["images"],
        split=data["split"],
        subsets=data["subsets"],
        cap=data["cap"],
        negatives=data["homogeneous"],
        on_error=data["on_error"],
    )
    model = build_model(
        recipe["model"],
        (text for subset in subsets.values() for text in texts_of(subset)),
        seed=recipe["trainer"].get("seed", SECTIONS["trainer"]["seed"]),
    )
    return fit(model, subsets, recipe)


def fit(
    model: SentenceTransformer, subsets: dict[str, Dataset], recipe: Recipe
) -> SentenceTransformer:
    """The training itself.

    Args:
        model: trained in place; adapters are merged, but not where FSDP or DeepSpeed shards it.
        subsets: by name, datasets of anchor, positive, negatives, and optionally ``label``: the
            content ids of ``LLaVELoss``.
        recipe: its sections data, loss and trainer.
    """
    data, loss = recipe["data"], dict(recipe["loss"])
    # Each global batch is cut between the processes, so that the batches, and with them the losses,
    # are the same for any number of processes.
    arguments = SentenceTransformerTrainingArguments(
        **recipe["trainer"],
        per_device_train_batch_size=data["batch_size"],
        accelerator_config={"split_batches": True},
        dataloader_drop_last=True,
    )
    if data["batch_size"] % arguments.world_size:
        raise ValueError(
            f"data.batch_size={data['batch_size']} must be a multiple of the number of processes, "
            f"{arguments.world_size}"
        )
    held_out = {}
    if data["held_out"]:
        parts = {
            name: subset.train_test_split(test_size=data["held_out"], seed=arguments.data_seed or 0)
            for name, subset in subsets.items()
        }
        subsets = {name: part["train"] for name, part in parts.items()}
        held_out = {name: part["test"] for name, part in parts.items()}
    size = loss.pop("mini_batch_size")
    loss_fn: torch.nn.Module
    if size is None:
        loss_fn = LLaVELoss(model, **loss)
    else:
        loss_fn = CachedLLaVELoss(model, mini_batch_size=size, **loss)
    trainer = EmbeddingTrainer(
        model=model,
        args=arguments,
        train_dataset=DatasetDict(subsets) if data["homogeneous"] else joined(subsets),
        loss=loss_fn,
        evaluator=SimilarityOverlap(held_out) if held_out else None,
    )
    trainer.check_sharding(data["homogeneous"])
    folder = Path(arguments.output_dir)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    trainer.save_whole(folder / "model")
    return model


def joined(subsets: dict[str, Dataset]) -> Dataset:
    """One dataset of all subsets, for batches that mix them; they must have the same columns."""
    columns = {name: sorted(subset[0]) for name, subset in subsets.items()}
    if len({tuple(names) for names in columns.values()}) > 1:
        raise ValueError(
            "subsets mixed in a batch must give the same columns; load them without negatives. "
            f"They give {columns}"
        )
    first, *_ = subsets.values()
    whole = concatenate_datasets(aligned(list(subsets.values())))
    if first.format["type"] == "custom":
        whole.set_transform(first.format["format_kwargs"]["transform"])
    return whole


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; unfinished ones are set aside."""
    numbered = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    ]
    for step, path in sorted(numbered, reverse=True):
        try:  # written last
            state = json.loads((path / "trainer_state.json").read_text())
            if state["global_step"] == step:
                return str(path)
        except (OSError, ValueError, KeyError):
            pass
        path.rename(path.with_name(f"unfinished-{path.name}-{os.getpid()}"))
    return None


class SimilarityOverlap(SentenceEvaluator):
    """Overlap of the similarity histograms of positives and negatives (paper, Figure 1).

    The histograms go to ``output_path``, in ``similarities-STEP.json``: counts by subset, in 100
    equal bins over [-1, 1].

    Args:
        subsets: by name, datasets with the columns anchor and positive.
    """

    greater_is_better = False

    def __init__(self, subsets: dict[str, Dataset]) -> None:
        super().__init__()
        self.subsets = subsets
        self.primary_metric = "similarity_overlap"

    def __call__(
        self,
        model: SentenceTransformer,
        output_path: str | None = None,
        epoch: int = -1,
        steps: int = -1,
    ) -> dict[str, float]:
        found: dict[str, float] = {}
        histograms = {}
        for name, subset in self.subsets.items():
            rows = subset[:]
            pair = (
                model.encode(list(rows[c]), convert_to_tensor=True, normalize_embeddings=True)
                for c in ("anchor", "positive")
            )
            result = similarity_statistics(*(x.float() for x in pair))
            found[f"{name}_similarity_overlap"] = float(result.overlap)
            found[f"{name}_positive_mean"] = float(result.positive_mean)
            found[f"{name}_negative_mean"] = float(result.negative_mean)
            counts = {"positives": result.positive, "negatives": result.negative}
            histograms[name] = {kind: count.tolist() for kind, count in counts.items()}
        if output_path is not None:
            file = Path(output_path) / f"similarities-{steps}.json"
            publish(file, partial(Path.write_text, data=json.dumps(histograms)))
        overlaps = [v for k, v in found.items() if k.endswith("_overlap")]
        return found | {"similarity_overlap": sum(overlaps) / len(overlaps)}


def build_model(
    settings: dict[str, Any], texts: Iterable[str], *, seed: int
) -> SentenceTransformer:
    """The model of a recipe's section of that name.

    Args:
        settings: the section, completed.
        texts: what the tokenizer of a backbone from scratch is trained on.
        seed: of adapters.

    Raises:
        ImportError: ``lora`` is set and peft is not installed.
        ValueError: ``frozen`` is in no parameter's name.
    """
    backbone = settings["backbone"]
    if settings["scratch"] is not None:
        backbone = scratch.llava_onevision(texts, **settings["scratch"])
    model = build(
        backbone,
        pinpoints=settings["pinpoints"],
        max_seq_length=settings["max_seq_length"],
        model_kwargs={"dtype": settings["dtype"]},
    )
    if settings["lora"]:
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ImportError(
                f"model.lora={settings['lora']} needs peft: pip install peft"
            ) from error
        torch.manual_seed(seed)
        model.add_adapter(LoraConfig(**settings["lora"]))
    if settings["frozen"]:  # adapters too
        names = [name for name, _ in model.named_parameters() if settings["frozen"] in name]
        if not names:
            raise ValueError(f"model.frozen={settings['frozen']!r} is in no parameter's name")
        for name in names:
            model.get_parameter(name).requires_grad_(False)
    return model
