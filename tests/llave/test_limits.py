"""Small files that would need much memory, and files of another kind than they claim."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for needed in ("sentence_transformers", "datasets", "PIL", "pyarrow"):
    pytest.importorskip(needed)

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from datasets import Dataset, Features, Value  # noqa: E402
from datasets import Image as Declared  # noqa: E402
from PIL import Image, UnidentifiedImageError  # noqa: E402

from llave import data, jsonl, limits  # noqa: E402
from llave.data import load_training  # noqa: E402
from llave.encoding import _Reader  # noqa: E402
from llave.images import FORMATS, open_rgb  # noqa: E402
from llave.media import Media, make_input  # noqa: E402
from llave.sealing import checksum  # noqa: E402
from llave.shards import MANIFEST, ranges, read_manifest, read_shard  # noqa: E402
from llave.subsets import typed as retyped  # noqa: E402
from tests.llave.test_embedding import model, quick, read, texts, write_jsonl  # noqa: E402
from tests.llave.test_subsets import queries, rows, write  # noqa: E402


def grown(call: Callable[[], Any]) -> float:
    """The MiB by which the process's peak memory during a call exceeds its memory before."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")
    except OSError:
        pytest.skip("this system does not tell a process's peak memory anew")
    before, after = (
        int(status.read_text().partition(name)[2].split()[0]) / 1024
        for name in ("VmRSS:", "VmHWM:")
        if name == "VmRSS:" or call() or True
    )
    return after - before


