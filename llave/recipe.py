"""Recipes: what a training run may set, with types and defaults, and the reading of their files."""

from __future__ import annotations

import dataclasses
import re
from enum import Enum
from importlib.resources import files
from operator import attrgetter
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import trainer_log_levels
from yaml.constructor import ConstructorError

from llave import scratch
from llave.subsets import has_splits
from llave_kernels.dispatch import BACKENDS

Text = Annotated[str, Field(min_length=1)]
Grid = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
Backend = Literal[("auto", *BACKENDS)]
Recipe = dict[str, dict[str, Any]]


@dataclasses.dataclass
class Model:
    """The section ``model``."""

    backbone: Text | None = None  # folder or hub name, or:
    scratch: dict[str, Any] | None = None  # arguments of llave.scratch.llava_onevision
    pinpoints: Annotated[list[Grid], Field(min_length=1)] | None = None
    max_seq_length: PositiveInt = 4096
    # Of the weights, which the optimizer updates in it: half precision, in which backbones are
    # published, loses small updates. With trainer.bf16 the products are in bfloat16 anyway.
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    frozen: Text | None = None  # parameters with this in their name are not trained
    # Arguments of peft.LoraConfig. Checkpoints hold the adapters alone; the model that is saved
    # at the end has them merged into its weights and needs neither peft nor the backbone.
    lora: dict[str, Any] | None = None


@dataclasses.dataclass
class Data:
    """The section ``data``."""

    train: Text | None = None  # folder of MMEB training files, or hub name
    images: Text | None = None
    split: Text | None = None  # default train; of a folder where its files say theirs
    subsets: Annotated[list[Text], Field(min_length=1)] | None = None  # default all of a folder
    cap: PositiveInt | None = 50_000
    batch_size: PositiveInt = 256  # of all processes together
    # Every batch from one subset; otherwise subsets are mixed, and mined negatives, which not
    # all of them have, are left out.
    homogeneous: bool = True
    held_out: NonNegativeInt = 0  # pairs of each subset kept for the similarity overlap
    on_error: Literal["raise", "skip"] = "raise"


@dataclasses.dataclass
class Loss:
    """The section ``loss``."""

    scale: PositiveFloat = 50.0
    alpha: NonNegativeFloat = 9.0
    false_negative_margin: float | None = None
    mini_batch_size: PositiveInt | None = None  # gradient caching
    backend: Backend = "auto"


