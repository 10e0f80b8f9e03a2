"""A vision-language model as a SentenceTransformer, in the format of LLaVE (arXiv 2503.04812).

The model consists of sentence-transformers' own modules (``Transformer``, ``Pooling``,
``Normalize``). A saved folder therefore loads with ``SentenceTransformer(path)`` where this package
is not installed. LLaVE's specifics are data in that folder: the input format (``llave.chat``), the
image grids, the padding side and the maximum length.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
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


def build(
    backbone: str | os.PathLike[str] | tuple[PreTrainedModel, ProcessorMixin],
    *,
    pinpoints: list[list[int]] | None = None,
    max_seq_length: int = 4096,
    model_kwargs: dict[str, Any] | None = None,
    device: str | None = None,
) -> SentenceTransformer:
    """Build a new embedding model on a vision-language backbone, in LLaVE's format.

    The language-model head is dropped. The embedding is the last hidden state at the last token,
    normalised. Weights and dtype are the backbone's.

    Args:
        backbone: a folder or hub name with model and processor, or a (model, processor) pair. A
            pair is copied by way of a temporary folder. The model's type is one of
            :mod:`llave.backbones`: LLaVA-OneVision, Qwen2-VL or Qwen2.5-VL. The tokenizer must know
            ``<|im_start|>`` and ``<|im_end|>``.
        pinpoints: the (height, width) grids an image may be cut into, in pixels. Only a backbone
            that cuts images into tiles has them (LLaVA-OneVision). Default: {1, 2} x {1, 2} tiles
            of the vision tower. For the paper's tower they are its {384, 768}^2. The released
            LLaVA-OneVision allows up to 6 x 6 tiles, which gives far more tokens.
        max_seq_length: the most tokens of an input with all its images. The default 4096 is the
            paper's; the paper has 8192 for video. Images or videos that do not fit raise an error
            when they are encoded. For Qwen-VL only ``size`` of its image processor limits the size
            of an image.
        model_kwargs: passed to ``AutoModel.from_pretrained``, e.g. ``dtype``,
            ``attn_implementation``.
        device: the model's device. Default: sentence-transformers' choice.

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
    # AutoConfig does not know llava_qwen, so its error could not point to llave.convert.
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
            unpad_inputs=None if kind.packs_texts else False,  # None: if the attention supports it
        )
    if kind.tiled:
        _set_pinpoints(transformer, pinpoints)
    elif pinpoints is not None:
        raise ValueError(
            f"pinpoints={pinpoints!r} does not apply to a {model_type} backbone, which takes "
            "images in their own resolution; leave it out"
        )
    # The frames are sampled already. Some processors would sample again, and drop frames or fail.
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
    """Return ``SentenceTransformer(path, **kwargs)``, and refuse a model that is not one of ours.

    The model can be pickled after use, as ``start_multi_process_pool`` does. A model loaded by
    ``SentenceTransformer`` itself cannot be pickled once it has encoded an image, because of
    transformers' hooks.

    Args:
        path: a folder saved from :func:`build` or by :func:`llave.convert.convert`, or a hub name.
        kwargs: those of ``SentenceTransformer``.

    Raises:
        ValueError: the model does not pool the last token (sentence-transformers gives a bare
            backbone mean pooling); it takes no texts or no images; a file of it is missing, cut
            short or not what its name says; its folder has a ``seal.json`` and a file has changed;
            or it does not tell two texts apart.
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
        if not folder.is_dir():
            if isinstance(error, ImportError):
                raise
            said = " ".join(str(error).split())
            raise ValueError(
                f"path={path!r} is no folder here, and as a hub name it cannot be loaded ({said}); "
                "check the name"
            ) from error
        refuse_damaged(folder)
        raise unloadable(path, error) from error
    # A tokenizer saved after use keeps its truncation, which would override ``max_seq_length``.
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
    """Embed two texts. Raise ValueError for equal embeddings, or ones not of length 1."""
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
    # NaN passes here. The code that encodes inputs refuses it.
    if any(abs(float(vector.norm()) - 1) > 0.05 for vector in vectors):
        raise ValueError("its embeddings do not have the length 1")


def _check_tokens(model: SentenceTransformer, folder: Path) -> None:
    """Raise ValueError for a tokenizer without padding, or a chat template that loses the text."""
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
    """Set ``model.max_seq_length``, the most tokens of an input with all its images.

    Raises:
        ValueError: it is not larger than the closing turn. The tokenizer would not truncate at all.
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
    """Make one input for ``model.encode([...])`` of things that ``encode`` does not take directly.

    ``encode`` itself takes a text, an image, and dicts of ``text``, ``image`` (one or a list) and
    ``video``. This function also takes grey arrays and ``pathlib`` paths. It samples a video's
    frames as the paper does. It converts every image to RGB as a person sees it
    (:mod:`llave.images`), and drops an alpha channel as the authors do. ``encode`` treats a PIL
    image differently: it puts an alpha channel on white, ignores the orientation and clips 16-bit
    values at 255.

    Args:
        text: the user's text. The placeholders ``<|image_1|>``, ``<|image_2|>``, ... count images
            and videos together. They are removed: images, then videos come before the text, each
            with a newline. A placeholder at the start of a single image's text is where the image
            goes, without the newline. Everything else is text, also a token's name such as
            ``<image>``. Without a text an image gets "Represent the given image." and a video
            "Represent the given video.".
        images: one image or a list: PIL, path, URL, or an array (height, width[, channels]).
            With LLaVA-OneVision, several images get one tile each, and a single one is cut into up
            to four.
        video: a file, a folder of frames or a list of frames; no URL.
            :func:`llave.video.load_frames` takes at most 32 frames, and 3 a second of a file. 32
            frames take 6273 tokens in the released models, so ``max_seq_length`` must be the
            paper's 8192. ``llave.encoding.encode`` takes videos of different lengths. Frames carry
            no times, so Qwen2.5-VL assumes 24 frames a second.

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
    """Return a text in a form that ``encode`` treats as text: unchanged, or in a dict.

    ``encode`` would download a text that looks like an image's URL, and embed the image.

    Args:
        text: the text.
        modalities: the model's modalities, if known.
    """
    return text if infer_modality(text, modalities) == "text" else {"text": text}


def _set_pinpoints(transformer: Transformer, pinpoints: list[list[int]] | None) -> None:
    """Set the grids of model and processor. The processor cuts an image, the model reassembles it.

    The two must therefore have the same grids.
    """
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
