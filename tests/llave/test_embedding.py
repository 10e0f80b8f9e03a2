from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from jinja2 import TemplateError
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule

from llave.embedding import EmbedReport, embed, model_fingerprint, ranges, read_manifest, read_shard
from tests.forks import processes

DIMENSION = 8
ROWS = 230
SHARD_ROWS = 8


class Hashed(InputModule):
    """Embeds the hash of a text and the mean colour of an image with a seeded projection."""

    config_keys = ("seed", "seconds")

    def __init__(self, seed: int = 0, seconds: float = 0.0) -> None:
        super().__init__()
        self.seed, self.seconds = seed, seconds
        values = torch.randn(35, DIMENSION, generator=torch.Generator().manual_seed(seed))
        self.weight = torch.nn.Parameter(values)

    @property
    def modalities(self) -> list[Any]:
        return ["text", "image", "message"]

    def get_embedding_dimension(self) -> int:
        return DIMENSION

    def preprocess(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        return {"features": torch.tensor([features(value, prompt or "") for value in inputs])}

    def forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        time.sleep(self.seconds)
        # The threads of a matrix product would wait for busy cores.
        batch["sentence_embedding"] = (batch["features"][..., None] * self.weight).sum(dim=1)
        return batch

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        self.save_config(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> Hashed:
        config = cls.load_config(model_name_or_path)
        return cls(config["seed"], config["seconds"])


def features(value: Any, prompt: str) -> list[float]:
    if not isinstance(value, dict):
        value = {"text" if isinstance(value, str) else "image": value}
    digest = hashlib.sha256((prompt + value.get("text", "")).encode()).digest()
    colour = np.asarray(value["image"]).mean(axis=(0, 1)) if "image" in value else np.zeros(3)
    return [byte / 128 - 1 for byte in digest] + [float(x) / 255 for x in colour]


def model(seed: int = 0) -> SentenceTransformer:
    return SentenceTransformer(modules=[Hashed(seed)], device="cpu")


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def texts(count: int) -> list[dict[str, str]]:
    return [{"id": f"doc {n}", "text": f"text é {n} " * (n % 5 + 1)} for n in range(count)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(folder: Path) -> tuple[list[str], np.ndarray]:
    manifest = read_manifest(folder)
    shards = [read_shard(folder / span.file, span, manifest) for span in ranges(manifest)]
    return [name for s in shards for name in s.ids], np.concatenate([s.vectors for s in shards])


def quick(source: Path, out: Path, **settings: Any) -> EmbedReport:
    seed = settings.pop("seed", 0)
    return embed(model(seed), source, out, **{"shard_rows": SHARD_ROWS, "batch_size": 4} | settings)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", texts(ROWS))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for n, name in enumerate(("b.png", "a/c.jpg", "a/b.PNG", "d.webp", "a.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), (40 * n, 200, 7)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def child(path: str, source: Path, out: Path, started: Any, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    loaded = SentenceTransformer(path, device="cpu", trust_remote_code=True)
    started.wait()
    embed(loaded, source, out, shard_rows=SHARD_ROWS, batch_size=4, **settings)


@pytest.fixture
def start(tmp_path: Path, source: Path) -> Callable[..., Any]:
    """Starts processes with the same saved model. They wait for each other before they embed."""
    path = str(tmp_path / "model")
    SentenceTransformer(modules=[Hashed(0, seconds=0.002)], device="cpu").save(path)

    def start(out: Path, *settings: dict[str, Any]) -> list[Any]:
        started = processes.Barrier(len(settings) + 1)
        running = [
            processes.Process(target=child, args=(path, source, out, started, one))
            for one in settings
        ]
        for process in running:
            process.start()
        started.wait(60)
        return running

    return start


def finish(running: list[Any]) -> None:
    for process in running:
        process.join(60)
        assert process.exitcode == 0


def test_killed_runs_leave_no_trace(start: Any, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole, {}))
    moments = random.Random(0)

    def files() -> int:
        return len(list(killed.glob("*.parquet")))

    progress = []
    for count in range(0, len(list(whole.glob("*.parquet"))), 2):
        (process,) = start(killed, {})
        # The kill waits for files, because a time says nothing on a busy machine.
        while process.is_alive() and files() < count:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.01))
        process.kill()
        process.join()
        assert process.exitcode in (-9, 0)
        progress.append(files())
    assert len(set(progress)) > 2  # the kills came during the work
    # A run killed between writing and renaming leaves such a file.
    (killed / f"{ranges(read_manifest(killed))[0].file}.{'0' * 32}.tmp").write_bytes(b"half")
    finish(start(killed, {}))
    assert contents(killed) == contents(whole)
    assert read(killed)[0] == [f"doc {n}" for n in range(ROWS)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_processes(start: Any, tmp_path: Path, world_size: int) -> None:
    ours = [{"rank": rank, "world_size": world_size} for rank in range(world_size)]
    finish(start(tmp_path / "many", *ours))
    finish(start(tmp_path / "one", {}))
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_two_processes_on_the_same_rows(start: Any, tmp_path: Path) -> None:
    finish(start(tmp_path / "shared", {}, {}))
    finish(start(tmp_path / "alone", {}))
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_contents(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = quick(source, tmp_path / "out", normalize=False, prompt="find: ")
    assert (report.rows, report.reused, report.skipped) == (ROWS, 0, [])
    assert "rank 0 of 1: 230 rows in" in capsys.readouterr().err
    ids, vectors = read(tmp_path / "out")
    records = texts(ROWS)
    assert ids == [record["id"] for record in records]
    expected = model().encode([r["text"] for r in records], prompt="find: ")
    np.testing.assert_allclose(vectors, expected, rtol=1e-5, atol=1e-6)
    table = pq.read_table(tmp_path / "out" / "part-0000000224-0000000229.parquet")
    assert table.schema.types == [pa.string(), pa.list_(pa.float32(), DIMENSION)]
    assert quick(source, tmp_path / "out", normalize=False, prompt="find: ").reused == ROWS


def test_normalised_half_precision(source: Path, tmp_path: Path) -> None:
    quick(source, tmp_path / "half", dtype="float16")
    quick(source, tmp_path / "single")
    half, single = read(tmp_path / "half")[1], read(tmp_path / "single")[1]
    np.testing.assert_allclose(np.linalg.norm(single, axis=1), 1, rtol=1e-6)
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, single.astype(np.float16))


def test_parquet_equals_jsonl(source: Path, pictures: Path, tmp_path: Path) -> None:
    records = [*texts(50), {"text": "with", "image": "b.png"}, {"id": 7, "image": "a/c.jpg"}]
    columns = {key: [r.get(key) for r in records] for key in ("text", "image")}
    columns["id"] = [None if "id" not in r else str(r["id"]) for r in records]
    write_jsonl(pictures / "same.jsonl", records)
    # The row groups do not align with the ranges.
    pq.write_table(pa.table(columns), tmp_path / "same.parquet", row_group_size=11)
    quick(pictures / "same.jsonl", tmp_path / "a")
    quick(tmp_path / "same.parquet", tmp_path / "b", image_root=pictures)
    assert read(tmp_path / "a")[0][-2:] == ["50", "7"]
    assert read(tmp_path / "a")[0] == read(tmp_path / "b")[0]
    np.testing.assert_array_equal(read(tmp_path / "a")[1], read(tmp_path / "b")[1])


def test_a_file_of_texts_equals_jsonl(tmp_path: Path) -> None:
    records = [{"text": f"line {n} é"} for n in range(20)]
    (tmp_path / "same.txt").write_bytes("\r\n\n".join(r["text"] for r in records).encode())
    quick(tmp_path / "same.txt", tmp_path / "a")
    quick(write_jsonl(tmp_path / "same.jsonl", records), tmp_path / "b")
    assert read(tmp_path / "a")[0] == read(tmp_path / "b")[0] == [str(n) for n in range(20)]
    np.testing.assert_array_equal(read(tmp_path / "a")[1], read(tmp_path / "b")[1])


def test_folder_of_images(pictures: Path, tmp_path: Path) -> None:
    quick(pictures, tmp_path / "out", shard_rows=2)
    ids, vectors = read(tmp_path / "out")
    assert ids == ["a.png", "a/b.PNG", "a/c.jpg", "b.png", "d.webp"]
    images = [Image.open(pictures / name).convert("RGB") for name in ids]
    expected = model().encode(images, normalize_embeddings=True)
    np.testing.assert_allclose(vectors, expected, rtol=1e-5, atol=1e-6)


def test_text_that_looks_like_an_image_stays_text(tmp_path: Path) -> None:
    address = "https://example.invalid/cat.png"
    quick(write_jsonl(tmp_path / "a.jsonl", [{"text": address}]), tmp_path / "out")
    expected = model().encode([{"text": address}], normalize_embeddings=True)
    np.testing.assert_array_equal(read(tmp_path / "out")[1], expected)


def test_rank_from_the_environment(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    quick(source, tmp_path / "out")
    first_rows = [int(p.name.split("-")[1]) for p in (tmp_path / "out").glob("*.parquet")]
    assert sorted(first_rows) == list(range(SHARD_ROWS, ROWS, 2 * SHARD_ROWS))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "model"),
        ({"shard_rows": 9}, "shard_rows"),
        ({"dtype": "float16"}, "dtype"),
        ({"normalize": False}, "normalised"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_other_settings_are_refused(
    source: Path, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    quick(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=f"another run: {named} is .* there and .* here"):
        quick(source, tmp_path / "out", **change)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("key", ["id", "text"])
def test_other_source_is_refused(source: Path, tmp_path: Path, key: str) -> None:
    quick(source, tmp_path / "out")
    records = texts(ROWS)
    records[100][key] = records[100][key].replace("0", "x")  # of the same length
    write_jsonl(source, records)
    with pytest.raises(ValueError, match="another run: source is"):
        quick(source, tmp_path / "out")


def test_fingerprint() -> None:
    changed = [model() for _ in range(5)]
    changed[0].prompts["query"] = "find: "
    changed[1].truncate_dim = 4
    changed[2][0].processor = SimpleNamespace(chat_template="{{ messages }}")
    changed[3][0].processor = SimpleNamespace(to_dict=lambda: {"size": 24})
    changed[4][0].weight.data *= 1.001  # a step of training
    prints = {model_fingerprint(one) for one in [model(), model(), model(1), *changed]}
    assert len(prints) == 7


def test_duplicate_ids(source: Path, tmp_path: Path) -> None:
    write_jsonl(source, [*texts(20), {"id": "doc 3", "text": "again"}])
    with pytest.raises(ValueError, match=r"rows 3 and 20 have the same id 'doc 3'"):
        quick(source, tmp_path / "out")
    # A given id may equal the row number that another row has by default.
    write_jsonl(source, [{"id": "1", "text": "a"}, {"text": "b"}])
    with pytest.raises(ValueError, match=r"rows 0 and 1 have the same id '1'"):
        quick(source, tmp_path / "out")


def test_damaged_files_are_replaced(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quick(source, out)
    before = contents(out)
    truncated, flipped, emptied, zeroed = sorted(out.glob("*.parquet"))[:4]
    truncated.write_bytes(before[truncated.name][:200])
    emptied.write_bytes(b"")
    zeroed.write_bytes(
        bytes(len(before[zeroed.name]))
    )  # as some systems leave it after a power loss
    damaged = bytearray(before[flipped.name])
    damaged[len(damaged) // 4] ^= 1  # a value, so only the page's checksum changes
    flipped.write_bytes(damaged)
    assert quick(source, out).rows == 4 * SHARD_ROWS
    assert contents(out) == before


def test_broken_images(pictures: Path, tmp_path: Path) -> None:
    good = (pictures / "b.png").read_bytes()
    quick(pictures, tmp_path / "whole", shard_rows=2)
    source = write_jsonl(
        pictures / "list.jsonl", [{"image": n} for n in ("a.png", "a/b.PNG", "a/c.jpg", "b.png")]
    )
    (pictures / "b.png").write_bytes(good[:40])
    (pictures / "a/c.jpg").unlink()
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"row 2 \(id '2'\): the image .*c\.jpg cannot be read"):
        quick(source, out, shard_rows=2)
    report = quick(source, out, shard_rows=2, on_error="skip")
    assert (report.rows, report.reused) == (0, 2)
    assert [(s["row"], s["id"]) for s in report.skipped] == [(2, "2"), (3, "3")]
    again = quick(source, out, shard_rows=2, on_error="skip")
    assert (again.rows, again.reused, again.skipped) == (0, 2, report.skipped)
    assert read(out)[0] == ["0", "1"]
    with pytest.raises(ValueError, match="row 2"):
        quick(source, out, shard_rows=2)
    (pictures / "b.png").write_bytes(good)
    (pictures / "a/c.jpg").write_bytes(good)
    assert quick(source, out, shard_rows=2).rows == 2
    assert read(out)[0] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("refusal", [ValueError, TypeError, TemplateError])
def test_rows_that_the_model_refuses_are_named_or_left_out(
    source: Path, tmp_path: Path, refusal: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = model()
    preprocess = refusing.preprocess

    def refuse(inputs: list[str], **settings: Any) -> dict[str, Any]:
        if any(text in inputs for text in refused):
            raise refusal("too long")
        return preprocess(inputs, **settings)

    refused = [texts(ROWS)[n]["text"] for n in (2, 3, 150)]
    monkeypatch.setattr(refusing, "preprocess", refuse)
    with pytest.raises(ValueError, match=r"row [23] \(id 'doc [23]'\): too long.*on_error='skip'"):
        embed(refusing, source, tmp_path / "out", shard_rows=64)
    report = embed(refusing, source, tmp_path / "out", shard_rows=64, on_error="skip")
    assert report.skipped == [
        {"row": n, "id": f"doc {n}", "error": "too long"} for n in (2, 3, 150)
    ]
    assert read(tmp_path / "out")[0] == [f"doc {n}" for n in range(ROWS) if n not in (2, 3, 150)]


def test_an_error_that_is_no_row_s_is_raised(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("device-side assert")

    failing = model()
    monkeypatch.setattr(failing[0], "forward", fail)
    with pytest.raises(RuntimeError, match="device-side assert"):
        embed(failing, source, tmp_path / "out", on_error="skip")


def test_embeddings_that_are_not_finite(source: Path, tmp_path: Path) -> None:
    broken = model()
    broken[0].weight.data[:] = torch.nan
    with pytest.raises(ValueError, match=r"row \d+ \(id 'doc \d+'\): the embedding is not finite"):
        embed(broken, source, tmp_path / "out")
    report = embed(broken, source, tmp_path / "out", on_error="skip")
    assert (report.rows, len(report.skipped)) == (0, ROWS)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "has no rows"),
        ([{"text": "a"}, {"id": "b"}], "row 1 has neither text nor image"),
        ([{"text": 3}], "row 0: text must be a string, got 3"),
        ([{"id": 1.5, "text": "a"}], "row 0: id must be a string, got 1.5"),
        ([{"id": "\ud800", "text": "a"}], "is not valid Unicode"),
        ([["a"]], "row 0 must be an object"),
    ],
)
def test_malformed_rows(tmp_path: Path, records: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(write_jsonl(tmp_path / "bad.jsonl", records), tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"shard_rows": -1}, "shard_rows must be at least 1, got -1"),
        ({"dtype": "int4"}, "dtype must be one of float32, float16, int8, binary, got 'int4'"),
        ({"on_error": "x"}, "on_error must be 'raise' or 'skip', got 'x'"),
        ({"rank": 2, "world_size": 2}, "rank must be in 0..world_size - 1, got 2 of 2"),
    ],
)
def test_settings_out_of_range(source: Path, tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(source, tmp_path / "out", **settings)


def test_other_misuse(source: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model must be a SentenceTransformer, got str"):
        embed("model", source, tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl does not exist"):
        quick(tmp_path / "nothing.jsonl", tmp_path / "out")
    (pictures / "notes.md").write_text("no corpus")
    with pytest.raises(ValueError, match=r"source must be a \.jsonl, \.parquet or \.txt file"):
        quick(pictures / "notes.md", tmp_path / "out")
    with pytest.raises(ValueError, match=r"image_root=.* has no meaning with the folder"):
        quick(pictures, tmp_path / "out", image_root=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"image_root=.*nowhere is no folder"):
        quick(source, tmp_path / "out", image_root=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()
    source.write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(ValueError, match="row 1 is not JSON"):
        quick(source, tmp_path / "out")
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not a folder of embeddings"):
        read_manifest(tmp_path / "out")
