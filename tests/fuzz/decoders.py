"""The decoders that read foreign bytes: for each some small files of its format, and what it makes of a mutant."""

import functools
import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet

from mmgpt.core.document import Document, Image, Text
from mmgpt.data import codec, media, sources
from mmgpt.data.codec import RecordError
from mmgpt.data.files import FileError
from mmgpt.data.media import MediaError
from mmgpt.data.sources import SourceError
from tests.fuzz import mutate

NAMED = (MediaError, RecordError, SourceError, FileError)
"""The errors that a decoder may raise: each says what was found, and costs one document or one import."""


class Decoder(NamedTuple):
    """`files()` are sound; `decode` returns "decoded" or the reason of a reject, or raises one of NAMED."""

    files: Callable[[], list[bytes]]
    decode: Callable[[bytes], str]
    repair: Callable[[bytearray], None] | None = None


def _pixels(height: int = 24, width: int = 40) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 6, y * 10, x * y], -1).astype(np.uint8)


def _saved(format: str, mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    PIL.Image.fromarray(_pixels()).convert(mode).save(out, format, **options)
    return out.getvalue()


def _images() -> list[PIL.Image.Image]:
    return [PIL.Image.fromarray(np.roll(_pixels(), 5 * i, 1)) for i in range(3)]


@functools.cache
def jpegs() -> list[bytes]:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    rest = [_saved("JPEG", progressive=True), _saved("JPEG", "L"), _saved("JPEG", "CMYK"), _saved("JPEG", exif=exif)]
    return [media.encode_jpeg(_pixels()), _saved("JPEG", quality=40, restart_marker_blocks=2), *rest]


@functools.cache
def pngs() -> list[bytes]:
    deep = io.BytesIO()
    PIL.Image.fromarray(_pixels()[..., 0].astype(np.uint16) * 257).save(deep, "PNG")
    modes = [_saved("PNG", mode) for mode in ("1", "L", "P", "LA", "RGB", "RGBA")]
    rest = {"save_all": True, "append_images": _images(), "duration": 100}
    return [*modes, _saved("PNG", "P", transparency=3), _saved("PNG", **rest), deep.getvalue()]


@functools.cache
def webps() -> list[bytes]:
    rest = {"save_all": True, "append_images": _images()}
    return [
        _saved("WEBP"),
        _saved("WEBP", lossless=True),
        _saved("WEBP", "RGBA"),
        _saved("WEBP", **rest),
        _saved("WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"),
    ]


@functools.cache
def gifs() -> list[bytes]:
    rest = {"save_all": True, "append_images": _images()}
    return [_saved("GIF"), _saved("GIF", "L"), _saved("GIF", "P", transparency=2, interlace=1), _saved("GIF", **rest)]


@functools.cache
def mp4s() -> list[bytes]:
    """H.264 with and without B-frames, MPEG-4, fragmented, and with sound beside."""
    frames = np.stack([np.roll(_pixels(32, 48), 3 * i, 1) for i in range(8)])
    found = [media.encode_mp4(frames, 8)]
    fragments = {"movflags": "frag_keyframe+empty_moov"}
    for codec_name, options, sound in (("mpeg4", {}, False), ("libx264", fragments, False), ("mpeg4", {}, True)):
        out = io.BytesIO()
        with av.open(out, "w", format="mp4", options=options) as container:
            stream = container.add_stream(codec_name, rate=8)
            stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
            audio = container.add_stream("aac", rate=8000) if sound else None
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
            if audio is not None:
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.sample_rate = 8000
                container.mux(audio.encode(silence))
                container.mux(audio.encode())
        found.append(out.getvalue())
    return found


def _picture(data: bytes) -> str:
    assert media.decode_image(data).ndim == 3
    return "decoded"


def _clip(data: bytes) -> str:
    """As an import does, then as tokenising does, at its own rate or another."""
    count, height, width = media.check_video(data)
    frames, _ = media.decode_video(data, fps=4 if len(data) % 2 else None, size=lambda h, w: (32, 32))
    assert count >= 1 and height >= 1 and width >= 1 and frames.shape[1:] == (32, 32, 3)
    return "decoded"


def _source(format: str, name: str, data: bytes) -> str:
    """What a format makes of a file: the number of documents, or the reason of the first reject."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        (Path(folder) / "a.png").write_bytes(pngs()[4])
        rejects: list[str] = []
        found = list(sources.load(format).documents(path, lambda key, reason, place: rejects.append(reason)))
        for document in found:
            codec.encode(Document(key=document.key, segments=document.segments, meta=document.meta))
        return "decoded" if found else rejects[0].partition(":")[0] if rejects else "nothing in it"


@functools.cache
def tars() -> list[bytes]:
    found = []
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=format) as tar:
            for i in range(3):
                long = "x" * 120 if i == 2 and format != tarfile.USTAR_FORMAT else ""
                for suffix, data in (("png", pngs()[1]), ("txt", b"a caption"), ("json", b'{"text": "b", "n": 1}')):
                    info = tarfile.TarInfo(f"d/{i}{long}é.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "d/0.png"
            tar.addfile(link)
        found.append(out.getvalue())
    return found


@functools.cache
def jsonls() -> list[bytes]:
    line = {
        "key": "a",
        "meta": {"by": "me"},
        "segments": [{"text": "é", "role": "user", "loss": 0.5}, {"image": "a.png", "time": 1.5}],
    }
    return ["\n".join(json.dumps({**line, "key": str(i)}, ensure_ascii=bool(i)) for i in range(3)).encode()]


@functools.cache
def parquets() -> list[bytes]:
    """Pictures with captions, and interleaved lists, in several encodings."""
    picture = {"bytes": pngs()[1], "path": "a.png"}
    pairs = pyarrow.table({"image": [picture] * 4, "caption": ["a", "b", "é", "a"], "n": [1, 2, 3, None]})
    mixed = pyarrow.table({"images": [[picture, None], [None, None]], "texts": [[None, "a"], ["b", "c"]]})
    ways: list[dict[str, Any]] = [{"compression": "snappy"}, {"compression": "zstd"}, {"compression": "gzip"}]
    ways.append({"compression": "none", "use_dictionary": False, "write_statistics": False, "data_page_version": "2.0"})
    found = []
    for table in (pairs, mixed):
        for way in ways:
            out = io.BytesIO()
            pyarrow.parquet.write_table(table, out, row_group_size=2, **way)
            found.append(out.getvalue())
    return found


@functools.cache
def records() -> list[bytes]:
    codes = np.zeros((32, 32, 1), np.int32)
    first = (Text(ids=np.arange(5, dtype=np.int32), role="user", loss=0.5), Image(codes=codes))
    second = (Text(text="a caption"), Image(data=bytes(4096), time=1.0))
    return [codec.encode(Document(key="k", segments=segments, meta={"a": "b"})) for segments in (first, second)]


def _record(data: bytes) -> str:
    codec.encode(codec.decode(data))
    return "decoded"


DECODERS: dict[str, Decoder] = {
    "jpeg": Decoder(jpegs, _picture),
    "png": Decoder(pngs, _picture, mutate.png_checksums),
    "webp": Decoder(webps, _picture),
    "gif": Decoder(gifs, _picture),
    "mp4": Decoder(mp4s, _clip),
    "tar": Decoder(tars, functools.partial(_source, "webdataset", "a.tar"), mutate.tar_checksums),
    "jsonl": Decoder(jsonls, functools.partial(_source, "jsonl", "a.jsonl")),
    "parquet": Decoder(parquets, functools.partial(_source, "parquet", "a.parquet")),
    "record": Decoder(records, _record),
}
