"""Storyboards of videos, as YT-Storyboard-1B has them: sheets of thumbnails and subtitles, interleaved by their times.

    WhWc3b3KhnY/storyboard.json    {"rows": 5, "columns": 5, "width": 160, "height": 90, "interval": 2.0, "count": 107}
    WhWc3b3KhnY/M0.jpg M1.jpg ...  the sheets, numbered without a gap    WhWc3b3KhnY/en.vtt   or .srt, .json, .csv

or side by side in one folder, as Emu's tools write them: <id>_0.jpg <id>_1.jpg, <id>.json and <id>.vtt, with the grid
of each sheet in {"sb": {"0": [width, height, columns, rows, count, type]}}. The JSON may give `fps` or, with a count,
`duration` for `interval`, and hold the `subtitles`; its other values become meta.

Thumbnail k is an image at k x interval seconds, subtitles with no thumbnail between them are one text at the first
one's start; at the same time the image comes first. Thumbnails become JPEG: the sheets have lost what it loses, and PNG
takes about four times the bytes. Cells after `count` are dropped; without a count, the black ones at the end.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from mmgpt.core.document import Image, Segment, Text
from mmgpt.data.captions import Reject
from mmgpt.data.files import MAX_TEXT_BYTES, FileError, as_text, read_inside
from mmgpt.data.media import MediaError, decode_image, encode_jpeg
from mmgpt.data.sources import Found, require_folder
from mmgpt.data.subtitles import SUFFIXES, Cue, from_json, load_json, parse

DESCRIPTION = "storyboard.json"
_SHEETS = ("jpg", "jpeg", "png", "webp")
_NUMBERED = re.compile(r"(.*?)_?(\d{1,6})")
_MAX_SIDE = 16_384
_MIN_THUMBNAIL = 16
_BLACK = 16


def documents(path: Path, reject: Reject) -> Iterator[Found]:
    """Documents video by video, in the order of their paths. Raises SourceError if `path` is no folder."""
    require_folder(path, "storyboard")
    for folder, below, names in os.walk(path):
        below.sort()
        start = PurePosixPath(os.path.relpath(folder, path))
        for key, files in _videos(start, path.name, [name for name in sorted(names) if not name.startswith(".")]):
            place = str(path / start / files[0])
            try:
                segments, meta = _video(path, start, key, files)
                yield Found(key=key, segments=segments, meta=meta, place=place)
            except (FileError, MediaError) as e:
                reject(key, str(e), place)


def _videos(folder: PurePosixPath, root: str, names: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Key and file names of each video of a folder."""
    if DESCRIPTION in names:
        yield folder.as_posix() if folder.name else root, names
        return
    found: dict[str, list[str]] = {}
    for name in names:
        stem = PurePosixPath(name).stem
        numbered = _NUMBERED.fullmatch(stem) if _suffix(name) in _SHEETS else None
        found.setdefault(numbered[1] if numbered else name.partition(".")[0], []).append(name)
    yield from (((folder / id).as_posix(), files) for id, files in sorted(found.items()))


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix[1:].lower()


class _Sheet(NamedTuple):
    """The grid of one sheet: its cells, the size of one in pixels, and how many hold a thumbnail, if that is known."""

    rows: int
    columns: int
    width: int
    height: int
    count: int | None


def _video(root: Path, folder: PurePosixPath, key: str, names: list[str]) -> tuple[tuple[Segment, ...], dict[str, str]]:
    sheets = sorted((_number(name), name) for name in names if _suffix(name) in _SHEETS)
    described = DESCRIPTION if DESCRIPTION in names else f"{PurePosixPath(key).name}.json"
    spoken = [name for name in names if _suffix(name) in SUFFIXES and name != described]
    if not sheets:
        raise FileError("subtitles without sheets")
    if described not in names:
        raise FileError("sheets without description", f"no {DESCRIPTION} or {described} says what grid they are")
    if [number for number, _ in sheets] != list(range(sheets[0][0], sheets[0][0] + len(sheets))):
        raise FileError("missing sheet", f"the numbers are {[number for number, _ in sheets][:20]}")
    info = load_json(as_text(read_inside(root, (folder / described).as_posix(), MAX_TEXT_BYTES)))
    if not isinstance(info, dict):
        raise FileError("wrong type", f"{described} must hold a table")
    if spoken:
        cues = parse(_suffix(spoken[0]), read_inside(root, (folder / spoken[0]).as_posix(), MAX_TEXT_BYTES))
    elif info.get("subtitles"):
        cues = from_json(info["subtitles"])
    else:
        raise FileError("sheets without subtitles")
    grids = _grids(info, len(sheets))
    thumbnails = _thumbnails(root, [(folder / name).as_posix() for _, name in sheets], grids)
    interval = _interval(info, len(thumbnails))
    images = [Image(data=data, time=round(k * interval, 3)) for k, data in enumerate(thumbnails)]
    left = {k: v for k, v in info.items() if k not in _FIELDS and isinstance(v, (str, int, float))}
    return interleaved(images, cues), {k: v if isinstance(v, str) else json.dumps(v) for k, v in left.items()}


