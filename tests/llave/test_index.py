"""The faiss index of a folder of embeddings, against exact search."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("faiss")

from llave import index
from llave.index import INDEX, build_index, default_factory, read_index
from llave.recall import recall
from llave.search import Hit, search
from llave.shards import Range, Shard, enter_manifest, put, ranges
from tests.llave.test_embedding import contents

ROWS, WIDTH, STEP = 1003, 12, 100
MANIFEST = {
    "source": {"rows": ROWS}, "image_root": None, "model": "m", "dimension": WIDTH,
    "shard_rows": STEP, "normalised": True, "dtype": "float32", "prompt": None,
}  # fmt: skip
SKIPPED = {7, 450, 451}


def vectors() -> np.ndarray:
    found = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def write(folder: Path, spans: list[Range], manifest: dict[str, Any] = MANIFEST) -> None:
    folder.mkdir(exist_ok=True)
    enter_manifest(folder, manifest)
    for span in spans:
        rows = [row for row in range(*span) if row not in SKIPPED]
        skipped = [
            {"row": row, "id": str(row), "error": "no"} for row in sorted(SKIPPED & {*range(*span)})
        ]
        shard = Shard(
            [f"row {row}" for row in rows], vectors()[rows, : manifest["dimension"]], skipped
        )
        put(folder / span.file, span, shard, manifest)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "out", ranges(MANIFEST))
    return tmp_path / "out"


def queries() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((9, WIDTH)).astype(np.float32)


def near(found: list[list[Hit]], expected: list[list[Hit]]) -> bool:
    return all(
        [(hit.id, hit.row) for hit in ours] == [(hit.id, hit.row) for hit in theirs]
        and np.allclose([h.score for h in ours], [h.score for h in theirs], atol=1e-5)
        for ours, theirs in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("k", [1, 10, ROWS + 1])
def test_a_flat_index_finds_what_exact_search_finds(folder: Path, k: int) -> None:
    made = build_index(folder)
    assert (made.factory, made.rows) == ("Flat", ROWS - len(SKIPPED))
    exact = search(folder, queries(), k=k)
    assert near(search(folder, queries(), k=k, backend="faiss"), exact)
    assert all(hit.id == f"row {hit.row}" for hits in exact for hit in hits)
    assert recall(folder, folder, indexed=True) == 1.0


@pytest.mark.parametrize(
    ("factory", "least"),
    [
        ("HNSW32", 0.95),
        ("IVF8,PQ6x4", 0.3),
        ("SQ8", 0.95),
        ("PCA12,IVF16,Flat", 0.8),
        ("IVF16,Flat,RFlat", 0.8),
        ("L2norm,HNSW16", 0.95),
    ],
)
def test_approximate_indexes_have_the_recall_that_is_said(
    folder: Path, factory: str, least: float
) -> None:
    build_index(folder, factory=factory)
    said = recall(folder, folder, indexed=True, k=5)
    assert said is not None
    assert least <= said <= 1.0
    # An independent count over the same rows: every row's neighbours by one dense product.
    kept = np.array([row for row in range(ROWS) if row not in SKIPPED])
    scores = vectors()[kept] @ vectors()[kept].T
    np.fill_diagonal(scores, -np.inf)
    true = kept[np.argsort(-scores, axis=1)[:, :5]]
    got = search(folder, vectors()[kept], k=6, backend="faiss")
    right = sum(
        len(set(neighbours) & set([hit.row for hit in hits if hit.row != row][:5]))
        for row, neighbours, hits in zip(kept.tolist(), true.tolist(), got, strict=True)
    )
    assert said == pytest.approx(right / true.size, abs=0.06)  # said is of 200 of the rows


@pytest.mark.parametrize("factory", ["Flat", "IVF4,SQ8"])
def test_an_index_grows_with_the_folder(tmp_path: Path, factory: str) -> None:
    folder, spans = tmp_path / "out", ranges(MANIFEST)
    write(folder, [spans[0], *spans[2:6]])
    first = build_index(folder, factory=factory)
    assert first.rows == 497
    with pytest.raises(ValueError, match="lacks 6 of 11 files"):
        search(folder, queries(), backend="faiss")
    write(folder, spans)
    with pytest.raises(ValueError, match=r"the index of .* lacks 6 of 11 files"):
        search(folder, queries(), backend="faiss")
    (found,) = search(folder, queries()[:1], k=ROWS, backend="faiss", partial=True)
    assert {hit.row for hit in found} <= {*range(100), *range(200, 600)} - SKIPPED
    reads = []
    real = index.read_shard

    def reading(path: Path, *rest: Any, **settings: Any) -> Shard:
        reads.append(path.name)
        return real(path, *rest, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "read_shard", reading)
        second = build_index(folder)
    assert (second.factory, second.rows, second.trained) == (factory, 1000, first.trained)
    assert reads == [span.file for span in (spans[1], *spans[6:])]
    assert len(list(folder.glob("index-*"))) == 1
    exact = search(folder, queries(), k=20)
    found = search(folder, queries(), k=20, backend="faiss")
    assert near(found, exact) if factory == "Flat" else recall(folder, folder, indexed=True) > 0.8
    before = contents(folder)
    build_index(folder)
    assert contents(folder) == before


def test_an_index_of_a_corpus_that_grew_much_is_trained_again(tmp_path: Path) -> None:
    folder, spans = tmp_path / "out", ranges(MANIFEST)
    write(folder, spans[:2])
    assert build_index(folder, factory="IVF2,SQ8").trained == 199
    write(folder, spans)
    assert build_index(folder).trained == 1000


def test_a_killed_build_leaves_the_index_that_was_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_index(folder, factory="Flat")
    whole = contents(folder)
    monkeypatch.setattr(index, "SAVED_ROWS", 250)
    real, left = index.publish, [0]

    def killed(*arguments: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(*arguments)

    monkeypatch.setattr(index, "publish", killed)
    for count in range(8):
        left[0] = count
        (folder / INDEX).unlink()
        for file in folder.glob("index-*"):
            file.unlink()
        with pytest.raises(KeyboardInterrupt):
            build_index(folder, factory="Flat")
        if count >= 2:
            search(folder, queries(), backend="faiss", partial=True)
        monkeypatch.setattr(index, "publish", real)
        build_index(folder, factory="Flat")
        assert contents(folder) == whole
        monkeypatch.setattr(index, "publish", killed)


def test_damage_is_noticed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = build_index(folder)
    whole = contents(folder)
    file = folder / made.file
    for damaged in (file.read_bytes()[:500], b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot be used .*run llave index"):
            search(folder, queries(), backend="faiss")
        build_index(folder)
        assert "is missing or damaged, and is made again" in capsys.readouterr().err
        assert contents(folder) == whole
    file.unlink()
    with pytest.raises(ValueError, match="run llave index"):
        search(folder, queries(), backend="faiss")
    text = (folder / INDEX).read_text()
    for wrong in ("{}", text[:40], text.replace("Flat", "flat"), '{"my": "own"}'):
        (folder / INDEX).write_text(wrong)
        for call in (lambda: build_index(folder), lambda: read_index(folder)):
            with pytest.raises(
                ValueError, match=r"index\.json is no index of llave .*move it away"
            ):
                call()
        assert (folder / INDEX).read_text() == wrong


def test_a_shard_that_was_made_again_with_more_rows(folder: Path) -> None:
    build_index(folder)
    span = ranges(MANIFEST)[0]
    shard = Shard([f"row {row}" for row in range(*span)], vectors()[slice(*span)], [])
    put(folder / span.file, span, shard, MANIFEST)
    with pytest.raises(ValueError, match="changed after it was indexed; run llave index"):
        search(folder, vectors()[:3], backend="faiss")
    assert build_index(folder).rows == ROWS - 2
    assert search(folder, vectors()[7:8], k=1, backend="faiss")[0][0].row == 7


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Nonsense", "factory='Nonsense' cannot be made for 12 values"),
        ("PQ5", "factory='PQ5' cannot be made for 12 values"),
        ("IVF2000,Flat", "factory='IVF2000,Flat' cannot be trained on 1,000 rows"),
        ("IDMap,Flat", "factory='IDMap,Flat' takes no rows, shard by shard"),
        ("NSG16,Flat", "factory='NSG16,Flat' takes no rows, shard by shard"),
    ],
)
def test_factories_that_cannot_be(folder: Path, factory: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_index(folder, factory=factory)
    assert not list(folder.glob("index*"))


def test_more_results_than_rows(folder: Path) -> None:
    build_index(folder)
    (found,) = search(folder, queries()[:1], k=10**24, backend="faiss")
    assert len(found) == ROWS - len(SKIPPED)


@pytest.mark.parametrize("count", [0, 1])
def test_no_neighbours_no_recall(folder: Path, count: int, tmp_path: Path) -> None:
    manifest = MANIFEST | {"source": {"rows": 1}}
    alone = tmp_path / "alone"
    alone.mkdir()
    enter_manifest(alone, manifest)
    (span,) = ranges(manifest)
    skipped = [{"row": 0, "id": "0", "error": "no"}][count:]
    put(alone / span.file, span, Shard(["a"][:count], vectors()[:count], skipped), manifest)
    assert recall(alone, alone, indexed=False) is None
    if count:
        build_index(alone)
        assert recall(alone, alone, indexed=True) is None


def test_a_shard_that_is_cut_short_is_named(folder: Path) -> None:
    (file, *_) = sorted(folder.glob("part-*"))
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match=f"{file.name} cannot be used .* run embed again"):
        build_index(folder)


def test_the_size_chooses_the_index() -> None:
    def chosen(rows: int, dimension: int) -> str:
        return default_factory({"source": {"rows": rows}, "dimension": dimension})

    assert chosen(20_000, 3584) == "Flat"
    assert chosen(20_001, 384) == "HNSW32"
    assert chosen(10_000_000, 896) == "IVF8192,PQ224"
    assert chosen(10_000_000, 1536) == "IVF8192,PQ384"
    assert chosen(10**9, 7) == "IVF65536,PQ1"


def test_nothing_to_index(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder of embeddings"):
        build_index(tmp_path)
    with pytest.raises(ValueError, match="has no index; run llave index"):
        search(folder, queries(), backend="faiss")
    for file in folder.glob("part-*"):
        file.unlink()
    with pytest.raises(ValueError, match="has no embeddings yet; run embed first"):
        build_index(folder)


def test_two_builds_at_the_same_moment(folder: Path) -> None:
    with index._alone(folder), pytest.raises(ValueError, match="another process builds the index"):
        build_index(folder)


def test_without_faiss(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_faiss(name: str, *args: Any) -> Any:
        if name == "faiss":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_faiss)
    for call in (lambda: build_index(folder), lambda: search(folder, queries(), backend="faiss")):
        with pytest.raises(ImportError, match="pip install faiss-cpu"):
            call()
