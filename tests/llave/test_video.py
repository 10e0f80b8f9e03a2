"""Which frames are taken from a video. The models must embed exactly those."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sentence_transformers")
pytest.importorskip("torchvision")

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sentence_transformers import SentenceTransformer

import llave
from llave.encoding import encode
from llave.modeling import inputs
from llave.video import _indices, load_frames, uniform_indices
from tests.llave import tiny

STEP = 20  # brightness between digits. Lossy compression changes it by less than half of this


def numbered(number: int) -> Image.Image:
    """A frame whose halves show the two base-12 digits of its number."""
    pixels = np.empty((32, 32, 3), np.uint8)
    pixels[:, :16], pixels[:, 16:] = (STEP * digit for digit in divmod(number, 12))
    return Image.fromarray(pixels)


def numbers(frames: list[Image.Image]) -> list[int]:
    """The numbers of these frames."""
    assert all(frame.mode == "RGB" for frame in frames)
    halves = [np.asarray(frame).reshape(32, 2, 48).mean((0, 2)) / STEP for frame in frames]
    return [12 * round(high) + round(low) for high, low in halves]


def write_video(path: Path, count: int, rate: int | Fraction = 10) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        codec = "wmv2" if path.suffix == ".wmv" else "libx264"
        stream = container.add_stream(codec, rate=rate, width=32, height=32, pix_fmt="yuv420p")
        for number in range(count):
            container.mux(stream.encode(av.VideoFrame.from_image(numbered(number))))
        container.mux(stream.encode())
    return path


def noise(count: int, seed: int = 0) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 30, 40, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


@given(st.integers(1, 5000), st.integers(1, 200))
def test_indices_are_spread_over_the_whole(total, count):
    found = uniform_indices(total, count)
    assert len(found) == min(total, count)
    steps = np.diff(found)
    assert found[0] == 0
    if len(found) > 1:
        assert found[-1] == total - 1
        assert steps.min() >= 1
        assert steps.max() - steps.min() <= 1


@pytest.mark.parametrize(("total", "count"), [(0, 3), (3, 0)])
def test_indices_need_a_positive_number(total, count):
    with pytest.raises(ValueError, match=f"total={total} and count={count}"):
        uniform_indices(total, count)


# Only MP4's header gives the number of frames.
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_file_gives_frames_by_its_duration(tmp_path, suffix):
    path = write_video(tmp_path / f"video.{suffix}", 100)
    assert numbers(load_frames(path)) == uniform_indices(100, 30)
    assert numbers(load_frames(str(path), fps=1)) == uniform_indices(100, 10)
    assert numbers(load_frames(path, limit=4)) == [0, 33, 66, 99]
    assert numbers(load_frames(path, limit=1)) == [0]
    assert numbers(load_frames(path, fps=0.01)) == [0]
    assert numbers(load_frames(path, fps=100, limit=200)) == list(range(100))


def test_a_long_file_gives_32_frames_and_a_slow_one_all(tmp_path):
    assert numbers(load_frames(write_video(tmp_path / "long.mp4", 120))) == uniform_indices(120, 32)
    assert numbers(load_frames(write_video(tmp_path / "slow.mp4", 7, rate=1))) == list(range(7))
    assert numbers(load_frames(write_video(tmp_path / "one.mp4", 1))) == [0]


def test_files_that_lack_a_rate_or_times(tmp_path):
    # An MPEG-TS file of one frame lacks a rate.
    assert numbers(load_frames(write_video(tmp_path / "one.ts", 1))) == [0]
    tick = Fraction(1, 1000)
    assert _indices([(None, None)] * 100, tick, None, 3.0, 32) == uniform_indices(100, 32)
    steady = [(100 * number, None) for number in range(100)]
    assert _indices(steady, tick, None, 3.0, 32) == uniform_indices(100, 30)
    assert _indices(steady[:1], tick, None, 3.0, 32) == [0]


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm", "ts", "avi", "flv", "wmv"])
def test_a_file_of_variable_rate_is_sampled_by_time(tmp_path, suffix):
    """20 frames in the first second, then one every 12 seconds."""
    av = pytest.importorskip("av")
    milliseconds = [50 * n for n in range(20)] + [1000 + 12000 * n for n in range(1, 6)]
    path = tmp_path / f"video.{suffix}"
    codec = {"webm": "libvpx-vp9", "avi": "mpeg4", "wmv": "wmv2"}.get(suffix, "libx264")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, width=32, height=32, pix_fmt="yuv420p")
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(milliseconds):
            frame = av.VideoFrame.from_image(numbered(number))
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    # These are the frames shown at 32 moments of the 61 seconds, each once.
    assert numbers(load_frames(path)) == [0, 19, 20, 21, 22, 23, 24]
    assert numbers(load_frames(path, limit=5)) == [0, 20, 21, 22, 24]
    assert numbers(load_frames(path, limit=2)) == [0, 24]
    assert numbers(load_frames(path, fps=50, limit=3000)) == list(range(25))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi", "flv", "wmv"])
@pytest.mark.parametrize("rate", [24, 25, Fraction(30000, 1001), 60])
def test_a_constant_rate_gives_frames_at_equal_distances(tmp_path, suffix, rate):
    """This also holds when the container rounds the frames' times."""
    path = write_video(tmp_path / f"video.{suffix}", 100, rate=rate)
    assert numbers(load_frames(path)) == uniform_indices(100, round(300 / rate))
    assert numbers(load_frames(path, fps=100)) == uniform_indices(100, 32)


