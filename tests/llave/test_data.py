"""MMEB's formats from folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

for needed in ("datasets", "PIL"):
    pytest.importorskip(needed)

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from PIL import Image  # noqa: E402

from llave import data  # noqa: E402
from llave.data import content_id, load_training, texts_of  # noqa: E402

FIELDS = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, mode in enumerate(("RGB", "RGBA", "P", "L")):
        Image.new(mode, (6, 6), i).save(folder / f"{i}.png")
    return folder


def write(folder: Path, name: str, rows: list[tuple[str, ...]], *, parquet: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    columns = {f: [row[i] for row in rows] for i, f in enumerate(FIELDS[: len(rows[0])])}
    if parquet:
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    else:
        lines = [json.dumps({k: v[i] for k, v in columns.items()}) for i in range(len(rows))]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def test_columns_inputs_and_ids(tmp_path: Path, images: Path) -> None:
    folder = write(
        tmp_path / "train",
        "with",
        [("<|image_1|>\nwhat", "0.png", "a dog", "", "", "1.png"), ("b", "", "a dog", "", "c", "")],
    )
    write(
        folder,
        "without",
        [("x", "", "", "2.png"), ("y", "", "<|image_1|>\nz", "3.png")],
        parquet=False,
    )
    loaded = load_training(folder, images=images)
    assert list(loaded) == ["with", "without"]
    batch = loaded["with"][:]
    assert list(batch) == ["anchor", "positive", "negative", "label"]
    assert batch["anchor"][0]["text"] == "<|image_1|>\nwhat"
    assert batch["anchor"][0]["image"].mode == "RGB"
    assert batch["anchor"][1] == "b"
    assert batch["negative"][0].keys() == {"image"}
    # The same content has the same id, another content another.
    assert batch["label"][0][0] == batch["label"][1][0] == content_id("a dog", "")
    assert batch["label"][0][1] != batch["label"][1][1]
    assert 0 <= batch["label"][0][0] < 2**63
    other = loaded["without"][:]
    assert list(other) == ["anchor", "positive", "label"]
    assert all(x["image"].mode == "RGB" for x in other["positive"])
    assert sorted(texts_of(loaded["with"])) == ["<|image_1|>\nwhat", "a dog", "a dog", "b"]


def test_the_cap_is_a_seeded_choice(tmp_path: Path) -> None:
    folder = write(tmp_path / "train", "s", [(f"q{i}", "", f"p{i}", "") for i in range(50)])
    first, again, other = (
        load_training(folder, cap=10, seed=seed)["s"][:]["anchor"] for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len(first) == 10
    assert len(load_training(folder, cap=None)["s"]) == 50


def test_images_are_opened_when_asked_for(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "train", "s", [("q", "0.png", "p", "")] * 20)
    opened: list[str] = []
    really = data.Images.open
    monkeypatch.setattr(data.Images, "open", lambda s, n: opened.append(n) or really(s, n))
    subset = load_training(folder, images=images)["s"]
    list(texts_of(subset))
    assert opened == []
    subset[:3]
    assert len(opened) == 3


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.png", "subset s, row 1: image 'none.png' is not in"),
        ("broken.png", "subset s, row 1: image 'broken.png' in .* cannot be read"),
        ("../out.png", "subset s, row 1: image path '../out.png' leaves the image folder"),
    ],
)
def test_a_broken_image_names_its_row_or_is_left_out(
    tmp_path: Path, images: Path, path: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "broken.png").write_bytes(b"nothing")
    (tmp_path / "out.png").write_bytes((images / "0.png").read_bytes())
    rows = [("q", "0.png", "p", ""), ("q", path, "p", ""), ("r", "1.png", "p", "")]
    folder = write(tmp_path / "train", "s", rows)
    with pytest.raises(ValueError, match=message):
        load_training(folder, images=images)["s"][:]
    if path.startswith(".."):
        with pytest.raises(ValueError, match="leaves the image folder"):
            load_training(folder, images=images, on_error="skip")
        return
    kept = load_training(folder, images=images, on_error="skip")["s"]
    assert len(kept) == 2
    assert "s: 1 of 3 rows left out for broken images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subsets": ["t"]}, "t is not in .*; there are s"),
        ({"on_error": "ignore"}, "on_error must be raise or skip, got 'ignore'"),
        ({"images": None}, "image '0.png' needs an image folder"),
    ],
)
def test_mistakes(tmp_path: Path, images: Path, settings: dict[str, Any], message: str) -> None:
    folder = write(tmp_path / "train", "s", [("q", "0.png", "p", "")])
    with pytest.raises(ValueError, match=message):
        load_training(folder, **({"images": images} | settings))["s"][:]
    with pytest.raises(ValueError, match="lacks the columns pos_image_path, pos_text"):
        load_training(write(tmp_path / "short", "s", [("q", "0.png")]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no \.parquet, \.jsonl, \.json files"):
        load_training(tmp_path / "empty")
