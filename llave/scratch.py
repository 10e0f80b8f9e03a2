"""A small LLaVA-OneVision from nothing: random weights, a tokenizer trained on given texts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionModel,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    Qwen2Tokenizer,
    SiglipVisionConfig,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")


def tokenizer(
    texts: Iterable[str], vocabulary: int, special: tuple[str, ...] = SPECIAL
) -> Qwen2Tokenizer:
    """Qwen2's normalising and splitting with a byte-level BPE of these texts.

    Args:
        texts: what the merges are learned from.
        vocabulary: entries at most, the special ones among them; 256 bytes are needed.
        special: ChatML's and the image tokens.
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
    made = Qwen2Tokenizer(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]])
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


def llava_onevision(
    texts: Iterable[str],
    *,
    vocabulary: int = 1024,
    tile: int = 32,
    patch: int = 8,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    seed: int = 0,
) -> tuple[LlavaOnevisionModel, LlavaOnevisionProcessor]:
    """A randomly initialised backbone without a language-model head, and its processor.

    Args:
        texts: what the tokenizer is trained on.
        vocabulary: size of the token embedding.
        tile, patch: side of an image tile and of its patches, pixels.
        vision, text: settings of ``SiglipVisionConfig`` and ``Qwen2Config`` beside those.
        seed: of the weights.

    Raises:
        ValueError: ``tile`` is no multiple of ``patch``.
    """
    if tile % patch:
        raise ValueError(f"tile={tile} must be a multiple of patch={patch}")
    words = tokenizer(texts, vocabulary)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            image_size=tile, patch_size=patch, vision_use_head=False, **(vision or {})
        ),
        text_config=Qwen2Config(vocab_size=vocabulary, **(text or {})),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
    )
    torch.manual_seed(seed)
    model = LlavaOnevisionModel(config)
    pixels: dict[str, Any] = {
        "size": {"height": tile, "width": tile},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(**pixels),
        video_processor=LlavaOnevisionVideoProcessor(**pixels),
        tokenizer=words,
        num_image_tokens=(tile // patch) ** 2,
        vision_feature_select_strategy="full",
    )
    return model, processor