def _number(name: str) -> int:
    match = _NUMBERED.fullmatch(PurePosixPath(name).stem)
    if match is None:
        raise FileError("missing sheet", f"{name[:200]!r} ends with no number; sheets are numbered in their order")
    return int(match[2])


_FIELDS = ("rows", "columns", "cols", "width", "height", "interval", "fps", "count", "subtitles", "sb")


def _grids(info: dict[str, Any], sheets: int) -> list[_Sheet]:
    """The grid of each sheet, from the table of one grid for all, or from Emu's of one each."""
    if isinstance(each := info.get("sb"), dict):
        if len(each) != sheets or not all(isinstance(each.get(str(i)), list) for i in range(sheets)):
            raise FileError("missing sheet", f"sb describes {len(each)} sheets, there are {sheets}")
        found = []
        for i in range(sheets):
            width, height, columns, rows, count = (_whole(v, f"sb {i}") for v in (*each[str(i)], *[None] * 5)[:5])
            found.append(_sheet(rows, columns, width // columns, height // rows, count))
        return found
    rows, width, height = (_whole(info.get(name), name) for name in ("rows", "width", "height"))
    columns = _whole(info.get("columns", info.get("cols")), "columns")
    if info.get("count") is None:
        return [_sheet(rows, columns, width, height, None)] * sheets
    count, cells = _whole(info["count"], "count"), rows * columns
    if not (sheets - 1) * cells < count <= sheets * cells:
        raise FileError("missing sheet", f"{count} thumbnails of {cells} a sheet are not {sheets} sheets")
    return [_sheet(rows, columns, width, height, min(cells, count - i * cells)) for i in range(sheets)]


def _sheet(rows: int, columns: int, width: int, height: int, count: int | None) -> _Sheet:
    if min(width, height) < _MIN_THUMBNAIL or (count or 1) > rows * columns:
        found = f"{count} of {width}x{height} pixels in {rows} rows of {columns}"
        raise FileError(
            "wrong size", f"thumbnails have at least {_MIN_THUMBNAIL} pixels a side and a cell, not {found}"
        )
    return _Sheet(rows, columns, width, height, count)


def _whole(value: Any, name: str) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_SIDE:
        raise FileError("wrong type", f"{name} must be a whole number from 1 to {_MAX_SIDE}, found {str(value)[:60]!r}")
    return value


def _interval(info: dict[str, Any], count: int) -> float:
    for name, seconds in (("interval", lambda v: v), ("fps", lambda v: 1 / v), ("duration", lambda v: v / count)):
        value = info.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 1e-3 <= value < 1e6:
            return seconds(value)
    raise FileError("no interval", "the description gives no interval, fps or duration in seconds")


def _thumbnails(root: Path, names: list[str], grids: list[_Sheet]) -> list[bytes]:
    found = []
    for i, (name, sheet) in enumerate(zip(names, grids, strict=True)):
        pixels = decode_image(read_inside(root, name))
        height, width = pixels.shape[:2]
        rows, columns = min(sheet.rows, height // sheet.height), min(sheet.columns, width // sheet.width)
        last = i == len(names) - 1  # which may be cut below its last row
        count = sheet.count or rows * columns
        if columns < min(sheet.columns, count) or rows * columns < count or (rows < sheet.rows and not last):
            raise FileError("wrong size", f"{name}: {width}x{height} pixels do not hold the cells of {sheet}")
        cells = [
            pixels[y * sheet.height : (y + 1) * sheet.height, x * sheet.width : (x + 1) * sheet.width]
            for y in range(rows)
            for x in range(columns)
        ][:count]
        while last and sheet.count is None and len(cells) > 1 and int(np.max(cells[-1])) <= _BLACK:
            cells.pop()
        found += [encode_jpeg(cell) for cell in cells]
    return found


def interleaved(images: list[Image], cues: list[Cue]) -> tuple[Segment, ...]:
    """Images and subtitles by time, an image first where both are at one; subtitles between images are one text."""
    segments: list[Segment] = []
    cues, at = sorted(cues, key=lambda cue: cue.start), 0
    for image in [*images, None]:
        until = float("inf") if image is None or image.time is None else image.time
        first = at
        while at < len(cues) and cues[at].start < until:
            at += 1
        if said := cues[first:at]:
            segments.append(Text(text=" ".join(cue.text for cue in said), time=said[0].start))
        if image is not None:
            segments.append(image)
    return tuple(segments)
