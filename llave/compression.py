"""A smaller copy of a folder of embeddings: fewer dimensions (Matryoshka), int8 or single bits."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llave.files import writing
from llave.printable import shown
from llave.quantisation import DTYPES, Dtype, check_truncate_dim, truncated, value_ranges
from llave.shards import (
    Range,
    Shard,
    enter_manifest,
    finished,
    put,
    ranges,
    read_manifest,
    read_shard,
    refuse_foreign,
    refuse_out,
)
from llave_kernels.atomic_files import sweep


def compress(
    folder: str | Path,
    out: str | Path,
    *,
    truncate_dim: int | None = None,
    dtype: Dtype = "float32",
) -> None:
    """Write the embeddings of ``folder`` to ``out`` in fewer bytes. ``search`` takes both.

    A second call continues the first, and the files are the same, byte for byte. One file at a time
    is in memory. With ``"int8"`` the embeddings are read twice.

    Args:
        folder: a finished folder that ``llave.embedding.embed`` wrote.
        out: a new folder, or one that this call began.
        truncate_dim: keep only so many of the first values. Use it for a model that was trained
            for it (Matryoshka). Normalised embeddings are normalised again. By default all.
        dtype: how values are stored: ``"float32"`` (default), ``"float16"``, ``"int8"`` with 256
            levels between the least and the largest value of each dimension, or ``"binary"`` with
            one bit for each.

    Raises:
        ValueError: ``folder`` lacks files, has damaged ones or is compressed itself; ``out`` holds
            something else; a setting is out of range.
        OSError: a file cannot be written.
    """
    folder, out = Path(folder), Path(out)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    manifest = read_manifest(folder)
    dimension = manifest["dimension"]
    if manifest["dtype"] not in ("float32", "float16"):
        raise ValueError(
            f"{shown(folder)} is compressed to {manifest['dtype']}; compress the embeddings that "
            "it was made of"
        )
    check_truncate_dim(truncate_dim, dimension)
    spans = ranges(manifest)
    if missing := [span for span in spans if not (folder / span.file).exists()]:
        raise ValueError(
            f"{shown(folder)} lacks {len(missing)} of {len(spans)} files, the first "
            f"{missing[0].file}; run embed again to complete it"
        )
    refuse_out(out, folder)
    smaller = manifest | {"dimension": truncate_dim or dimension, "dtype": dtype}
    shrunk = partial(_shrunk, folder, manifest, smaller)
    if dtype == "int8":
        bar = tqdm(spans, desc="ranges", unit="file")
        smaller["ranges"] = value_ranges(shrunk(span).vectors for span in bar)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    enter_manifest(out, smaller)
    for span in tqdm(spans, desc=f"to {dtype}", unit="file"):
        file = out / span.file
        refuse_foreign(file, span, smaller)
        if finished(file, span, smaller, "skip") is None:
            put(file, span, shrunk(span), smaller)
        else:
            sweep(file)


def _shrunk(folder: Path, manifest: dict[str, Any], smaller: dict[str, Any], span: Range) -> Shard:
    shard = read_shard(folder / span.file, span, manifest)
    return shard._replace(vectors=truncated(shard.vectors, smaller))
