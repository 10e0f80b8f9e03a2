"""The vision-language models that an embedding model can be built on: one row each.

A row holds all that differs from one to another. The tokenizer, the classes and the bounds of an
image's size come from the backbone's own folder, by way of transformers. Every tokenizer must know
ChatML's ``<|im_start|>`` and ``<|im_end|>``.
"""

from __future__ import annotations

from typing import NamedTuple


class Backbone(NamedTuple):
    """How models of one type take their input.

    Attributes:
        image: the token of an image, which the processor repeats to the image's length.
        video: the same of a video.
        around: how such a token stands in the text, with ``{}`` for the token.
        tiled: whether an image is cut into the tiles of a grid, one of the config's
            ``image_grid_pinpoints``. The others take it in its own resolution, bounded by ``size``
            of the image processor.
        packs_texts: whether a batch of texts can be one long row without padding.
    """

    image: str
    video: str
    around: str
    tiled: bool
    packs_texts: bool


LLAVA_ONEVISION = Backbone("<image>", "<video>", "{}", tiled=True, packs_texts=True)
_QWEN_VL = Backbone(
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>{}<|vision_end|>",
    tiled=False,
    packs_texts=False,  # packed, its three-dimensional positions would be lost
)
# By the ``model_type`` of config.json.
BACKBONES = {
    "llava_onevision": LLAVA_ONEVISION,
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
}


def backbone_of(model_type: str | None) -> Backbone:
    """The row of a model type.

    Raises:
        ValueError: there is none.
    """
    if model_type not in BACKBONES:
        raise ValueError(
            f"model_type={model_type!r} is not one of {sorted(BACKBONES)}; an authors' checkpoint "
            "(llava_qwen) goes through llave.convert first"
        )
    return BACKBONES[model_type]
