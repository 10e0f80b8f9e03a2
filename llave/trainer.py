"""sentence-transformers' trainer, extended for DDP, sharded weights and adapters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.losses.gradcache import uses_gradient_cache
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, PreTrainedModel, Trainer
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from llave.checkpointing import CheckpointingTrainer
from llave.figures import Figures
from llave.losses import CachedLLaVELoss, LLaVELoss


class EmbeddingTrainer(CheckpointingTrainer):
    """sentence-transformers' trainer, extended for DDP, sharded weights and adapters."""

    def __init__(self, *args: Any, loss: LLaVELoss | CachedLLaVELoss, **kwargs: Any) -> None:
        super().__init__(*args, loss=loss, **kwargs)
        self.figures = Figures(loss if isinstance(loss, LLaVELoss) else loss.loss)
        self.add_callback(self.figures)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the base class does, and the figures of the training beside a loss."""
        if "loss" in logs:
            logs = logs | self.figures.take(self.accelerator)
        super().log(logs, *args, **kwargs)

    def check_sharding(self, homogeneous: bool) -> None:
        """Raise ValueError for sharding settings that would stop the training or the saving.

        Args:
            homogeneous: whether every batch comes from one subset.
        """
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(
                f"trainer.fsdp={self.args.fsdp!r}: accelerate shards over no "
                f"{self.args.device.type}; leave it out"
            )
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError(
                f"trainer.fsdp_config={self.args.fsdp_config!r} asks for FSDP1; set version to 2"
            )
        zero = {}
        if self.is_deepspeed_enabled:
            plugin = self.accelerator.state.deepspeed_plugin
            zero = plugin.deepspeed_config.get("zero_optimization", {})
        if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
            raise ValueError(
                f"trainer.deepspeed={self.args.deepspeed!r}: the weights could not be saved; set "
                "zero_optimization.stage3_gather_16bit_weights_on_model_save to true in it"
            )
        if zero.get("stage") and uses_gradient_cache(self.loss):
            raise ValueError(
                f"loss.mini_batch_size={self.loss.mini_batch_size}: gradient caching runs several "
                f"backward passes a step, and DeepSpeed (trainer.deepspeed="
                f"{self.args.deepspeed!r}) reduces each gradient only once; leave it out, or shard "
                "with trainer.fsdp"
            )
        whole = self.is_fsdp_enabled and _untrained(self.model.transformers_model)
        if not homogeneous and (zero.get("stage") == 3 or (self.is_fsdp_enabled and not whole)):
            # All processes take part in gathering weights. One with images would wait for one
            # without.
            raise ValueError(
                "data.homogeneous=False: sharded weights need batches of one subset, so that all "
                "processes have images or none; set it to true, or with FSDP freeze the vision "
                "tower (model.frozen)"
            )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        # FSDP2 changes the class of the module it wraps. It cannot do so for sentence-transformers'
        # modules, because they are ABCs. The backbone can be wrapped, and it has all the weights.
        if not self.is_fsdp_enabled:
            return super()._prepare_for_training(*args, **kwargs)
        prepare, plugin = self.accelerator.prepare, self.accelerator.state.fsdp_plugin

        def prepare_backbone(model: SentenceTransformer, optimizer: Any) -> tuple[Any, Any]:
            backbone = model.transformers_model
            plugin.ignored_modules = _untrained(backbone)
            if plugin.transformer_cls_names_to_wrap is None:
                # The backbone's list also has classes that this configuration lacks. FSDP would
                # raise an error for them.
                present = {type(module).__name__ for module in backbone.modules()}
                plugin.transformer_cls_names_to_wrap = sorted(
                    present & set(backbone._no_split_modules)
                )
            backbone, optimizer = prepare(backbone, optimizer)
            register_fsdp_forward_method(backbone, "forward")  # its ``forward`` is called by name
            model.set_requires_gradient_sync = backbone.set_requires_gradient_sync
            return model, optimizer

        self.accelerator.prepare = prepare_backbone
        try:
            return super()._prepare_for_training(*args, **kwargs)
        finally:
            self.accelerator.prepare = prepare

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss, and tell DDP which parameters it uses.

        DDP itself looks only at the last forward. If that one has texts and an earlier one had
        images, DDP takes the vision tower for unused, and raises at its gradients.
        """
        self.figures.see(inputs)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if (
            isinstance(model, DistributedDataParallel)
            and model.find_unused_parameters
            and model.require_backward_grad_sync
            and not uses_gradient_cache(self.loss)
        ):
            model.reducer.prepare_for_backward([loss])
        return loss

    def total_steps(self) -> int:
        """Return the number of optimizer steps in the whole training."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * self._steps_per_epoch())

    def _steps_per_epoch(self) -> int:
        return math.ceil(len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps)

    def take_weights(self, folder: Path) -> None:
        """Load the weights of a finished model, in which adapters are merged."""
        _merge_adapters(self.model.transformers_model)
        SentenceTransformerTrainer._load_from_checkpoint(self, str(folder))

    def merge_adapters(self) -> None:
        """Merge the model's adapters into its weights, unless the weights are sharded."""
        if not self._shards():
            _merge_adapters(self.accelerator.unwrap_model(self.model).transformers_model)

    def save_whole(self, folder: Path) -> None:
        """Save the model with adapters merged and shards gathered. Every process must call this."""
        state = None
        if self._shards():
            state = self.accelerator.get_state_dict(self.model_wrapped)
        with self.saving(folder) as made:
            self._save_state(made, state, merge=True)

    def _shards(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # The base class would save sharded weights as they are, and from every process at once.
        folder = Path(output_dir or self.args.output_dir)
        self._save_state(folder, state_dict, merge=False)
        if self.args.should_save:
            torch.save(self.args, folder / "training_args.bin")

    def _save_state(self, folder: Path, state: dict[str, Any] | None, merge: bool) -> None:
        """Save the model.

        Args:
            folder: the folder to write.
            state: the gathered weights, where the model's own are sharded.
            merge: whether to merge the adapters.
        """
        model = self.accelerator.unwrap_model(self.model)
        backbone = model.transformers_model
        # A used tokenizer would be saved with its truncation. That would override any length set
        # after loading.
        model.tokenizer.backend_tokenizer.no_truncation()
        if not self._shards():
            if merge:
                self.merge_adapters()
            if self.args.should_save:
                model.save_pretrained(str(folder))
        elif self.args.should_save and state is not None:
            with self._unsharded():
                whole = _with_weights(backbone, state)
                if merge:
                    _merge_adapters(whole)
                model[0].model = whole
                # The card shows embeddings. The copy lacks its buffers, so it cannot compute them.
                model.save_pretrained(str(folder), create_model_card=False)
                model[0].model = backbone

    @contextmanager
    def _unsharded(self) -> Iterator[None]:
        """Let transformers build and save a model on this process alone.

        With DeepSpeed's stage 3 it would shard a new model, and wait for the other processes.
        """
        unset_hf_deepspeed_config()
        try:
            yield
        finally:
            if self.is_deepspeed_enabled:
                set_hf_deepspeed_config(self.args.hf_deepspeed_config)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            _complete(self.optimizer)
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        backbone = self.accelerator.unwrap_model(self.model).transformers_model
        if self.is_fsdp_enabled:  # sentence-transformers' method does not handle FSDP
            Trainer._load_from_checkpoint(self, checkpoint_path, model)
        elif _adapted(backbone):  # the base class would look for the backbone in a removed folder
            from peft import set_peft_model_state_dict

            saved = load_file(Path(checkpoint_path) / "adapter_model.safetensors")
            state = {name.removeprefix("base_model.model."): x for name, x in saved.items()}
            if state.keys() != backbone.get_adapter_state_dict().keys():
                raise ValueError(
                    f"{checkpoint_path} has other adapters than model.lora makes; train with the "
                    "model.lora it was made with, or in another trainer.output_dir"
                )
            set_peft_model_state_dict(backbone, state, "default")
        else:
            super()._load_from_checkpoint(checkpoint_path)


def _untrained(backbone: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the parts without trained parameters, such as a frozen vision tower.

    FSDP leaves them unsharded, so any process can run them alone.
    """
    return [m for m in backbone.children() if not any(p.requires_grad for p in m.parameters())]


def _complete(optimizer: Any) -> None:
    """Add zero state for parameters that had no gradient yet. FSDP restores all states or none."""
    known: dict[str, Any] = next(iter(optimizer.state.values()), {})
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not optimizer.state.get(p):
                optimizer.state[p] = {
                    name: torch.zeros_like(p if value.dim() else value)
                    for name, value in known.items()
                }


def _adapted(backbone: PreTrainedModel) -> bool:
    return hasattr(backbone, "peft_config")


def _with_weights(backbone: PreTrainedModel, state: dict[str, Any]) -> PreTrainedModel:
    """Return an unsharded copy of a sharded backbone, with weights from the model's full state."""
    prefix = "0.model."  # the first module is sentence-transformers' Transformer
    with torch.device("meta"):
        whole = AutoModel.from_config(backbone.config)
        if _adapted(backbone):
            whole.add_adapter(backbone.peft_config["default"])
    weights = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    whole.load_state_dict(weights, assign=True)
    return whole


def _merge_adapters(backbone: PreTrainedModel) -> None:
    """Merge the adapters into the weights, and remove the adapter layers."""
    if not _adapted(backbone):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, layer in list(backbone.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            backbone.set_submodule(name, layer.get_base_layer())
        elif isinstance(layer, AuxiliaryTrainingWrapper):  # modules_to_save
            trained = layer.unload_and_optionally_merge_module(True, False, None)
            backbone.set_submodule(name, trained)
    backbone.delete_adapter("default")
