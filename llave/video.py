"""Sample a video's frames as LLaVE does: about 3 a second, at most 32, over its whole length."""

from __future__ import annotations

import io
import os
import re
from bisect import bisect_right
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image

from llave import limits
from llave.containers import DEMUXERS, refuse_inflated
from llave.files import left_behind
from llave.images import IMAGE_SUFFIXES, REMOTE, existing, to_rgb
from llave.opening import opened
from llave.printable import shown

VIDEO_SUFFIXES = {
    ".3g2", ".3gp", ".asf", ".avi", ".f4v", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpe",
    ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv",
}  # fmt: skip
# Pillow's transpose for each display matrix. The key (a, b, c, d) is a matrix that maps the x axis
# to (a, b) and the y axis to (c, d).
_TURNS = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


def load_frames(video: Any, *, fps: float = 3.0, limit: int = 32) -> list[Image.Image]:
    """Return frames spread uniformly over a video, in RGB. They include the first and the last.

    Frames are as a person sees them: turned upright, in square pixels, in the file's own colours.

    Args:
        video: a video file, as a path or opened for reading; a folder of frame images
            (:func:`frame_files`); a list of frames, each as :func:`llave.images.to_rgb` takes it;
            or an array of shape (frames, height, width, channels). PyAV decodes a file, and only
            the sampled frames stay in memory.
        fps: frames to take per second of a video file, default the paper's 3. They are the frames
            shown at moments spread uniformly over its time, each at most once. Only ``limit``
            counts for the other kinds, and for a file with neither times nor a rate.
        limit: the most frames to take, default the paper's 32.

    Raises:
        ValueError: there is no such file or folder, it cannot be read or has no frames, it is a
            URL or another kind of thing, it is above a limit (``llave.limits``), or ``fps`` or
            ``limit`` is not positive.
        ImportError: ``video`` is a file and PyAV is not installed.
    """
    if fps <= 0 or limit < 1:
        raise ValueError(f"fps={fps!r} must be above 0 and limit={limit!r} at least 1")
    if isinstance(video, (str, os.PathLike)):
        path = os.fspath(video)
        if path.startswith(REMOTE):
            raise ValueError(f"video={path!r} is a URL; download it and pass the file")
        if not Path(path).is_dir():
            with opened(existing(path, "video")) as file:
                return _decode(file, path, fps, limit)
        frames: list[Any] = list(frame_files(path, limit))
    elif isinstance(video, io.BufferedIOBase):
        path = str(getattr(video, "name", "its content"))
        return _decode(cast(BinaryIO, video), path, fps, limit)
    elif isinstance(video, (list, tuple)) or (isinstance(video, np.ndarray) and video.ndim == 4):
        path, frames = type(video).__name__, list(video)
    else:
        raise ValueError(
            f"video is a {type(video).__name__}; pass a file, a folder of images, a list of frames "
            "or an array (frames, height, width, channels)"
        )
    if not frames:
        raise ValueError(f"video={path!r} holds no images; pass at least one frame")
    made, pixels = [], 0
    for i in uniform_indices(len(frames), limit):
        made.append(to_rgb(frames[i], f"video[{i}]"))
        pixels += made[-1].width * made[-1].height
        limits.check("LLAVE_MAX_VIDEO_PIXELS", pixels, "pixels in the frames taken")
    return made


