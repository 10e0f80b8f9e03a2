"""Still images in RGB: as a person sees them, or as they are stored.

As a person sees them: the orientation tag (EXIF, XMP, HEIF) turns an image upright. 16-bit and
float grey becomes 8-bit. An embedded profile converts colours to sRGB, CMYK and Lab included.

As stored: the image is what Pillow's ``convert("RGB")`` makes of the file, with none of that.

In both, an alpha channel is dropped, as LLaVE's authors do. A file may hold several pictures (GIF,
TIFF, WebP), and the first is taken.
"""

from __future__ import annotations

import io
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast
from urllib.request import Request, urlopen

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError, features
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    SAMPLEFORMAT,
    TILELENGTH,
    TILEWIDTH,
)

from llave import limits
from llave.files import LFS_POINTER
from llave.opening import opened
from llave.printable import shown

try:
    from pillow_heif import register_heif_opener
except ImportError:
    HEIF = False
else:
    register_heif_opener()
    HEIF = True

Pixels = Literal["seen", "stored"]
# Suffixes of image files that Pillow reads. In a folder of images, other files are left out.
IMAGE_SUFFIXES = {
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".hif", ".j2k", ".jfif", ".jp2",
    ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm",
    ".tga", ".tif", ".tiff", ".webp",
}  # fmt: skip
# A file's content decides its format, not its suffix. Pillow's other formats are refused, because
# one of them starts a program (EPS). JPEG includes MPO. TGA has no signature and is tried last.
_WANTED = "AVIF BMP DIB GIF HEIF JPEG JPEG2000 PCX PNG PPM TIFF WEBP TGA"
Image.init()
FORMATS = tuple(name for name in _WANTED.split() if name in Image.OPEN)
# By suffix, what to install where the decoder is missing.
MISSING = {
    suffix: remedy
    for suffixes, there, remedy in (
        ((".heic", ".heif", ".hif"), HEIF, "pip install pillow-heif"),
        ((".avif",), features.check("avif"), "pip install 'pillow>=11.3'"),
    )
    for suffix in suffixes
    if not there
}
REMOTE = ("http://", "https://", "data:")
_SRGB = ImageCms.createProfile("sRGB")


def open_rgb(
    file: str | os.PathLike[str] | bytes | BinaryIO, pixels: Pixels = "seen"
) -> Image.Image:
    """Read an image file in RGB.

    Args:
        file: a path, a file's content, or a file opened for reading. An opened file stays open.
        pixels: ``"seen"`` (default) is as a person sees the image. ``"stored"`` is as it is stored.

    Raises:
        UnidentifiedImageError: it is no image, or of a format that is not read. The message says
            which.
        ValueError: it is no regular file, or has more pixels than LLAVE_MAX_PIXELS
            (``llave.limits``). Decoders raise errors of many other types.
    """
    with _source(file) as source, _image(source) as image:
        return as_seen(image) if pixels == "seen" else image.convert("RGB")


def declared_size(file: str | os.PathLike[str] | bytes | BinaryIO) -> tuple[int, int]:
    """Return the (width, height) in pixels that an image file declares, without decoding it.

    Raises:
        UnidentifiedImageError, ValueError: as in ``open_rgb``.
    """
    with _source(file) as source, _image(source) as image:
        size: tuple[int, int] = image.size
        return size


def _source(file: str | os.PathLike[str] | bytes | BinaryIO) -> Any:
    if isinstance(file, bytes):
        return io.BytesIO(file)
    return opened(file) if isinstance(file, (str, os.PathLike)) else nullcontext(file)


