"""The trainer's settings in a recipe: their types and ranges, and which have an effect."""

from __future__ import annotations

import re
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import trainer_log_levels

# Settings that have no effect here, with the reasons.
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
    "save_on_each_node": "all processes must see one trainer.output_dir",
    "enable_jit_checkpoint": "a signal makes the trainer keep a checkpoint anyway",
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
# Types for settings whose own annotations are too narrow or too wide.
_Seed = Annotated[int, Field(ge=0, lt=2**32)]
_Pattern = Annotated[re.Pattern[str], AfterValidator(attrgetter("pattern"))]
if TYPE_CHECKING:
    _LogLevel = str
    _Logger = str
else:
    _LogLevel = Literal[tuple(trainer_log_levels)]
    _Logger = Literal[("all", "none", *INTEGRATION_TO_CALLBACK)]
TYPES: dict[str, Any] = {
    "output_dir": Annotated[str, Field(min_length=1)] | None,
    "ddp_backend": Literal["nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl"] | None,
    "seed": _Seed,
    "data_seed": _Seed | None,
    "learning_rate_mapping": dict[_Pattern, NonNegativeFloat] | None,
    "lr_scheduler_kwargs": dict[str, Any] | None,
    "report_to": _Logger | list[_Logger] | None,
    **dict.fromkeys(("log_level", "log_level_replica"), _LogLevel),
    **dict.fromkeys(("save_total_limit", "torch_empty_cache_steps"), PositiveInt | None),
    **dict.fromkeys(("save_steps", "logging_steps"), PositiveFloat),
    "eval_steps": PositiveFloat | None,
    "num_train_epochs": PositiveFloat,
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Annotated[float, Field(ge=0, lt=1)]),
    "gradient_accumulation_steps": PositiveInt,
    "fsdp": bool | str | list[str] | None,
}
_OFF = (None, False, 0, "no")
# Each setting has no effect unless one of the others is on.
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


def check(trainer: dict[str, Any], data: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Refuse settings that conflict, are out of range, or would have no effect.

    Args:
        trainer, data: sections of a recipe.
        defaults: defaults of the section ``trainer``.

    Raises:
        ValueError: there is such a setting. The message names the first.
    """
    for setting, value in trainer.items():
        default = defaults[setting]
        if type(default) in (int, float) and default >= 0 and value < 0:
            raise ValueError(f"trainer.{setting}={value} must not be negative")
    if not (trainer.get("max_steps", -1) > 0 or trainer.get("max_steps", -1) == -1):
        raise ValueError(
            f"trainer.max_steps={trainer['max_steps']} must be at least 1, or -1 for whole epochs"
        )
    for setting, others in NEEDS.items():
        changed = trainer.get(setting) not in (None, defaults.get(setting))
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
