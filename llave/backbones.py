"""The vision-language models that an embedding model can be built on: one row each.

A row holds what differs between model types. transformers loads the rest from the backbone's own
folder: the tokenizer, the classes and the limits on an image's size. Every tokenizer must know
ChatML's ``<|im_start|>`` and ``<|im_end|>``.
"""

from __future__ import annotations

from typing import NamedTuple


class Backbone(NamedTuple):
    """How models of one type take their input.

    Attributes:
        image: the image token. The processor repeats it once per image feature.
        video: the video token.
        around: the text around such a token, with ``{}`` for the token.
        tiled: whether an image is cut into tiles. The tiles form one of the grids in the config's
            ``image_grid_pinpoints``. Other models take an image in its own resolution, and ``size``
            of the image processor limits it.
        packs_texts: whether a batch of texts can be packed into one long row without padding.
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
    packs_texts=False,  # packing would lose its three-dimensional positions
)
# The keys are the ``model_type`` of config.json.
BACKBONES = {
    "llava_onevision": LLAVA_ONEVISION,
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
}


def backbone_of(model_type: str | None) -> Backbone:
    """Return the row of a model type.

    Raises:
        ValueError: the model type has no row.
    """
    if model_type not in BACKBONES:
        raise ValueError(
            f"model_type={model_type!r} is not one of {sorted(BACKBONES)}; an authors' checkpoint "
            "(llava_qwen) goes through llave.convert first"
        )
    return BACKBONES[model_type]
