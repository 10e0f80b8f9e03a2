"""Checkpoints in the LLaVE authors' layout, made from tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from llave import convert
from tests.llave import tiny

GRIDS = [[24, 24], [24, 48], [48, 24], [48, 48]]
TOWER = "model.vision_tower.vision_tower.vision_model."


def theirs(name: str) -> str:
    """The authors' name of a tensor of LlavaOnevisionForConditionalGeneration."""
    for ours, other in (
        ("model.vision_tower.vision_model.", TOWER),
        ("model.vision_tower.", TOWER),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("model.language_model.", "model."),
    ):
        if name.startswith(ours):
            return name.replace(ours, other)
    return name


def write_checkpoint(
    folder: Path, network, *, rows: int | None = None, dtype=torch.float32
) -> dict[str, torch.Tensor]:
    """Write config and tokenizer to ``folder``. Returns the weights by the authors' names."""
    text = network.config.text_config.to_dict()
    keys = set(convert._TEXT_KEYS) & text.keys()
    settings = {key: text[key] for key in keys} | {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        "rope_theta": 10000.0,
        "mm_hidden_size": tiny.WIDTH,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": GRIDS,
        "vocab_size": text["vocab_size"],
    }
    (folder / "config.json").write_text(json.dumps(settings))
    tiny.tokenizer().save_pretrained(folder)
    state = {theirs(name): tensor.to(dtype) for name, tensor in network.state_dict().items()}
    if network.config.tie_word_embeddings:
        del state["lm_head.weight"]
    if rows is not None:
        state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:rows].clone()
    return state


def write_separate_tokenizer_files(folder: Path) -> None:
    """Replace tokenizer.json by Qwen2's older files: vocabulary, merges and added tokens."""
    made = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(made["model"]["vocab"]))
    merges = [" ".join(pair) for pair in made["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    added = {str(token.pop("id")): token for token in made["added_tokens"]}
    numbers = {token["content"]: int(number) for number, token in added.items()}
    (folder / "added_tokens.json").write_text(json.dumps(numbers))
    settings = {
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "chat_template": "{{ messages }}",
        "eos_token": "<|im_end|>",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_shards(folder: Path, state: dict[str, torch.Tensor], count: int) -> None:
    names = sorted(state)
    parts = [names[i::count] for i in range(count)]
    if count == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    where = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        where.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tower_of_27(state: dict[str, torch.Tensor]) -> list[str]:
    """Add SigLIP's last layer and head, which some checkpoints still hold.

    Returns:
        The names of the added tensors.
    """
    last = f"{TOWER}encoder.layers.{convert.VISION_LAYERS - 1}."
    more = {
        name.replace(f".{convert.VISION_LAYERS - 1}.", f".{convert.VISION_LAYERS}."): tensor.clone()
        for name, tensor in state.items()
        if name.startswith(last)
    }
    more[f"{TOWER}head.probe"] = torch.zeros(1, 1, tiny.WIDTH)
    state.update(more)
    return list(more)


def backbone():
    """A LLaVA-OneVision with the layout's number of vision layers."""
    return tiny.llava_onevision(
        vision_layers=convert.VISION_LAYERS, vision_heads=convert.VISION_HEADS
    )