def chunk(name: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check


def black(width: int, height: int, extra: bytes = b"") -> bytes:
    """A black PNG file with one bit a pixel. It is compressed line by line to save memory."""
    packing = zlib.compressobj(9)
    line = bytes(1 + (width + 7) // 8)
    lines = b"".join(packing.compress(line) for _ in range(height)) + packing.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + extra + chunk(b"IDAT", lines) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("side", [11_600, 13_300, 30_000])
def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded(side: int) -> None:
    content = black(side, side)

    def refuse() -> None:
        with pytest.raises(ValueError, match=r"LLAVE_MAX_PIXELS is 134,217,728; .* higher"):
            open_rgb(content)

    assert len(content) < 150_000
    assert grown(refuse) < 20


def test_a_limit_is_raised_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    content = black(64, 64)
    monkeypatch.setenv("LLAVE_MAX_PIXELS", "4095")
    with pytest.raises(ValueError, match=r"it has 4,096 pixels, .*LLAVE_MAX_PIXELS is 4,095"):
        open_rgb(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own limit is not used
    monkeypatch.setenv("LLAVE_MAX_PIXELS", "4096")
    assert open_rgb(content).size == (64, 64)
    for wrong in ("0", "-1", "many", "1e9", "1" * 30):
        monkeypatch.setenv("LLAVE_MAX_PIXELS", wrong)
        with pytest.raises(ValueError, match=rf"LLAVE_MAX_PIXELS='{wrong}' in the environment"):
            open_rgb(content)
    monkeypatch.setenv("LLAVE_MAX_PIXELS", "")
    assert open_rgb(content).size == (64, 64)


def test_text_in_a_file_that_unpacks_to_much() -> None:
    packed = zlib.compress(bytes(2**26))
    bomb = b"".join(chunk(b"zTXt", b"k%d\0\0" % n + packed) for n in range(40))

    def refuse() -> None:
        with pytest.raises(ValueError, match="too large"):
            open_rgb(black(4, 4, bomb))

    assert grown(refuse) < 50


def test_a_tile_that_is_larger_than_its_picture() -> None:
    packed = zlib.compress(bytes(2**20))
    tags = {256: 1, 257: 1, 258: 8, 259: 8, 262: 1, 277: 1, 322: 32768, 323: 16384, 324: 8}
    tags[325] = len(packed)
    file = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + struct.pack("<H", len(tags))
    file += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    with pytest.raises(ValueError, match="it has 536,870,912 pixels"):
        open_rgb(file + bytes(4))


def test_deep_grey_is_brought_to_8_bits_in_parts() -> None:
    content = io.BytesIO()
    Image.fromarray(np.full((3000, 4000), 40_000, np.uint16)).save(content, "PNG")
    assert grown(lambda: open_rgb(content.getvalue())) < 12 * 12  # 12 bytes a pixel, 12 megapixels


def test_images_are_embedded_in_batches_that_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [10, 10, 30, 5, 5, 5, 50, 1]
    for number, side in enumerate(sizes):
        Image.new("RGB", (side, 10), (number, 0, 0)).save(tmp_path / f"{number}.png")
    records: list[Any] = [{"image": f"{n}.png"} for n in range(len(sizes))]
    (tmp_path / "2.png").unlink()
    source = write_jsonl(tmp_path / "a.jsonl", [*records, {"text": "a"}])
    settings = {"on_error": "skip", "batch_size": 8}
    quick(source, tmp_path / "whole", **settings)
    monkeypatch.setenv("LLAVE_MAX_PIXELS", "500")
    quick(source, tmp_path / "parts", **settings)
    assert read(tmp_path / "parts")[0] == read(tmp_path / "whole")[0]
    np.testing.assert_array_equal(read(tmp_path / "parts")[1], read(tmp_path / "whole")[1])


def test_a_batch_is_read_in_parts_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        Image.new("RGB", (10, 10)).save(tmp_path / f"{number}.png")
    media = Media(tmp_path)
    items = [("", f"{number}.png") for number in range(5)] + [("a", ""), ("b", "")]
    reader = _Reader(model(), lambda item: ("", make_input(*item, media)), None)
    for limit, lengths in (("250", [3, 4]), ("200", [2, 2, 3]), ("10000", [7])):
        monkeypatch.setenv("LLAVE_MAX_PIXELS", limit)
        parts = [places for places, _ in reader[items].parts]
        assert [len(part) for part in parts] == lengths
        assert [place for part in parts for place in part] == [*range(7)]


def test_a_batch_of_training_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    write(tmp_path / "train" / "a.jsonl", rows(*"abc", qry_image_path="a.png"))
    loaded = load_training(tmp_path / "train", images=tmp_path)["a"]
    monkeypatch.setenv("LLAVE_MAX_BATCH_PIXELS", "200")
    assert len(loaded[:2]["anchor"]) == 2
    with pytest.raises(ValueError, match=r"row 2: the batch has 300 .*LLAVE_MAX_BATCH_PIXELS is"):
        loaded[:3]


def test_an_image_that_is_too_large_is_a_broken_one(tmp_path: Path) -> None:
    (tmp_path / "big.png").write_bytes(black(13_300, 13_300))
    source = write_jsonl(tmp_path / "a.jsonl", [*texts(1), {"image": "big.png"}])
    with pytest.raises(ValueError, match=r"row 1 .*LLAVE_MAX_PIXELS"):
        quick(source, tmp_path / "out")
    assert len(quick(source, tmp_path / "out", on_error="skip").skipped) == 1
    write(tmp_path / "train" / "a.jsonl", [*rows("a"), *rows("b", qry_image_path="big.png")])
    with pytest.raises(ValueError, match=r"row 1: image 'big.png' .*LLAVE_MAX_PIXELS"):
        load_training(tmp_path / "train", images=tmp_path)["a"][:]
    kept = load_training(tmp_path / "train", images=tmp_path, on_error="skip")["a"]
    assert len(kept) == 1


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program named gs that writes the returned file when it runs."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    return tmp_path / "ran"


def test_no_program_is_started_for_an_image(tmp_path: Path, ghostscript: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps", "EPS")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    for file in (tmp_path / "a.png", (tmp_path / "a.png").read_bytes()):
        with pytest.raises(UnidentifiedImageError, match="of a kind that Pillow does not"):
            open_rgb(file)
    with pytest.raises(ValueError, match="cannot be read"):
        Media(tmp_path).load("a.png")
    assert not ghostscript.exists()


@pytest.mark.parametrize(
    "kind", ["BLP", "DDS", "EPS", "ICNS", "ICO", "IM", "MSP", "SGI", "SPIDER", "XBM"]
)
def test_other_formats_are_not_read_whatever_their_name(tmp_path: Path, kind: str) -> None:
    mode = {"BLP": "P", "MSP": "1", "XBM": "1", "SPIDER": "F"}.get(kind, "RGB")
    Image.new(mode, (64, 64)).save(tmp_path / "a", kind)
    (tmp_path / "a").rename(tmp_path / "a.png")
    with pytest.raises(UnidentifiedImageError, match="of a kind that Pillow does not"):
        open_rgb(tmp_path / "a.png")
    assert kind not in FORMATS


def nested(depth: int, kind: str) -> str:
    opening, closing = {"list": ("[", "]"), "object": ('{"a": ', "}")}[kind]
    return opening * depth + "0" + closing * depth


@pytest.mark.parametrize("kind", ["list", "object"])
def test_depth(kind: str) -> None:
    assert jsonl.parsed(nested(100, kind).encode())
    for depth in (101, 5000, 200_000):
        for text in (nested(depth, kind), nested(depth, kind)[: 7 * depth], "[" * depth):
            with pytest.raises(ValueError, match=r"LLAVE_MAX_JSON_DEPTH is 100"):
                jsonl.parsed(text.encode())
    for coding in ("utf-16", "utf-32", "utf-8-sig"):
        with pytest.raises(ValueError, match="lists and objects in each other"):
            jsonl.parsed(nested(101, kind).encode(coding))


@pytest.mark.parametrize("text", ["[" * 300, '"[' * 300, '\\"[' * 300, "\\" * 7 + '"{' * 200])
def test_brackets_in_strings_are_no_depth(text: str) -> None:
    value = {"a": [text] * 20, text: 1}
    assert jsonl.parsed(json.dumps(value).encode()) == value
    hidden = json.dumps(value)[:-1] + ', "b": ' + nested(101, "list") + "}"
    with pytest.raises(ValueError, match="it has 102 lists and objects"):
        jsonl.parsed(hidden.encode())


@pytest.mark.parametrize("depth", [900, 5000, 100_000])
def test_rows_that_are_nested_are_named_or_left_out(tmp_path: Path, depth: int) -> None:
    deep = json.dumps(rows("b")[0]).replace('"b"', nested(depth, "list"))
    lines = [json.dumps(rows("a")[0]), deep, json.dumps(rows("c")[0])]
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"subset a, row 1: .*lists and objects in each other"):
        load_training(tmp_path / "train")
    assert queries(tmp_path / "train", on_error="skip") == {"a": ["a", "c"]}
    (tmp_path / "train" / "a.jsonl").rename(tmp_path / "train" / "a.json")
    (tmp_path / "train" / "a.json").write_text(f"[{','.join(lines)}]")
    with pytest.raises(ValueError, match=r"a\.json is not JSON .*LLAVE_MAX_JSON_DEPTH"):
        load_training(tmp_path / "train")
    source = tmp_path / "corpus.jsonl"
    source.write_text('{"text": "a"}\n{"text": ' + nested(depth, "object") + "}\n")
    with pytest.raises(ValueError, match=r"row 1 is not JSON .*LLAVE_MAX_JSON_DEPTH"):
        quick(source, tmp_path / "out")
    assert len(quick(source, tmp_path / "out", on_error="skip").skipped) == 1


def test_a_line_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVE_MAX_LINE_BYTES", "1000")
    monkeypatch.setenv("LLAVE_MAX_JSON_BYTES", "2000")
    source = write_jsonl(tmp_path / "c.jsonl", [{"text": "a" * 2000}])
    with pytest.raises(ValueError, match=r"c\.jsonl has 1,001 bytes or more in a line, .* higher"):
        quick(source, tmp_path / "out")
    write(tmp_path / "train" / "a.jsonl", rows("a" * 2000))
    with pytest.raises(ValueError, match=r"a\.jsonl has 1,001 bytes or more in a line"):
        load_training(tmp_path / "train")
    (tmp_path / "train" / "a.jsonl").unlink()
    (tmp_path / "train" / "a.json").write_text(json.dumps(rows("a" * 2000)))
    with pytest.raises(ValueError, match=r"a\.json has 2,001 bytes or more, .*LLAVE_MAX_JSON_B"):
        load_training(tmp_path / "train")


@pytest.mark.parametrize("name", ["LLAVE_MAX_ROWS", "LLAVE_MAX_ROW_GROUP_BYTES"])
def test_what_a_parquet_file_declares(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "train" / "a.parquet", rows("a", "b", unread="x" * 9999))
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "c.parquet")
    monkeypatch.setenv(name, "1")
    for call in (
        lambda: load_training(tmp_path / "train"),
        lambda: quick(tmp_path / "c.parquet", tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=rf"\.parquet has .*{name} is 1;"):
            call()
    monkeypatch.setenv(name, "5000")
    assert queries(tmp_path / "train") == {"a": ["a", "b"]}


def cut_in_the_middle(path: Path) -> None:
    """Damage a parquet file's rows but not its footer."""
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    path.write_bytes(content)


def test_rows_that_are_damaged_name_their_file(tmp_path: Path) -> None:
    source = write(tmp_path / "train" / "a.parquet", rows(*map(str, range(2000))))
    cut_in_the_middle(source)
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read"):
        load_training(tmp_path / "train")
    pq.write_table(pa.table({"text": list(map(str, range(2000)))}), tmp_path / "c.parquet")
    cut_in_the_middle(tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"c\.parquet cannot be read"):
        quick(tmp_path / "c.parquet", tmp_path / "out")
    Dataset.from_list(rows("a")).save_to_disk(tmp_path / "saved" / "a")
    for file in (tmp_path / "saved" / "a").iterdir():
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"saved.*cannot be read"):
            load_training(tmp_path / "saved")
        file.write_bytes(whole)


@pytest.mark.parametrize("address", ["secret.png", "http://127.0.0.1:9/a.png"])
@pytest.mark.parametrize("stored", ["string", "struct"])
def test_a_column_that_declares_itself_an_image_is_not_opened(
    tmp_path: Path, stored: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The column holds text, but its metadata declares an image."""
    where = address if "//" in address else str(tmp_path / address)
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    values: list[Any] = [{"path": where, "bytes": None} if stored == "struct" else where]
    features = Features(dict.fromkeys(data.TRAINING, Value("string")) | {"qry": Declared()})
    plain = rows("a")[0]
    note = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    columns = {name: values if name == "qry" else [plain.get(name, "")] for name in features}
    table = pa.table(columns).replace_schema_metadata(note)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("it was opened")

    monkeypatch.setattr("datasets.Image.decode_example", fail)
    monkeypatch.setattr(Image, "open", fail)
    (tmp_path / "train").mkdir()
    pq.write_table(table, tmp_path / "train" / "a.parquet")
    if stored == "string":
        loaded = load_training(tmp_path / "train")["a"][0]
        assert loaded["anchor"] in (where, {"text": where})
    else:
        with pytest.raises(ValueError, match="column qry is of type struct"):
            load_training(tmp_path / "train")
        with pytest.raises(ValueError, match="column qry is of type struct"):
            retyped(Dataset(table), data.TRAINING, "the hub's")
        Dataset(table).save_to_disk(tmp_path / "saved" / "a")
        with pytest.raises(ValueError, match="column qry is of type struct"):
            load_training(tmp_path / "saved")


@pytest.mark.parametrize(
    "change",
    [
        {"source": {"rows": 10**18}},
        {"shard_rows": 0},
        {"shard_rows": "8"},
        {"source": {"rows": -5}},
        {"source": {"rows": 2.5}},
        {"source": 3},
        {"dimension": None},
    ],
)
def test_a_manifest_that_asks_for_hours(tmp_path: Path, change: dict[str, Any]) -> None:
    quick(write_jsonl(tmp_path / "a.jsonl", texts(9)), tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"is not a folder of embeddings|LLAVE_MAX_SHARDS"):
        ranges(read_manifest(tmp_path / "out"))


def test_a_shard_that_asks_for_gigabytes(tmp_path: Path) -> None:
    quick(write_jsonl(tmp_path / "a.jsonl", texts(9)), tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    span = ranges(manifest)[0]
    path = tmp_path / "out" / span.file

    def forge(ids: pa.Array, manifest: dict[str, Any]) -> None:
        note = json.dumps({"manifest": checksum(manifest), "first": 0, "skipped": []})
        table = pa.table({"id": ids}).replace_schema_metadata({"llave": note})
        pq.write_table(table, path)

    forge(pa.nulls(10**7, pa.string()), manifest)
    assert path.stat().st_size < 100_000

    def refuse() -> None:
        with pytest.raises(ValueError, match="it has 10000000 rows"):
            read_shard(path, span, manifest)

    assert grown(refuse) < 20
    forge(pa.array(["a"] * 8), manifest | {"dimension": 2**40})
    with pytest.raises(ValueError, match="cannot be used"):
        read_shard(path, span, manifest | {"dimension": 2**40})


def test_a_flipped_bit_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", texts(9)), tmp_path / "out"
    quick(source, out)
    whole = (out / MANIFEST).read_bytes()
    for place in range(0, len(whole) - 1, 7):
        bent = bytearray(whole)
        bent[place] ^= 1
        (out / MANIFEST).write_bytes(bent)
        if json.loads(whole) == _loaded(bent):
            continue
        with pytest.raises(ValueError, match=f"{MANIFEST} cannot be used"):
            read_manifest(out)
    (out / MANIFEST).write_bytes(whole)
    quick(source, out)


def _loaded(data: bytes | bytearray) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_names_from_data_stay_on_their_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = "a\n\x1b[31m\u202e\udcff"
    write(tmp_path / "train" / f"{odd}.jsonl", [*rows("a"), {"qry": ["b"]}])
    write(tmp_path / "train" / f"{odd} other.jsonl", [{"x": "y"}])
    (tmp_path / "train" / f"{odd}.csv").touch()
    load_training(tmp_path / "train", on_error="skip")
    with pytest.raises(ValueError, match="row 1") as raised:
        load_training(tmp_path / "train")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / f"x.{odd}").touch()
    Image.new("RGB", (2, 2)).save(tmp_path / "photos" / "a.png")
    quick(tmp_path / "photos", tmp_path / "out")
    said = capsys.readouterr()
    lines = [*said.out.splitlines(), str(raised.value)]
    assert len(lines) > 3
    assert "left out 1 .a\\n\\x1b[31m" in said.err
    assert all(line.isprintable() for line in lines)


def test_every_limit_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "input.md").read_text()
    for name, default in limits.DEFAULTS.items():
        assert f"| `{name}` | {default:,} |" in page
