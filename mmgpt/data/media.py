"""Encoded media to pixels and back. Decoders take bytes only, with the format forced and sizes capped from the header.

Names and paths never reach a decoder: FFmpeg opens local files and URLs when text pretends to be a clip.
"""

import io
import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, Self

import av
import av.error
import numpy as np
import PIL.Image
import PIL.ImageOps
import simplejpeg

from mmgpt.core.errors import UserError
from mmgpt.data.mp4_boxes import excess

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_IMAGE_PIXELS = 4096 * 4096
MAX_FRAME_PIXELS = 1920 * 1088
# PyAV 18 (Python 3.11) fails on metadata that is not UTF-8 unless told otherwise; PyAV 19 replaces it by itself.
_OPEN = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp")

# PyAV 19 replaces broken metadata unasked and has no such argument any more.
_LENIENT: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


class MediaError(UserError, ValueError):
    """A medium that cannot be decoded. `reason` is a short fixed phrase, `detail` says what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def decode_image(data: bytes, *, max_pixels: int = MAX_IMAGE_PIXELS) -> np.ndarray:
    """The first picture of a JPEG, PNG, WebP or GIF file as uint8 [H, W, 3], sRGB.

    Alpha is laid over white, 16-bit grey keeps its high byte, EXIF orientation is applied.
    Raises MediaError: "empty", "not an image", "too many pixels" (from the header), "truncated", "corrupt".
    """
    if not data:
        raise MediaError("empty", "0 bytes")
    if data[:2] == b"\xff\xd8":
        pixels = _decode_plain_jpeg(data, max_pixels)
        if pixels is not None:
            return pixels
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except PIL.UnidentifiedImageError as e:
        raise MediaError("not an image", f"none of {', '.join(IMAGE_FORMATS)}, starts with {data[:8]!r}") from e
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as e:
        raise MediaError("too many pixels", str(e)) from e
    except Exception as e:
        raise MediaError("corrupt", f"header: {e}") from e
    _check_size(image.height, image.width, max_pixels)
    try:
        image.load()
        return _as_rgb(PIL.ImageOps.exif_transpose(image))
    except Exception as e:  # Pillow's plugins raise almost any class on damaged input
        truncated = isinstance(e, EOFError) or "truncated" in str(e).lower()
        raise MediaError("truncated" if truncated else "corrupt", str(e) or type(e).__name__) from e


def _decode_plain_jpeg(data: bytes, max_pixels: int) -> np.ndarray | None:
    """The pixels by the fast decoder, None where Pillow must look: CMYK, EXIF orientation, any warning."""
    if b"Exif\0\0" in data[:4096]:
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(int(height), int(width), max_pixels)
    if space not in ("YCbCr", "Gray", "RGB"):
        return None
    try:
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise MediaError("empty", f"{width}x{height} pixels")
    if height * width > max_pixels:
        raise MediaError("too many pixels", f"{width}x{height} is over the cap of {max_pixels}")


def _as_rgb(image: PIL.Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def decode_video(
    data: bytes,
    *,
    fps: float | None = None,
    max_frames: int = 256,
    max_pixels: int = MAX_FRAME_PIXELS,
    size: Callable[[int, int], tuple[int, int]] | None = None,
) -> tuple[np.ndarray, float]:
    """The first frames of an MP4 clip as uint8 [T, H, W, 3] and their rate in frames per second.

    With `fps` below the clip's rate, frame k is the one shown k / fps seconds after the first; a higher `fps`
    keeps the clip's own rate. At most `max_frames` are read. `size` gives the height and width to bring frames to by
    their own: frame by frame, since a clip of full size may be too large to hold.
    Raises MediaError: "empty", "not a video", "no frames", "too many pixels" (from the header), "corrupt".
    """
    with _Clip(data, max_pixels) as clip:
        thin = fps is not None and fps < clip.fps * 0.999
        shown = _resample(clip.frames(), fps, 1 / clip.fps) if thin and fps else (frame for _, frame in clip.frames())
        frames = []
        for frame in shown:
            pixels = frame.to_ndarray(format="rgb24")
            frames.append(pixels if size is None else resize(pixels, *size(*pixels.shape[:2])))
            if len(frames) == max_frames:
                break
        return np.stack(frames), fps if thin and fps else clip.fps


def frames_at(data: bytes, times: list[float], *, max_pixels: int = MAX_FRAME_PIXELS) -> Iterator[np.ndarray]:
    """The frame on screen at each of `times`, ascending seconds since the first frame, as uint8 [H, W, 3].

    Times count as equal within 0.1 ms. Ends early, at the first time after the clip's end.
    Raises MediaError like `decode_video`.
    """
    with _Clip(data, max_pixels) as clip:
        count, end, held = 0, 0.0, None
        for time, frame in clip.frames():
            while held is not None and count < len(times) and times[count] < time - 1e-4:
                yield held.to_ndarray(format="rgb24")
                count += 1
            if count == len(times):
                return
            held, end = frame, time + 1 / clip.fps
        while held is not None and count < len(times) and times[count] < end - 1e-4:
            yield held.to_ndarray(format="rgb24")
            count += 1


def clip_times(data: bytes, max_frames: int, *, max_pixels: int = MAX_FRAME_PIXELS) -> list[float]:
    """Seconds since the first frame of each frame, up to `max_frames`. Raises MediaError like `decode_video`."""
    with _Clip(data, max_pixels) as clip:
        return [time for time, _ in itertools.islice(clip.frames(), max_frames)]


def check_video(data: bytes, *, max_frames: int = 256, max_pixels: int = MAX_FRAME_PIXELS) -> tuple[int, int, int]:
    """Frames (up to `max_frames`), height and width of a clip that decodes; raises MediaError like `decode_video`."""
    with _Clip(data, max_pixels) as clip:
        count = height = width = 0
        for _, frame in clip.frames():
            count, height, width = count + 1, frame.height, frame.width
            if count == max_frames:
                break
        return count, height, width


class _Clip:
    """An open MP4 file in memory; every failure inside its `with` block becomes a MediaError."""

    def __init__(self, data: bytes, max_pixels: int) -> None:
        self._data = data
        self._max_pixels = max_pixels
        self.fps = 0.0

    def __enter__(self) -> Self:
        if not self._data:
            raise MediaError("empty", "0 bytes")
        if self._data[4:8] not in _MP4_BOXES:
            raise MediaError("not a video", f"no MP4 box at the start, found {self._data[:8]!r}")
        if (problem := excess(self._data)) is not None:
            raise MediaError("corrupt", problem)
        try:
            self._container = av.open(io.BytesIO(self._data), "r", format="mp4", **_LENIENT)
        except (av.error.FFmpegError, MemoryError, ValueError) as e:
            raise MediaError("corrupt", f"header: {e}") from e
        if not self._container.streams.video:
            self._container.close()
            raise MediaError("no frames", "the file holds no video stream")
        self._stream = self._container.streams.video[0]
        context = self._stream.codec_context
        try:
            if context is None:
                raise MediaError("corrupt", "the video stream has no known codec")
            _check_size(context.height, context.width, self._max_pixels)
        except MediaError:
            self._container.close()
            raise
        context.thread_count = 1
        context.options = {"max_pixels": str(self._max_pixels)}
        self.fps = float(self._stream.average_rate or self._stream.guessed_rate or 25)
        return self

    def frames(self) -> Iterator[tuple[float, av.VideoFrame]]:
        """Seconds since the first frame, and the frame; at least one, all of one size."""
        first: tuple[float, int, int] | None = None
        for index, frame in enumerate(self._container.decode(self._stream)):
            time = index / self.fps if frame.time is None else float(frame.time)
            if first is None:
                first = (time, frame.height, frame.width)
                _check_size(frame.height, frame.width, self._max_pixels)
            if (frame.height, frame.width) != first[1:]:
                raise MediaError("corrupt", f"the frame size changes at frame {index}")
            yield time - first[0], frame
        if first is None:
            raise MediaError("no frames", "the video stream decodes to nothing")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._container.close()
        if isinstance(error, (av.error.FFmpegError, MemoryError)):
            raise MediaError("corrupt", str(error) or type(error).__name__) from error


def _resample(frames: Iterator[tuple[float, av.VideoFrame]], fps: float, period: float) -> Iterator[av.VideoFrame]:
    """The frame on screen at 0, 1/fps, 2/fps ... seconds; `period` is how long the last one stays."""
    count, end, held = 0, 0.0, None
    for time, frame in frames:
        while held is not None and count / fps < time - 1e-6:
            yield held
            count += 1
        held, end = frame, time + period
    while held is not None and (count == 0 or count / fps < end - 1e-6):  # times may go back
        yield held
        count += 1


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """`image` uint8 [H, W, 3] at another size, antialiased: box average for whole factors, Lanczos otherwise."""
    if image.shape[:2] == (height, width):
        return image
    whole = image.shape[0] % height == 0 and image.shape[1] % width == 0
    method = PIL.Image.Resampling.BOX if whole else PIL.Image.Resampling.LANCZOS
    return np.array(PIL.Image.fromarray(image).resize((width, height), method))


def fit(height: int, width: int, *, area: int, multiple: int) -> tuple[int, int]:
    """The size nearest in aspect with at most `area` pixels and sides that are multiples of `multiple`.

    Pictures below `area` are not enlarged beyond rounding. Raises ValueError if one `multiple` square is over `area`.
    """
    cells = area // (multiple * multiple)
    if cells < 1:
        raise ValueError(f"area {area} holds no {multiple}x{multiple} square; raise the area.")
    scale = min(1.0, math.sqrt(area / (height * width))) / multiple
    rows = min(max(1, round(height * scale)), cells)
    columns = min(max(1, round(width * scale)), cells)
    while rows * columns > cells:
        narrower = abs(math.log(rows * width / (max(columns - 1, 0.1) * height)))
        lower = abs(math.log(max(rows - 1, 0.1) * width / (columns * height)))
        rows, columns = (rows - 1, columns) if lower < narrower else (rows, columns - 1)
    return rows * multiple, columns * multiple


def encode_png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as PNG."""
    out = io.BytesIO()
    PIL.Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def encode_jpeg(image: np.ndarray, quality: int = 92) -> bytes:
    """uint8 [H, W, 3] as JPEG with full-resolution colour."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "444")


def encode_mp4(frames: np.ndarray, fps: float) -> bytes:
    """uint8 [T, H, W, 3] as an H.264 clip (yuv420p, which players need); odd sides gain one repeated line."""
    odd = ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0))
    frames = np.pad(frames, odd, mode="edge")
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1  # the bytes then depend on the frames alone
        # Without the macroblock tree, which reads memory that it did not write: small frames then differ by chance.
        stream.options = {"crf": "16", "x264-params": "mbtree=0"}
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def encode_gif(frames: np.ndarray, fps: float) -> bytes:
    """uint8 [T, H, W, 3] as an endless GIF."""
    first, *rest = [PIL.Image.fromarray(f) for f in frames]
    out = io.BytesIO()
    first.save(out, "GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    return out.getvalue()