# fsdp (version 2) and deepspeed (untried) shard the weights. Parts that are frozen as a whole
# FSDP leaves unsharded; the others every process must run in each forward, so a column of a
# subset should have images in all its rows or in none.
KINDS = {
    "model": Model,
    "data": Data,
    "loss": Loss,
    "trainer": SentenceTransformerTrainingArguments,
}
# The trainer's settings that have no effect here, and why.
_NO_METRICS = "evaluation is the similarity overlap, which has no such setting"
_ORDER = "batches are drawn at random; trainer.batch_sampler is how"
_COMMAND = "the command says what is done"
INEFFECTIVE = {
    "per_device_train_batch_size": "it follows from data.batch_size",
    "auto_find_batch_size": "the batch is data.batch_size; lower loss.mini_batch_size instead",
    "accelerator_config": "it follows from data.batch_size",
    "dataloader_drop_last": "the loss needs whole batches",
    "resume_from_checkpoint": "a run goes on from the last checkpoint in trainer.output_dir",
    "train_sampling_strategy": _ORDER,
    "length_column_name": _ORDER,
    "label_smoothing_factor": "the loss has no such setting",
    "average_tokens_across_devices": "the loss is that of the whole batch already",
    "router_mapping": "the model has no routes",
    "use_cache": "embedding generates nothing",
    "warmup_ratio": "trainer.warmup_steps below 1 is a share of all steps",
    "local_rank": "torchrun says it",
    "neftune_noise_alpha": "the trainer finds no word embeddings in this model",
    "include_num_input_tokens_seen": "the model has no one input to count the tokens of",
    **dict.fromkeys(("remove_unused_columns", "label_names"), "the loss uses every column"),
    "ddp_broadcast_buffers": "sentence-transformers turns it off",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _COMMAND),
    **dict.fromkeys(
        (
            "per_device_eval_batch_size",
            "prediction_loss_only",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "eval_accumulation_steps",
            "include_for_metrics",
            "batch_eval_metrics",
            "bf16_full_eval",
            "fp16_full_eval",
        ),
        _NO_METRICS,
    ),
}
# Where the trainer's own annotations are too narrow or too wide.
_Seed = Annotated[int, Field(ge=0, lt=2**32)]
_Pattern = Annotated[re.Pattern[str], AfterValidator(attrgetter("pattern"))]
_LogLevel = Literal[tuple(trainer_log_levels)]
_Logger = Literal[("all", "none", *INTEGRATION_TO_CALLBACK)]
TRAINER_TYPES: dict[str, Any] = {
    "output_dir": Text | None,
    "ddp_backend": Literal["nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl"] | None,
    "seed": _Seed,
    "data_seed": _Seed | None,
    "learning_rate_mapping": dict[_Pattern, NonNegativeFloat] | None,
    "lr_scheduler_kwargs": dict[str, Any] | None,
    "report_to": _Logger | list[_Logger] | None,
    **dict.fromkeys(("log_level", "log_level_replica"), _LogLevel),
    **dict.fromkeys(("save_total_limit", "torch_empty_cache_steps"), PositiveInt | None),
    **dict.fromkeys(("eval_steps", "save_steps", "logging_steps"), PositiveFloat | None),
    "num_train_epochs": PositiveFloat,
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Annotated[float, Field(ge=0, lt=1)]),
    "gradient_accumulation_steps": PositiveInt,
    "fsdp": bool | str | list[str] | None,
}
# Settings that have no effect unless one of these others is on.
_OFF = (None, False, 0, "no")
NEEDS = {
    **dict.fromkeys(
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        ("gradient_checkpointing", "activation_checkpointing"),
    ),
    "liger_kernel_config": ("use_liger_kernel",),
    "fsdp_config": ("fsdp",),
    "torch_compile_mode": ("torch_compile", "torch_compile_backend"),
    "eval_delay": ("eval_strategy",),
    **dict.fromkeys(
        (
            *("dataloader_persistent_workers", "dataloader_prefetch_factor"),
            "dataloader_multiprocessing_context",
        ),
        ("dataloader_num_workers",),
    ),
    **dict.fromkeys(
        (
            *("hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push"),
            "hub_revision",
        ),
        ("push_to_hub",),
    ),
}


def _defaults(name: str) -> dict[str, Any]:
    return {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(KINDS[name])
        if field.init and not (name == "trainer" and field.name in INEFFECTIVE)
    }


# What a recipe may say, with defaults; None: no default, the recipe must say it or leave it out.
SECTIONS: dict[str, dict[str, Any]] = {name: _defaults(name) for name in KINDS}


