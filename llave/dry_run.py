"""Say what a training would do: rows, steps, parameters and memory. Nothing is written."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.training_args import MultiDatasetBatchSamplers
from transformers import AutoConfig, AutoModel, LlavaOnevisionConfig

from llave import scratch
from llave.epochs import hold_out, unused_rows, whole_batches
from llave.recipe import Recipe
from llave.training import choose_trained, prepare

GIB = 2**30
# Bytes a token takes in one layer of a transformer while gradients are computed, in multiples of
# hidden size times bytes of a value: 34 without attention matrices (arXiv 2205.05198). With
# gradient checkpointing a layer keeps only its input.
KEPT, RECOMPUTED = 1, 34


class Memory(NamedTuple):
    """Expected memory of one device, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float


def describe(recipe: Recipe) -> list[str]:
    """Return lines about the training of a recipe.

    The backbone's configuration is read, but not its weights. The data are read.

    Raises:
        ValueError: the training would raise it before its first step.
    """
    arguments, subsets = prepare(recipe)
    data = recipe["data"]
    subsets, _ = hold_out(subsets, data["held_out"], seed=arguments.data_seed or 0)
    rows = {name: len(subset) for name, subset in subsets.items()}
    sampler = MultiDatasetBatchSamplers(arguments.multi_dataset_batch_sampler)
    kind = {
        "homogeneous": data["homogeneous"],
        "round_robin": sampler == MultiDatasetBatchSamplers.ROUND_ROBIN,
    }
    lines = [f"rows of {name}: {count:,}" for name, count in rows.items()]
    lines += unused_rows(rows, data["batch_size"], **kind)
    batches = sum(whole_batches(rows, data["batch_size"], **kind).values())
    pairs = data["batch_size"] * arguments.gradient_accumulation_steps
    lines.append(
        f"steps: {total_steps(batches, arguments):,} of {pairs:,} pairs each; an epoch has "
        f"{batches:,} batches"
    )
    backbone = skeleton(recipe, seed=arguments.seed)
    trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in backbone.parameters())
    lines.append(f"parameters: {trained:,} trained of {whole:,}")
    found = memory(backbone, recipe, arguments)
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in found._asdict().items())
    lines.append(
        f"memory per device, expected: {sum(found) / GIB:.2f} GiB at most ({parts}), with "
        f"{arguments.world_size} processes and inputs of {recipe['model']['max_seq_length']:,} "
        "tokens; the library's own memory and that of the loss come on top"
    )
    return lines


def total_steps(batches: int, arguments: SentenceTransformerTrainingArguments) -> int:
    """Return the number of optimizer steps of a training, of its batches in an epoch."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    in_epoch = math.ceil(batches / arguments.gradient_accumulation_steps)
    return math.ceil(arguments.num_train_epochs * in_epoch)


def skeleton(recipe: Recipe, *, seed: int) -> Any:
    """Return a recipe's backbone on the ``meta`` device, with its adapters and frozen parts."""
    settings = recipe["model"]
    if settings["scratch"] is None:
        config: Any = AutoConfig.from_pretrained(settings["backbone"])
    else:
        parts = {key: value for key, value in settings["scratch"].items() if key != "seed"}
        configs: dict[str, Any] = {**scratch.configurations(**parts)}
        config = LlavaOnevisionConfig(**configs)
    named = settings["dtype"]
    if named == "auto":
        named = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    with torch.device("meta"):
        backbone = AutoModel.from_config(config, dtype=getattr(torch, named))
        choose_trained(backbone, settings, seed=seed)
    return backbone


def memory(
    backbone: Any, recipe: Recipe, arguments: SentenceTransformerTrainingArguments
) -> Memory:
    """Return the expected memory of one device.

    FSDP shards all parts that have trained parameters. Of DeepSpeed's stages, 1 shards the
    optimizer's state, 2 also the gradients, and 3 also the weights.

    Args:
        backbone: the backbone, as ``skeleton`` makes it.
        recipe: the recipe.
        arguments: the trainer's arguments.
    """
    processes = arguments.world_size
    stage = 3 if arguments.fsdp else 0
    if arguments.deepspeed:
        stage = arguments.hf_deepspeed_config.get_value("zero_optimization.stage", 0)
    alone = 0  # bytes of the parts that FSDP leaves whole
    if arguments.fsdp:
        for part in backbone.children():
            if not any(p.requires_grad for p in part.parameters()):
                alone += sum(p.numel() * p.element_size() for p in part.parameters())
    weights = sum(p.numel() * p.element_size() for p in backbone.parameters())
    gradients = sum(p.numel() * p.element_size() for p in backbone.parameters() if p.requires_grad)
    optimizer = gradients * _moments(str(arguments.to_dict()["optim"]))
    return Memory(
        alone + (weights - alone) / (processes if stage == 3 else 1),
        gradients / (processes if stage >= 2 else 1),
        optimizer / (processes if stage >= 1 else 1),
        _activations(backbone, recipe, arguments),
    )


def _moments(optimizer: str) -> float:
    """Return how many values an optimizer keeps for one of a gradient."""
    if "adafactor" in optimizer or "galore" in optimizer or "apollo" in optimizer:
        return 0.1  # factored or projected
    kept = 1.0 if optimizer.startswith(("sgd", "rmsprop", "adagrad", "lion")) else 2.0
    return kept / 4 if "8bit" in optimizer or "4bit" in optimizer else kept


def _activations(
    backbone: Any, recipe: Recipe, arguments: SentenceTransformerTrainingArguments
) -> float:
    """Return the bytes that the language model's activations take at most in one backward."""
    text = backbone.config.get_text_config()
    rows = -(-recipe["data"]["batch_size"] // arguments.world_size)
    rows = min(recipe["loss"]["mini_batch_size"] or rows, rows)
    half = arguments.bf16 or arguments.fp16 or backbone.dtype != torch.float32
    value = text.hidden_size * (2 if half else 4)
    checkpointed = arguments.gradient_checkpointing or getattr(
        arguments, "activation_checkpointing", False
    )
    layers = text.num_hidden_layers
    kept = layers * KEPT + RECOMPUTED if checkpointed else layers * RECOMPUTED
    return float(rows * recipe["model"]["max_seq_length"] * value * kept)
