"""Media: what decodes comes back as it was, and everything else has a named reason."""

import contextlib
import io
import struct
import zlib

import av
import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmgpt.data import media, mp4_boxes
from mmgpt.data.media import MediaError


def gradient(height: int = 48, width: int = 64) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 4, y * 5, x + y], -1).astype(np.uint8)


def saved(image: PIL.Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def clip(frames: int = 20) -> np.ndarray:
    return np.stack([np.roll(gradient(), 3 * i, 1) for i in range(frames)])


def reason(data: bytes, **options: int) -> str:
    with pytest.raises(MediaError) as error:
        media.decode_image(data, **options)
    return error.value.reason


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header says a size that its few bytes do not hold."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def test_png_returns_the_same_pixels():
    assert np.array_equal(media.decode_image(media.encode_png(gradient())), gradient())


def test_jpeg_returns_nearly_the_same_pixels():
    error = np.abs(media.decode_image(media.encode_jpeg(gradient())).astype(int) - gradient())
    assert error.max() <= 8


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "I;16"])
def test_every_png_mode_becomes_rgb(mode: str):
    grey = gradient()[:, :, 1]
    image = (
        PIL.Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else PIL.Image.fromarray(grey).convert(mode)
    )
    pixels = media.decode_image(saved(image, "PNG"))
    assert pixels.shape == (48, 64, 3) and pixels.dtype == np.uint8
    if mode != "1":
        assert np.array_equal(pixels, np.repeat(grey[:, :, None], 3, 2))


def test_cmyk_jpeg_keeps_its_colour():
    red = PIL.Image.new("RGB", (16, 16), (250, 10, 10)).convert("CMYK")
    assert np.allclose(media.decode_image(saved(red, "JPEG", quality=95))[8, 8], (250, 10, 10), atol=12)


def test_alpha_lies_on_white():
    clear = PIL.Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert (media.decode_image(saved(clear, "PNG")) == 255).all()


def test_exif_orientation_is_applied():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    data = saved(PIL.Image.fromarray(gradient(16, 32)), "JPEG", exif=exif)
    assert media.decode_image(data).shape == (32, 16, 3)


def test_an_animation_gives_its_first_frame():
    frames = np.stack([np.full((8, 8, 3), v, np.uint8) for v in (0, 255)])
    assert (media.decode_image(media.encode_gif(frames, 5)) == 0).all()


def test_named_reasons():
    jpeg = media.encode_jpeg(gradient())
    assert reason(b"") == "empty"
    assert reason(b"<svg xmlns='http://www.w3.org/2000/svg'/>") == "not an image"
    assert reason(saved(PIL.Image.fromarray(gradient()), "TIFF")) == "not an image"
    assert reason(jpeg[: len(jpeg) // 2 + 100]) == "truncated"
    assert reason(media.encode_gif(clip(1), 5)[:-900]) == "truncated"
    assert reason(jpeg, max_pixels=1000) == "too many pixels"


@pytest.mark.parametrize("side", [5000, 12_000, 60_000])
def test_a_bomb_is_refused_from_its_header(side: int, monkeypatch: pytest.MonkeyPatch):
    def load(self: object) -> None:
        raise AssertionError("the pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    assert reason(png_of_size(side, side)) == "too many pixels"


@pytest.mark.parametrize("encode", [media.encode_png, media.encode_jpeg])
@given(data=st.data())
def test_damaged_images_raise_media_errors_only(encode, data: st.DataObject):
    damaged = bytearray(encode(gradient(16, 16)))
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MediaError):
        assert media.decode_image(bytes(damaged)).ndim == 3


def test_mp4_keeps_frames_and_rate():
    frames, fps = media.decode_video(media.encode_mp4(clip(), 10))
    assert fps == 10 and frames.shape == (20, 48, 64, 3)
    assert np.abs(frames.astype(int) - clip()).mean() < 6


def test_mp4_bytes_depend_on_the_frames_alone():
    assert media.encode_mp4(clip(), 7.5) == media.encode_mp4(clip(), 7.5)


def test_odd_sides_gain_a_line():
    assert media.decode_video(media.encode_mp4(clip(3)[:, :47, :63], 5))[0].shape == (3, 48, 64, 3)


def test_a_lower_rate_takes_the_frame_on_screen():
    data = media.encode_mp4(clip(), 10)
    every, _ = media.decode_video(data)
    some, fps = media.decode_video(data, fps=4)
    assert fps == 4 and np.array_equal(some, every[[0, 2, 5, 7, 10, 12, 15, 17]])


def test_a_higher_rate_keeps_the_clips_own():
    assert media.decode_video(media.encode_mp4(clip(), 10), fps=30)[1] == 10


def test_frames_are_capped():
    data = media.encode_mp4(clip(), 10)
    assert len(media.decode_video(data, max_frames=5)[0]) == 5
    assert media.check_video(data) == (20, 48, 64)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "not a video"),
        (b"#EXTM3U\nhttp://127.0.0.1/a.ts\n", "not a video"),
        (b"plain text that a terminal demuxer would draw", "not a video"),
        (b"\0\0\0\x10ftypmp42\0\0\0\0", "corrupt"),
        (media.encode_png(gradient()), "not a video"),
        (media.encode_mp4(clip(), 10)[:1500], "corrupt"),
    ],
)
def test_what_is_no_clip_is_named(data: bytes, expected: str):
    with pytest.raises(MediaError) as error:
        media.decode_video(data)
    assert error.value.reason == expected


