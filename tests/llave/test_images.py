"""Formats, modes, depths and orientations of images, compared with the original picture.

Pixels "as seen" are what an image viewer shows. Pixels "as stored" are what Pillow's
``convert("RGB")`` gives. MMEB's published scores used the latter.
"""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for needed in ("sentence_transformers", "PIL"):
    pytest.importorskip(needed)

from PIL import Image, ImageCms, features  # noqa: E402

from llave import images  # noqa: E402
from llave.images import IMAGE_SUFFIXES, as_seen, open_rgb, to_rgb  # noqa: E402

DOWN, RIGHT = np.mgrid[0:24, 0:40]
COLOURS = np.stack([6 * RIGHT, 10 * DOWN, 250 - 3 * RIGHT - 3 * DOWN], -1).astype(np.uint8)
PICTURE = Image.fromarray(COLOURS)
GREY = np.asarray(PICTURE.convert("L"))
LOSSY = 16  # lossy coding may change a value by this much
EXACT = {"quality": 98}
needs_heif = pytest.mark.skipif(not images.HEIF, reason="pillow-heif is not installed")
needs_avif = pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")


def difference(found: Image.Image, expected: Image.Image) -> int:
    assert (found.mode, found.size) == ("RGB", expected.size)
    pair = (np.asarray(image.convert("RGB")).astype(int) for image in (found, expected))
    return int(np.abs(next(pair) - next(pair)).max())


def saved(image: Image.Image, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


# The modes that each format can hold.
MODES = {
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("1", "L", "P"),
    "JPEG": ("1", "L", "RGB", "CMYK", "YCbCr"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr"),
    "MPO": ("L", "RGB", "CMYK"),
    "PCX": ("1", "L", "P", "RGB"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "PPM": ("1", "L", "RGB"),
    "TGA": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"),
    "WEBP": ("RGB", "RGBA"),
    "AVIF": ("L", "LA", "RGB", "RGBA"),
    "HEIF": ("L", "RGB", "RGBA"),
}
MARKS = {"HEIF": needs_heif, "AVIF": needs_avif}


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        pytest.param(kind, mode, marks=[MARKS[kind]] if kind in MARKS else [])
        for kind, modes in MODES.items()
        for mode in modes
    ],
)
def test_formats_and_modes(kind: str, mode: str) -> None:
    image = PICTURE.convert(mode)
    lossless: dict[str, dict[str, Any]] = {
        "WEBP": {"lossless": True},
        "JPEG2000": {"irreversible": False},
        "TIFF": {"compression": "tiff_lzw"},
    }
    data = saved(image, kind, **lossless.get(kind, EXACT if kind not in ("GIF", "TGA") else {}))
    lossy = LOSSY if kind in ("JPEG", "MPO", "AVIF", "HEIF") else 3 if mode == "YCbCr" else 0
    expected = image.convert("RGBA") if mode == "PA" else image
    assert difference(open_rgb(data), expected) <= lossy
    assert difference(open_rgb(data, "stored"), expected) <= lossy


def deep(depth: str) -> np.ndarray:
    """The grey picture with more than 8 bits a value."""
    return {
        "u2": GREY.astype("<u2") * 257,
        "i4": GREY.astype("<i4") * 257,
        "f4": GREY.astype("<f4") / 255,
    }[depth]


@pytest.mark.parametrize(
    ("kind", "depth"),
    [
        ("PNG", "u2"), ("PPM", "u2"), ("PPM", "i4"), ("PPM", "f4"), ("JPEG2000", "u2"),
        ("TIFF", "u2"), ("TIFF", "i4"), ("TIFF", "f4"),
    ],
)  # fmt: skip
def test_grey_of_more_than_8_bits(kind: str, depth: str) -> None:
    image = Image.fromarray(deep(depth))
    expected = Image.fromarray(GREY)
    assert difference(open_rgb(saved(image, kind)), expected) == 0
    assert difference(as_seen(image), expected) == 0
    assert difference(to_rgb(deep(depth), "image"), expected) == 0
    found = open_rgb(saved(image, kind), "stored")
    assert difference(found, image.convert("RGB")) == 0


@pytest.mark.parametrize(
    ("mode", "compression"),
    [
        ("1", "group3"), ("1", "group4"), ("1", "packbits"), ("L", "tiff_lzw"), ("L", "jpeg"),
        ("L", "tiff_adobe_deflate"), ("RGB", "jpeg"), ("RGB", "tiff_lzw"), ("CMYK", "tiff_lzw"),
        ("P", "tiff_lzw"), ("I;16", "tiff_lzw"), ("I;16", "tiff_adobe_deflate"),
    ],
)  # fmt: skip
def test_compressed_scans(mode: str, compression: str) -> None:
    image = Image.fromarray(deep("u2")) if mode == "I;16" else PICTURE.convert(mode)
    expected = Image.fromarray(GREY) if mode == "I;16" else image
    found = open_rgb(saved(image, "TIFF", compression=compression))
    assert difference(found, expected) <= (40 if compression == "jpeg" else 0)


def tiff(values: np.ndarray, bits: int, black: int = 1, kind: int = 1, order: str = "<") -> bytes:
    """A TIFF file of one strip from (height, width[, channels]). ``black``: the photometric tag."""
    height, width, *channels = values.shape
    count = channels[0] if channels else 1
    if bits == 12:  # two values in three bytes
        flat = values.reshape(-1, 2).astype(np.uint32)
        whole = flat[:, 0] << 12 | flat[:, 1]
        data = np.stack([whole >> 16, whole >> 8 & 255, whole & 255], -1).astype(np.uint8)
    else:
        data = values.astype(values.dtype.newbyteorder(order))
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 2 if channels else black, 273: 8}
    tags |= {277: count, 278: height, 279: len(data.tobytes()), 339: kind}
    pixels = data.tobytes() + b"\0" * (data.nbytes % 2)
    file = b"II*\0" if order == "<" else b"MM\0*"
    more = 8 + len(pixels)  # where the bits of three channels are stored
    file += struct.pack(f"{order}I", more + 2 * count) + pixels
    file += struct.pack(f"{order}{count}H", *[bits] * count)
    file += struct.pack(f"{order}H", len(tags))
    for tag, value in tags.items():
        if tag == 258 and count > 1:
            file += struct.pack(f"{order}HHII", tag, 3, count, more)
        else:
            file += struct.pack(f"{order}HHII", tag, 4, 1, value)
    return file + b"\0" * 4


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(tiff(deep("u2"), 16), id="16 bits"),
        pytest.param(tiff(deep("u2"), 16, order=">"), id="16 bits, big-endian"),
        pytest.param(tiff(65535 - deep("u2"), 16, black=0), id="16 bits, 0 is white"),
        pytest.param(tiff(GREY.astype(np.uint32) * 4095 // 255, 12), id="12 bits"),
        pytest.param(tiff(GREY, 8), id="8 bits"),
        pytest.param(tiff(255 - GREY, 8, black=0), id="8 bits, 0 is white"),
        pytest.param(tiff(deep("f4"), 32, kind=3), id="floats"),
        pytest.param(tiff(deep("f4"), 32, kind=3, order=">"), id="floats, big-endian"),
        pytest.param(tiff(1 - deep("f4"), 32, black=0, kind=3), id="floats, 0 is white"),
        pytest.param(tiff(deep("f4") * 255, 32, kind=3), id="floats to 255"),
        pytest.param(tiff(deep("i4"), 32, kind=2), id="signed"),
        pytest.param(tiff(GREY.astype("<u4") * 16843009, 32), id="unsigned, all 32 bits"),
    ],
)
def test_what_scanners_write(data: bytes) -> None:
    assert difference(open_rgb(data), Image.fromarray(GREY)) == 0


