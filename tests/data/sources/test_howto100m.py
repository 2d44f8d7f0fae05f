"""HowTo100M: what is said and the frames it is said over, in the order of time; captions are read piece by piece."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mmgpt.core.document import Image, Text
from mmgpt.data.files import FileError
from mmgpt.data.media import MediaError, encode_mp4, frames_at
from mmgpt.data.sources import Found, SourceError, howto100m
from tests.data.raw import grey, levels, put
from tests.data.sources.raw import read, reasons

CLIP = encode_mp4(np.stack([grey(10 * k) for k in range(20)]), 2.0)
"""Ten seconds, each half second a lighter grey: 0, 10, 20 ..."""
SAID = {"start": [0.0, 1.0, 5.0], "end": [1.5, 5.0, 9.0], "text": ["take", "the cup", "and go"]}


def shown(document: Found) -> list[tuple[object, float | None]]:
    found: list[tuple[object, float | None]] = []
    for s in document.segments:
        found.append(
            (levels([s.data or b""])[0] if isinstance(s, Image) else s.text if isinstance(s, Text) else s, s.time)
        )
    return found


EXPECTED = [("take the cup", 0.0), (50, 2.5), ("and go", 5.0), (140, 7.0)]


def near(found: list[tuple[object, float | None]], expected: list[tuple[object, float]]) -> bool:
    """Equal, grey levels within 3: the clip is coded with loss."""
    return len(found) == len(expected) and all(
        t == u and (abs(a - b) <= 3 if isinstance(a, int) and isinstance(b, int) else a == b)
        for (a, t), (b, u) in zip(found, expected, strict=True)
    )


VTT = "WEBVTT\n\n00:00.000 --> 00:01.500\ntake\n\n00:01.000 --> 00:05.000\nthe cup\n\n00:05.000 --> 00:09.000\nand go"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("raw_caption.json", json.dumps({"x": SAID, "a": SAID})),
        ("caption.json", json.dumps({"a": SAID})),
        ("videos/a.json", json.dumps(SAID)),
        ("videos/a.csv", "start,end,text\n0,1.5,take\n1,5,the cup\n5,9,and go\n"),
        ("videos/a.en.vtt", VTT),
    ],
)
def test_speech_and_the_frame_at_its_middle(tmp_path: Path, name: str, text: str):
    documents, rejects = read("howto100m", put(tmp_path, {"videos/a.mp4": CLIP, name: text}))
    assert [d.key for d in documents] == ["a"] and documents[0].meta == {"video": "videos/a.mp4"}
    assert near(shown(documents[0]), EXPECTED), shown(documents[0])
    expected = {"raw_caption.json without video": "captions without video"} if name == "raw_caption.json" else {}
    assert reasons(rejects) == expected


def test_captions_after_the_end_are_left_out(tmp_path: Path):
    late = {"start": [0, 5, 11], "end": [5, 9, 99], "text": ["take the cup", "and go", "never shown"]}
    put(tmp_path, {"a.mp4": CLIP, "b.mp4": CLIP})
    gone = {"start": [50], "end": [60], "text": ["x"]}
    put(tmp_path, {"raw_caption.json": json.dumps({"a": late, "b": gone})})
    documents, rejects = read("howto100m", tmp_path)
    assert [d.key for d in documents] == ["a"] and [part for part, _ in shown(documents[0])][2] == "and go"
    assert len(documents[0].segments) == 4 and reasons(rejects) == {"b": "captions after the end"}


def test_a_long_video_goes_on_in_the_next_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(howto100m, "MAX_IMAGES", 2)
    monkeypatch.setattr(howto100m, "LEAST_SECONDS", 1.0)
    said = {"start": list(range(5)), "end": list(range(1, 6)), "text": list("abcde")}
    put(tmp_path, {"v.mp4": CLIP, "v.json": json.dumps(said)})
    documents, _ = read("howto100m", tmp_path)
    assert [d.key for d in documents] == ["v", "v/2", "v/3"]
    assert [[part for part, _ in shown(d) if isinstance(part, str)] for d in documents] == [
        ["a", "b"],
        ["c", "d"],
        ["e"],
    ]


def test_videos_fail_one_by_one(tmp_path: Path):
    bad = {
        "page": "<html>",
        "cut": CLIP[:400],
        "mute": CLIP,
        "twice": CLIP,
        "sub/twice": CLIP,
        "list": CLIP,
        "good": CLIP,
    }
    put(tmp_path, {f"{name}.mp4": data for name, data in bad.items()})
    put(tmp_path, {f"{name}.json": json.dumps(SAID) for name in ("page", "cut", "twice", "good")})
    put(tmp_path, {"list.json": "[1]", "film.webm": b"x"})
    documents, rejects = read("howto100m", tmp_path)
    assert [d.key for d in documents] == ["good", "twice"]
    assert reasons(rejects) == {
        "cut": "corrupt",
        "page": "not a video",
        "mute": "video without caption",
        "sub/twice.mp4": "duplicate key",
        "list": "wrong type",
        "film.webm": "unknown file type",
    }


def test_links_out_of_the_folder_are_not_read(tmp_path: Path):
    put(tmp_path, {"secret.mp4": CLIP, "raw/raw_caption.json": json.dumps({"a": SAID, "../secret": SAID})})
    (tmp_path / "raw" / "a.mp4").symlink_to(tmp_path / "secret.mp4")
    documents, rejects = read("howto100m", tmp_path / "raw")
    assert not documents and reasons(rejects)["a"] == "link out of the folder"


def test_howto100m_needs_videos(tmp_path: Path):
    with pytest.raises(SourceError, match=r"holds no \.mp4 file"):
        read("howto100m", put(tmp_path, {"raw_caption.json": "{}"}))


# --- the caption file


def entries(path: Path) -> tuple[list[tuple[str, object]], str]:
    found = []
    try:
        for entry in howto100m.entries(path):
            found.append(entry)
    except FileError as e:
        return found, e.reason
    return found, ""


@pytest.mark.parametrize("chunk", [*range(1, 12), 1 << 20])
def test_captions_are_the_same_in_pieces_of_any_size(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(howto100m, "_CHUNK", chunk)
    path = tmp_path / "x.json"
    value = {'é\\"{': SAID, "b": 12345, "c": [], "d": "}", "e": None}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=3), "{}", " { } "):
        path.write_text("\ufeff" + text, encoding="utf-8")
        assert entries(path) == (list(json.loads(text).items()), "")
    path.write_text('{"a": 12345, "b": 67890}')  # a number that a piece ends in
    assert entries(path) == ([("a", 12345), ("b", 67890)], "")


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (b"", "malformed JSON"),
        (b",", "malformed JSON"),
        (b", }", "malformed JSON"),
        (b' "c": 1}', "malformed JSON"),
        (b', "c" 1}', "malformed JSON"),
        (b', "c": {"start": [1,', "malformed JSON"),
        (b', "c": ' + b"[" * 100_000, "malformed JSON"),
        (b', "c": "\xff"}', "not UTF-8"),
    ],
)
def test_captions_before_the_damage_are_kept(tmp_path: Path, end: bytes, reason: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(howto100m, "_CHUNK", 16)
    (tmp_path / "x.json").write_bytes(b'{"a": 1, "b": [2]' + end)
    assert entries(tmp_path / "x.json") == ([("a", 1), ("b", [2])], reason)


def test_a_value_over_the_cap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(howto100m, "_CHUNK", 16)
    monkeypatch.setattr(howto100m, "MAX_TEXT_BYTES", 100)
    (tmp_path / "x.json").write_text(json.dumps({"a": 1, "b": "x" * 1000}))
    assert entries(tmp_path / "x.json") == ([("a", 1)], "too many bytes")


def test_the_caption_file_may_be_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(howto100m, "_CHUNK", 1 << 12)
    path = tmp_path / "x.json"
    path.write_text(json.dumps({f"v{i}": SAID for i in range(20_000)}))
    tracemalloc.start()
    count = sum(1 for _ in howto100m.entries(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000 and path.stat().st_size > 1 << 20 and peak < 1 << 18


# --- frames


def test_frames_at_times_are_those_on_screen():
    found = [round(float(frame.mean())) for frame in frames_at(CLIP, [0.0, 0.49, 0.5, 0.5, 3.1, 9.99])]
    assert np.abs(np.array(found) - [0, 0, 10, 10, 60, 190]).max() <= 3
    assert len(list(frames_at(CLIP, [9.0, 10.0, 11.0]))) == 1, "after the end there is none"
    assert not list(frames_at(CLIP, []))
    with pytest.raises(MediaError, match="not a video"):
        list(frames_at(b"#EXTM3U page", [0.0]))
