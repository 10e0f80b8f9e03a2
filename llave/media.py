"""Images and videos that data name by a path, and the inputs that are made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from llave import limits
from llave.files import shown
from llave.images import Pixels, open_rgb
from llave.modeling import text_input
from llave.opening import OutsideError, Root
from llave.video import VIDEO_SUFFIXES, frame_files, load_frames


class BrokenMediaError(ValueError):
    """An image or video file that cannot be read."""


class Media:
    """Images and videos below one folder, by path. Paths that lead out are refused.

    Args:
        root: the folder.
        pixels: ``"stored"``, which is MMEB's way, or ``"seen"`` (``llave.images``).
    """

    def __init__(self, root: str | Path | None, pixels: Pixels = "stored") -> None:
        self._root = None if root is None else Root(root, "images")
        self.pixels = pixels

    def path(self, name: str) -> Path:
        """The file or folder of frames of a path as it stands in the data.

        Raises:
            ValueError: there is no folder, or the path leaves it.
            FileNotFoundError: no such file, nor could there be.
        """
        try:
            return self._known().path(name)
        except FileNotFoundError as error:
            if self._packed:
                raise FileNotFoundError(f"{error}; it has archives to unpack") from error
            raise

    def open(self, path: Path) -> BinaryIO:
        """A file that ``path`` gave, or one in a folder that it gave, opened for reading.

        Raises:
            ValueError: it leaves the folder or is no regular file; OSError: as ``open``.
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
        """Whether the folder has archives, as large sets of images are published."""
        ends = (".zip", ".tar", ".tar.gz")
        places = [self._root.folder.glob(deep) for deep in ("*", "*/*")] if self._root else []
        return any(path.name.endswith(ends) for place in places for path in place)

    def load(self, name: str) -> dict[str, Any]:
        """The part of an input that shows it: ``image``, in RGB, or ``video``, a list of frames.

        Raises:
            ValueError, FileNotFoundError: as in ``path``; BrokenMediaError: it cannot be read.
        """
        path = self.path(name)
        # The name's suffix: in the hub's cache the file itself has none.
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


def make_input(text: str, path: str, media: Media) -> str | dict[str, Any]:
    """What ``model.encode`` takes: the text, or a dict with the opened image or video.

    ``<|image_1|>`` stays in the text: the model's chat template takes it out.
    """
    if not path:
        return text_input(text)
    made = media.load(path)
    return made | {"text": text} if text else made


def pixel_count(item: str | dict[str, Any]) -> int:
    """How many pixels the image or the frames of an input have."""
    return sum(picture.width * picture.height for picture in _pictures(item))


def input_batches(
    items: Sequence[tuple[str, str]], media: Media, size: int
) -> Iterator[tuple[list[tuple[str, str]], list[Any]]]:
    """(text, path) pairs and what ``make_input`` makes of them, at most ``size`` at a time.

    A batch ends early where its images and frames have LLAVE_MAX_PIXELS or more.
    """
    most = limits.value("LLAVE_MAX_PIXELS")
    taken, made, pixels = [], [], 0
    for item in items:
        taken.append(item)
        made.append(make_input(*item, media))
        pixels += pixel_count(made[-1])
        if len(taken) == size or pixels >= most:
            yield taken, made
            taken, made, pixels = [], [], 0
    if taken:
        yield taken, made


def _pictures(item: str | dict[str, Any]) -> list[Any]:
    parts = {} if isinstance(item, str) else item
    return [parts["image"]] if "image" in parts else list(parts.get("video", ()))


def content_id(item: str | dict[str, Any]) -> int:
    """63 bits of what an input says and shows, its text and pixels, in every process and run."""
    parts = {"text": item} if isinstance(item, str) else item
    digest = hashlib.blake2b(json.dumps(parts.get("text", "")).encode(), digest_size=8)
    for picture in _pictures(item):
        digest.update(b"%d %d " % picture.size + picture.tobytes())
    return int.from_bytes(digest.digest(), "big") >> 1
