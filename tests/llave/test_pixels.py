"""Which pixels the commands, training and evaluation use: as seen or as stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

for needed in ("sentence_transformers", "PIL"):
    pytest.importorskip(needed)

from PIL import Image  # noqa: E402

from llave.data import load_training  # noqa: E402
from llave.evaluation import evaluate  # noqa: E402
from llave.images import open_rgb  # noqa: E402
from llave.media import Media  # noqa: E402
from llave.mmeb import pixels  # noqa: E402
from llave.modeling import inputs  # noqa: E402
from llave.video import load_frames  # noqa: E402
from tests.llave.test_embedding import model, quick, read, write_jsonl  # noqa: E402
from tests.llave.test_images import (  # noqa: E402
    EXACT,
    PICTURE,
    exif,
    needs_avif,
    needs_heif,
    saved,
    turned,
)


@pytest.fixture
def sideways(tmp_path: Path) -> Path:
    """A folder with one photo. The right half of its stored pixels is on top when seen."""
    folder = tmp_path / "photos"
    folder.mkdir()
    stored = np.zeros((16, 16, 3), np.uint8)
    stored[:, 8:] = 255
    # A quarter turn to the left moves the right side to the top.
    Image.fromarray(stored).save(folder / "a.png", exif=exif(8))
    return folder


def upright(image: Image.Image) -> bool:
    found = np.asarray(image)
    return bool((found[:8] == 255).all() and (found[8:] == 0).all())


def test_commands_see_what_a_person_sees(sideways: Path, tmp_path: Path) -> None:
    seen = open_rgb(sideways / "a.png")
    assert upright(seen)
    assert upright(inputs(images=sideways / "a.png")["image"])  # for search and convert --check
    assert upright(inputs(images=Image.open(sideways / "a.png"))["image"])
    assert upright(load_frames(sideways)[0])
    assert not upright(open_rgb(sideways / "a.png", "stored"))
    write_jsonl(tmp_path / "a.jsonl", [{"image": "photos/a.png"}])
    for number, source in enumerate((sideways, tmp_path / "a.jsonl")):
        quick(source, tmp_path / f"{number}")
        np.testing.assert_array_equal(
            read(tmp_path / f"{number}")[1], model().encode([seen], normalize_embeddings=True)
        )


@needs_heif
@needs_avif
def test_a_folder_of_what_phones_write(tmp_path: Path) -> None:
    kinds = {"a.avif": "AVIF", "b.heic": "HEIF", "c.HIF": "HEIF", "d.jfif": "JPEG", "e.mpo": "MPO"}
    for name, kind in kinds.items():
        data = saved(turned(6), kind, exif=exif(6).tobytes(), **EXACT)
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(data)
    report = quick(tmp_path / "photos", tmp_path / "out")
    assert (report.rows, report.ignored) == (5, {})
    ids, found = read(tmp_path / "out")
    assert ids == list(kinds)
    expected = model().encode([PICTURE] * 5, normalize_embeddings=True)
    np.testing.assert_allclose(found, expected, atol=0.02)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("ImageNet-1K", "stored"), ("ImageNet_1K", "stored"), ("RefCOCO-Matching", "stored"),
        ("MSCOCO_i2t", "stored"), ("photos", "seen"), ("mscoco", "seen"),
    ],
)  # fmt: skip
def test_mmeb_s_own_sets_are_taken_as_stored(name: str, way: str) -> None:
    assert pixels(name) == way


def test_training_and_evaluation_take_pixels_by_the_set(
    sideways: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "train").mkdir()
    row = {"qry": "", "qry_image_path": "a.png", "pos_text": "p", "pos_image_path": ""}
    for name in ("SUN397", "mine"):
        write_jsonl(tmp_path / "train" / f"{name}.jsonl", [row])
    loaded = load_training(tmp_path / "train", images=sideways)
    assert {name: upright(subset[0]["anchor"]["image"]) for name, subset in loaded.items()} == {
        "SUN397": False,
        "mine": True,
    }
    assert not upright(Media(sideways).load("a.png")["image"])
    assert upright(Media(sideways, "seen").load("a.png")["image"])
    row = {"qry_text": "", "qry_img_path": "a.png", "tgt_text": ["p"], "tgt_img_path": [""]}
    shown = []
    watching = model()
    preprocess = watching.preprocess

    def watched(items: list[Any], **settings: Any) -> dict[str, Any]:
        shown.extend(upright(item["image"]) for item in items if isinstance(item, dict))
        return preprocess(items, **settings)

    monkeypatch.setattr(watching, "preprocess", watched)
    for name in ("SUN397", "mine"):
        write_jsonl(tmp_path / "train" / f"{name}.jsonl", [row, row])
    tasks = ["SUN397", "mine"]
    where = {"data": tmp_path / "train", "images": sideways, "out": tmp_path / "out"}
    evaluate(watching, tasks, **where, workers=0)
    assert shown == [False, True]