def _image(source: BinaryIO) -> Image.Image:
    """Open an image without reading its pixels, and check its size."""
    most = limits.value("LLAVE_MAX_PIXELS")
    # Pillow has a limit of its own. It is raised only where the user set ours.
    if "LLAVE_MAX_PIXELS" in os.environ and Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, most)
    try:
        image = Image.open(source, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError(_no_image(source)) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{str(error).rstrip('.')} {limits.remedy('LLAVE_MAX_PIXELS')}") from error
    tags = getattr(image, "tag_v2", {})  # TIFF tags: a tile can be larger than the picture
    tile = tags.get(TILEWIDTH, 0) * tags.get(TILELENGTH, 0)
    limits.check("LLAVE_MAX_PIXELS", max(image.width * image.height, tile), "pixels")
    return image


def to_rgb(image: Any, name: str) -> Image.Image:
    """Return one image in RGB as a person sees it.

    Args:
        image: a PIL image, a path, an opened file, a URL or an array. An array is of shape (height,
            width), or uint8 with 3 or 4 channels last. For grey of a dtype other than uint8 and
            uint16, white is 1 (floats only), 255 or 65535, whichever is the smallest that no value
            exceeds.
        name: the argument's name, for the errors.

    Raises:
        ValueError: the file does not exist or cannot be read, or it is no image.
    """
    if isinstance(image, (str, os.PathLike)):
        file: Any = existing(image, name)
        name = f"{name}={file!r}"
    elif isinstance(image, io.BufferedIOBase):
        file, name = image, f"{name}={getattr(image, 'name', 'its content')!r}"
    elif isinstance(image, np.ndarray):
        try:
            image = Image.fromarray(image)
        except TypeError as error:
            raise ValueError(
                f"{name} is an array of shape {image.shape} and type {image.dtype}; "
                "pass uint8 of shape (height, width), or with 3 or 4 channels last"
            ) from error
    elif not isinstance(image, Image.Image):
        raise ValueError(
            f"{name} is a {type(image).__name__}; pass a PIL image, a path, a URL or an array"
        )
    try:
        if isinstance(image, Image.Image):
            return as_seen(image)
        if isinstance(file, str) and file.startswith(REMOTE):
            with urlopen(Request(file, headers={"User-Agent": "llave"}), timeout=60) as response:
                content = response.read(limits.value("LLAVE_MAX_DOWNLOAD_BYTES") + 1)
            limits.check("LLAVE_MAX_DOWNLOAD_BYTES", len(content), "bytes or more")
            return open_rgb(content)
        return open_rgb(file)
    except Exception as error:  # decoders raise errors of many types
        raise ValueError(f"{name} cannot be read: {shown(error)}; pass another image") from error


def existing(path: str | os.PathLike[str], name: str) -> str:
    """Return a path or URL as a string. Raise ValueError where a path is no file.

    Args:
        path: the path or URL.
        name: the argument's name, for the error.
    """
    path = os.fspath(path)
    if not path.startswith(REMOTE) and not Path(path).is_file():
        raise ValueError(f"{name}={path!r} is no file; pass a path that exists")
    return path


def as_seen(image: Image.Image) -> Image.Image:
    """Convert a PIL image to RGB as a person sees it."""
    image.load()
    seen = _srgb(_eight_bits(image), image.info.get("icc_profile"))
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the metadata is damaged; viewers ignore it then
        orientation = 1
    if orientation not in range(2, 9):
        seen.info = {}
        return seen
    # Only this tag is kept. Pillow would write the others again, and it fails at some of them.
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = int(orientation)
    seen.info = {"exif": exif.tobytes()}
    seen = ImageOps.exif_transpose(seen)
    seen.info = {}
    return seen


def _eight_bits(image: Image.Image) -> Image.Image:
    """Convert grey of more than 8 bits or of floats to 8 bits. Other images are unchanged."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # TIFF tags
    bits = tags.get(BITSPERSAMPLE, (32,))[0] if tags else 32
    unsigned = tags.get(SAMPLEFORMAT, (1,))[0] == 1
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        white = 2.0 ** min(bits, 16) - 1  # some scanners write 12 bits
    else:  # such files do not say which value is white
        if tags and image.mode == "I" and bits == 32 and unsigned:
            values = values.view(np.uint32)
        most = np.max(values, initial=0, where=np.isfinite(values))
        full = most if image.mode == "F" else np.iinfo(values.dtype).max
        whites = (1, 255, 65535, full)[image.mode == "I" :]
        white = float(next(white for white in whites if most <= white))
    made = np.empty(values.shape, np.uint8)
    for first in range(0, len(values), rows := max(1, 2**20 // max(1, image.width))):
        some = values[first : first + rows].astype(np.float64)  # a part at a time saves memory
        shares = np.nan_to_num(np.clip(some / white, 0, 1))
        if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:  # 0 is white; Pillow inverts only 8 bits
            shares = 1 - shares
        made[first : first + rows] = np.rint(255 * shares)
    return Image.fromarray(made)


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an 8-bit image to RGB, by its colour profile if it has one."""
    if image.mode in ("P", "PA", "RGBa", "La"):  # palettes with alpha, or premultiplied alpha
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if profile:
        image = image.convert({"1": "L", "LA": "L", "RGBA": "RGB"}.get(image.mode, image.mode))
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if image.mode != "RGB" or "srgb" not in ImageCms.getProfileName(source).lower():
                made = ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
                return cast(Image.Image, made)  # it is None only for a conversion in place
        except (ImageCms.PyCMSError, OSError):
            pass  # The profile is damaged or for other colours. Viewers ignore it then.
    return image.convert("RGB")


def _no_image(source: BinaryIO) -> str:
    """Say why a file is not read as an image."""
    source.seek(0)
    head = source.read(32)
    if not head:
        return "it is empty"
    if head.startswith(LFS_POINTER):
        return "it is a pointer of git-lfs, not yet the file: git lfs pull fetches it"
    if head[4:8] == b"ftyp":
        kind = ".avif" if head[8:11] == b"avi" else ".heic"
        if kind in MISSING:
            return f"it is an {kind[1:].upper()} file: {MISSING[kind]}"
    return "it is damaged, or of a kind that Pillow does not read"
