"""Recipes: the settings of a training run with their types and defaults, and their YAML files."""

from __future__ import annotations

import dataclasses
import os
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from sentence_transformers import SentenceTransformerTrainingArguments

from llave import scratch, trainer_settings, yaml12
from llave.subsets import has_splits
from llave_kernels import dispatch

Text = Annotated[str, Field(min_length=1)]
Grid = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
if TYPE_CHECKING:
    Backend = str
else:
    Backend = Literal[("auto", *dispatch.names())]
Recipe = dict[str, dict[str, Any]]
OURS = Path(__file__).with_name("recipes")


@dataclasses.dataclass
class Model:
    """The section ``model``."""

    backbone: Text | None = None  # folder or hub name; exclusive with scratch
    scratch: dict[str, Any] | None = None  # arguments of llave.scratch.llava_onevision
    pinpoints: Annotated[list[Grid], Field(min_length=1)] | None = None
    max_seq_length: PositiveInt = 4096
    # The dtype of the weights. The optimizer updates them in this dtype. Backbones are published in
    # half precision, which loses small updates. With trainer.bf16 the matrix products are in
    # bfloat16 anyway.
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    frozen: Text | None = None  # parameters with this in their name are not trained
    # Arguments of peft.LoraConfig. Checkpoints hold only the adapters. The model saved at the end
    # has them merged into its weights. It needs neither peft nor the backbone.
    lora: dict[str, Any] | None = None


@dataclasses.dataclass
class Data:
    """The section ``data``."""

    train: Text | None = None  # folder of MMEB training files, or hub name
    images: Text | None = None
    split: Text | None = None  # default train; a folder needs it only if its files state a split
    subsets: Annotated[list[Text], Field(min_length=1)] | None = None  # default all of a folder
    cap: PositiveInt | None = 50_000
    batch_size: PositiveInt = 256  # of all processes together
    # True: every batch comes from one subset. False: a batch mixes subsets. Mined negatives are
    # then left out, because not all subsets have them.
    homogeneous: bool = True
    held_out: NonNegativeInt = 0  # pairs of each subset kept for the similarity overlap
    on_error: Literal["raise", "skip"] = "raise"


@dataclasses.dataclass
class Loss:
    """The section ``loss``."""

    scale: PositiveFloat = 50.0
    alpha: NonNegativeFloat = 9.0
    false_negative_margin: float | None = None
    mini_batch_size: PositiveInt | None = None  # gradient caching
    backend: Backend = "auto"


# trainer.fsdp (version 2) and trainer.deepspeed shard the weights. FSDP leaves parts that
# are wholly frozen unsharded. Every process must run the sharded parts in each forward. A column of
# a subset should therefore have images in all its rows or in none.
KINDS = {
    "model": Model,
    "data": Data,
    "loss": Loss,
    "trainer": SentenceTransformerTrainingArguments,
}


def _defaults(name: str) -> dict[str, Any]:
    return {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(KINDS[name])
        if field.init and not (name == "trainer" and field.name in trainer_settings.INEFFECTIVE)
    }


# All settings of a recipe with their defaults. None: there is no default value.
SECTIONS: dict[str, dict[str, Any]] = {name: _defaults(name) for name in KINDS}


