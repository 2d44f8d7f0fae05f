"""What an MP4 file claims in its tables, read before FFmpeg does: a count of a few bytes may cost it gigabytes.

A file is a row of boxes: uint32 size, four letters, then a payload that may be boxes again. FFmpeg makes an entry for
every sample that a table counts, whether or not the file holds it, and looks for tables in boxes of any kind.
"""

import collections
import struct
from collections.abc import Iterator

MAX_SAMPLES = 1 << 21
"""Of all tracks: ten hours of film with sound."""
MAX_BOXES = 1 << 19
_COUNTED = (b"stsz", b"stz2", b"stts", b"ctts", b"trun")
_OPAQUE = (b"mdat", b"free", b"skip")
_DEPTH = 12


def excess(data: bytes) -> str | None:
    """What of the file is too much to be read, or None."""
    counts: collections.Counter[bytes] = collections.Counter()
    for number, (kind, start, end) in enumerate(_boxes(data, 0, len(data), _DEPTH)):
        if number >= MAX_BOXES:
            return f"over {MAX_BOXES} boxes"
        if kind in _COUNTED:
            counts[kind] += _samples(kind, data[start:end])
            if counts[kind] > MAX_SAMPLES:
                return f"{counts[kind]} samples are counted ({kind.decode()}), over the cap of {MAX_SAMPLES}"
    return None


def _boxes(data: bytes, start: int, end: int, depth: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of the payload of each box, outer and inner; where there are none, of what is named so."""
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        body = start + 8
        if size == 1 and start + 16 <= end:
            size, body = struct.unpack_from(">Q", data, body)[0], start + 16
        stop = end if size == 0 else min(end, start + size)
        if stop < body or (depth < _DEPTH and not kind.isalnum()):
            yield from _named(data, start, end)
            return
        yield kind, body, stop
        if kind not in (*_COUNTED, *_OPAQUE) and depth:
            yield from _boxes(data, body, stop, depth - 1)
        start = stop


def _named(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    for kind in _COUNTED:
        at = start
        while (at := data.find(kind, at, end)) >= 0:
            at += 4
            yield kind, at, end


def _samples(kind: bytes, table: bytes) -> int:
    """The samples that a table counts: itself, or by runs (count, duration) as many as are there."""
    place = 8 if kind in (b"stsz", b"stz2") else 4
    if len(table) < place + 4:
        return 0
    count = struct.unpack_from(">I", table, place)[0]
    if kind in (b"stts", b"ctts"):
        return sum(run for run, _ in struct.iter_unpack(">II", table[8 : 8 + 8 * min(count, (len(table) - 8) // 8)]))
    return count