@pytest.mark.parametrize("order", ["<", ">"])
def test_colours_of_16_bits(order: str) -> None:
    wide = COLOURS.astype(np.uint16) * 257
    assert difference(open_rgb(tiff(wide, 16, order=order)), PICTURE) == 0

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in wide)
    header = struct.pack(">IIBBBBB", 40, 24, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    png += chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    assert difference(open_rgb(png), PICTURE) == 0


def test_values_without_a_number_are_black() -> None:
    values = deep("f4").copy()
    values[0, 0], values[0, 1], values[0, 2] = np.nan, np.inf, -np.inf
    found = to_rgb(values, "image")
    assert [found.getpixel((x, 0))[0] for x in range(3)] == [0, 255, 0]


def turned(orientation: int) -> Image.Image:
    """The picture as a camera held in that orientation stores it."""
    way = Image.Transpose
    undo = {
        2: way.FLIP_LEFT_RIGHT, 3: way.ROTATE_180, 4: way.FLIP_TOP_BOTTOM, 5: way.TRANSPOSE,
        6: way.ROTATE_90, 7: way.TRANSVERSE, 8: way.ROTATE_270,
    }.get(orientation)  # fmt: skip
    return PICTURE if undo is None else PICTURE.transpose(undo)


def exif(orientation: Any) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def xmp(orientation: int) -> bytes:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
        'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
        f'tiff:Orientation="{orientation}"/></rdf:RDF></x:xmpmeta>'
    ).encode()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "kind", ["JPEG", "MPO", "PNG", "TIFF", "WEBP", pytest.param("AVIF", marks=needs_avif)]
)
def test_orientation(kind: str, orientation: int) -> None:
    data = saved(turned(orientation), kind, exif=exif(orientation), **EXACT)
    lossy = LOSSY + 24 if kind == "WEBP" else LOSSY
    assert difference(open_rgb(data), PICTURE) <= lossy
    # Pillow always turns the pixels of a TIFF file.
    stored = PICTURE if kind == "TIFF" else turned(orientation)
    assert difference(open_rgb(data, "stored"), stored) <= lossy


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_in_xmp(orientation: int) -> None:
    data = saved(turned(orientation), "JPEG", xmp=xmp(orientation), **EXACT)
    assert difference(open_rgb(data), PICTURE) <= LOSSY