class _Loader(yaml.SafeLoader):
    """YAML 1.2: 2e-5 is a number; no, on and 1:30 are strings; a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for (key, _), text in zip(node.value, keys, strict=True):
            if keys.count(text) > 1 and isinstance(text, str):
                raise ConstructorError(None, None, f"{text} stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBER = r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan"
for _tag, _pattern, _first in (
    ("bool", "(?i:true|false)", "tTfF"),
    ("int", "[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", _NUMBER, "-+.0123456789"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )
_Loader.add_constructor(
    "tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node))
)


def read_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """A recipe from a YAML file or by the name of one of ours, checked and completed.

    Every setting has a type: a number may be written ``2e-5``, ``9e0`` or in quotes.

    Args:
        name: a path, or ``llave-0.5b``, ``llave-2b``, ``llave-7b``, ``tiny``.
        overrides: ``["--loss.alpha", "5", ...]``; values are read as YAML.

    Raises:
        ValueError: an unknown section or setting, a value of another type or out of range, a
            setting without effect, or an override that is not ``--section.setting value``.
        FileNotFoundError: no such file or recipe.
        ImportError: ``model.lora`` is set and peft is not installed.
    """
    given = {section: {} if x is None else x for section, x in _given(name).items()}
    words = overrides or []
    if len(words) % 2:
        raise ValueError(f"overrides come in pairs, --section.setting value; got {words}")
    for key, value in zip(words[::2], words[1::2], strict=True):
        section, dot, setting = key.removeprefix("--").partition(".")
        if not key.startswith("--") or not dot:
            raise ValueError(
                f"{key!r} is no override; expected --section.setting, e.g. --loss.alpha"
            )
        settings = given.setdefault(section, {})
        if isinstance(settings, dict):  # else it is refused below
            settings[setting] = _yaml(value, key)
    recipe: Recipe = {section: {} for section in SECTIONS}
    for section, settings in given.items():
        if section not in SECTIONS:
            raise ValueError(f"section {section!r} of {name} is none of {', '.join(SECTIONS)}")
        if not isinstance(settings, dict):
            raise ValueError(f"section {section} of {name} is {settings!r}; expected settings")
        types = get_type_hints(KINDS[section], include_extras=True)
        if section == "trainer":
            types |= TRAINER_TYPES
        for setting, value in settings.items():
            if section == "trainer" and setting in INEFFECTIVE:
                raise ValueError(
                    f"trainer.{setting} of {name} has no effect: {INEFFECTIVE[setting]}"
                )
            if setting not in SECTIONS[section]:
                known = ", ".join(SECTIONS[section])
                raise ValueError(f"{section}.{setting} of {name} is no setting; there are {known}")
            recipe[section][setting] = _typed(f"{section}.{setting}", value, types[setting])
    for section in ("model", "data", "loss"):
        recipe[section] = SECTIONS[section] | recipe[section]
    _check(recipe, name)
    return recipe


def lora_config(settings: dict[str, Any]) -> Any:
    """The ``peft.LoraConfig`` of ``model.lora``.

    Raises:
        ImportError: peft is not installed.
        ValueError: an unknown setting, or a value of another type.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError(f"model.lora={settings} needs peft: pip install peft") from error
    return LoraConfig(**_arguments("model.lora", settings, get_type_hints(LoraConfig)))


def _given(name: str) -> dict[str, Any]:
    """The sections a recipe's file says."""
    ours = files("llave") / "recipes"
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        names = sorted(r.name.removesuffix(".yaml") for r in ours.iterdir())
        if name not in names:
            raise FileNotFoundError(f"no recipe {name!r}; there are {', '.join(names)}, or a path")
        text = (ours / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        text = path.read_text(encoding="utf-8-sig")
    given = _yaml(text, name)
    if not isinstance(given, dict):
        raise ValueError(f"{name} holds no sections; expected {', '.join(SECTIONS)}")
    return given


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is no YAML: {' '.join(str(error).split())}") from error


def _arguments(where: str, given: dict[str, Any], types: dict[str, Any]) -> dict[str, Any]:
    """What is given to a function or class, in its types."""
    for setting in given:
        if setting not in types:
            raise ValueError(f"{where}.{setting} is no setting; there are {', '.join(types)}")
    return {key: _typed(f"{where}.{key}", value, types[key]) for key, value in given.items()}


def _typed(where: str, value: Any, kind: Any) -> Any:
    """The value in the type of its setting; ValueError where it is of another."""
    if get_origin(kind) in (Union, UnionType):
        kinds = get_args(kind)
        if any(isinstance(k, type) and issubclass(k, Enum) for k in kinds):
            kinds = tuple(k for k in kinds if k is not str)  # nothing but the names
        kind = Union[kinds]  # noqa: UP007
    config = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False, extra="forbid")
    try:
        # Strings of numbers are numbers, but true is not 1.
        found = TypeAdapter(kind, config=config).validate_python(
            value, strict=isinstance(value, bool)
        )
    except ValidationError as error:
        problems = dict.fromkeys(problem["msg"] for problem in error.errors())
        if any(problem["type"] == "string_type" for problem in error.errors()):
            problems["write text that YAML takes for something else in quotes"] = None
        raise ValueError(f"{where}={value!r} is refused: {'; '.join(problems)}") from None
    return found.value if isinstance(found, Enum) else found


