"""Subtitles and recognised speech: WebVTT, SubRip, JSON or a table of start, end and text, as cues in order of time."""

import html
import io
import json
import math
import re
from typing import Any, NamedTuple

from mmgpt.data.files import FileError, as_text
from mmgpt.data.tables import rows

SUFFIXES = ("vtt", "srt", "json", "csv")
_TIME = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2})[.,](\d{1,3})")
_TAG = re.compile(r"<[^>]*>")


class Cue(NamedTuple):
    """What is said from `start` to `end`, in seconds; never empty."""

    start: float
    end: float
    text: str


def parse(suffix: str, data: bytes) -> list[Cue]:
    """The cues of a subtitle file, in order of their start.

    Raises FileError: "not UTF-8", "malformed JSON", "wrong type", "malformed subtitles", "wrong columns",
    "malformed line", "no subtitles".
    """
    text = as_text(data)
    if suffix == "json":
        return from_json(load_json(text))
    return _cues(_from_table(text) if suffix == "csv" else _from_lines(text))


def load_json(text: str) -> Any:
    """The value of a JSON text. Raises FileError "malformed JSON"."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:  # ValueError: also an integer of thousands of digits
        raise FileError("malformed JSON", str(e)) from e


def from_json(value: Any) -> list[Cue]:
    """Cues of a list of {start, end | duration, text | lines}, or of a table of lists {start, end, text}."""
    if isinstance(value, dict):
        lists = [part for name in ("start", "end", "text") if isinstance(part := value.get(name), list)]
        if len(lists) < 3 or len({len(part) for part in lists}) > 1:
            raise FileError("wrong type", "subtitles must have the lists start, end and text, of one length")
        return _cues([(_seconds(s), _seconds(e), _text(t)) for s, e, t in zip(*lists, strict=True)])
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise FileError("wrong type", "subtitles must be a list of tables, or one table of lists")
    found = []
    for item in value:
        start = _seconds(item.get("start"))
        end = _seconds(item["end"]) if "end" in item else start + _seconds(item.get("duration", 0))
        found.append((start, end, _text(item.get("text", item.get("lines")))))
    return _cues(found)


def joined(cues: list[Cue], least: float) -> list[Cue]:
    """Neighbours put together until each lasts `least` seconds. A cue ends where the next one starts."""
    found: list[Cue] = []
    for i, cue in enumerate(cues):
        end = min(cue.end, cues[i + 1].start) if i + 1 < len(cues) else cue.end
        if found and found[-1].end - found[-1].start < least:
            found[-1] = Cue(found[-1].start, max(end, found[-1].end), f"{found[-1].text} {cue.text}")
        else:
            found.append(Cue(cue.start, end, cue.text))
    return found


def _cues(found: list[tuple[float, float, str]]) -> list[Cue]:
    cues = [Cue(start, max(start, end), text) for start, end, text in found if text]
    if not cues:
        raise FileError("no subtitles")
    return sorted(cues, key=lambda cue: cue.start)


def _seconds(value: Any) -> float:
    if isinstance(value, str) and (match := _TIME.fullmatch(value.strip())):
        return _clock(match)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e9:
        return float(value)
    raise FileError("wrong type", f"a time must be a number of seconds, found {str(value)[:60]!r}")


def _text(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        value = " ".join(value)
    if isinstance(value, float) and math.isnan(value):  # HowTo100M's own files have NaN where nothing is said
        value = ""
    if not isinstance(value, str):
        raise FileError("wrong type", f"the text of a subtitle must be a string, found {str(value)[:60]!r}")
    return " ".join(value.split())


def _clock(match: re.Match[str]) -> float:
    hours, minutes, seconds, fraction = match.groups()
    return int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) + int(fraction.ljust(3, "0")) / 1000


def _from_table(text: str) -> list[tuple[float, float, str]]:
    def refuse(_: str, reason: str, place: str) -> None:
        raise FileError(reason.partition(":")[0], f"{place}{reason.partition(':')[2]}")

    found = []
    for row in rows(io.StringIO(text, newline=""), "line", ("start", "end", "text"), refuse):
        try:
            start, end = float(row.values["start"]), float(row.values["end"])
        except ValueError as e:
            raise FileError("wrong type", f"{row.place}: {e}") from e
        found.append((_seconds(start), _seconds(end), _text(row.values["text"])))
    return found


def _from_lines(text: str) -> list[tuple[float, float, str]]:
    """Cues of WebVTT or SubRip: a line with `-->` and the lines below it, up to an empty one."""
    lines = text.splitlines()
    rolling = any("<c>" in line for line in lines)  # recognised speech of YouTube: each cue shows the last line again
    found: list[tuple[float, float, str]] = []
    said, i = "", 0
    while i < len(lines):
        i += 1
        if "-->" not in lines[i - 1]:
            continue
        times = [_TIME.match(part.strip()) for part in lines[i - 1].split("-->", 1)]
        if times[0] is None or times[1] is None:
            raise FileError("malformed subtitles", f"line {i}: {lines[i - 1][:60]!r}")
        kept = []
        while i < len(lines) and lines[i] and "-->" not in lines[i]:
            line = " ".join(html.unescape(_TAG.sub("", lines[i])).split())
            if line and not (rolling and line == said):
                kept.append(line)
            said, i = line or said, i + 1
        found.append((_clock(times[0]), _clock(times[1]), " ".join(kept)))
    return found
