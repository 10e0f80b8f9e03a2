"""A vision-language model as a SentenceTransformer, in the format of LLaVE (arXiv 2503.04812).

The model is made of sentence-transformers' own modules (``Transformer``, ``Pooling``,
``Normalize``), so a folder it is saved to loads with ``SentenceTransformer(path)`` where this
package is not installed. What is particular to LLaVE is data inside that folder:

* the chat template: system and user turns, images before the text, each followed by a newline;
* the tokenizer's post-processor: the closing turn. A tokenizer makes room for what its
  post-processor adds before it truncates, so an over-long text is cut inside the user turn and
  the pooled token, the last one, is always there. A template's end would be cut off;
* the image grids, the padding side and the maximum length.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modality import infer_modality
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers.processors import TemplateProcessing
from transformers import PretrainedConfig

from llave.images import to_rgb
from llave.video import load_frames

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

CLOSING_TURN = "<|im_end|>\n<|im_start|>assistant\n\n<|im_end|>\n"

# Per model type: the image and the video token, and how each stands in the text.
_MARKERS = {
    "llava_onevision": ("<image>", "<video>", "{}"),
    "qwen2_vl": ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>{}<|vision_end|>"),
}
_MARKERS["qwen2_5_vl"] = _MARKERS["qwen2_vl"]

_TEMPLATE = """
{%- set ns = namespace(prompt='', text='', images=0, videos=0) -%}
{%- for message in messages -%}
{%- if message.role not in ['system', 'user'] -%}
{{- raise_exception('an input is one user turn; it has a message of role ' ~ message.role) -}}
{%- endif -%}
{%- set content = message.content -%}
{%- for item in ([{'type': 'text', 'text': content}] if content is string else content) -%}
{%- if item.type == 'image' -%}
{%- set ns.images = ns.images + 1 -%}
{%- elif item.type == 'video' -%}
{%- set ns.videos = ns.videos + 1 -%}
{%- elif message.role == 'system' -%}
{%- set ns.prompt = ns.prompt ~ item.text -%}
{%- else -%}
{%- set ns.text = ns.text ~ ('\\n' if ns.text else '') ~ item.text -%}
{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{%- for kind, marker in [('an image', 'IMAGE_TOKEN'), ('a video', 'VIDEO_TOKEN')] -%}
{%- if marker in ns.prompt ~ ns.text -%}
{{- raise_exception('the text contains the marker ' ~ marker ~ ', which stands for ' ~ kind
    ~ ' itself: take it out') -}}
{%- endif -%}
{%- endfor -%}
{%- for i in range(1, ns.images + ns.videos + 1) -%}
{%- set name = '<|image_' ~ i ~ '|>' -%}
{%- if name in ns.text -%}
{%- set ns.text = ns.text.replace(name, '') | trim -%}
{%- endif -%}
{%- endfor -%}
{%- if '<|image_' in ns.prompt ~ ns.text -%}
{{- raise_exception('the text has an image placeholder <|image_N|> but the input has '
    ~ ns.images ~ ' image(s) and ' ~ ns.videos ~ ' video(s): pass them or take the placeholder out')
-}}
{%- endif -%}
{%- if not (ns.prompt ~ ns.text) | trim -%}
{%- if ns.videos -%}
{%- set ns.text = 'Represent the given video.' -%}
{%- elif ns.images -%}
{%- set ns.text = 'Represent the given image.' -%}
{%- endif -%}
{%- endif -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n<|im_start|>user\\n' -}}
{%- for i in range(ns.images) -%}{{- 'IMAGE' ~ 'SEPARATOR' -}}{%- endfor -%}
{%- for i in range(ns.videos) -%}{{- 'VIDEO' ~ 'SEPARATOR' -}}{%- endfor -%}
{{- ns.prompt ~ ns.text -}}
"""


def chat_template(model_type: str = "llava_onevision", *, separator: str = "\\n") -> str:
    """The Jinja template of an input, up to the closing turn, which the tokenizer adds.

    A system message is what sentence-transformers makes of a ``prompt``: it goes in front of the
    user's text, because the system turn of the format is fixed.

    Args:
        model_type: the backbone's, one of ``llava_onevision``, ``qwen2_vl``, ``qwen2_5_vl``.
        separator: what follows an image, as inside a Jinja string. The format has a newline; the
            examples of the published model cards have a space.

    Raises:
        ValueError: ``model_type`` is another.
    """
    if model_type not in _MARKERS:
        raise ValueError(
            f"model_type={model_type!r} is not one of {sorted(_MARKERS)}; an authors' checkpoint "
            "(llava_qwen) goes through llave.convert first"
        )
    image, video, around = _MARKERS[model_type]
    template = _TEMPLATE.strip()
    for name, value in {
        "IMAGE_TOKEN": image,
        "VIDEO_TOKEN": video,
        "IMAGE": around.format(image),
        "VIDEO": around.format(video),
        "SEPARATOR": separator,
    }.items():
        template = template.replace(f"'{name}'", f"'{value}'")
    return template


def build(
    backbone: str | os.PathLike[str] | tuple[PreTrainedModel, ProcessorMixin],
    *,
    pinpoints: list[list[int]] | None = None,
    max_seq_length: int = 4096,
    model_kwargs: dict[str, Any] | None = None,
    device: str | None = None,
) -> SentenceTransformer:
    """A new embedding model on a vision-language backbone, in LLaVE's format.

    The backbone loses its language-model head; its last hidden state at the last token, normalised,
    is the embedding. Weights and dtype are the backbone's.

    Args:
        backbone: a folder or hub name with model and processor, or a (model, processor) pair, which
            is copied by way of a temporary folder. LLaVA-OneVision, Qwen2-VL or Qwen2.5-VL, with a
            tokenizer that knows ``<|im_start|>`` and ``<|im_end|>``.
        pinpoints: the (height, width) grids an image may be cut into, LLaVA-OneVision only.
            Default: {1, 2} x {1, 2} tiles of the vision tower, the paper's {384, 768}^2 for its
            tower. The released LLaVA-OneVision allows up to 6 x 6, far more tokens.
        max_seq_length: tokens of an input with all its images, default the paper's 4096; for video
            it has 8192. Images or videos that do not fit raise an error when they are encoded.
            Qwen-VL's image size is bounded by ``size`` of its image processor alone.
        model_kwargs: passed to ``AutoModel.from_pretrained``, e.g. ``dtype``,
            ``attn_implementation``.
        device: where the model goes; default as sentence-transformers chooses.

    Raises:
        ValueError: the backbone's type is not one of those, its tokenizer lacks the ChatML tokens,
            a grid is not made of whole tiles, or ``max_seq_length`` has no room for the format.
    """
    if isinstance(backbone, tuple):
        model, processor = backbone
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            return build(
                folder,
                pinpoints=pinpoints,
                max_seq_length=max_seq_length,
                model_kwargs=model_kwargs,
                device=device,
            )
    backbone = os.fspath(backbone)
    # Not AutoConfig, which knows no llava_qwen and so could not point to its conversion.
    model_type = PretrainedConfig.get_config_dict(backbone)[0].get("model_type")
    transformer = Transformer(
        backbone,
        model_kwargs=model_kwargs,
        processor_kwargs={
            "chat_template": chat_template(model_type),
            "padding_side": "right",
            "truncation_side": "right",
            "model_max_length": max_seq_length,
        },
        # Packing texts without padding loses Qwen-VL's three-dimensional positions.
        unpad_inputs=None if model_type == "llava_onevision" else False,
    )
    if model_type == "llava_onevision":
        _set_pinpoints(transformer, pinpoints)
    elif pinpoints is not None:
        raise ValueError(
            f"pinpoints={pinpoints!r} does not apply to a {model_type} backbone, which takes "
            "images in their own resolution; leave it out"
        )
    # Some processors sample: from frames without times they drop some, or fail.
    transformer.processor.video_processor.do_sample_frames = False
    _set_closing_turn(transformer.tokenizer, max_seq_length)
    width = transformer.get_embedding_dimension()
    modules = [transformer, Pooling(width, pooling_mode="lasttoken"), Normalize()]
    return SentenceTransformer(modules=modules, device=device)


def load(path: str | os.PathLike[str], **kwargs: Any) -> SentenceTransformer:
    """``SentenceTransformer(path, **kwargs)``, refusing a model that does not pool the last token.

    Args:
        path: a folder saved from :func:`build` or by :func:`llave.convert.convert`, or a hub name.
        kwargs: those of ``SentenceTransformer``.

    Raises:
        ValueError: the model is not one of ours: a bare backbone, for which sentence-transformers
            falls back to mean pooling, or an embedding model with other pooling.
    """
    path = os.fspath(path)
    remedy = "make one with llave.build(path) or llave.convert"
    if Path(path).is_dir() and not (Path(path) / "modules.json").is_file():
        raise ValueError(f"path={path!r} has no modules.json: it is no embedding model; {remedy}")
    model = SentenceTransformer(path, **kwargs)
    # A tokenizer saved after use remembers how it truncated, over any ``max_seq_length`` set later.
    for setting in ("max_length", "stride", "truncation_strategy"):
        getattr(model.tokenizer, "init_kwargs", {}).pop(setting, None)
    modes = [module.pooling_mode for module in model if isinstance(module, Pooling)]
    if modes not in (["lasttoken"], [("lasttoken",)]):
        raise ValueError(f"path={path!r} has pooling {modes}, not the last token's; {remedy}")
    return model


def inputs(
    text: str | None = None,
    images: Any = None,
    video: Any = None,
) -> dict[str, Any]:
    """One input for ``model.encode([...])`` from what ``encode`` does not take as it is.

    ``encode`` itself takes a text, an image, and dicts of ``text``, ``image`` (one or a list) and
    ``video``. This helper adds grey arrays, ``pathlib`` paths, the paper's sampling of a video, and
    one conversion to RGB for every kind of image, as a person sees it (:mod:`llave.images`): the
    alpha channel dropped, as the authors do. (Given a PIL image, ``encode`` lays an alpha channel
    on white, turns nothing and cuts 16 bits off at 255.)

    Args:
        text: the user's text. ``<|image_1|>``, ``<|image_2|>``, ..., which count images and videos
            together, are taken out: images, then videos go first. The backbone's own markers, such
            as ``<image>``, raise when encoded. Without a text an image gets "Represent the given
            image.", a video "Represent the given video.".
        images: one image or a list: PIL, path, URL, or an array (height, width[, channels]).
            Several images get one tile each, and need sentence-transformers 6.1; a single one is
            cut into up to four.
        video: a file, a folder of frames or a list of frames, of which
            :func:`llave.video.load_frames` takes at most 32, 3 a second of a file; no URL. 32
            frames of a released size are 6273 tokens, so ``max_seq_length`` must be the paper's
            8192. Videos of different lengths go through :func:`encode`. Frames carry no times:
            Qwen2.5-VL takes them for 24 a second.

    Raises:
        ValueError: nothing was given, a file does not exist or cannot be read, an array is no image
            or a video has no frames.
        ImportError: ``video`` is a file and PyAV is not installed.
    """
    if text is None and images is None and video is None:
        raise ValueError("inputs() got neither text, nor images, nor video; pass one of them")
    item: dict[str, Any] = {}
    if images is not None:
        listed = images if isinstance(images, (list, tuple)) else [images]
        if not listed:
            raise ValueError("images=[] is empty; pass None for an input without images")
        loaded = [to_rgb(image, f"images[{i}]") for i, image in enumerate(listed)]
        item["image"] = loaded if len(loaded) > 1 else loaded[0]
    if video is not None:
        item["video"] = load_frames(video)
    if text is not None:
        item["text"] = text
    return item


def text_input(text: str, modalities: list[Any] | None = None) -> str | dict[str, str]:
    """What makes ``encode`` take a text for one: as it is, or in a dict.

    A text that looks like an address of an image would be fetched and embedded as one.

    Args:
        text: the text.
        modalities: those of the model, where they are known.
    """
    return text if infer_modality(text, modalities) == "text" else {"text": text}


def encode(model: SentenceTransformer, items: Sequence[Any], **kwargs: Any) -> np.ndarray:
    """``model.encode(items, **kwargs)`` with videos of different lengths.

    LLaVA-OneVision stacks the videos of a batch, which must then have the same number of frames;
    items are encoded together with those of their own number.

    Args:
        model: from :func:`build` or :func:`load`.
        items: as :func:`inputs` makes them, or what ``encode`` takes.
        kwargs: those of ``encode``, except the ones that make it return no array.

    Returns:
        The embeddings, of shape (items, D) and ``encode``'s dtype.
    """
    groups: dict[int, list[int]] = {}
    for place, item in enumerate(items):
        frames = item.get("video", ()) if isinstance(item, dict) else ()
        groups.setdefault(len(frames), []).append(place)
    found = [model.encode([items[i] for i in group], **kwargs) for group in groups.values()]
    if len(found) < 2:
        return found[0] if found else model.encode([], **kwargs)
    return np.concatenate(found)[np.argsort(np.concatenate(list(groups.values())))]


def _set_pinpoints(transformer: Transformer, pinpoints: list[list[int]] | None) -> None:
    """Model and processor must agree on the grids: one cuts the image, the other puts it back."""
    tile = transformer.config.vision_config.image_size
    if pinpoints is None:
        pinpoints = [[rows * tile, columns * tile] for rows in (1, 2) for columns in (1, 2)]
    if not pinpoints or any(side % tile or side < 1 for grid in pinpoints for side in grid):
        raise ValueError(
            f"pinpoints={pinpoints!r} must be (height, width) pairs in multiples of the vision "
            f"tower's {tile} pixels"
        )
    grids = [list(grid) for grid in pinpoints]
    transformer.config.image_grid_pinpoints = grids
    transformer.processor.image_processor.image_grid_pinpoints = grids


def _set_closing_turn(tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> None:
    missing = {"<|im_start|>", "<|im_end|>"} - tokenizer.get_vocab().keys()
    if missing:
        raise ValueError(f"the backbone's tokenizer lacks {sorted(missing)}; ChatML needs them")
    tokens = tokenizer.tokenize(CLOSING_TURN, add_special_tokens=False)
    opening = tokenizer.tokenize(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        add_special_tokens=False,
    )
    if max_seq_length <= len(opening) + len(tokens):
        raise ValueError(
            f"max_seq_length={max_seq_length} leaves no room: the format alone takes "
            f"{len(opening) + len(tokens)} tokens"
        )
    closing = {"id": "closing", "ids": tokenizer.convert_tokens_to_ids(tokens), "tokens": tokens}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A closing", special_tokens=[closing]
    )
