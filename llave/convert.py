"""Convert the authors' LLaVE checkpoints (``llava_qwen`` layout) to sentence-transformers."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    LlavaOnevisionConfig,
    Qwen2Config,
    Qwen2Tokenizer,
    SiglipVisionConfig,
)

from llave import onevision
from llave.backbones import LLAVA_ONEVISION
from llave.files import read_json, reading, refuse_pipes, regular, writing
from llave.modeling import build, inputs, load
from llave.printable import shown
from llave.sealing import seal
from llave_kernels.atomic_files import folder_beside, sync

logger = logging.getLogger(__name__)

# The authors use SigLIP so400m without the last of its 27 layers and without its pooling head.
VISION_LAYERS = 26
VISION_HEADS = 16

_VISION = "model.vision_tower.vision_tower.vision_model."
_PREFIXES = (  # (in the authors' checkpoint, in transformers' LLaVA-OneVision)
    (_VISION, "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.image_newline", "image_newline"),
    ("model.embed_tokens.", "language_model.embed_tokens."),
    ("model.layers.", "language_model.layers."),
    ("model.norm.", "language_model.norm."),
)
_DROPPED = ("lm_head.", f"{_VISION}encoder.layers.{VISION_LAYERS}.", f"{_VISION}head.")
_WORDS = "model.embed_tokens.weight"
_TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    "tokenizer_config.json",
)
_TEXT_KEYS = (
    "attention_dropout",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "max_window_layers",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "use_sliding_window",
)


def convert(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], *, allow_pickle: bool = False
) -> list[str]:
    """Turn an authors' checkpoint into a folder for ``SentenceTransformer(dst)``.

    The tokenizer is the checkpoint's, with ``<image>`` and ``<video>`` added. The image processor
    is SigLIP's (mean and deviation 0.5). The image grids are ``image_grid_pinpoints`` of its
    ``config.json``. The dtype is kept.

    Memory holds one shard at a time, and the whole model once at the end. The disk needs room for
    two copies of the checkpoint. Everything is written beside ``dst``, and ``dst`` appears when it
    is complete.

    Args:
        src: a folder with ``config.json``, the tokenizer's files and the weights, e.g. a download
            of ``zhibinlan/LLaVE-0.5B``. The weights are ``model.safetensors``, or shards with their
            index.
        dst: the folder to make; it must not exist.
        allow_pickle: read ``pytorch_model.bin`` files, default False. They are Python pickles.
            torch reads them in its restricted mode. Still, take them only from someone you trust.

    Returns:
        The names of the tensors left out: the language-model head, and SigLIP's unused last layer
        and pooling head.

    Raises:
        ValueError: ``src`` is no such checkpoint, a file of it is cut short or not what its name
            says, its index names files outside it, its weights are pickled, tensors are missing,
            unknown or of the wrong shape (all of them are listed), or ``dst`` exists.
        OSError: ``dst`` cannot be written, because there is no space or no permission.
    """
    src, dst = Path(src), Path(dst)
    if os.path.lexists(dst):
        raise ValueError(f"dst={str(dst)!r} exists; give a new folder")
    refuse_pipes(src)
    settings = _settings(src)
    shards = _shards(src, allow_pickle)
    shapes: dict[str, tuple[int, ...]] = {}
    dtype = None
    for shard in shards:
        with _opened(shard) as (names, read):
            for name in names:
                tensor = read(name, "meta")
                shapes[name] = tuple(tensor.shape)
                # Promotion is exact, so a checkpoint of several dtypes keeps every value.
                dtype = torch.promote_types(dtype or tensor.dtype, tensor.dtype)
    left_out = sorted(name for name in shapes if name.startswith(_DROPPED))
    renamed = {name: _rename(name) for name in shapes if name not in set(left_out)}

    tokenizer = _tokenizer(src)
    with reading(src / "config.json"):
        config = _config(settings, shapes, tokenizer)
        config.dtype = dtype
        words = config.get_text_config().vocab_size
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    shapes[_WORDS] = (words, *shapes[_WORDS][1:])
    # In some versions of transformers the tower's names contain "vision_model.".
    targets = {name.replace("vision_model.", ""): name for name in model.state_dict()}
    wanted = {short: tuple(model.state_dict()[name].shape) for short, name in targets.items()}
    _compare(src, shapes, renamed, wanted)

    with writing(dst):
        dst.parent.mkdir(parents=True, exist_ok=True)
    with writing(dst), folder_beside(dst) as folder:
        backbone, made = folder / "backbone", folder / "model"
        backbone.mkdir()
        config.save_pretrained(backbone)
        onevision.processor(config, tokenizer).save_pretrained(backbone)
        index = {}
        for number, shard in enumerate(shards, 1):
            part = {}
            with _opened(shard) as (names, read):
                for name in sorted(renamed.keys() & set(names)):
                    tensor = read(name, "cpu")
                    if name == _WORDS:
                        # <image> and <video> get zero rows where the checkpoint has none. No result
                        # depends on these rows.
                        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, words - len(tensor)))
                    part[targets[renamed[name]]] = tensor.contiguous()
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            save_file(part, backbone / file, metadata={"format": "pt"})
            index.update(dict.fromkeys(part, file))
        text = json.dumps({"metadata": {}, "weight_map": index})
        (backbone / "model.safetensors.index.json").write_text(text)
        model = build(backbone, pinpoints=settings["image_grid_pinpoints"], device="cpu")
        model.save(str(made), create_model_card=False)
        seal(made)
        if os.path.lexists(dst):  # another process made it meanwhile
            raise ValueError(f"dst={str(dst)!r} exists; give a new folder")
        made.replace(dst)
        sync(dst.parent)
    for name in left_out:
        logger.info("left out: %s", shown(name))
    return left_out


def check(path: str | os.PathLike[str], image: Any) -> dict[str, float]:
    """Print the similarity scores that the published model cards show for their example image.

    Args:
        path: a converted model, or a hub name.
        image: the card's ``figures/example.jpg``, or another: a path, a PIL image or an array.

    Returns:
        For each of two texts, its cosine similarity to the image with a question. In half precision
        the cards show for "A cat and a dog" / "A cat and a tiger": 0.5B .4802 / .3413, 2B .5132 /
        .3809, 7B .6240 / .4543.

    Raises:
        ValueError: the embeddings are not finite.
    """
    model = load(path)
    # The cards put a space after the image. Training had a newline there.
    instruction = "<|image_1|> Represent the given image with the following question: "
    question = instruction + "What is in the image"
    query = model.encode([inputs(question, image)], convert_to_tensor=True)
    texts = ["A cat and a dog", "A cat and a tiger"]
    found = model.similarity(query, model.encode(texts, convert_to_tensor=True))[0].tolist()
    if not np.isfinite(found).all():
        raise ValueError(f"path={str(path)!r} gives embeddings that are not finite: {found}")
    scores = dict(zip(texts, found, strict=True))
    for text, score in scores.items():
        print(f"{text} = {score:.4f}")
    return scores


def _tokenizer(src: Path) -> Qwen2Tokenizer:
    """Load the checkpoint's tokenizer and add the image and video tokens."""
    there = [src / name for name in _TOKENIZER_FILES if (src / name).exists()]
    for file in there:
        if file.suffix == ".json":
            read_json(file)
    words = [file for file in there if file.name != "tokenizer_config.json"]
    if not words:
        raise ValueError(f"src={str(src)!r} has no tokenizer.json, nor vocab.json and merges.txt")
    with reading(*words):
        tokenizer = Qwen2Tokenizer.from_pretrained(src)
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    # A truncated list of merges still loads, but it splits texts into other tokens.
    made = {"".join(pair) for pair in model["merges"]}
    known = made | tokenizer.get_added_vocab().keys()
    if lost := [word for word in model["vocab"] if len(word) > 1 and word not in known]:
        file = src / "tokenizer.json" if (src / "tokenizer.json") in there else src / "merges.txt"
        raise ValueError(
            f"{file} has no merge for {len(lost)} of the vocabulary's words, e.g. {lost[-1]!r}: it "
            "is cut short; download it again"
        )
    tokenizer.add_tokens([LLAVA_ONEVISION.image, LLAVA_ONEVISION.video], special_tokens=True)
    return tokenizer