def read_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe from a YAML file, or one of ours by name, and check it.

    Defaults complete the sections model, data and loss. Every setting has a type. A number may be
    written ``2e-5``, ``9e0`` or in quotes.

    A recipe may extend another one. It names that recipe as its ``base``: one of ours, or a path
    relative to its own file. Its settings replace those of the base one by one.

    Args:
        name: a path, or ``llave-0.5b``, ``llave-2b``, ``llave-7b``, ``tiny`` or ``llave``. The last
            one has what the first three share, and it lacks a backbone.
        overrides: ``["--loss.alpha", "5", ...]``. Values are read as YAML.

    Raises:
        ValueError: an unknown section or setting, a value of another type or out of range, a
            setting without effect, a base that is no text or leads back to the recipe, or an
            override that is not ``--section.setting value``.
        FileNotFoundError: there is no such file or recipe, or no such base.
        ImportError: ``model.lora`` is set and peft is not installed.
    """
    said = _merged([*_layers(name), (name, _overriding(overrides or []))])
    recipe: Recipe = {section: {} for section in SECTIONS}
    for section, settings in said.items():
        types = get_type_hints(KINDS[section], include_extras=True)
        if section == "trainer":
            types |= trainer_settings.TYPES
        for setting, (value, where) in settings.items():
            if section == "trainer" and setting in trainer_settings.INEFFECTIVE:
                why = trainer_settings.INEFFECTIVE[setting]
                raise ValueError(f"trainer.{setting} of {where} has no effect: {why}")
            if setting not in SECTIONS[section]:
                known = ", ".join(SECTIONS[section])
                raise ValueError(f"{section}.{setting} of {where} is no setting; there are {known}")
            key = f"{section}.{setting}"
            recipe[section][setting] = _typed(key, value, types[setting], f" of {where}")
    for section in ("model", "data", "loss"):
        recipe[section] = SECTIONS[section] | recipe[section]
    _check(recipe, name)
    return recipe


def lora_config(settings: dict[str, Any]) -> Any:
    """Return the ``peft.LoraConfig`` for ``model.lora``.

    Raises:
        ImportError: peft is not installed.
        ValueError: an unknown setting, or a value of another type.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError(f"model.lora={settings} needs peft: pip install peft") from error
    return LoraConfig(**_arguments("model.lora", settings, get_type_hints(LoraConfig)))


def _layers(name: str) -> list[tuple[str, dict[Any, Any]]]:
    """Return names and contents of a recipe and its bases, from the first base to the recipe."""
    layers: list[tuple[str, dict[Any, Any]]] = []
    seen: dict[str, str] = {}
    path = _path(name, Path())
    while True:
        given = _given(path, name)
        layers.insert(0, (name, given))
        if "base" not in given:
            return layers
        base = given.pop("base")
        seen[os.path.realpath(path)] = name
        if not isinstance(base, str):
            raise ValueError(
                f"base={base!r} of {name} is no text; expected the name of one of our recipes, or "
                "a path relative to this file"
            )
        try:
            path = _path(base, path.parent)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"base={base!r} of {name}: {error}") from None
        if os.path.realpath(path) in seen:
            chain = " -> ".join([*seen.values(), base])
            raise ValueError(f"base={base!r} of {name} leads back: {chain}; take one base out")
        name = base if path.parent == OURS else str(path)


def _path(name: str, folder: Path) -> Path:
    """Return a recipe's file. The recipe is a name of ours, or a path relative to a folder."""
    if Path(name).suffix not in (".yaml", ".yml"):
        path, names = OURS / f"{name}.yaml", sorted(path.stem for path in OURS.glob("*.yaml"))
        if name not in names:
            raise FileNotFoundError(
                f"no recipe {name!r}; there are {', '.join(names)}, or a path that ends in .yaml"
            )
        return path
    path = folder / name
    if not os.path.lexists(path):
        raise FileNotFoundError(f"no file {str(path)!r}; expected a recipe")
    return path


def _given(path: Path, name: str) -> dict[Any, Any]:
    """Read a recipe's file."""
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise ValueError(f"{name} is no file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no text in UTF-8: {error}") from error
    given = yaml12.load(text, name)
    if not isinstance(given, dict):
        raise ValueError(f"{name} holds no sections; expected {', '.join(SECTIONS)}")
    return given


def _overriding(words: list[str]) -> dict[str, dict[str, Any]]:
    """Return the settings in the overrides, by section."""
    if len(words) % 2:
        raise ValueError(f"overrides come in pairs, --section.setting value; got {words}")
    given: dict[str, dict[str, Any]] = {}
    for key, value in zip(words[::2], words[1::2], strict=True):
        section, dot, setting = key.removeprefix("--").partition(".")
        if not key.startswith("--") or not dot:
            raise ValueError(
                f"{key!r} is no override; expected --section.setting, e.g. --loss.alpha"
            )
        given.setdefault(section, {})[setting] = yaml12.load(value, key)
    return given


