"""Smaller copies of a folder of embeddings: what they hold, what they find, kills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sentence_transformers")

from llave import compression, embedding
from llave.compression import compress
from llave.recall import recall
from llave.search import search
from llave.shards import ranges, read_manifest, read_shard
from tests.llave.test_embedding import (
    DIMENSION,
    ROWS,
    contents,
    model,
    quick,
    read,
    texts,
    write_jsonl,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    records: list[dict[str, str]] = [*texts(ROWS)]
    records[5] = {"id": "bad", "image": "none.png"}
    source = write_jsonl(tmp_path / "corpus.jsonl", records)
    quick(source, tmp_path / "out", on_error="skip")
    return tmp_path / "out"


def test_int8_is_within_half_a_level(folder: Path, tmp_path: Path) -> None:
    compress(folder, tmp_path / "small", dtype="int8")
    ids, whole = read(folder)
    same, found = read(tmp_path / "small")
    assert same == ids
    level = (whole.max(0) - whole.min(0)) / 255
    assert (np.abs(found - whole) <= 0.502 * level).all()


@pytest.mark.parametrize(("dtype", "saved"), [("int8", 3), ("binary", 4 - 1 / 8)])
def test_a_file_is_smaller(tmp_path: Path, dtype: Any, saved: float) -> None:
    source = write_jsonl(tmp_path / "corpus.jsonl", texts(ROWS))
    quick(source, tmp_path / "out", shard_rows=ROWS)
    compress(tmp_path / "out", tmp_path / "small", dtype=dtype)
    sizes = [next((tmp_path / n).glob("part*")).stat().st_size for n in ("out", "small")]
    assert sizes[0] - sizes[1] == pytest.approx(saved * ROWS * DIMENSION, abs=500)


@pytest.mark.parametrize("dimension", [None, 5])
def test_bits_are_signs(folder: Path, tmp_path: Path, dimension: int | None) -> None:
    compress(folder, tmp_path / "small", dtype="binary", truncate_dim=dimension)
    _, whole = read(folder)
    _, found = read(tmp_path / "small")
    width = dimension or DIMENSION
    np.testing.assert_allclose(found, np.where(whole[:, :width] > 0, 1, -1) / width**0.5, rtol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_fewer_dimensions(tmp_path: Path, normalize: bool) -> None:
    source = write_jsonl(tmp_path / "corpus.jsonl", texts(ROWS))
    quick(source, tmp_path / "out", normalize=normalize)
    compress(tmp_path / "out", tmp_path / "small", truncate_dim=3, dtype="float16")
    expected = read(tmp_path / "out")[1].astype(np.float64)[:, :3]
    if normalize:
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = read(tmp_path / "small")[1]
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    # The folder's model embeds the queries. They are cut as the corpus was.
    query = texts(ROWS)[9]["text"]
    (hits,) = search(tmp_path / "small", [query], model=model(), k=1)
    vector = model().encode([query], normalize_embeddings=normalize)[:, :3].astype(np.float64)
    if normalize:
        vector /= np.linalg.norm(vector)
    scores = found.astype(np.float64) @ vector[0]
    assert hits[0].score == pytest.approx(scores.max(), rel=1e-5)
    assert hits[0].row == scores.argmax()


def test_recall_is_that_of_a_dense_count(folder: Path, tmp_path: Path) -> None:
    compress(folder, tmp_path / "small", dtype="binary")
    said = recall(folder, tmp_path / "small", indexed=False, k=5)
    whole, small = read(folder)[1].astype(np.float64), read(tmp_path / "small")[1]
    shares = []
    for row, query in enumerate(whole):
        true, near = whole @ query, small @ query.astype(np.float32)
        true[row] = near[row] = -np.inf
        shares.append(
            len(set(np.argsort(-true)[:5]) & set(np.argsort(-near, kind="stable")[:5])) / 5
        )
    assert 0.2 < said < 0.95
    assert said == pytest.approx(np.mean(shares), abs=0.05)  # said is of 200 of the rows
    assert recall(folder, folder, indexed=False) == 1.0


@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_a_killed_run_goes_on(
    folder: Path, tmp_path: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(folder, tmp_path / "whole", dtype=dtype)
    real, left = compression.put, [0]

    def killed(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(*arguments)

    for count in (0, 3, 7):
        monkeypatch.setattr(compression, "put", killed)
        left[0] = count
        with pytest.raises(KeyboardInterrupt):
            compress(folder, tmp_path / "killed", dtype=dtype)
    monkeypatch.setattr(compression, "put", real)
    damaged = sorted((tmp_path / "killed").glob("part-*"))[1]
    damaged.write_bytes(damaged.read_bytes()[:100])
    compress(folder, tmp_path / "killed", dtype=dtype)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("dimension", "dtype", "normalize"),
    [
        (None, "int8", True),
        (5, "int8", False),
        (5, "binary", True),
        (5, "float16", True),
        (5, "float32", False),
    ],
)
def test_embed_writes_what_compress_would(
    tmp_path: Path, dtype: Any, dimension: int | None, normalize: bool
) -> None:
    """The sample for int8 is the whole corpus here."""
    records: list[dict[str, str]] = [*texts(ROWS)]
    records[5] = {"id": "bad", "image": "none.png"}
    source = write_jsonl(tmp_path / "corpus.jsonl", records)
    settings: dict[str, Any] = {"on_error": "skip", "normalize": normalize, "shard_rows": 50}
    quick(source, tmp_path / "out", **settings)
    compress(tmp_path / "out", tmp_path / "small", truncate_dim=dimension, dtype=dtype)
    report = quick(source, tmp_path / "at once", truncate_dim=dimension, dtype=dtype, **settings)
    assert contents(tmp_path / "at once") == contents(tmp_path / "small")
    if normalize:
        found = recall(tmp_path / "out", tmp_path / "small", indexed=False)
        assert report.recall == pytest.approx(found, abs=0.05)  # of other 200 rows


def test_ranges_come_from_a_sample_and_hold_for_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embedding, "SAMPLE", 30)
    source = write_jsonl(tmp_path / "corpus.jsonl", texts(ROWS))
    assert quick(source, tmp_path / "out").recall is None
    quick(source, tmp_path / "small", dtype="int8")
    assert "in a sample of 30 rows" in capsys.readouterr().err
    whole, found = read(tmp_path / "out")[1], read(tmp_path / "small")[1]
    chosen = whole[np.linspace(0, ROWS - 1, 30).astype(int)]
    low, high = chosen.min(0), chosen.max(0)
    assert (whole < low).any()  # so that some values are clipped
    assert (np.abs(found - whole.clip(low, high)) <= 0.502 * (high - low) / 255).all()
    # A process that measured other ranges takes those of the first one.
    part = tmp_path / "parts"
    quick(source, part, dtype="int8", rank=0, world_size=2)
    (part / "manifest.json").rename(tmp_path / "kept")
    real = embedding.enter_manifest

    def late(folder: Path, manifest: dict[str, Any], **settings: Any) -> dict[str, Any]:
        (tmp_path / "kept").rename(part / "manifest.json")
        manifest["ranges"] = [[x - 1 for x in ends] for ends in manifest["ranges"]]
        return real(folder, manifest, **settings)

    monkeypatch.setattr(embedding, "refuse_out", lambda *_: None)  # as if it had run before
    monkeypatch.setattr(embedding, "enter_manifest", late)
    quick(source, part, dtype="int8", rank=1, world_size=2)
    assert contents(part) == contents(tmp_path / "small")


def test_a_search_in_a_prefix_is_a_search_in_a_smaller_copy(folder: Path, tmp_path: Path) -> None:
    compress(folder, tmp_path / "small", truncate_dim=3)
    inputs = [one["text"] for one in texts(9)]
    expected = search(tmp_path / "small", inputs, model=model(), k=4)
    assert search(folder, inputs, model=model(), k=4, truncate_dim=3) == expected
    vectors = model().encode(inputs, normalize_embeddings=True)
    assert search(folder, vectors, k=4, truncate_dim=3) == expected
    assert search(folder, vectors, k=4) != expected
    with pytest.raises(ValueError, match=r"truncate_dim must be in 1\.\.8, got 9"):
        search(folder, vectors, truncate_dim=9)
    with pytest.raises(ValueError, match="truncate_dim=3 has no meaning for an index"):
        search(folder, vectors, truncate_dim=3, backend="faiss")


def test_embed_names_a_row_that_it_would_sample(tmp_path: Path) -> None:
    records: list[dict[str, str]] = [*texts(20)]
    records[19] = {"id": "bad", "image": "none.png"}
    source = write_jsonl(tmp_path / "corpus.jsonl", records)
    with pytest.raises(
        ValueError, match=r"row 19 \(id 'bad'\): the image none\.png cannot be read"
    ):
        quick(source, tmp_path / "out", dtype="int8")
    with pytest.raises(ValueError, match=r"truncate_dim must be in 1\.\.8, got 9"):
        quick(source, tmp_path / "out", truncate_dim=9)
    source = write_jsonl(tmp_path / "none.jsonl", [records[19]])
    with pytest.raises(ValueError, match="no row is usable"):
        quick(source, tmp_path / "out", dtype="int8", on_error="skip")


def test_misuse(folder: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    for settings, message in (
        ({"truncate_dim": 0}, r"truncate_dim must be in 1\.\.8, got 0"),
        ({"truncate_dim": 9}, r"truncate_dim must be in 1\.\.8, got 9"),
        ({"dtype": "int4"}, "dtype must be one of float32, float16, int8, binary, got 'int4'"),
    ):
        with pytest.raises(ValueError, match=message):
            compress(folder, small, **settings)
    with pytest.raises(ValueError, match=r"out=.* is source="):
        compress(folder, folder, dtype="int8")
    assert not small.exists()
    compress(folder, small, dtype="int8")
    before = contents(small)
    with pytest.raises(ValueError, match="is compressed to int8"):
        compress(small, tmp_path / "smaller", dtype="binary")
    with pytest.raises(ValueError, match="another run: dimension is 8 there and 4 here"):
        compress(folder, small, dtype="int8", truncate_dim=4)
    assert contents(small) == before
    missing = folder / ranges(read_manifest(folder))[2].file
    missing.unlink()
    with pytest.raises(ValueError, match=f"lacks 1 of 29 files, the first {missing.name}"):
        compress(folder, tmp_path / "other", dtype="binary")


def test_a_manifest_with_wrong_ranges(folder: Path, tmp_path: Path) -> None:
    compress(folder, tmp_path / "small", dtype="int8")
    manifest = read_manifest(tmp_path / "small")
    span = ranges(manifest)[0]
    read_shard(tmp_path / "small" / span.file, span, manifest)
    file = tmp_path / "small" / "manifest.json"
    text = file.read_text()
    for wrong in (
        text.replace('"int8"', '"binary"'),
        text.replace('"ranges"', '"range"'),
        text.replace('"dimension": 8', '"dimension": 7'),
    ):
        file.write_text(wrong.replace("checksum", "unused"))
        with pytest.raises(ValueError, match=r"manifest\.json cannot be used"):
            read_manifest(tmp_path / "small")
