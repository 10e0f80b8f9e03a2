"""Make a small LLaVA-OneVision with random weights and a tokenizer trained on given texts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field, NonNegativeInt, PositiveInt
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    LlavaOnevisionModel,
    LlavaOnevisionProcessor,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2Tokenizer,
    SiglipVisionConfig,
)

from llave import onevision
from llave.backbones import LLAVA_ONEVISION

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPECIAL = (*CHATML, LLAVA_ONEVISION.image, LLAVA_ONEVISION.video)
SMALLEST = 256 + len(SPECIAL)  # a byte-level vocabulary contains all 256 bytes


def tokenizer(
    texts: Iterable[str], vocabulary: int, special: tuple[str, ...] = SPECIAL
) -> Qwen2Tokenizer:
    """Train a byte-level BPE tokenizer with Qwen2's normaliser and pre-tokenizer.

    Args:
        texts: the texts to learn merges from.
        vocabulary: the most entries, special tokens included. The 256 bytes must fit.
        special: the special tokens. Default: ChatML's and the image and video tokens.
    """
    qwen = Qwen2Tokenizer().backend_tokenizer
    small = Tokenizer(models.BPE())
    small.normalizer, small.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    trainer = BpeTrainer(
        vocab_size=vocabulary - len(special),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    small.train_from_iterator(texts, trainer)
    bpe = json.loads(small.to_str())["model"]
    merges: Any = [tuple(pair) for pair in bpe["merges"]]
    made = Qwen2Tokenizer(vocab=bpe["vocab"], merges=merges)
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


def configurations(
    *,
    vocabulary: int = 1024,
    tile: int = 32,
    patch: int = 8,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
) -> dict[str, PreTrainedConfig]:
    """Return ``vision_config`` and ``text_config``. The arguments are as in ``llava_onevision``.

    Raises:
        ValueError: ``tile`` is no multiple of ``patch``, a ``hidden_size`` is no multiple of
            ``num_attention_heads``, or ``vision`` or ``text`` has a setting that is unknown, of
            another type or follows from the other arguments.
    """
    if tile % patch:
        raise ValueError(f"tile={tile} must be a multiple of patch={patch}")
    parts: tuple[tuple[str, type[PreTrainedConfig], dict[str, Any], dict[str, Any]], ...] = (
        (
            "vision",
            SiglipVisionConfig,
            vision or {},
            {"image_size": tile, "patch_size": patch, "vision_use_head": False},
        ),
        ("text", Qwen2Config, text or {}, {"vocab_size": vocabulary}),
    )
    made: dict[str, PreTrainedConfig] = {}
    for name, kind, given, ours in parts:
        known = kind().to_dict().keys() - ours.keys()
        if unknown := [setting for setting in given if setting not in known]:
            why = f"is no setting of {kind.__name__}"
            if unknown[0] in ours:
                why = "follows from the other arguments"
            raise ValueError(f"{name}.{unknown[0]} {why}; leave it out")
        try:
            config = kind(**given, **ours)
        except StrictDataclassError as error:
            raise ValueError(f"{name}={given}: {' '.join(str(error).split())}") from error
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"{name}.hidden_size={config.hidden_size} must be a multiple of "
                f"num_attention_heads={config.num_attention_heads}"
            )
        made[f"{name}_config"] = config
    return made


def llava_onevision(
    texts: Iterable[str],
    *,
    vocabulary: Annotated[int, Field(ge=SMALLEST)] = 1024,
    tile: PositiveInt = 32,
    patch: PositiveInt = 8,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    seed: NonNegativeInt = 0,
) -> tuple[LlavaOnevisionModel, LlavaOnevisionProcessor]:
    """Return a randomly initialised backbone without a language-model head, and its processor.

    Args:
        texts: the texts to train the tokenizer on.
        vocabulary: size of the token embedding, at least 261.
        tile, patch: sides of an image tile and of its patches, in pixels.
        vision, text: other settings of ``SiglipVisionConfig`` and ``Qwen2Config``.
        seed: seed of the weights.

    Raises:
        ValueError: as in ``configurations``.
    """
    parts = configurations(vocabulary=vocabulary, tile=tile, patch=patch, vision=vision, text=text)
    words = tokenizer(texts, vocabulary)
    config = onevision.configuration(parts["vision_config"], parts["text_config"], words)
    torch.manual_seed(seed)
    return LlavaOnevisionModel(config), onevision.processor(config, words)
