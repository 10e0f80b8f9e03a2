from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llave.search import Hit, search
from tests.llave.test_embedding import DIMENSION, ROWS, model, quick, read, texts, write_jsonl


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Embeddings with each text four times in different shards, so that most scores are tied."""
    records = texts(ROWS)
    for n, record in enumerate(records):
        record["text"] = records[n % (ROWS // 4)]["text"]
    quick(write_jsonl(tmp_path / "corpus.jsonl", records), tmp_path / "out", shard_rows=16)
    return tmp_path / "out"


def queries(count: int = 7) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, DIMENSION)).astype(np.float32)


def brute_force(folder: Path, vectors: np.ndarray, k: int) -> list[list[Hit]]:
    ids, corpus = read(folder)
    scores = (vectors.astype(np.float64) @ corpus.astype(np.float64).T).astype(np.float32)
    rows = [
        int(name.removeprefix("doc ")) if name[:3] == "doc" else "xab".index(name) for name in ids
    ]
    hits = [[Hit(*hit) for hit in zip(ids, row.tolist(), rows, strict=True)] for row in scores]
    return [sorted(row, key=lambda hit: (-hit.score, hit.id))[:k] for row in hits]


def test_a_query_that_the_model_refuses_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = model()

    preprocess = refusing.preprocess

    def refuse(inputs: list[Any], **settings: Any) -> dict[str, Any]:
        if "bad" in inputs:
            raise ValueError("it is bad")
        return preprocess(inputs, **settings)

    monkeypatch.setattr(refusing, "preprocess", refuse)
    with pytest.raises(ValueError, match="input 1, 'bad': it is bad"):
        search(folder, ["good", "bad"], model=refusing)


@pytest.mark.parametrize("k", [1, 3, 10, 100, 1000])
def test_exact_equals_brute_force(folder: Path, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llave.search.QUERY_BLOCK", 3)
    found = search(folder, queries(), k=k)
    assert found == brute_force(folder, queries(), k)
    assert len(found[0]) == min(k, ROWS)


def test_rows_that_are_not_finite_are_named_and_embedded_again(
    folder: Path, tmp_path: Path
) -> None:
    expected = search(folder, queries())
    file = sorted(folder.glob("part-*.parquet"))[2]
    table = pq.read_table(file)
    values = table["embedding"].combine_chunks().flatten().to_numpy().copy()
    values[3 * DIMENSION + 1] = np.nan
    broken = pa.FixedSizeListArray.from_arrays(pa.array(values), DIMENSION)
    table = table.set_column(1, table.schema.field("embedding"), broken)
    pq.write_table(table, file, write_page_checksum=True)
    with pytest.raises(ValueError, match=rf"{file.name} .*id 'doc 35': the embedding is not"):
        search(folder, queries())
    quick(tmp_path / "corpus.jsonl", folder, shard_rows=16)
    assert search(folder, queries()) == expected


def test_all_tied(folder: Path) -> None:
    first = sorted(read(folder)[0])[:10]
    (found,) = search(folder, np.zeros((1, DIMENSION), np.float32))
    assert [(hit.id, hit.score) for hit in found] == [(i, 0.0) for i in first]


def test_inputs(folder: Path) -> None:
    inputs = [
        texts(ROWS)[5]["text"],
        Image.new("RGB", (2, 2)),
        {"text": "a", "image": Image.new("RGB", (2, 2))},
    ]
    found = search(folder, inputs, model=model(), k=4)
    assert found == search(folder, model().encode(inputs, normalize_embeddings=True), k=4)
    assert found[0][0].id == "doc 119"  # ties with 5, 62 and 176; first by id
    assert found[0][0].score == pytest.approx(1, abs=1e-6)
    assert search(folder, inputs, model=model(), prompt="find: ") != found


def test_rows_skipped_and_half_precision(tmp_path: Path) -> None:
    records = [{"id": "x", "image": "none.png"}, {"id": "a", "text": "a"}, {"id": "b", "text": "b"}]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    quick(source, tmp_path / "out", shard_rows=1, on_error="skip", dtype="float16")
    found = search(tmp_path / "out", queries(2))
    assert found == brute_force(tmp_path / "out", queries(2), 10)
    assert {hit.id for hit in found[0]} == {"a", "b"}


def test_missing_files(folder: Path) -> None:
    missing = sorted(folder.glob("*.parquet"))[1]
    missing.unlink()
    with pytest.raises(ValueError, match=rf"lacks 1 of 15 files, the first {missing.name}"):
        search(folder, queries())
    (found,) = search(folder, queries(1), k=ROWS, partial=True)
    assert {hit.id for hit in found} == {f"doc {n}" for n in range(ROWS) if not 16 <= n < 32}


def test_damaged_file(folder: Path) -> None:
    damaged = sorted(folder.glob("*.parquet"))[1]
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{damaged.name} cannot be used .* run embed again"):
        search(folder, queries(), partial=True)


@pytest.mark.parametrize(
    ("wrong", "settings", "message"),
    [
        (queries()[:, :4], {}, r"queries must have shape \(queries, 8\), .* got \(7, 4\)"),
        (queries()[0], {}, r"got \(8,\)"),
        (queries() * np.inf, {}, "queries must be finite, query 0: "),
        (np.where(np.arange(7)[:, None] == 3, np.nan, queries()), {}, "finite, query 3: "),
        (["a"], {}, "model is needed"),
        ("a", {"model": model()}, "queries must be a list of inputs, got 'a'"),
        (["a"], {"model": model(1)}, "the folder was embedded with"),
        (queries(), {"k": 0}, "k must be at least 1, got 0"),
        (queries(), {"backend": "hnsw"}, "backend must be 'exact' or 'faiss', got 'hnsw'"),
    ],
)
def test_misuse(folder: Path, wrong: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(folder, wrong, **settings)


def test_no_embeddings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder of embeddings"):
        search(tmp_path, queries())


def test_folder_of_no_rows(folder: Path) -> None:
    for path in folder.glob("*.parquet"):
        path.unlink()
    assert search(folder, queries(2), partial=True) == [[], []]
