"""A LLaVA-OneVision put together of its parts, for converted checkpoints and for random weights."""

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
    """The config of a vision tower and a language model.

    Args:
        vision, text: the configs of the two.
        tokenizer: one that has the tokens of images and videos.
        settings: further ones of ``LlavaOnevisionConfig``.
    """
    for name in ("image", "video"):
        token = getattr(LLAVA_ONEVISION, name)
        settings[f"{name}_token_index"] = tokenizer.convert_tokens_to_ids(token)
    return LlavaOnevisionConfig(vision_config=vision, text_config=text, **settings)


def processor(
    config: LlavaOnevisionConfig, tokenizer: PreTrainedTokenizerBase
) -> LlavaOnevisionProcessor:
    """The processor of a config, with SigLIP's mean and deviation of the pixels."""
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
