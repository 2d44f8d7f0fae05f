"""HowTo100M: MP4 files and what is said in them, as keyframes interleaved with the speech.

    videos/-0kNoCIpIpM.mp4     also in subfolders; the id is the name without suffix
    raw_caption.json           or caption.json: one table of id -> {"start": [...], "end": [...], "text": [...]}, or
    videos/-0kNoCIpIpM.json    for each video beside it: such a table, .csv with start,end,text, .vtt or .srt

Neighbouring captions are put together until they last 4 seconds, as HowTo100M's own loader does. Each is a text at its
start, followed by the frame at its middle as a JPEG image; captions after the clip's end are left out. A document has
at most 128 images: the next one, "<id>/2", goes on from there. The caption file may be far larger than memory.
"""

import codecs
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mmgpt.core.document import Image, Segment, Text
from mmgpt.data.captions import Reject
from mmgpt.data.files import MAX_TEXT_BYTES, FileError, read_inside
from mmgpt.data.media import MediaError, encode_jpeg, frames_at
from mmgpt.data.sources import Found, SourceError, require_folder
from mmgpt.data.subtitles import SUFFIXES, Cue, from_json, joined, parse

TABLES = ("raw_caption.json", "caption.json")
LEAST_SECONDS = 4.0
MAX_IMAGES = 128
_VIDEOS = ("mp4", "m4v")
_CHUNK = 1 << 20


def documents(path: Path, reject: Reject) -> Iterator[Found]:
    """Documents in the order of the caption file, then of the videos. Raises SourceError if there is no video."""
    require_folder(path, "howto100m")
    videos, beside = _files(path, reject)
    if not videos:
        raise SourceError(f"{path}: holds no .mp4 file; the format 'howto100m' reads videos and their captions.")
    for table in (path / name for name in TABLES if (path / name).is_file()):
        alone = 0
        try:
            for id, value in entries(table):
                if id in videos:
                    yield from _found(
                        path, id, videos.pop(id), str(table), lambda value=value: from_json(value), reject
                    )
                else:
                    alone += 1
        except FileError as e:
            reject(table.name, str(e), str(table))
        if alone:  # the published file has 1.2 million ids: a line for each would hide the others
            reject(f"{table.name} without video", f"captions without video: {alone}", str(table))
    for id, video in list(videos.items()):
        name = beside.get(id)
        if name is None:
            reject(id, "video without caption", str(path / video))
        else:
            yield from _found(path, id, video, str(path / name), lambda name=name: _beside(path, name), reject)


def _beside(root: Path, name: str) -> list[Cue]:
    return parse(_suffix(name), read_inside(root, name, MAX_TEXT_BYTES))


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix[1:].lower()


def _files(root: Path, reject: Reject) -> tuple[dict[str, str], dict[str, str]]:
    """Id -> path of the videos, and of the caption files."""
    videos: dict[str, str] = {}
    captions: dict[str, str] = {}
    for folder, below, names in os.walk(root):
        below.sort()
        start = PurePosixPath(os.path.relpath(folder, root))
        for name in sorted(name for name in names if not name.startswith(".")):
            path, suffix = (start / name).as_posix(), _suffix(name)
            if path in TABLES:
                continue
            if suffix not in (*_VIDEOS, *SUFFIXES):
                reject(path, f"unknown file type: videos are {', '.join(_VIDEOS)}", str(root / path))
                continue
            known = videos if suffix in _VIDEOS else captions
            id = PurePosixPath(name).stem if suffix in _VIDEOS else name.partition(".")[0]  # yt-dlp writes id.en.vtt
            if known.setdefault(id, path) != path and known is videos:
                reject(path, f"duplicate key: {id} is also {known[id]}", str(root / path))
    return videos, captions


def _found(root: Path, id: str, video: str, place: str, cues: Any, reject: Reject) -> Iterator[Found]:
    """The documents of one video, each as soon as its frames are decoded."""
    key, number = id, 1
    segments: list[Segment] = []
    try:
        said = joined(cues(), LEAST_SECONDS)
        middles = [(cue.start + cue.end) / 2 for cue in said]
        for cue, middle, frame in zip(said, middles, frames_at(read_inside(root, video), middles), strict=False):
            if len(segments) == 2 * MAX_IMAGES:
                yield Found(key=key, segments=tuple(segments), meta={"video": video}, place=place)
                number, segments = number + 1, []
                key = f"{id}/{number}"
            segments.append(Text(text=cue.text, time=round(cue.start, 3)))
            segments.append(Image(data=encode_jpeg(frame), time=round(middle, 3)))
        if not segments:
            raise FileError("captions after the end", f"the first one is at {said[0].start:.1f} s")
    except (FileError, MediaError) as e:
        reject(key, str(e), place)
        return
    yield Found(key=key, segments=tuple(segments), meta={"video": video}, place=place)


def entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Name and value of each entry of a JSON file that holds one table, read piece by piece.

    Raises FileError "malformed JSON" or "not UTF-8", after the entries before it, and "too many bytes" for a value over
    the cap of a text file.
    """
    with open(path, "rb") as file:
        reader = _Reader(file)
        if reader.sign() != "{":
            raise FileError("malformed JSON", "expected a table of id and captions")
        for count in itertools.count():
            if count == 0 and reader.sign(peek=True) == "}":
                return
            name = reader.value()
            if not isinstance(name, str) or reader.sign() != ":":
                raise FileError("malformed JSON", f"expected a name and a colon at entry {count}")
            yield name, reader.value()
            sign = reader.sign()
            if sign == "}":
                return
            if sign != ",":
                raise FileError("malformed JSON", f"expected a comma after entry {count}, {name[:60]!r}")


class _Reader:
    """JSON values of a file one after the other; holds one value and a piece of the file at a time."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._json = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._ended = False
        self._fault: FileError | None = None

    def _more(self, size: int) -> None:
        if self._fault is not None:
            raise self._fault
        data = self._file.read(size)
        self._ended = not data
        try:
            more = self._decode(data, final=self._ended)
        except UnicodeDecodeError as e:  # what lies before it is still read
            self._fault = FileError("not UTF-8", f"before byte {self._file.tell()}: {e.reason}")
            more = e.object[: e.start].decode("utf-8-sig")
        self._text, self._at = self._text[self._at :] + more, 0

    def sign(self, *, peek: bool = False) -> str:
        """The next character that is no space, "" at the end; it stays where it is with `peek`."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                found = self._text[self._at]
                self._at += not peek
                return found
            if self._ended:
                return ""
            self._more(_CHUNK)

    def value(self) -> Any:
        self.sign(peek=True)
        size = _CHUNK
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
                if end < len(self._text) or self._ended:  # else it may go on: 12 of 123
                    self._at = end
                    return value
            except (ValueError, RecursionError) as e:
                if self._ended or isinstance(e, RecursionError):
                    raise FileError("malformed JSON", str(e)) from e
                if len(self._text) - self._at > MAX_TEXT_BYTES:
                    raise FileError("too many bytes", f"one value is over the cap of {MAX_TEXT_BYTES}") from e
            self._more(size)
            size *= 2  # parsing anew from the start of the value then costs twice the value, not its square
