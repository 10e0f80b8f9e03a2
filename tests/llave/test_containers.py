"""Video files whose name or size declarations are wrong."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

av = pytest.importorskip("av")
for needed in ("sentence_transformers", "datasets", "PIL"):
    pytest.importorskip(needed)

from PIL import Image  # noqa: E402

from llave.containers import refuse_inflated  # noqa: E402
from llave.media import Media  # noqa: E402
from llave.video import load_frames  # noqa: E402
from tests.llave.test_limits import grown  # noqa: E402


def blank(
    path: Path,
    width: int = 64,
    height: int = 48,
    count: int = 4,
    codec: str = "mpeg4",
    **settings: Any,
) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=3, width=width, height=height)
        stream.pix_fmt = "yuv420p"
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        frame = av.VideoFrame(width, height, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        for number in range(count):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


NAMES = [
    *("a:b.mp4", "concat:a|b.mp4", "http:b.mp4", "file:b.mp4", "-.mp4", "%03d.mp4", "a,b.mp4"),
    *("subfile,,start,0,end,9,,:b.mp4", "b\n.mp4", "b\udcff.mp4", "é ?*.mp4"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blank(tmp_path / "video.mp4").rename(tmp_path / name)
    assert len(Media(tmp_path).load(name)["video"]) == 4
    monkeypatch.chdir(tmp_path)
    assert len(load_frames(name)) == 4


@pytest.fixture
def asked() -> tuple[str, list[bool]]:
    """A server's address, and a list that is empty unless somebody connected to it."""
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.2)
    seen: list[bool] = []

    def listen() -> None:
        try:
            server.accept()[0].close()
            seen.append(True)
        except OSError:
            pass

    thread = threading.Thread(target=listen)
    thread.start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}", seen
    thread.join()
    server.close()


SCRIPTS = {
    "playlist": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nPLACE\n#EXT-X-ENDLIST\n",
    "list": "ffconcat version 1.0\nfile PLACE\n",
    "manifest": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static">'
    "<Period><AdaptationSet><BaseURL>PLACE</BaseURL></AdaptationSet></Period></MPD>",
    "session": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=video 9 RTP/AVP 96\n",
    "subtitles": "1\n00:00:01,000 --> 00:00:02,000\nPLACE\n",
    "metadata": ";FFMETADATA1\ntitle=PLACE\n",
    "text": "PLACE\n" * 99,
}


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("where", ["file", "address"])
def test_lists_and_scripts_lead_nowhere(
    tmp_path: Path, kind: str, where: str, asked: tuple[str, list[bool]]
) -> None:
    outside = blank(tmp_path / "outside.ts")
    address, seen = asked
    place = str(outside) if where == "file" else f"{address}/a.ts"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_text(SCRIPTS[kind].replace("PLACE", place))
    with pytest.raises(ValueError, match=r"video 'a\.mp4' .* cannot be decoded"):
        Media(tmp_path / "in").load("a.mp4")
    assert not seen


def test_references_to_other_files_are_not_followed(tmp_path: Path) -> None:
    """A QuickTime file may name another file that holds its samples, in the ``dref`` box."""
    blank(tmp_path / "outside.mov")
    content = bytearray((tmp_path / "outside.mov").read_bytes())
    place = content.index(b"url ", content.index(b"dref"))
    assert content[place + 4 : place + 8] == b"\0\0\0\1"  # the samples are in this file
    content[place + 7] = 0
    start = content.index(b"mdat")
    (size,) = struct.unpack_from(">I", content, start - 4)
    content[start + 4 : start - 4 + size] = bytes(size - 8)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mov").write_bytes(content)
    with pytest.raises(ValueError, match=r"video 'a\.mov' .* (cannot be decoded|has no frames)"):
        Media(tmp_path / "in").load("a.mov")


