"""Train models from recipes, with sentence-transformers' trainer and the paper's loss."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator
from sentence_transformers.sentence_transformer.training_args import MultiDatasetBatchSamplers
from transformers import Trainer, get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from llave import runs, scratch
from llave.data import load_training, texts_of
from llave.embedding import refuse_not_finite
from llave.encoding import encode
from llave.epochs import hold_out, joined, unused_rows
from llave.files import publish, refuse_damaged
from llave.losses import CachedLLaVELoss, LLaVELoss
from llave.media import content_id
from llave.modeling import build
from llave.printable import escaped
from llave.processes import from_first, part_at_exit
from llave.recipe import SECTIONS, Recipe, lora_config, read_recipe
from llave.runs import last_checkpoint
from llave.trainer import EmbeddingTrainer
from llave_kernels import available_backends, similarity_statistics

__all__ = [
    "SECTIONS",
    "SimilarityOverlap",
    "build_model",
    "fit",
    "last_checkpoint",
    "read_recipe",
    "train",
]


def train(recipe: Recipe) -> SentenceTransformer:
    """Train a model by a recipe. The model is saved in ``output_dir/model``, with adapters merged.

    An interrupted run goes on from its last complete checkpoint, with the losses that it would have
    had without the interruption. A finished run is not trained again. Under torchrun every process
    trains on its share of each global batch.

    Raises:
        ValueError: a setting cannot be had here, ``output_dir`` holds a run with other settings, a
            row of the data is unusable, or nothing would be trained.
    """
    arguments, subsets = prepare(recipe)
    model = build_model(
        recipe["model"],
        (text for subset in subsets.values() for text in texts_of(subset)),
        seed=arguments.seed,
    )
    return fit(model, subsets, recipe)


def prepare(
    recipe: Recipe,
) -> tuple[SentenceTransformerTrainingArguments, dict[str, Dataset]]:
    """Check a recipe against this machine and its output folder, and load its subsets.

    Raises:
        ValueError: as in ``train``.
    """
    data = recipe["data"]
    arguments = trainer_arguments(recipe)  # raises before anything is loaded
    from_first(partial(runs.check, Path(arguments.output_dir), recipe))
    there = Path(data["train"]).is_dir() or data["subsets"]  # otherwise load_training raises
    if there and data["images"] is not None and not Path(data["images"]).is_dir():
        raise ValueError(f"data.images={data['images']!r} is no folder")
    subsets = load_training(
        data["train"],
        images=data["images"],
        split=data["split"] or "train",
        subsets=data["subsets"],
        cap=data["cap"],
        negatives=data["homogeneous"],
        on_error=data["on_error"],
    )
    return arguments, subsets


def trainer_arguments(recipe: Recipe) -> SentenceTransformerTrainingArguments:
    """Make the trainer's arguments, and check them against this machine.

    Raises:
        ValueError: ``data.batch_size`` does not divide among the processes, or ``loss.backend`` or
            a setting of the trainer cannot be had here.
    """
    size, backend = recipe["data"]["batch_size"], recipe["loss"]["backend"]
    # Each global batch is split between the processes. Batches and losses are then the same for any
    # number of processes.
    arguments = SentenceTransformerTrainingArguments(
        **recipe["trainer"],
        per_device_train_batch_size=size,
        accelerator_config={"split_batches": True},
        dataloader_drop_last=True,
    )
    if size % arguments.world_size:
        raise ValueError(
            f"data.batch_size={size} must be a multiple of the number of processes, "
            f"{arguments.world_size}"
        )
    _check_classes(arguments)
    if backend != "auto" and (reason := available_backends()[backend]) is not None:
        raise ValueError(f"loss.backend={backend!r} cannot run here: {reason}")
    return arguments


def _check_classes(arguments: SentenceTransformerTrainingArguments) -> None:
    """Raise ValueError for an optimizer, scheduler or logger that would fail after the loading."""

    def optimizer(given: SentenceTransformerTrainingArguments) -> Any:
        return Trainer.get_optimizer_cls_and_kwargs(given)

    def scheduler() -> Any:
        unused = torch.optim.SGD([torch.zeros(1)])
        kind, settings = arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs
        steps = {"num_warmup_steps": 0, "num_training_steps": 1}
        return get_scheduler(kind, unused, **steps, scheduler_specific_kwargs=dict(settings or {}))

    def loggers() -> Any:
        return [kind() for kind in get_reporting_integration_callbacks(arguments.report_to)]

    tries = {"lr_scheduler_kwargs": scheduler, "report_to": loggers}
    if arguments.optim_target_modules is None:  # otherwise the optimizer needs the model
        tries["optim"] = partial(optimizer, arguments)
    for setting, attempt in tries.items():
        try:
            attempt()
        except Exception as error:
            value = arguments.to_dict()[setting]
            raise ValueError(f"trainer.{setting}={value!r} cannot be had here: {error}") from error
    if arguments.optim_args is not None and arguments.optim_target_modules is None:
        without = copy(arguments)
        without.optim_args = None
        if optimizer(without) == optimizer(arguments):
            raise ValueError(
                f"trainer.optim_args={arguments.optim_args!r} has no effect on "
                f"trainer.optim={arguments.to_dict()['optim']}"
            )


def fit(
    model: SentenceTransformer, subsets: dict[str, Dataset], recipe: Recipe
) -> SentenceTransformer:
    """Train a model on subsets, and save it.

    Args:
        model: the model. It is trained in place. Its adapters are merged, unless FSDP or DeepSpeed
            shards it.
        subsets: by name, datasets of anchor, positive and negatives, and optionally ``label`` with
            the content ids for ``LLaVELoss``.
        recipe: its sections data, loss and trainer.

    Raises:
        ValueError: as in ``train``.
    """
    data, loss = recipe["data"], dict(recipe["loss"])
    arguments = trainer_arguments(recipe)
    subsets, held_out = hold_out(subsets, data["held_out"], seed=arguments.data_seed or 0)
    sampler = MultiDatasetBatchSamplers(arguments.multi_dataset_batch_sampler)
    lines = unused_rows(
        {name: len(subset) for name, subset in subsets.items()},
        data["batch_size"],
        homogeneous=data["homogeneous"],
        round_robin=sampler == MultiDatasetBatchSamplers.ROUND_ROBIN,
    )
    if isinstance(arguments.prompts, dict):
        known = {*subsets, *(column for subset in subsets.values() for column in subset[0])}
        if unknown := sorted(arguments.prompts.keys() - known):
            raise ValueError(
                f"trainer.prompts names {', '.join(unknown)}, which is neither a subset nor a "
                f"column; there are {', '.join(sorted(known))}"
            )
    metric = arguments.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in _metrics(held_out):
        raise ValueError(
            f"trainer.metric_for_best_model={metric!r} is none of {', '.join(_metrics(held_out))}"
        )
    size = loss.pop("mini_batch_size")
    loss_fn: LLaVELoss | CachedLLaVELoss
    if size is None:
        loss_fn = LLaVELoss(model, **loss)
    else:
        loss_fn = CachedLLaVELoss(model, mini_batch_size=size, **loss)
    folder, rows = Path(arguments.output_dir), {name: len(part) for name, part in subsets.items()}
    with ExitStack() as stack:
        from_first(lambda: stack.enter_context(runs.alone(folder)))
        changed = from_first(partial(runs.check, folder, recipe, rows))
        there = from_first(partial(runs.take_up, folder, best=arguments.load_best_model_at_end))
        trainer = EmbeddingTrainer(
            model=model,
            args=arguments,
            train_dataset=DatasetDict(subsets) if data["homogeneous"] else joined(subsets),
            loss=loss_fn,
            evaluator=SimilarityOverlap(held_out) if held_out else None,
        )
        trainer.check_sharding(data["homogeneous"])
        trainer.run, checkpoint = there["run"], there["checkpoint"]
        total, made = trainer.total_steps(), runs.step_of(checkpoint) if checkpoint else 0
        lines += [*changed, *there["lines"]]
        if done := max(made, there["saved"]) >= total:
            lines = [*there["lines"], f"{folder} holds a finished run: nothing is trained"]
        if trainer.is_world_process_zero():
            print(*map(escaped, lines), sep="\n", end="\n" * bool(lines))
        if there["saved"] >= total:
            trainer.take_weights(folder / runs.MODEL)
            part_at_exit()
            return model
        if not done:
            _refuse_no_way_on(arguments, there)
            from_first(partial(runs.record, folder, recipe, rows, trainer.run))
        trainer.train(resume_from_checkpoint=checkpoint)
        if not trainer.state.global_step:  # e.g. no_duplicates makes no batch of copies
            raise ValueError(
                f"nothing was trained: trainer.batch_sampler={arguments.batch_sampler.value} made "
                f"no batch of {data['batch_size']} rows; lower data.batch_size"
            )
        trainer.save_whole(folder / runs.MODEL)
        trainer.tidy(at_end=True)
    return model


def _refuse_no_way_on(
    arguments: SentenceTransformerTrainingArguments, there: dict[str, Any]
) -> None:
    """Raise ValueError where there is no optimizer state to go on with."""
    if there["checkpoint"] is not None and arguments.save_only_model:
        raise ValueError(
            f"{there['checkpoint']} has no state of the optimizer to go on with, because "
            "trainer.save_only_model is true; choose another trainer.output_dir"
        )
    if there["checkpoint"] is None and there["saved"]:
        raise ValueError(
            f"trainer.output_dir={arguments.output_dir!r} holds a model and no checkpoint to go on "
            "from; choose another, or move the model away"
        )


def _metrics(subsets: Iterable[str]) -> list[str]:
    """Return the names of ``SimilarityOverlap``'s metrics for these subsets."""
    kinds = ("similarity_overlap", "positive_mean", "negative_mean")
    return ["similarity_overlap", *(f"{name}_{kind}" for name in subsets for kind in kinds)]


