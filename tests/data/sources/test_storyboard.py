"""Storyboards: thumbnails are cut in order, and come with the subtitles in the order of time."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmgpt.core.document import Image, Text
from mmgpt.data.media import decode_image, encode_png
from mmgpt.data.sources import Found, SourceError
from tests.data.raw import grey, levels, put
from tests.data.sources.raw import read, reasons

VTT = "WEBVTT\n\n00:00.000 --> 00:01.000\none\n\n00:01.500 --> 00:02.000\ntwo\n\n00:05.000 --> 00:06.000\nlast\n"
GRID = {"rows": 2, "columns": 3, "width": 20, "height": 16, "interval": 1.5}


def sheet(values: list[int], rows: int = 2, columns: int = 3) -> bytes:
    """A sheet of grey thumbnails, 16 x 20 pixels each, black where there is none."""
    cells = [grey(v, 16, 20) for v in [*values, *[0] * (rows * columns - len(values))]]
    return encode_png(np.concatenate([np.concatenate(cells[y * columns :][:columns], 1) for y in range(rows)], 0))


def board(root: Path, **info: object) -> Path:
    """A video of 8 thumbnails of grey 100, 110, ... on two sheets of 2 x 3."""
    files = {"M0.jpg": sheet(list(range(100, 160, 10))), "M1.jpg": sheet([160, 170]), "en.vtt": VTT}
    files["storyboard.json"] = json.dumps({**GRID, "count": 8, **info})
    return put(root, files)


def shown(document: Found) -> list[tuple[object, float | None]]:
    """Grey level or text, and time, of each segment."""
    found: list[tuple[object, float | None]] = []
    for s in document.segments:
        found.append(
            (levels([s.data or b""])[0] if isinstance(s, Image) else s.text if isinstance(s, Text) else s, s.time)
        )
    return found


def test_thumbnails_and_subtitles_are_in_the_order_of_time(tmp_path: Path):
    board(tmp_path / "b" / "WhWc3b3KhnY", title="Spring", views=7)
    documents, rejects = read("storyboard", tmp_path)
    assert not rejects and [d.key for d in documents] == ["b/WhWc3b3KhnY"]
    assert shown(documents[0]) == [
        (100, 0.0),
        ("one", 0.0),
        (110, 1.5),
        ("two", 1.5),
        (120, 3.0),
        (130, 4.5),
        ("last", 5.0),
        (140, 6.0),
        (150, 7.5),
        (160, 9.0),
        (170, 10.5),
    ]
    assert documents[0].meta == {"title": "Spring", "views": "7"}
    first = documents[0].segments[0]
    assert isinstance(first, Image) and decode_image(first.data or b"").shape == (16, 20, 3)


def test_subtitles_between_two_thumbnails_are_one_text(tmp_path: Path):
    put(board(tmp_path, interval=3.0), {"en.vtt": VTT})
    (document,), _ = read("storyboard", tmp_path)
    assert [part for part in shown(document) if isinstance(part[0], str)] == [("one two", 0.0), ("last", 5.0)]


@pytest.mark.parametrize("info", [{"fps": 0.5, "interval": None}, {"duration": 16, "interval": None}])
def test_the_interval_may_be_a_rate_or_a_duration(tmp_path: Path, info: dict):
    (document,), _ = read("storyboard", board(tmp_path, **info))
    assert [time for part, time in shown(document) if isinstance(part, int)] == [k * 2.0 for k in range(8)]


def test_without_a_count_black_cells_at_the_end_are_dropped(tmp_path: Path):
    (document,), _ = read("storyboard", put(board(tmp_path, count=None), {"M0.jpg": sheet([0, 0, 0, 0, 0, 0])}))
    pictures = [part for part, _ in shown(document) if isinstance(part, int)]
    assert pictures == [0, 0, 0, 0, 0, 0, 160, 170], "black ones before the end are of the video"


def test_cells_after_the_count_are_dropped_whatever_they_show(tmp_path: Path):
    put(board(tmp_path), {"M1.jpg": sheet([160, 170, 170, 170])})
    (document,), _ = read("storyboard", tmp_path)
    assert [part for part, _ in shown(document) if isinstance(part, int)][-2:] == [160, 170]
    (document,), _ = read("storyboard", put(tmp_path, {"M1.jpg": sheet([160, 0, 170])}))
    assert [part for part, _ in shown(document) if isinstance(part, int)][-2:] == [160, 0]


def test_a_last_sheet_may_be_cut_below_its_last_row(tmp_path: Path):
    (document,), rejects = read("storyboard", put(board(tmp_path), {"M1.jpg": sheet([160, 170, 0], rows=1)}))
    assert not rejects and [part for part, _ in shown(document)][-1] == 170


def test_sheets_are_ordered_by_number(tmp_path: Path):
    files = {f"M{i}.png": sheet([100 + i], 1, 1) for i in range(12)}
    put(tmp_path, {**files, "a.srt": "1\n00:00:00,000 --> 00:00:01,000\nx\n"})
    put(tmp_path, {"storyboard.json": json.dumps({**GRID, "rows": 1, "columns": 1, "count": 12})})
    (document,), _ = read("storyboard", tmp_path)
    assert [part for part, _ in shown(document) if isinstance(part, int)] == [100 + i for i in range(12)]


def test_videos_side_by_side_as_emus_tools_write_them(tmp_path: Path):
    each = {"0": [60, 32, 3, 2, 6, "jpg"], "1": [20, 32, 1, 2, 2, "jpg"]}
    for id in ("_a_1", "b"):
        put(
            tmp_path / "00000",
            {f"{id}_0.jpg": sheet(list(range(100, 160, 10))), f"{id}_1.jpg": sheet([160, 170], 2, 1)},
        )
    said = [{"start": "00:00:00.000", "end": "00:00:01.000", "lines": ["one", "and"]}]
    put(tmp_path / "00000", {"_a_1.json": json.dumps({"sb": each, "fps": 0.1, "subtitles": said})})
    put(tmp_path / "00000", {"b.json": json.dumps({"sb": each, "interval": 2}), "b.en.vtt": VTT})
    documents, rejects = read("storyboard", tmp_path)
    assert not rejects and [d.key for d in documents] == ["00000/_a_1", "00000/b"]
    assert shown(documents[0])[:3] == [(100, 0.0), ("one and", 0.0), (110, 10.0)]
    assert [part for part, _ in shown(documents[1]) if isinstance(part, int)] == list(range(100, 180, 10))


@pytest.mark.parametrize(
    ("files", "info", "reason"),
    [
        ({"M1.jpg": None}, {}, "missing sheet"),
        ({"M1.jpg": None, "M2.jpg": sheet([160, 170])}, {}, "missing sheet"),
        ({}, {"count": 20}, "missing sheet"),
        ({"M0.jpg": None, "M1.jpg": None}, {}, "subtitles without sheets"),
        ({"cover.jpg": sheet([1])}, {}, "missing sheet"),
        ({"en.vtt": None}, {}, "sheets without subtitles"),
        ({"en.vtt": "WEBVTT"}, {}, "no subtitles"),
        ({"en.vtt": b"\xff"}, {}, "not UTF-8"),
        ({"storyboard.json": "["}, {}, "malformed JSON"),
        ({"storyboard.json": "[]"}, {}, "wrong type"),
        ({}, {"rows": 0}, "wrong type"),
        ({}, {"rows": True}, "wrong type"),
        ({}, {"width": "20"}, "wrong type"),
        ({}, {"columns": 10**9}, "wrong type"),
        ({}, {"width": 1, "count": None}, "wrong size"),
        ({}, {"width": 30}, "wrong size"),
        ({}, {"height": 17}, "wrong size"),
        ({"M0.jpg": sheet([100, 110, 120], rows=1)}, {"count": None}, "wrong size"),
        ({}, {"interval": None}, "no interval"),
        ({}, {"interval": 0}, "no interval"),
        ({"M0.jpg": b"<html>"}, {}, "not an image"),
        ({"M0.jpg": sheet([1])[:60]}, {}, "truncated"),
        ({}, {"sb": {"0": [60, 32, 3, 2, 6]}}, "missing sheet"),
        ({}, {"sb": {"0": [60, 32, 3, 2, 6], "1": [60, 32]}}, "wrong type"),
        ({}, {"sb": {"0": [60, 32, 3, 2, 7], "1": [60, 32, 3, 2, 2]}}, "wrong size"),
    ],
)
def test_a_bad_video_costs_itself(tmp_path: Path, files: dict[str, bytes | str | None], info: dict, reason: str):
    board(tmp_path / "bad", **info)
    board(tmp_path / "good")
    for name, data in files.items():
        if data is None:
            (tmp_path / "bad" / name).unlink()
        else:
            put(tmp_path / "bad", {name: data})
    documents, rejects = read("storyboard", tmp_path)
    assert [d.key for d in documents] == ["good"] and reasons(rejects) == {"bad": reason}


def test_sheets_without_a_description_are_named(tmp_path: Path):
    put(tmp_path, {"a_0.jpg": sheet([1]), "a.vtt": VTT})
    assert reasons(read("storyboard", tmp_path)[1]) == {"a": "sheets without description"}


@pytest.mark.parametrize("name", ["M0.jpg", "en.vtt", "storyboard.json"])
def test_links_out_of_the_folder_are_not_read(tmp_path: Path, name: str):
    board(tmp_path / "raw" / "a")
    secret = (tmp_path / "raw" / "a" / name).rename(tmp_path / name)
    (tmp_path / "raw" / "a" / name).symlink_to(secret)
    documents, rejects = read("storyboard", tmp_path / "raw")
    assert not documents and reasons(rejects) == {"a": "link out of the folder"}


def test_storyboard_needs_a_folder(tmp_path: Path):
    with pytest.raises(SourceError, match="is a file"):
        read("storyboard", put(tmp_path, {"a": b"x"}) / "a")
