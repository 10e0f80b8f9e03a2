"""Checks of a video file before FFmpeg reads it: its container and the samples it declares."""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

# The containers that FFmpeg may detect in a file. The others open more files (playlists, lists,
# name patterns), are scripts, or are read by rarely used code.
DEMUXERS = (
    "apng,asf,avi,flv,gif,h264,hevc,ivf,m4v,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mpeg,mpegts,"
    "mpegvideo,obu,ogg,wav"
)
_PARENTS = b"moov trak mdia minf stbl edts moof traf mvex dinf meta udta wave".split()
# The offset of the entry count in an MP4 box. The entries of a ``trun`` may take no bytes.
_COUNTS = {b"stsz": 8, b"stz2": 8, b"trun": 4, b"elst": 4}


def refuse_inflated(file: BinaryIO) -> None:
    """Raise ValueError for an MP4 file with more samples than bytes, or with a compressed index.

    When FFmpeg opens a file, it allocates one index entry per declared sample and edit. A file of a
    thousand bytes could make it allocate gigabytes.
    """
    size = file.seek(0, os.SEEK_END)
    declared: Counter[bytes] = Counter()
    edits = 1
    for kind, start, stop in _boxes(file, 0, size):
        if kind == b"cmov":
            raise ValueError("its index is compressed; write it anew, as ffmpeg -c copy does")
        if kind in (b"stts", b"ctts"):  # each entry is a run of samples
            file.seek(start + 8)
            runs = file.read(max(0, stop - start - 8))
            declared[kind] += sum(n for n, _ in struct.iter_unpack(">II", runs[: len(runs) & ~7]))
        elif kind in _COUNTS and stop - start >= _COUNTS[kind] + 4:
            file.seek(start + _COUNTS[kind])
            (count,) = struct.unpack(">I", file.read(4))
            if kind == b"elst":
                edits = max(edits, count)
            else:
                declared[kind] += count
    file.seek(0)
    samples = max(declared.values(), default=0)
    if samples * edits > size:
        raise ValueError(
            f"it declares {samples} samples and {edits} edits, more than its {size} bytes can hold"
        )


def _boxes(
    file: BinaryIO, start: int, stop: int, depth: int = 0
) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind, start and end of each MP4 box. Other files give none, or a few."""
    while start + 8 <= stop:
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(8))
        inside = start + 8
        if size == 1 and start + 16 <= stop:
            (size,) = struct.unpack(">Q", file.read(8))
            inside += 8
        end = stop if size == 0 else start + size
        if end < inside:
            return
        yield kind, inside, min(end, stop)
        if kind in _PARENTS and depth < 10:
            yield from _boxes(file, inside, min(end, stop), depth + 1)
        start = end
