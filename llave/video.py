"""Frames of a video as LLaVE takes them: about 3 a second, at most 32, over its whole length."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_utils import load_image

FRAME_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_REMOTE = ("http://", "https://", "data:")


def load_frames(video: Any, *, fps: float = 3.0, limit: int = 32) -> list[Image.Image]:
    """Frames spread uniformly over a video, in RGB, the first and the last among them.

    Args:
        video: a video file, decoded by PyAV, which keeps the taken frames only; a folder of frame
            images, in natural order (2 before 10), other files ignored; a list of frames, each as
            :func:`to_rgb` takes it; or an array of shape (frames, height, width, channels).
        fps: frames taken per second of a video file, default the paper's. Where there is no
            duration, in the other kinds or a file without a frame rate, only ``limit`` counts.
        limit: frames at most, default the paper's.

    Raises:
        ValueError: there is no such file or folder, it cannot be read or has no frames, it is a
            URL or another kind of thing, or ``fps`` or ``limit`` is not positive.
        ImportError: ``video`` is a file and PyAV is not installed.
    """
    if fps <= 0 or limit < 1:
        raise ValueError(f"fps={fps!r} must be above 0 and limit={limit!r} at least 1")
    if isinstance(video, (str, os.PathLike)):
        path = os.fspath(video)
        if path.startswith(_REMOTE):
            raise ValueError(f"video={path!r} is a URL; download it and pass the file")
        if not Path(path).is_dir():
            return _decode(_existing(path, "video"), fps, limit)
        files = (p for p in Path(path).iterdir() if p.suffix.lower() in FRAME_SUFFIXES)
        frames: list[Any] = sorted((p for p in files if p.name[0] != "."), key=_natural)
    elif isinstance(video, (list, tuple)) or (isinstance(video, np.ndarray) and video.ndim == 4):
        path, frames = type(video).__name__, list(video)
    else:
        raise ValueError(
            f"video is a {type(video).__name__}; pass a file, a folder of images, a list of frames "
            "or an array (frames, height, width, channels)"
        )
    if not frames:
        raise ValueError(f"video={path!r} holds no images; pass at least one frame")
    return [to_rgb(frames[i], f"video[{i}]") for i in uniform_indices(len(frames), limit)]


def uniform_indices(total: int, count: int) -> list[int]:
    """``count`` of ``range(total)``, or all where there are fewer, uniformly spread and increasing.

    The first is 0 and, of more than one, the last ``total - 1``. ValueError: one is below 1.
    """
    if total < 1 or count < 1:
        raise ValueError(f"total={total} and count={count} must be at least 1")
    count = min(count, total)
    # Rounded down: steps are at least 1, so no two become equal, as halves to even could.
    return [i * (total - 1) // max(count - 1, 1) for i in range(count)]


def to_rgb(image: Any, name: str) -> Image.Image:
    """One image in RGB, an alpha channel dropped.

    Args:
        image: PIL, path, URL, or a uint8 array (height, width), or with 3 or 4 channels last.
        name: of the argument, for the errors.

    Raises:
        ValueError: the file does not exist or cannot be read, or it is no image.
    """
    if isinstance(image, (str, os.PathLike)):
        image = _existing(image, name)
        name = f"{name}={image!r}"
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
        return load_image(image)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error}; pass another image") from error


def open_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """An image file's pixels as they are stored, in RGB. Raises what its decoder raises."""
    with Image.open(path) as image:
        return image.convert("RGB")


def _existing(path: str | os.PathLike[str], name: str) -> str:
    path = os.fspath(path)
    if not path.startswith(_REMOTE) and not Path(path).is_file():
        raise ValueError(f"{name}={path!r} is no file; pass a path that exists")
    return path


def _natural(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"([0-9]+)", path.name)  # text and digits in turn
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


def _decode(path: str, fps: float, limit: int) -> list[Image.Image]:
    try:
        import av
    except ImportError as error:
        raise ImportError(f"video={path!r} needs PyAV to be decoded: pip install av") from error
    frames = []
    try:
        with av.open(path) as container:
            rate = container.streams.video[0].average_rate if container.streams.video else None
            # Counted: the headers of Matroska, WebM and MPEG-TS do not say how many frames follow.
            packets = container.demux(video=0) if container.streams.video else ()
            total = sum(1 for packet in packets if packet.size and not packet.is_discard)
        if total:
            count = min(limit, max(1, round(float(total / rate) * fps))) if rate else limit
            indices = uniform_indices(total, count)
            with av.open(path) as container:  # again, since not every container can be rewound
                container.streams.video[0].thread_type = "AUTO"
                for i, frame in enumerate(container.decode(video=0)):
                    if i in indices:
                        frames.append(frame.to_image())
                    if i == indices[-1]:
                        break
    except av.FFmpegError as error:
        raise ValueError(f"video={path!r} cannot be decoded: {error}; is it whole?") from error
    if not frames:
        raise ValueError(f"video={path!r} has no frames; pass a file that plays")
    return frames