def changed(path: Path, box: bytes, offset: int, *values: int) -> Path:
    content = bytearray(path.read_bytes())
    struct.pack_into(f">{len(values)}I", content, content.index(box) + offset, *values)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("box", "offset", "values"),
    [(b"stsz", 8, (1, 2**25)), (b"stts", 12, (2**25, 1)), (b"elst", 8, (2**25,))],
)
def test_more_samples_than_bytes_are_refused_unread(
    tmp_path: Path, box: bytes, offset: int, values: tuple[int, ...]
) -> None:
    path = changed(blank(tmp_path / "a.mp4"), box, offset, *values)

    def refuse() -> None:
        with pytest.raises(ValueError, match=r"a\.mp4' cannot be decoded: it declares .* samples"):
            load_frames(path)

    assert grown(refuse) < 50


def test_a_packed_index_is_refused(tmp_path: Path) -> None:
    path = blank(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes().replace(b"mvhd", b"cmov"))
    with pytest.raises(ValueError, match="its index is compressed"):
        load_frames(path)


def test_boxes_of_any_size_end(tmp_path: Path) -> None:
    """Reading ends with any declared box size."""
    content = blank(tmp_path / "a.mp4").read_bytes()
    for place in range(0, len(content) - 4, 31):
        for value in (0, 1, 7, 8, 2**31, 2**32 - 1):
            damaged = bytearray(content)
            struct.pack_into(">I", damaged, place, value)
            (tmp_path / "b.mp4").write_bytes(damaged)
            with (tmp_path / "b.mp4").open("rb") as file:
                try:
                    refuse_inflated(file)
                except ValueError as error:
                    assert "it declares" in str(error)  # noqa: PT017


def test_frames_of_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = blank(tmp_path / "a.mkv", 4096, 4096, 3)
    assert path.stat().st_size < 200_000
    assert len(load_frames(path)) == 3
    path = blank(tmp_path / "a.mkv", 5120, 4096, 3)

    def refuse() -> None:
        with pytest.raises(ValueError, match=r"it has 335,544,320 pixels .*LLAVE_MAX_VIDEO_PIXELS"):
            load_frames(path)

    assert grown(refuse) < 60


def of_frames(folder: Path) -> object:
    folder.mkdir()
    for number in range(20):
        Image.new("RGB", (64, 48)).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    "make",
    [
        lambda path: blank(path.with_suffix(".mp4"), count=20),
        lambda path: blank(path.with_suffix(".mkv"), count=20),
        of_frames,
        lambda _: [Image.new("RGB", (64, 48))] * 20,
    ],
)
def test_the_frames_taken_have_a_limit(
    tmp_path: Path, make: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    video = make(tmp_path / "video")
    monkeypatch.setenv("LLAVE_MAX_VIDEO_PIXELS", str(20 * 64 * 48))
    assert len(load_frames(video, fps=100)) == 20
    monkeypatch.setenv("LLAVE_MAX_VIDEO_PIXELS", str(20 * 64 * 48 - 1))
    with pytest.raises(ValueError, match="LLAVE_MAX_VIDEO_PIXELS is 61,439"):
        load_frames(video, fps=100)


def test_pixels_made_square_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = blank(tmp_path / "a.mp4", codec="libx264", sample_aspect_ratio=Fraction(10))
    assert load_frames(path)[0].size == (640, 48)
    monkeypatch.setenv("LLAVE_MAX_VIDEO_PIXELS", str(16 * 640 * 48 - 1))
    with pytest.raises(ValueError, match="it has 491,520 pixels in the frames taken"):
        load_frames(path)


def test_the_number_of_frames_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = blank(tmp_path / "a.mkv", count=20)
    monkeypatch.setenv("LLAVE_MAX_VIDEO_FRAMES", "19")
    with pytest.raises(ValueError, match=r"it has 20 frames or more, .*LLAVE_MAX_VIDEO_FRAMES"):
        load_frames(path)
    monkeypatch.setenv("LLAVE_MAX_VIDEO_FRAMES", "20")
    assert len(load_frames(path)) == 20


def test_a_title_in_another_encoding_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "latin"
        stream = container.add_stream("mpeg4", rate=3, width=64, height=48)
        container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"latin", b"l\xe4\xf6\xfcn"))
    assert len(load_frames(path)) == 1
