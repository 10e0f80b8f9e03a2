"""Load the images and videos that data name by a path, and make model inputs of them."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from llave.images import Pixels, declared_size, open_rgb
from llave.modeling import text_input
from llave.opening import OutsideError, Root
from llave.printable import shown
from llave.video import VIDEO_SUFFIXES, frame_files, load_frames


class BrokenMediaError(ValueError):
    """An image or video file that cannot be read."""


class Media:
    """Images and videos in one folder, by path. Paths that lead out of it are refused.

    Args:
        root: the folder.
        pixels: ``"stored"``, as MMEB does, or ``"seen"`` (``llave.images``).
    """

    def __init__(self, root: str | Path | None, pixels: Pixels = "stored") -> None:
        self._root = None if root is None else Root(root, "images")
        self.pixels = pixels

    def path(self, name: str) -> Path:
        """Return the file, or the folder of frames, that a path in the data names.

        Raises:
            ValueError: ``root`` is None, or the path leaves it.
            FileNotFoundError: there is no such file, or the path is not a possible one.
        """
        try:
            return self._known().path(name)
        except FileNotFoundError as error:
            if self._packed:
                raise FileNotFoundError(f"{error}; it has archives to unpack") from error
            raise

    def open(self, path: Path) -> BinaryIO:
        """Open a file for reading.

        Args:
            path: a file that ``self.path`` returned, or one in a folder that it returned.

        Raises:
            ValueError: it leaves the folder or is no regular file.
            OSError: as in ``open``.
        """
        return self._known().open(path)

    def _known(self) -> Root:
        if self._root is None:
            raise ValueError(
                "an image or video needs the folder that its path is relative to; pass images="
            )
        return self._root

    @cached_property
    def _packed(self) -> bool:
        """Whether the folder has archives. Large sets of images are published as such."""
        ends = (".zip", ".tar", ".tar.gz")
        places = [self._root.folder.glob(deep) for deep in ("*", "*/*")] if self._root else []
        return any(path.name.endswith(ends) for place in places for path in place)

    def load(self, name: str) -> dict[str, Any]:
        """Return ``{"image": RGB image}`` or ``{"video": list of frames}`` for a path in the data.

        Raises:
            ValueError, FileNotFoundError: as in ``path``.
            BrokenMediaError: it cannot be read.
        """
        path = self.path(name)
        # The suffix is taken from the name. In the hub's cache the file itself has none.
        kind = "video" if Path(name).suffix.lower() in VIDEO_SUFFIXES or path.is_dir() else "image"
        try:
            with ExitStack() as stack:
                if path.is_dir():
                    opened = [stack.enter_context(self.open(file)) for file in frame_files(path)]
                    return {kind: load_frames(opened)}
                file = stack.enter_context(self.open(path))
                return {kind: load_frames(file) if kind == "video" else open_rgb(file, self.pixels)}
        except (OutsideError, ImportError):
            raise
        except Exception as error:  # decoders raise errors of many types
            message = f"{kind} {name!r} in {self._known().folder} cannot be read: {shown(error)}"
            raise BrokenMediaError(message) from error

    def size(self, name: str) -> tuple[int, int] | None:
        """Return the (width, height) that an image declares. None for a video or a broken file."""
        try:
            with self.open(self.path(name)) as file:
                return declared_size(file)
        except Exception:  # loading it reports the error
            return None


def make_input(text: str, path: str, media: Media) -> str | dict[str, Any]:
    """Return an input for ``model.encode``: the text, or a dict with the opened image or video.

    ``<|image_1|>`` stays in the text. The model's chat template handles it.
    """
    if not path:
        return text_input(text)
    made = media.load(path)
    return made | {"text": text} if text else made


def pixel_count(item: Any) -> int:
    """Return the number of pixels in an input's images and frames."""
    return sum(picture.width * picture.height for picture in pictures(item))


def pictures(item: Any) -> list[Image.Image]:
    """Return the opened images and frames of an input for ``encode``."""
    parts = item if isinstance(item, dict) else {"image": item}
    image = parts.get("image")
    listed = [*(image if isinstance(image, list) else [image]), *parts.get("video", ())]
    return [picture for picture in listed if isinstance(picture, Image.Image)]


def content_id(item: str | dict[str, Any]) -> int:
    """Return a 63-bit hash of an input's text and pixels, the same in every process and run."""
    parts = {"text": item} if isinstance(item, str) else item
    digest = hashlib.blake2b(json.dumps(parts.get("text", "")).encode(), digest_size=8)
    for picture in pictures(item):
        digest.update(b"%d %d " % picture.size + picture.tobytes())
    return int.from_bytes(digest.digest(), "big") >> 1
