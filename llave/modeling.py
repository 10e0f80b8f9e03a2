"""A vision-language model as a SentenceTransformer, in the format of LLaVE (arXiv 2503.04812).

The model is made of sentence-transformers' own modules (``Transformer``, ``Pooling``,
``Normalize``), so a folder it is saved to loads with ``SentenceTransformer(path)`` where this
package is not installed. What is particular to LLaVE is data inside that folder: the input format
(``llave.chat``), the image grids, the padding side and the maximum length.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jinja2 import TemplateError
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modality import infer_modality
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import PretrainedConfig

from llave.backbones import backbone_of
from llave.chat import chat_template, formatted
from llave.damage import all_weights, unloadable
from llave.files import reading, refuse_damaged, refuse_pipes, writing
from llave.images import to_rgb
from llave.pickling import make_picklable
from llave.sealing import refuse_changed
from llave.video import load_frames

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

_REFUSALS = (ValueError, TemplateError)  # what a model raises against an input


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
            is copied by way of a temporary folder. Its type is one of :mod:`llave.backbones`:
            LLaVA-OneVision, Qwen2-VL or Qwen2.5-VL. Its tokenizer knows ``<|im_start|>`` and
            ``<|im_end|>``.
        pinpoints: the (height, width) grids an image may be cut into, for a backbone that cuts
            images into tiles (LLaVA-OneVision).
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
            a grid is not made of whole tiles, ``max_seq_length`` has no room for the format, or a
            folder with a ``seal.json`` is not as it was written.
    """
    if isinstance(backbone, tuple):
        model, processor = backbone
        with TemporaryDirectory() as folder:
            with writing(Path(folder)):
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
    refuse_changed(Path(backbone))
    # Not AutoConfig, which knows no llava_qwen and so could not point to its conversion.
    model_type = PretrainedConfig.get_config_dict(backbone)[0].get("model_type")
    kind = backbone_of(model_type)
    with all_weights(backbone):
        transformer = Transformer(
            backbone,
            model_kwargs=model_kwargs,
            processor_kwargs={
                "chat_template": chat_template(kind),
                "padding_side": "right",
                "truncation_side": "right",
                "model_max_length": max_seq_length,
            },
            unpad_inputs=None if kind.packs_texts else False,  # None: where attention can
        )
    if kind.tiled:
        _set_pinpoints(transformer, pinpoints)
    elif pinpoints is not None:
        raise ValueError(
            f"pinpoints={pinpoints!r} does not apply to a {model_type} backbone, which takes "
            "images in their own resolution; leave it out"
        )
    # Some processors sample: from frames without times they drop some, or fail.
    transformer.processor.video_processor.do_sample_frames = False
    tokenizer = formatted(transformer.tokenizer, max_seq_length)
    transformer.processor.tokenizer = tokenizer
    transformer.processor.chat_template = chat_template(kind, tokenizer.get_added_vocab())
    width = transformer.get_embedding_dimension()
    modules = [transformer, Pooling(width, pooling_mode="lasttoken"), Normalize()]
    made = SentenceTransformer(modules=modules, device=device)
    make_picklable(made)
    return made


def load(path: str | os.PathLike[str], **kwargs: Any) -> SentenceTransformer:
    """``SentenceTransformer(path, **kwargs)``, refusing a model that does not pool the last token.

    The model can be pickled after use, as ``start_multi_process_pool`` does. One that
    ``SentenceTransformer`` loaded cannot once it has encoded an image, for transformers' hooks.

    Args:
        path: a folder saved from :func:`build` or by :func:`llave.convert.convert`, or a hub name.
        kwargs: those of ``SentenceTransformer``.

    Raises:
        ValueError: the model is not one of ours: a bare backbone, for which sentence-transformers
            falls back to mean pooling, or an embedding model with other pooling; or a file of it
            is missing, cut short, not what its name says or, where its folder has a ``seal.json``,
            other than it was written; or what was loaded does not tell two texts apart.
    """
    path = os.fspath(path)
    folder = Path(path)
    remedy = "make one with llave.build(path) or llave.convert"
    if folder.is_dir() and not (folder / "modules.json").is_file():
        raise ValueError(f"path={path!r} has no modules.json: it is no embedding model; {remedy}")
    if folder.is_dir():
        refuse_pipes(folder)
        refuse_changed(folder)
    try:
        with all_weights(path):
            model = SentenceTransformer(path, **kwargs)
    except Exception as error:  # libraries raise errors of many types, few of which name a file
        if not folder.is_dir() and isinstance(error, (ImportError, OSError, ValueError)):
            raise
        refuse_damaged(folder)
        raise unloadable(path, error) from error
    # A tokenizer saved after use remembers how it truncated, over any ``max_seq_length`` set later.
    for setting in ("max_length", "stride", "truncation_strategy"):
        getattr(model.tokenizer, "init_kwargs", {}).pop(setting, None)
    modes = [module.pooling_mode for module in model if isinstance(module, Pooling)]
    if modes not in (["lasttoken"], [("lasttoken",)]):
        raise ValueError(f"path={path!r} has pooling {modes}, not the last token's; {remedy}")
    if missing := {"text", "image"} - set(model.modalities):
        raise ValueError(
            f"path={path!r} takes no {' and no '.join(sorted(missing))}: "
            f"{folder / 'sentence_bert_config.json'} is not whole; download it again"
        )
    _check_tokens(model, folder)
    try:
        _probe(model)
    except Exception as error:
        raise unloadable(path, error) from error
    make_picklable(model)
    return model


