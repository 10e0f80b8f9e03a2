"""Assemble a LLaVA-OneVision config and processor, for converted checkpoints and random weights."""

from __future__ import annotations

from typing import Any

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from llave.backbones import LLAVA_ONEVISION


def configuration(
    vision: PreTrainedConfig,
    text: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    **settings: Any,
) -> LlavaOnevisionConfig:
    """Return the config for a vision tower and a language model.

    Args:
        vision, text: their configs.
        tokenizer: a tokenizer with the image and video tokens.
        settings: other arguments of ``LlavaOnevisionConfig``.
    """
    for name in ("image", "video"):
        token = getattr(LLAVA_ONEVISION, name)
        settings[f"{name}_token_index"] = tokenizer.convert_tokens_to_ids(token)
    return LlavaOnevisionConfig(vision_config=vision, text_config=text, **settings)


def processor(
    config: LlavaOnevisionConfig, tokenizer: PreTrainedTokenizerBase
) -> LlavaOnevisionProcessor:
    """Return the processor for a config, with SigLIP's pixel mean and deviation."""
    vision: Any = config.vision_config
    pixels: dict[str, Any] = {
        "size": {"height": vision.image_size, "width": vision.image_size},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(**pixels),
        num_image_tokens=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_select_strategy="full",
    )