@needs_heif
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_heif(orientation: int) -> None:
    """HEIF has its own orientation field. The Exif tag does not count."""
    data = saved(turned(orientation), "HEIF", exif=exif(orientation).tobytes(), **EXACT)
    assert difference(open_rgb(data), PICTURE) <= LOSSY


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "P", "I;16"])
def test_every_mode_is_turned(mode: str) -> None:
    image = Image.fromarray(deep("u2")) if mode == "I;16" else PICTURE.convert(mode)
    expected = as_seen(image)
    assert expected.size == (40, 24)
    quarter = image.transpose(Image.Transpose.ROTATE_90)
    quarter.info["exif"] = exif(6).tobytes()
    assert difference(as_seen(quarter), expected) == 0


def exif_of_type(kind: int) -> bytes:
    """An orientation tag with another type than TIFF's SHORT."""
    entry = struct.pack("<HHHII", 1, 0x112, kind, 1, 6)
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + entry + bytes(4)


@pytest.mark.parametrize(
    "tags",
    [b"Exif\0\0no tags at all", exif(0), exif(9), *map(exif_of_type, (1, 2, 7))],
    ids=["damaged", "0", "9", "byte", "ascii", "undefined"],
)
def test_damaged_orientations_are_passed_over(tags: Any) -> None:
    assert difference(open_rgb(saved(PICTURE, "JPEG", exif=tags, **EXACT)), PICTURE) <= LOSSY


def wide_gamut() -> ImageCms.ImageCmsProfile:
    """A profile with red and green swapped, so that it differs clearly from sRGB."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = data.index(b"rXYZ"), data.index(b"gXYZ")
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    for name in (b"sRGB", "sRGB".encode("utf-16-be")):
        data = bytearray(bytes(data).replace(name, name[::-1]))
    return ImageCms.ImageCmsProfile(io.BytesIO(bytes(data)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_profiles_give_the_colours_a_viewer_shows(kind: str) -> None:
    profile = wide_gamut().tobytes()
    red = saved(Image.new("RGB", (8, 8), (200, 0, 0)), kind, icc_profile=profile, quality=98)
    seen, stored = (open_rgb(red, way).getpixel((4, 4)) for way in ("seen", "stored"))
    assert np.abs(np.subtract(seen, (0, 200, 0))).max() <= 4
    assert np.abs(np.subtract(stored, (200, 0, 0))).max() <= 4


def test_other_profiles_change_nothing() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for mode in ("L", "LA", "1", "P", "RGB", "RGBA", "CMYK"):
        for profile in (srgb, b"no profile", b""):
            image = PICTURE.convert(mode)
            image.info["icc_profile"] = profile
            if mode in ("RGB", "P", "RGBA") or profile != srgb:
                assert difference(as_seen(image), image) == 0


def test_lab() -> None:
    lab = PICTURE.convert("LAB")
    assert difference(open_rgb(saved(lab, "TIFF")), lab.convert("RGB")) <= 1


def test_alpha_is_dropped_not_laid_on_a_colour() -> None:
    clear = PICTURE.convert("RGBA")
    clear.putalpha(0)
    for way in ("seen", "stored"):
        assert difference(open_rgb(saved(clear, "PNG"), way), PICTURE) == 0


def test_the_first_picture_of_several() -> None:
    more = [Image.new("RGB", (40, 24), "red")]
    for kind in ("TIFF", "PNG", "MPO"):
        data = saved(PICTURE, kind, save_all=True, append_images=more, **EXACT)
        assert difference(open_rgb(data), PICTURE) <= LOSSY


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull fetches it"),
        (b"no image", "it is damaged, or of a kind that Pillow does not read"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 8, "it is an HEIC file: pip install pillow-heif"),
        (b"\0\0\0\x18ftypavif" + b"\0" * 8, "it is an AVIF file: pip install 'pillow>=11.3'"),
    ],
)
def test_files_that_are_no_image_say_why(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(images.MISSING, ".heic", "pip install pillow-heif")
    monkeypatch.setitem(images.MISSING, ".avif", "pip install 'pillow>=11.3'")
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    for file in (path, content):
        with pytest.raises(images.UnidentifiedImageError, match=message):
            open_rgb(file)
    with pytest.raises(ValueError, match=r"image='.*photo\.jpg' cannot be read: .*" + message):
        to_rgb(path, "image")


def test_addresses_of_data() -> None:
    address = (
        "data:image/png;base64,"
        + base64.b64encode(saved(Image.fromarray(deep("u2")), "PNG")).decode()
    )
    assert difference(to_rgb(address, "image"), Image.fromarray(GREY)) == 0


def test_suffixes_are_of_formats_that_are_read() -> None:
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    assert IMAGE_SUFFIXES - images.MISSING.keys() <= known | {".mpo"}