def _merged(layers: list[tuple[str, dict[Any, Any]]]) -> dict[str, dict[str, tuple[Any, str]]]:
    """Merge recipes. Return by section each setting's last value, and the recipe it is from."""
    merged: dict[str, dict[str, tuple[Any, str]]] = {}
    for name, given in layers:
        for section, settings in given.items():
            if section not in SECTIONS:
                raise ValueError(f"section {section!r} of {name} is none of {', '.join(SECTIONS)}")
            if not isinstance(settings, dict | None):
                raise ValueError(f"section {section} of {name} is {settings!r}; expected settings")
            said = {setting: (value, name) for setting, value in (settings or {}).items()}
            merged[section] = merged.get(section, {}) | said
    return merged


def _arguments(where: str, given: dict[str, Any], types: dict[str, Any]) -> dict[str, Any]:
    """Convert the arguments of a function or class to their types.

    Args:
        where: what holds the arguments, for the errors.
        given: the arguments.
        types: the types, by argument.

    Raises:
        ValueError: an argument is unknown or of another type.
    """
    for setting in given:
        if setting not in types:
            raise ValueError(f"{where}.{setting} is no setting; there are {', '.join(types)}")
    return {key: _typed(f"{where}.{key}", value, types[key]) for key, value in given.items()}


def _typed(where: str, value: Any, kind: Any, of: str = "") -> Any:
    """Convert a value to its setting's type. Raise ValueError where it is of another type."""
    if get_origin(kind) in (Union, UnionType):
        kinds = get_args(kind)
        if any(isinstance(k, type) and issubclass(k, Enum) for k in kinds):
            kinds = tuple(k for k in kinds if k is not str)  # allow only the Enum's names
        kind = Union[kinds]  # noqa: UP007
    config = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False, extra="forbid")
    try:
        # A quoted number counts as a number, but true does not count as 1.
        found = TypeAdapter(kind, config=config).validate_python(
            value, strict=isinstance(value, bool)
        )
    except ValidationError as error:
        problems = dict.fromkeys(problem["msg"] for problem in error.errors())
        if any(problem["type"] == "string_type" for problem in error.errors()):
            problems["write text that YAML takes for something else in quotes"] = None
        raise ValueError(f"{where}={value!r}{of} is refused: {'; '.join(problems)}") from None
    return found.value if isinstance(found, Enum) else found


def _check(recipe: Recipe, name: str) -> None:
    """Refuse settings that conflict, or that would have no effect."""
    model, data, trainer = recipe["model"], recipe["data"], recipe["trainer"]
    if (model["backbone"] is None) == (model["scratch"] is None):
        has = "neither" if model["backbone"] is None else "both"
        raise ValueError(f"model of {name} needs one of backbone and scratch; it has {has}")
    for section, setting in (("data", "train"), ("trainer", "output_dir")):
        if recipe[section].get(setting) is None:
            raise ValueError(f"{section}.{setting} of {name} is missing")
    if model["scratch"] is not None:
        types = get_type_hints(scratch.llava_onevision, include_extras=True)
        types = {key: types[key] for key in types if key not in ("texts", "return")}
        model["scratch"] = _arguments("model.scratch", model["scratch"], types)
        parts = {key: value for key, value in model["scratch"].items() if key != "seed"}
        try:
            scratch.configurations(**parts)
        except ValueError as error:
            raise ValueError(f"model.scratch of {name}: {error}") from error
    if model["lora"] is not None:
        lora_config(model["lora"])
    folder = Path(data["train"])
    if data["split"] is not None and folder.is_dir() and not has_splits(folder):
        raise ValueError(
            f"data.split={data['split']!r} has no effect: data.train={data['train']!r} is a "
            "folder whose files say no split; set it to null"
        )
    names = data["subsets"] or []
    if repeated := {subset for subset in names if names.count(subset) > 1}:
        raise ValueError(f"data.subsets repeats {', '.join(sorted(repeated))}")
    trainer_settings.check(trainer, data, SECTIONS["trainer"])
