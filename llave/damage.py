"""Find the damaged file in a model's folder, also where the library loads the folder silently."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer

from llave.files import read_json
from llave.printable import shown

_LOADER = logging.getLogger("transformers.modeling_utils")


class _Report(logging.Handler):
    """Collects the names of weights that transformers reports as missing."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.missing: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        for line in record.getMessage().splitlines():
            key, *rest = line.split("|")
            if rest and "MISSING" in rest[0]:
                self.missing.append(key.strip())


@contextmanager
def all_weights(path: str) -> Iterator[None]:
    """Refuse a model that lacks weights. transformers only logs them and initialises them randomly.

    Raises:
        ValueError: weights are missing.
    """
    report, level = _Report(), _LOADER.level
    _LOADER.addHandler(report)
    _LOADER.setLevel(min(_LOADER.getEffectiveLevel(), logging.WARNING))
    try:
        yield
    finally:
        _LOADER.setLevel(level)
        _LOADER.removeHandler(report)
    if report.missing:
        first = ", ".join(map(shown, report.missing[:3]))
        raise ValueError(
            f"path={path!r}: its .safetensors files lack {len(report.missing)} weights of its "
            f"config.json, e.g. {first}; download it again"
        )


def unloadable(path: str, error: Exception) -> ValueError:
    """Return the error for a model that cannot be used. It names the files to look at."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    files = ", ".join(_suspects(Path(path))) if Path(path).is_dir() else "its files"
    return ValueError(
        f"path={path!r} cannot be loaded ({said}); look at {files}, or download it again"
    )


def _suspects(folder: Path) -> list[str]:
    """Return the names of the files that are probably damaged.

    These are the first files that fail to load by themselves. If all load, they are the files that
    this does not test fully.
    """

    def modules() -> None:
        if not [_module(entry) for entry in read_json(folder / "modules.json", list)]:
            raise ValueError("no modules")

    def network() -> None:
        with torch.device("meta"):
            AutoModel.from_config(AutoConfig.from_pretrained(folder, **local))

    local = {"trust_remote_code": False, "local_files_only": True}
    tokens = ["tokenizer.json", "tokenizer_config.json"]
    attempts: list[tuple[list[str], Callable[[], Any]]] = [
        (["modules.json"], modules),
        (["config.json"], network),
        (tokens, lambda: AutoTokenizer.from_pretrained(folder, **local)),
        (
            ["processor_config.json", "chat_template.jinja"],
            lambda: AutoProcessor.from_pretrained(folder, **local),
        ),
    ]
    for files, attempt in attempts:
        try:
            attempt()
        except Exception:
            return files
    for entry in read_json(folder / "modules.json", list):
        try:
            if entry["path"]:
                _module(entry).load(str(folder / entry["path"]))
        except Exception:
            return ["modules.json", f"{shown(entry['path'])}/config.json"]
    return ["sentence_bert_config.json", "config.json", "model.safetensors", *tokens]


def _module(entry: dict[str, str]) -> Any:
    package, _, name = entry["type"].rpartition(".")
    if not package.startswith("sentence_transformers.") or not isinstance(entry["path"], str):
        raise ValueError("no module of sentence-transformers")
    return getattr(import_module(package), name)