def _probe(model: SentenceTransformer) -> None:
    """Embed two texts; ValueError where the model does not tell them apart."""
    vectors = []
    for text in ("a cat", "two dogs"):
        message = {"role": "user", "content": [{"type": "text", "text": text}]}
        made = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        features = model[0].processor.apply_chat_template([message], **made).to(model.device)
        with torch.no_grad():
            vectors.append(model({**features})["sentence_embedding"][0].float())
    first, second = vectors
    if torch.allclose(first, second, rtol=0, atol=1e-6):
        raise ValueError("two texts have the same embedding")
    if any(abs(float(vector.norm()) - 1) > 0.05 for vector in vectors):  # NaN is for who embeds
        raise ValueError("its embeddings do not have the length 1")


def _check_tokens(model: SentenceTransformer, folder: Path) -> None:
    """Raise for files without which every row would fail, or have the same tokens."""
    processor = model[0].processor
    with reading(folder / "tokenizer_config.json"):
        if model.tokenizer.pad_token is None:
            raise LookupError("no pad_token")
    message = {"role": "user", "content": [{"type": "text", "text": "probe"}]}
    with reading(folder / "chat_template.jinja"):
        if processor.chat_template is None:
            raise LookupError("no template")
        if "probe" not in processor.apply_chat_template([message]):
            raise LookupError("no text in what it makes")


def set_length(model: SentenceTransformer, max_seq_length: int) -> None:
    """Set ``model.max_seq_length``, the tokens of an input with all its images.

    Raises:
        ValueError: the closing turn takes as many; the tokenizer would not cut at all.
    """
    closing = model.tokenizer.num_special_tokens_to_add()
    if max_seq_length <= closing:
        raise ValueError(
            f"max_seq_length={max_seq_length} leaves no room: the closing turn takes {closing} "
            "tokens"
        )
    model.max_seq_length = max_seq_length


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
            together, are taken out: images, then videos go first, each with a newline. One that
            begins the text of a single image stays there, without a newline of ours. All else is
            text, names of the tokenizer's tokens such as ``<image>`` included. Without a text an
            image gets "Represent the given image.", a video "Represent the given video.".
        images: one image or a list: PIL, path, URL, or an array (height, width[, channels]).
            Several images get one tile each; a single one is cut into up to four.
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


class RefusedItemError(ValueError):
    """An item that the model does not take.

    Attributes:
        place: of the item.
        reason: the model's error.
    """

    def __init__(self, place: int, item: Any, reason: Exception) -> None:
        super().__init__(f"input {place}, {item!r:.80}: {reason}")
        self.place, self.reason = place, reason


def encode(model: SentenceTransformer, items: Sequence[Any], **kwargs: Any) -> np.ndarray:
    """``model.encode(items, **kwargs)`` with videos of different lengths, naming a refused item.

    LLaVA-OneVision stacks the videos of a batch, which must then have the same number of frames;
    items are encoded together with those of their own number.

    Args:
        model: from :func:`build` or :func:`load`.
        items: as :func:`inputs` makes them, or what ``encode`` takes.
        kwargs: those of ``encode``, except the ones that make it return no array.

    Returns:
        The embeddings, of shape (items, D) and ``encode``'s dtype.

    Raises:
        RefusedItemError: the model does not take an item.
    """
    groups: dict[int, list[int]] = {}
    for place, item in enumerate(items):
        frames = item.get("video", ()) if isinstance(item, dict) else ()
        groups.setdefault(len(frames), []).append(place)
    try:
        found = [model.encode([items[i] for i in group], **kwargs) for group in groups.values()]
    except _REFUSALS:
        for place, item in enumerate(items):
            try:
                model.encode([item], **kwargs)
            except _REFUSALS as error:
                raise RefusedItemError(place, item, error) from error
        raise
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