def test_text_that_passes_for_a_box_still_meets_the_mp4_demuxer_only(monkeypatch: pytest.MonkeyPatch):
    opened: list[tuple[object, object]] = []
    real = media.av.open

    def spy(file: object, mode: str, **options: object) -> object:
        opened.append((type(file), options["format"]))
        return real(file, mode, **options)

    monkeypatch.setattr(media.av, "open", spy)
    monkeypatch.setattr(media, "_MP4_BOXES", (b"ncat",))
    with pytest.raises(MediaError, match="corrupt"):
        media.decode_video(b"ffconcat version 1.0\nfile /etc/hostname\n")
    assert opened == [(io.BytesIO, "mp4")]


def test_a_clip_without_frames_is_named():
    data = media.encode_mp4(clip(), 10)
    with pytest.raises(MediaError) as error:
        media.decode_video(data[: data.index(b"mdat") - 4] + _without_samples(data))
    assert error.value.reason in ("no frames", "corrupt")


def _without_samples(data: bytes) -> bytes:
    """The boxes from mdat on, the samples overwritten with zeros."""
    start = data.index(b"mdat")
    size = struct.unpack(">I", data[start - 4 : start])[0]
    return data[start - 4 : start + 4] + bytes(size - 8) + data[start - 4 + size :]


@pytest.mark.parametrize("times", [[0.0], [0.0, -0.75, -0.625], [0.0, 0.0]])
def test_a_clip_whose_times_are_broken_still_gives_a_frame(times: list[float]):
    """Seen in mutants: the first frame's time is after the others'."""
    frames = iter([(time, str(time)) for time in times])
    assert len(list(media._resample(frames, 4.0, 1e-9))) == 1  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("table", "place"), [(b"stsz", 12), (b"stts", 12), (b"ctts", 12)])
def test_a_table_that_counts_more_than_any_clip_is_refused_before_it_is_built(table: bytes, place: int):
    """A few bytes would cost gigabytes; so they would in a box that has no business there."""
    data = media.encode_mp4(clip(), 10)
    assert table in data
    at = data.index(table) + place
    hostile = data[:at] + b"\x7f" + data[at + 1 :]
    if table == b"stsz":
        hostile = hostile[: at - 4] + b"\0\0\0\1" + hostile[at:]  # all samples of one size, which needs no list
    for found in (hostile, hostile.replace(b"stbl", b"dinf"), hostile.replace(b"minf", b"abcd")):
        with pytest.raises(MediaError, match=f"samples are counted .{table.decode()}"):
            media.check_video(found)


def test_a_file_of_boxes_alone_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mp4_boxes, "MAX_BOXES", 1000)
    with pytest.raises(MediaError, match="over 1000 boxes"):
        media.check_video(media.encode_mp4(clip(2), 10) + b"\0\0\0\x08free" * 1000)


def test_frames_are_brought_to_a_size_one_by_one():
    data = media.encode_mp4(clip(3), 10)
    whole, _ = media.decode_video(data)
    small, _ = media.decode_video(data, size=lambda height, width: (height // 2, width // 4))
    assert np.array_equal(small, [media.resize(frame, 24, 16) for frame in whole])


def test_metadata_that_is_not_utf8_costs_no_clip():
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        container.metadata["title"] = "TITLE"
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(gradient(), format="rgb24")))
        container.mux(stream.encode())
    assert media.check_video(out.getvalue().replace(b"TITLE", b"caf\xe9!")) == (1, 48, 64)


def test_large_frames_are_refused():
    with pytest.raises(MediaError, match="too many pixels"):
        media.decode_video(media.encode_mp4(clip(2), 10), max_pixels=1000)


def test_whole_reductions_are_box_averages():
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    mean = image.reshape(24, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(media.resize(image, 24, 32) - mean).max() <= 1  # each of the two passes rounds
    assert media.resize(image, 20, 30).shape == (20, 30, 3)


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([1, 8, 16, 32]), st.integers(1, 4096))
def test_fit_stays_below_the_area(height: int, width: int, multiple: int, cells: int):
    area = cells * multiple * multiple
    h, w = media.fit(height, width, area=area, multiple=multiple)
    assert h % multiple == w % multiple == 0 and 0 < h * w <= area


def test_fit_keeps_the_aspect_and_does_not_enlarge():
    assert media.fit(1024, 2048, area=512 * 1024, multiple=8) == (512, 1024)
    assert media.fit(64, 96, area=512 * 512, multiple=8) == (64, 96)
    with pytest.raises(ValueError, match="holds no 16x16"):
        media.fit(10, 10, area=100, multiple=16)