def _check(recipe: Recipe, name: str) -> None:
    """Refuse what does not go together, or would have no effect."""
    model, data, trainer = recipe["model"], recipe["data"], recipe["trainer"]
    for section, setting in (("data", "train"), ("trainer", "output_dir")):
        if recipe[section].get(setting) is None:
            raise ValueError(f"{section}.{setting} of {name} is missing")
    if (model["backbone"] is None) == (model["scratch"] is None):
        raise ValueError(f"model of {name} needs one of backbone and scratch")
    if model["scratch"] is not None:
        types = get_type_hints(scratch.llava_onevision, include_extras=True)
        types = {key: types[key] for key in types if key not in ("texts", "return")}
        model["scratch"] = _arguments("model.scratch", model["scratch"], types)
        parts = {key: value for key, value in model["scratch"].items() if key != "seed"}
        try:
            scratch.configurations(**parts)
        except ValueError as error:
            raise ValueError(f"model.scratch of {name}: {error}") from error
    if model["lora"] is not None:
        lora_config(model["lora"])
    folder = Path(data["train"])
    if data["split"] is not None and folder.is_dir() and not has_splits(folder):
        raise ValueError(
            f"data.split={data['split']!r} has no effect: data.train={data['train']!r} is a "
            "folder whose files say no split; set it to null"
        )
    names = data["subsets"] or []
    if repeated := {subset for subset in names if names.count(subset) > 1}:
        raise ValueError(f"data.subsets repeats {', '.join(sorted(repeated))}")
    for setting, value in trainer.items():
        default = SECTIONS["trainer"][setting]
        if type(default) in (int, float) and default >= 0 and value < 0:
            raise ValueError(f"trainer.{setting}={value} must not be negative")
    if not (trainer.get("max_steps", -1) > 0 or trainer.get("max_steps", -1) == -1):
        raise ValueError(
            f"trainer.max_steps={trainer['max_steps']} must be at least 1, or -1 for whole epochs"
        )
    for setting, others in NEEDS.items():
        changed = trainer.get(setting) not in (None, SECTIONS["trainer"][setting])
        if changed and not any(trainer.get(other, "no") not in _OFF for other in others):
            raise ValueError(
                f"trainer.{setting}={trainer[setting]!r} has no effect without "
                f"{' or '.join(f'trainer.{other}' for other in others)}"
            )
    if trainer.get("optim_target_modules") and not trainer.get("optim", "").startswith(
        ("galore", "apollo")
    ):
        raise ValueError(
            f"trainer.optim_target_modules={trainer['optim_target_modules']!r} has no effect "
            "without a galore or apollo optimizer in trainer.optim"
        )
    strategy = trainer.get("eval_strategy", "no")
    if trainer.get("eval_steps") is not None and strategy != "steps":
        raise ValueError(
            f"trainer.eval_steps={trainer['eval_steps']} has no effect with "
            f"trainer.eval_strategy={strategy}; set that to steps"
        )
    evaluates = strategy != "no" or trainer.get("eval_on_start", False)
    if data["held_out"] and not evaluates:
        raise ValueError(
            f"data.held_out={data['held_out']} has no effect without an evaluation; set "
            "trainer.eval_strategy to steps or epoch"
        )
    if evaluates and not data["held_out"]:
        raise ValueError(
            f"trainer.eval_strategy={strategy} needs pairs to evaluate on; set data.held_out"
        )
    best = trainer.get("load_best_model_at_end", False) or trainer.get("save_strategy") == "best"
    best = best or trainer.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy")
    says = {key: trainer.get(key) for key in ("metric_for_best_model", "greater_is_better")}
    for setting, value in says.items():
        if value is not None and not best:
            raise ValueError(
                f"trainer.{setting}={value!r} has no effect: nothing asks which model is best; set "
                "trainer.load_best_model_at_end"
            )
    if best and None in says.values():
        raise ValueError(
            "trainer.metric_for_best_model and trainer.greater_is_better must say which model is "
            "best, e.g. similarity_overlap and false"
        )
    if trainer.get("batch_sampler") == "group_by_label":
        raise ValueError(
            "trainer.batch_sampler='group_by_label' needs labels of classes; here they are content "
            "ids: choose batch_sampler or no_duplicates"
        )
    if "multi_dataset_batch_sampler" in trainer and not data["homogeneous"]:
        raise ValueError(
            "trainer.multi_dataset_batch_sampler has no effect where data.homogeneous is false: "
            "subsets are mixed in a batch"
        )