def _settings(src: Path) -> dict[str, Any]:
    """Read the authors' ``config.json`` and check what the conversion relies on."""
    file = src / "config.json"
    if not file.is_file():
        raise ValueError(f"src={str(src)!r} has no config.json; give the checkpoint's folder")
    settings = read_json(file)
    with reading(file):
        architecture = (settings.get("architectures") or [None])[0]
    if architecture != "LlavaQwenForCausalLM" and settings.get("model_type") != "llava_qwen":
        raise ValueError(
            f"src={str(src)!r} has architecture {architecture!r}, not LlavaQwenForCausalLM; a "
            "model in transformers' own layout needs no conversion: use llave.build"
        )
    grids = settings.get("image_grid_pinpoints")
    if not grids or not isinstance(grids, list) or not all(_is_grid(grid) for grid in grids):
        raise ValueError(
            f"image_grid_pinpoints={grids!r} in {file} must be a list of pairs; write it out, "
            "e.g. [[384, 384], [384, 768], [768, 384], [768, 768]]"
        )
    needs = {"mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "anyres_max_9"}
    for key, value in needs.items():
        if settings.get(key, value) != value:
            raise ValueError(f"{key}={settings[key]!r} in {file}; only {value!r} is known here")
    return settings


def _is_grid(grid: object) -> bool:
    return isinstance(grid, list) and len(grid) == 2 and all(type(n) is int and n > 0 for n in grid)


def _shards(src: Path, allow_pickle: bool) -> list[Path]:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = src / f"{stem}.index.json"
        if index.is_file():
            names = sorted(set(_weight_map(index).values()))
            files = [_named(src, name, Path(stem).suffix, index) for name in names]
        else:
            files = [src / stem] if (src / stem).is_file() else []
        if not files:
            continue
        absent = [file.name for file in files if not file.exists()]
        if absent:
            raise ValueError(f"src={str(src)!r} lacks {absent}, named in {index.name}")
        if stem.endswith(".bin") and not allow_pickle:
            raise ValueError(
                f"src={str(src)!r} has pickled weights only; allow_pickle=True reads them, "
                "if you trust where they come from"
            )
        return files
    raise ValueError(f"src={str(src)!r} has no model.safetensors, nor shards with their index")


def _named(src: Path, name: str, suffix: str, index: Path) -> Path:
    """Return the path of a file that an index names.

    Raises:
        ValueError: the file has another suffix, or it is outside the folder.
    """
    path = src / name
    if path.suffix != suffix:
        raise ValueError(f"{shown(index)} names {name!r:.200}; it may name {suffix} files only")
    here = src.resolve()
    # In the hub's cache, files are links to its blobs.
    bases = [here, *(p.parent / "blobs" for p in here.parents if p.name == "snapshots")]
    try:
        inside = any(map(path.resolve().is_relative_to, bases))
    except (OSError, RuntimeError, ValueError):  # links in a circle, a null byte
        inside = False
    if not inside:
        raise ValueError(f"{shown(index)} names {name!r:.200}, which leaves {shown(src)}")
    return regular(path) if path.exists() else path


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index)
    with reading(index):
        return {name: str(file) for name, file in found["weight_map"].items()}