def frame_files(folder: str | os.PathLike[str], limit: int = 32) -> list[Path]:
    """Return the images to take from a folder of frames, in natural order (2 before 10).

    Other files are ignored. From more than ``limit`` images, ``limit`` are taken uniformly.

    Raises:
        ValueError: there are none.
    """
    files = (p for p in Path(folder).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    frames = sorted((p for p in files if not left_behind(p.name)), key=_natural)
    if not frames:
        raise ValueError(f"video={os.fspath(folder)!r} holds no images; pass at least one frame")
    return [frames[i] for i in uniform_indices(len(frames), limit)]


def uniform_indices(total: int, count: int) -> list[int]:
    """Return ``count`` indices spread uniformly over ``range(total)``, or all if there are fewer.

    They increase strictly. The first is 0. If there are several, the last is ``total - 1``.

    Raises:
        ValueError: an argument is below 1.
    """
    if total < 1 or count < 1:
        raise ValueError(f"total={total} and count={count} must be at least 1")
    count = min(count, total)
    # Indices are rounded down. Steps are at least 1, so all differ. With rounding of halves to
    # even, two could be equal.
    return [i * (total - 1) // max(count - 1, 1) for i in range(count)]


def _natural(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"([0-9]+)", path.name)  # text and digits in turn
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


def _decode(file: BinaryIO, path: str, fps: float, limit: int) -> list[Image.Image]:
    try:
        import av
    except ImportError as error:
        raise ImportError(f"video={path!r} needs PyAV to be decoded: pip install av") from error
    most = limits.value("LLAVE_MAX_VIDEO_PIXELS") // 16
    # The frame size may change within a file, so FFmpeg gets a bound for every frame. Decoders add
    # margins, so the bound is above the limit.
    bound = {"max_pixels": str(2 * most + 2**16)}
    # FFmpeg gets the opened file and cannot open any other.
    settings: dict[str, Any] = {
        "options": bound | {"format_whitelist": DEMUXERS, "protocol_whitelist": ""},
        "metadata_errors": "ignore",
    }
    frames: list[Image.Image] = []
    try:
        refuse_inflated(file)
        with av.open(file, **settings) as container:
            videos = container.streams.video
            # The container knows its main video stream. Others are covers and thumbnails.
            number = videos.index(container.streams.best("video")) if len(videos) > 1 else 0
            # Frames are counted, because the headers of Matroska, WebM and MPEG-TS have no count.
            times: list[tuple[int | None, int | None]] = []
            ratio, tick = Fraction(1), Fraction(1)
            for packet in container.demux(video=number) if videos else ():
                if packet.size and not packet.is_discard:
                    tick, ratio = packet.time_base, packet.stream.sample_aspect_ratio or Fraction(1)
                    times.append((packet.pts, packet.duration))
                    limits.check("LLAVE_MAX_VIDEO_FRAMES", len(times), "frames or more")
            rate = videos[number].average_rate if videos else None
        if times:
            indices = _indices(times, tick, rate, fps, limit)
            file.seek(0)
            with av.open(file, **settings) as container:  # not every container can seek back
                stream = container.streams.video[number]
                _check_frame(stream.width, stream.height, ratio, len(indices))
                stream.codec_context.options = bound
                # Frame threading keeps a frame per thread in memory, so large frames do not use it.
                large = stream.width * stream.height > most // 2
                stream.thread_type = "SLICE" if large else "AUTO"
                for i, frame in enumerate(container.decode(video=number)):
                    if i in indices:
                        width = max(1, round(frame.width * float(ratio)))
                        _check_frame(width, frame.height, 1, len(indices))
                        frames.append(_upright(frame, frame.to_image(width=width)))
                    if i == indices[-1]:
                        break
    except (av.FFmpegError, UnicodeError) as error:
        raise ValueError(
            f"video={path!r} cannot be decoded: {shown(error)}; is it whole, and of a kind that is "
            "read?"
        ) from error
    except (ValueError, OSError, OverflowError) as error:
        raise ValueError(f"video={path!r} cannot be decoded: {shown(error)}") from error
    if not frames:
        raise ValueError(f"video={path!r} has no frames; pass a file that plays")
    return frames


def _check_frame(width: int, height: int, ratio: Fraction | int, count: int) -> None:
    """Raise ValueError where frames of a size, at least 16 of them, are above the pixel limit.

    Args:
        width, height: the frame size in pixels.
        ratio: the pixels' aspect ratio. Above 1 it widens the frames.
        count: the number of frames.
    """
    pixels = round(width * max(ratio, 1)) * height * max(count, 16)
    limits.check("LLAVE_MAX_VIDEO_PIXELS", pixels, "pixels in the frames taken")


def _indices(
    packets: list[tuple[int | None, int | None]],
    tick: Fraction,
    rate: Fraction | None,
    fps: float,
    limit: int,
) -> list[int]:
    """Return the indices of the frames shown at moments spread uniformly over a video's time.

    Args:
        packets: each frame's time and duration in ticks, in the file's order.
        tick: the length of a tick in seconds.
        rate: average frames per second, if the file states it.
        fps, limit: as in :func:`load_frames`.
    """
    times = sorted((start, length) for start, length in packets if start is not None)
    if len(times) < len(packets):  # raw streams have no times, so the rate is constant
        wanted = round(len(packets) / rate * fps) if rate else limit
        return uniform_indices(len(packets), min(limit, max(1, wanted)))
    starts = [start for start, _ in times]
    span, steps = starts[-1] - starts[0], len(starts) - 1
    # ASF does not always state the rate.
    last = times[-1][1] or (1 / rate / tick if rate else Fraction(span, max(steps, 1)))
    seconds = float((span + last) * tick)
    count = min(limit, max(1, round(seconds * fps)))
    # Containers round times to ticks. Times that differ from equal steps by at most one tick count
    # as equally spaced.
    if all(abs((t - starts[0]) * steps - k * span) <= steps for k, t in enumerate(starts)):
        return uniform_indices(len(starts), count)
    moments = [starts[0] + i * span // max(count - 1, 1) for i in range(count)]
    return sorted({bisect_right(starts, moment) - 1 for moment in moments})


def _upright(frame: Any, image: Image.Image) -> Image.Image:
    """Turn a frame's image as its display matrix says."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    # The matrix is 3 x 3. Its first row begins with the image of (1, 0), its second with that of
    # (0, 1).
    (a, b), (c, d) = np.sign(np.frombuffer(bytes(matrix), np.int32).reshape(3, 3)[:2, :2]).tolist()
    turn = _TURNS.get((a, b, c, d))
    return image if turn is None else image.transpose(turn)