class SimilarityOverlap(SentenceEvaluator):
    """Evaluate the overlap of the positive and negative similarity histograms (paper, Figure 1).

    A copy of a pair's positive does not count as its negative. The histograms are written to
    ``similarities-STEP.json`` in ``output_path``. They are counts by subset, in 100 equal bins over
    [-1, 1].

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
            pair = []
            for side in ("anchor", "positive"):
                vectors = encode(model, list(rows[side]), workers=0)
                refuse_not_finite(vectors, f"subset {name}, held-out {side} {{}}".format)
                pair.append(torch.from_numpy(vectors))
            ids = torch.tensor([content_id(item) for item in rows["positive"]])
            result = similarity_statistics(*pair, query_ids=ids, target_ids=ids)
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
    """Build the model of a recipe's section ``model``.

    Args:
        settings: the section, completed.
        texts: the texts to train the tokenizer on, for a backbone from scratch.
        seed: seed of the adapters' initial weights.

    Raises:
        ImportError: ``lora`` is set and peft is not installed.
        ValueError: ``frozen`` is in no parameter's name, or in all of them; or a file of the
            backbone is damaged or missing.
    """
    backbone = settings["backbone"]
    if settings["scratch"] is not None:
        backbone = scratch.llava_onevision(texts, **settings["scratch"])
    try:
        model = build(
            backbone,
            pinpoints=settings["pinpoints"],
            max_seq_length=settings["max_seq_length"],
            model_kwargs={"dtype": settings["dtype"]},
        )
    except Exception as error:  # libraries raise errors of many types, few of which name a file
        if settings["scratch"] is None:
            refuse_damaged(Path(backbone))
        if type(error) in (ImportError, OSError, ValueError):
            raise
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        name = "backbone" if settings["scratch"] is None else "scratch"
        raise ValueError(f"model.{name}={settings[name]!r} cannot be loaded ({said})") from error
    one, other = (model.tokenizer(text)["input_ids"] for text in ("a cat", "two dogs"))
    if one == other:  # a tokenizer without its vocabulary does this
        raise ValueError(
            f"model.backbone={backbone!r} has a tokenizer that does not tell texts apart: its "
            "tokenizer.json or another file of it is missing; download it again"
        )
    choose_trained(model, settings, seed=seed)
    return model


def choose_trained(model: Any, settings: dict[str, Any], *, seed: int) -> None:
    """Add the adapters of a recipe's section ``model``, and freeze what it freezes.

    Args:
        model: a SentenceTransformer, or its backbone.
        settings, seed: as in ``build_model``.

    Raises:
        ImportError, ValueError: as in ``build_model``.
    """
    if settings["lora"] is not None:
        adapters = lora_config(settings["lora"])
        torch.manual_seed(seed)
        try:
            model.add_adapter(adapters)
        except ValueError as error:  # peft names no setting
            raise ValueError(f"model.lora={settings['lora']!r} does not fit: {error}") from error
    if settings["frozen"]:  # adapters can be frozen too
        names = [name for name, _ in model.named_parameters() if settings["frozen"] in name]
        if not names:
            raise ValueError(f"model.frozen={settings['frozen']!r} is in no parameter's name")
        for name in names:
            model.get_parameter(name).requires_grad_(False)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                f"model.frozen={settings['frozen']!r} is in every trained parameter's name: "
                "nothing would be trained"
            )