@contextmanager
def _opened(shard: Path) -> Iterator[tuple[list[str], Callable[[str, str], torch.Tensor]]]:
    """Yield a shard's tensor names, and a function that reads one tensor onto "meta" or "cpu"."""
    if shard.suffix == ".bin":
        with reading(shard):
            held = torch.load(shard, map_location="cpu", mmap=True, weights_only=True)
            if not all(isinstance(tensor, torch.Tensor) for tensor in held.values()):
                raise TypeError("expected names of tensors")
        yield list(held), lambda name, device: held[name].to(device)
        return
    with reading(shard):
        opened = safe_open(shard, "pt")
    with opened as file:

        def read(name: str, device: str) -> torch.Tensor:
            if device == "cpu":
                with reading(shard):
                    return file.get_tensor(name)
            # An empty slice has the dtype and reads no data.
            part = file.get_slice(name)
            shape = part.get_shape()
            return torch.empty(shape, dtype=part[:0].dtype, device="meta")

        yield list(file.keys()), read


def _rename(name: str) -> str:
    for theirs, ours in _PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _compare(
    src: Path,
    shapes: dict[str, tuple[int, ...]],
    renamed: dict[str, str],
    wanted: dict[str, tuple[int, ...]],
) -> None:
    unknown = sorted(name for name, short in renamed.items() if short not in wanted)
    missing = sorted(wanted.keys() - set(renamed.values()))
    wrong = [
        f"{name} {shapes[name]}, not {wanted[short]}"
        for name, short in sorted(renamed.items())
        if short in wanted and shapes[name] != wanted[short]
    ]
    found = {"unknown": unknown, "missing": missing, "of the wrong shape": wrong}
    parts = [f"{what}: {', '.join(map(shown, names))}" for what, names in found.items() if names]
    if parts:
        raise ValueError(
            f"src={str(src)!r} does not hold the tensors of its config.json; {'; '.join(parts)}"
        )


def _config(
    settings: dict[str, Any], shapes: dict[str, tuple[int, ...]], tokenizer: Qwen2Tokenizer
) -> LlavaOnevisionConfig:
    """Make transformers' config from the authors' config and the tensors' shapes.

    The vision tower's sizes come from the shapes.
    """
    sources = {
        "patches": f"{_VISION}embeddings.patch_embedding.weight",
        "positions": f"{_VISION}embeddings.position_embedding.weight",
        "mlp": f"{_VISION}encoder.layers.0.mlp.fc1.weight",
        "words": _WORDS,
    }
    absent = [name for name in sources.values() if name not in shapes]
    if absent:
        raise ValueError(f"the checkpoint's tensors are incomplete, missing: {', '.join(absent)}")
    size = {key: shapes[name] for key, name in sources.items()}
    tile = min(side for grid in settings["image_grid_pinpoints"] for side in grid)
    patch = size["patches"][-1]
    if (tile // patch) ** 2 != size["positions"][0]:
        raise ValueError(
            f"image_grid_pinpoints={settings['image_grid_pinpoints']} start from {tile} pixels, "
            f"but the vision tower has {size['positions'][0]} patches of {patch} pixels"
        )
    return onevision.configuration(
        SiglipVisionConfig(
            hidden_size=size["patches"][0],
            intermediate_size=size["mlp"][0],
            num_hidden_layers=VISION_LAYERS,
            num_attention_heads=VISION_HEADS,
            image_size=tile,
            patch_size=patch,
            vision_use_head=False,
        ),
        Qwen2Config(
            vocab_size=max(size["words"][0], len(tokenizer)),
            **{key: settings[key] for key in _TEXT_KEYS if settings.get(key) is not None},
        ),
        tokenizer,
        image_grid_pinpoints=settings["image_grid_pinpoints"],
    )