def test_times_that_a_container_rounds():
    milliseconds = [round(1000 * n / 30) for n in range(100)]
    packets = [(time, 33) for time in milliseconds]
    rate, tick = Fraction(30), Fraction(1, 1000)
    assert _indices(packets, tick, rate, 3.0, 32) == uniform_indices(100, 10)
    packets[3:5] = [(None, None), packets[3]]  # as in a raw stream of constant rate
    assert _indices(packets, tick, rate, 3.0, 32) == uniform_indices(100, 10)


def quarters() -> np.ndarray:
    """A picture with four colours in its quarters, so that any turn changes it."""
    pixels = np.empty((32, 64, 3), np.uint8)
    pixels[:16, :32], pixels[:16, 32:] = (230, 20, 20), (20, 230, 20)
    pixels[16:, :32], pixels[16:, 32:] = (20, 20, 230), (230, 230, 20)
    return pixels


def write_picture(path: Path, pixels: np.ndarray, codec: str = "libx264", **settings) -> Path:
    """Write a video of that picture.

    Args:
        settings: of the stream. ``pixel`` is the pixel format.
    """
    av = pytest.importorskip("av")
    matrix, turn = settings.pop("matrix", None), settings.pop("turn", None)
    pixel, space = settings.pop("pixel", "yuv444p"), settings.pop("space", 5)
    height, width, _ = pixels.shape
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=5, width=width, height=height, pix_fmt=pixel)
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        if (turn, matrix) != (None, None) and not hasattr(stream, "set_display_matrix"):
            pytest.skip("this PyAV writes no display matrix")
        if turn is not None:
            stream.set_display_rotation(turn)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(pixels)
            full = "JPEG" if settings.get("color_range") == 2 else "MPEG"
            frame = frame.reformat(format=pixel, dst_colorspace=space, dst_color_range=full)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """The colours of the four quarters, rounded to hundreds."""
    width, height = image.size
    places = [(x * width // 4, y * height // 4) for y in (1, 3) for x in (1, 3)]
    return [tuple(round(v / 100) * 100 for v in image.getpixel(place)) for place in places]


ONE = 1 << 16


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("turn", [0, 90, -90, 180])
def test_a_turned_video_is_upright(tmp_path, suffix, turn):
    path = write_picture(tmp_path / f"video.{suffix}", quarters(), turn=turn)
    expected = Image.fromarray(quarters()).rotate(turn, expand=True)  # both turn to the left
    (*_, found) = load_frames(path)
    assert found.size == expected.size
    assert corners(found) == corners(expected)


@pytest.mark.parametrize(
    ("axes", "way"),
    [
        ((-ONE, 0, 0, ONE), Image.Transpose.FLIP_LEFT_RIGHT),
        ((ONE, 0, 0, -ONE), Image.Transpose.FLIP_TOP_BOTTOM),
        ((0, ONE, ONE, 0), Image.Transpose.TRANSPOSE),
        ((0, -ONE, -ONE, 0), Image.Transpose.TRANSVERSE),
    ],
)
def test_a_mirrored_video_is_as_a_player_shows_it(tmp_path, axes, way):
    a, b, c, d = axes
    matrix = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path = write_picture(tmp_path / "video.mp4", quarters(), matrix=matrix)
    expected = Image.fromarray(quarters()).transpose(way)
    found = load_frames(path)[0]
    assert found.size == expected.size
    assert corners(found) == corners(expected)


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    for ratio, width in ((Fraction(2), 128), (Fraction(1, 2), 32), (Fraction(1), 64)):
        path = write_picture(tmp_path / "video.mp4", quarters(), sample_aspect_ratio=ratio)
        found = load_frames(path)[0]
        assert found.size == (width, 32)
        assert corners(found) == corners(Image.fromarray(quarters()))


def test_pixels_are_made_square_before_the_turn(tmp_path):
    path = tmp_path / "video.mp4"
    write_picture(path, quarters(), sample_aspect_ratio=Fraction(2), turn=90)
    assert load_frames(path)[0].size == (32, 128)


@pytest.mark.parametrize(
    ("codec", "settings"),
    [
        ("libx264", {"pixel": "yuv420p"}),
        ("libx264", {"pixel": "yuvj420p", "color_range": 2}),  # what phones write
        ("libx264", {"pixel": "yuv420p", "colorspace": 1, "space": 1}),
        ("libx264", {"pixel": "yuv420p", "colorspace": 1, "space": 1, "color_range": 2}),
        ("libx264", {"pixel": "yuv422p10le"}),
        ("libx265", {"pixel": "yuv420p10le", "colorspace": 9, "space": 9}),
        ("libx265", {"pixel": "yuv444p12le"}),
        ("mjpeg", {"pixel": "yuvj420p", "color_range": 2}),
        ("ffv1", {"pixel": "gbrp16le"}),
        ("ffv1", {"pixel": "bgr0"}),
    ],
)
def test_depths_ranges_and_matrices_of_colours(tmp_path, codec, settings):
    pixels = np.full((32, 64, 3), (200, 60, 30), np.uint8)
    path = write_picture(tmp_path / "video.mkv", pixels, codec, **settings)
    found = np.asarray(load_frames(path)[0]).astype(int)
    assert np.abs(found - pixels).max() <= 8


def test_a_cover_is_not_the_video(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "video.mkv"
    with av.open(str(path), "w") as container:
        kinds = (("mjpeg", "yuvj420p", 16, 1), ("mpeg4", "yuv420p", 64, 5))
        streams = [
            container.add_stream(codec, rate=5, width=size, height=size, pix_fmt=pixel)
            for codec, pixel, size, _ in kinds
        ]
        for stream, (_, pixel, size, count) in zip(streams, kinds, strict=True):
            black = av.VideoFrame.from_ndarray(np.zeros((size, size, 3), np.uint8))
            for _ in range(count):
                container.mux(stream.encode(black.reformat(format=pixel)))
            container.mux(stream.encode())
    assert {frame.size for frame in load_frames(path)} == {(64, 64)}


def test_a_folder_is_read_in_natural_order(tmp_path):
    for number in range(40):
        numbered(number).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    (tmp_path / "._frame0.png").write_text("no frame")
    (tmp_path / "more").mkdir()
    assert numbers(load_frames(tmp_path)) == uniform_indices(40, 32)
    assert numbers(load_frames(str(tmp_path), limit=3)) == [0, 19, 39]
    (tmp_path / "frame20.png").write_text("broken")
    assert numbers(load_frames(tmp_path, limit=3)) == [0, 19, 39]
    with pytest.raises(ValueError, match=r"frame20\.png"):
        load_frames(tmp_path, limit=40)


def test_frames_in_memory(tmp_path):
    frames = [numbered(number) for number in range(40)]
    arrays = np.stack([np.asarray(frame) for frame in frames])
    for video in (frames, tuple(frames), arrays, list(arrays), list(arrays[..., 0])):
        assert numbers(load_frames(video)) == uniform_indices(40, 32)
    assert numbers(load_frames(frames[3:4])) == [3]
    frames[7].save(tmp_path / "7.png")
    assert numbers(inputs(video=[frames[5], tmp_path / "7.png"])["video"]) == [5, 7]
    assert len(inputs(video=frames)["video"]) == 32


@pytest.mark.parametrize("kept", [0, 500])
def test_a_broken_file_is_named(tmp_path, kept):
    path = write_video(tmp_path / "cut.mp4", 50)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cut\.mp4' cannot be decoded"):
        load_frames(path)
    path.write_bytes(b"no video" * 99)
    with pytest.raises(ValueError, match=r"cut\.mp4' cannot be decoded"):
        load_frames(path)


def test_a_file_of_sound_alone_has_no_frames(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match=r"sound\.wav' has no frames"):
        load_frames(path)


@pytest.mark.parametrize(
    ("video", "options", "message"),
    [
        ("no/such.mp4", {}, r"video='no/such\.mp4' is no file"),
        ("https://host/a.mp4", {}, "video='https://host/a.mp4' is a URL; download it"),
        ([], {}, "video='list' holds no images"),
        (np.zeros((0, 2, 2, 3), np.uint8), {}, "holds no images"),
        (np.zeros((2, 2, 3), np.uint8), {}, r"array \(frames, height, width, channels\)"),
        (3, {}, "video is a int"),
        ([numbered(0), None], {}, r"video\[1\] is a NoneType"),
        ([numbered(0)], {"fps": 0}, "fps=0 must be above 0"),
        ([numbered(0)], {"limit": 0}, "limit=0 at least 1"),
    ],
)
def test_errors_name_what_is_wrong(video, options, message):
    with pytest.raises(ValueError, match=message):
        load_frames(video, **options)


def test_an_empty_folder_is_an_error(tmp_path):
    (tmp_path / "notes.txt").write_text("no frame")
    with pytest.raises(ValueError, match=f"video='{tmp_path}' holds no images"):
        load_frames(tmp_path)


def test_without_pyav_a_file_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "video.mp4"
    path.touch()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"video\.mp4' needs PyAV .* pip install av"):
        load_frames(path)


@pytest.fixture(scope="module", params=tiny.BACKBONES)
def model(request):
    """A model whose processor samples four frames. A published processor may do so."""
    network, processor = tiny.BACKBONES[request.param]()
    processor.video_processor.do_sample_frames = True
    processor.video_processor.num_frames = 4
    return llave.build((network, processor), device="cpu")


def tokens(model: SentenceTransformer, item) -> int:
    ids = model.preprocess([item])["input_ids"][0]
    return int((ids == model[0].processor.video_token_id).sum())


def test_every_frame_reaches_the_model(model, tmp_path):
    """Qwen-VL merges two frames. LLaVA-OneVision adds one newline token after the last frame."""
    counts = [tokens(model, inputs(video=noise(count))) for count in (2, 4, 8, 32, 40)]
    two = counts[1] - counts[0]
    assert two > 0
    assert np.diff(counts).tolist() == [two, 2 * two, 12 * two, 0]
    first, more = (model.encode([inputs(video=noise(count))])[0] for count in (6, 8))
    assert np.abs(first - more).max() > 1e-3
    swapped = model.encode([inputs(video=noise(8)[::-1])])[0]
    assert np.abs(swapped - more).max() > 1e-3

    model.save(str(tmp_path / "model"), create_model_card=False)
    again = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    np.testing.assert_allclose(again.encode([inputs(video=noise(8))])[0], more, atol=1e-5)


def test_a_file_and_its_frames_have_the_same_embedding(model, tmp_path):
    path = write_video(tmp_path / "video.mp4", 20)
    found = model.encode([inputs("A cat", video=path), inputs("A cat", video=load_frames(path))])
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def test_videos_of_different_lengths_give_what_single_ones_give(model):
    items = [
        inputs(video=noise(3)),
        "A cat",
        inputs("See it", video=noise(8, seed=1)),
        noise(1)[0],
        inputs("<|image_1|> See it", video=noise(3, seed=2)),
        inputs(video=noise(1)),
        inputs("A dog", images=noise(1)[0], video=noise(5)),
    ]
    singles = np.concatenate([model.encode([item]) for item in items])
    np.testing.assert_allclose(encode(model, items), singles, atol=1e-5)
    np.testing.assert_allclose(encode(model, items[1:2]), singles[1:2], atol=1e-5)
    assert len(encode(model, [])) == 0
