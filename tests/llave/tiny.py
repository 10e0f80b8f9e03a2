"""Tiny random backbones with their processors. They need no downloads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import transformers
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    Qwen2Tokenizer,
    SiglipVisionConfig,
)

from llave import scratch

TILE = 24  # pixels: 4 x 4 patches of 6 pixels, 16 tokens
PATCH = 6
WIDTH = 32
VOCABULARY = 400  # rows of the embedding. The tokenizer has fewer tokens
WORDS = (
    "You are a helpful assistant. system user assistant\n\n Represent the given image. "
    "A cat and a dog, a cat and a tiger. What is in the image\n the video"
)


def tokenizer(*extra: str) -> Qwen2Tokenizer:
    """A byte-level BPE with Qwen2's normalising and splitting, few merges and ChatML's tokens.

    Args:
        extra: special tokens after ChatML's.
    """
    special = (*scratch.CHATML, *extra)
    return scratch.tokenizer([WORDS] * 4, 340 + len(special), special)


def llava_onevision(
    *, vision_layers: int = 2, vision_heads: int = 2, tie: bool = False, seed: int = 0
) -> tuple[LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor]:
    """A LLaVA-OneVision of about 100,000 parameters, and its processor."""
    words = tokenizer("<image>", "<video>")
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_heads,
            image_size=TILE,
            patch_size=PATCH,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tie,
        ),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        tie_word_embeddings=tie,
    )
    torch.manual_seed(seed)
    model = _spread(LlavaOnevisionForConditionalGeneration(config))
    size = {"height": TILE, "width": TILE}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer=words,
        video_processor=LlavaOnevisionVideoProcessor(
            size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        num_image_tokens=(TILE // PATCH) ** 2,
        vision_feature_select_strategy="full",
    )
    return model, processor


def qwen_vl(version: str) -> tuple[torch.nn.Module, transformers.ProcessorMixin]:
    """A Qwen2-VL ("2") or Qwen2.5-VL ("2_5") of the same size, and its processor."""
    words = tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    vision = {"depth": 2, "num_heads": 2, "hidden_size": WIDTH, "patch_size": 4}
    if version == "2":
        vision |= {"embed_dim": WIDTH, "mlp_ratio": 2}
    else:
        vision |= {"intermediate_size": 48, "out_hidden_size": WIDTH, "window_size": 16}
        vision |= {"fullatt_block_indexes": [1]}
    family = {"2": "Qwen2VL", "2_5": "Qwen2_5_VL"}[version]
    config = getattr(transformers, f"{family}Config")(
        vision_config=vision,
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            },
        },
        image_token_id=words.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=words.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=words.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"),
    )
    torch.manual_seed(0)
    model = _spread(getattr(transformers, f"{family}ForConditionalGeneration")(config))
    pixels = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 4096}}
    processor = getattr(transformers, f"{family}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(**pixels),
        tokenizer=words,
        video_processor=transformers.Qwen2VLVideoProcessor(**pixels),
    )
    return model, processor


# The keys are the model types of llave.backbones.
BACKBONES: dict[str, Callable[[], tuple[torch.nn.Module, transformers.ProcessorMixin]]] = {
    "llava_onevision": llava_onevision,
    "qwen2_vl": partial(qwen_vl, "2"),
    "qwen2_5_vl": partial(qwen_vl, "2_5"),
}


def _spread(model: torch.nn.Module) -> torch.nn.Module:
    """Draw larger weights. With the usual initialisation different inputs look the same."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()
