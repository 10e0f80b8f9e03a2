"""Images and videos named by a path, and the inputs made from them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("sentence_transformers", "PIL"):
    pytest.importorskip(needed)

from PIL import Image  # noqa: E402

from llave.media import BrokenMediaError, Media, content_id, make_input  # noqa: E402

ROOT = Path(__file__).parents[2]


def test_what_an_input_is(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    media = Media(tmp_path)
    assert make_input("words", "", media) == "words"
    assert set(make_input("words", "1.png", media)) == {"text", "image"}
    assert set(make_input("", "1.png", media)) == {"image"}


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA", "1", "CMYK"])
def test_images_become_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "tiff" if mode == "CMYK" else "png"
    Image.new(mode, (4, 4)).save(tmp_path / f"other.{suffix}")
    opened = Media(tmp_path).load(f"other.{suffix}")["image"]
    assert (opened.mode, opened.size) == ("RGB", (4, 4))


def test_content_ids_are_the_same_in_every_process() -> None:
    code = (
        "from PIL import Image; from llave.media import content_id\n"
        "print(content_id({'text': 'a cat', 'image': Image.new('RGB', (3, 2), 'teal')}))"
    )
    made = content_id({"text": "a cat", "image": Image.new("RGB", (3, 2), "teal")})
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == made


def test_content_ids_tell_contents_apart() -> None:
    shapes = (((4, 2), "red"), ((2, 4), "red"), ((4, 2), "blue"))
    images = [Image.new("RGB", size, colour) for size, colour in shapes]
    contents = ["a", "ab", "é", "", *({"image": image} for image in images)]
    contents += [{"image": images[0], "text": text} for text in ("a", "b")]
    ids = [content_id(content) for content in contents]
    assert len(set(ids)) == len(ids)
    assert all(0 <= number < 2**63 for number in ids)
    assert content_id("a") == content_id({"text": "a"})


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (40, 0, 0)).save(tmp_path / "1.png")
    (tmp_path / "again.png").symlink_to(tmp_path / "1.png")
    opened = Media(tmp_path).load("again.png")["image"]
    assert opened.getpixel((0, 0)) == (40, 0, 0)


def test_a_text_that_looks_like_an_address_stays_a_text(tmp_path: Path) -> None:
    address = "http://example.org/a.jpg"
    assert make_input(address, "", Media(tmp_path)) == {"text": address}


def test_videos_are_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "cut.mp4").write_bytes(b"no video")
    with pytest.raises(BrokenMediaError, match=r"video 'cut\.mp4' in .* cannot be read"):
        Media(tmp_path).load("cut.mp4")
    with pytest.raises(FileNotFoundError, match=r"^path 'gone\.mp4' is not in"):
        Media(tmp_path).load("gone.mp4")
    with pytest.raises(ValueError, match=r"^path '\.\./a\.mp4' leaves the folder .* images says"):
        Media(tmp_path).load("../a.mp4")
    with pytest.raises(ValueError, match=r"^an image or video needs the folder .*; pass images="):
        Media(None).load("a.mp4")
