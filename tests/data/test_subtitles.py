"""Subtitles of every kind give the same cues, and what is none is named."""

import json

import pytest

from mmgpt.data.files import FileError
from mmgpt.data.subtitles import Cue, joined, parse

CUES = [Cue(0.5, 2.25, "hello there"), Cue(3600.0, 3601.5, "R&D <wins>")]
VTT = """WEBVTT
Kind: captions

NOTE a --comment

00:00.500 --> 00:02.250 align:start position:0%
hello <i>there</i>

last
01:00:00.000 --> 01:00:01.500
R&amp;D
&lt;wins&gt;
"""
SRT = (
    "1\r\n00:00:00,500 --> 00:00:02,250\r\nhello\r\nthere\r\n\r\n"
    "2\r\n01:00:00,000 --> 01:00:01,500\r\nR&amp;D &lt;wins&gt;"
)
ITEMS = [
    {"text": "R&D <wins>", "start": 3600, "duration": 1.5},
    {"lines": ["hello", "there"], "start": "00:00:00.500", "end": "00:00:02.250"},
    {"text": "  ", "start": 4, "end": 5},
]
LISTS = {"start": [0.5, 9, 3600], "end": [2.25, 9, 3601.5], "text": ["hello there", float("nan"), "R&D <wins>"]}
CSV = ',start,end,text\n0,0.5,2.25,hello there\n1,3600,3601.5,"R&D\n<wins>"\n'


@pytest.mark.parametrize(
    ("suffix", "text"),
    [("vtt", VTT), ("srt", SRT), ("json", json.dumps(ITEMS)), ("json", json.dumps(LISTS)), ("csv", CSV)],
)
def test_every_kind_gives_the_same_cues(suffix: str, text: str):
    assert parse(suffix, b"\xef\xbb\xbf" + text.encode()) == CUES


def test_a_cue_ends_at_the_next_one_without_an_empty_line():
    text = "00:00.500 --> 00:02.250\nhello there\n01:00:00.000 --> 01:00:01.500\nR&amp;D &lt;wins&gt;\n"
    assert parse("vtt", text.encode()) == CUES


def test_recognised_speech_that_rolls_over_two_lines_is_said_once():
    text = """WEBVTT

00:00:00.000 --> 00:00:02.000
{blank}
so<00:00:00.500><c> take</c><c> two</c>

00:00:02.000 --> 00:00:02.010
so take two
{blank}

00:00:02.010 --> 00:00:04.000
so take two
no<00:00:02.500><c> three</c>
""".format(blank=" ")
    assert parse("vtt", text.encode()) == [Cue(0, 2, "so take two"), Cue(2.01, 4, "no three")]
    repeated = VTT.replace("R&amp;D\n&lt;wins&gt;", "hello there")
    assert [cue.text for cue in parse("vtt", repeated.encode())] == ["hello there"] * 2, "said twice, not rolled"


@pytest.mark.parametrize(
    ("suffix", "data", "reason"),
    [
        ("vtt", b"WEBVTT\n\n00:00.000 --> 00:01.000\ncaf\xe9", "not UTF-8"),
        ("vtt", b"WEBVTT\n\nsoon --> later\nx", "malformed subtitles"),
        ("vtt", b"", "no subtitles"),
        ("srt", b"1\n00:00:00,000 --> 00:00:01,000\n\n", "no subtitles"),
        ("json", b"[", "malformed JSON"),
        ("json", b"[" * 100_000, "malformed JSON"),
        ("json", b"[1]", "wrong type"),
        ("json", b"3", "wrong type"),
        ("json", b"[]", "no subtitles"),
        ("json", b'[{"text": "x"}]', "wrong type"),
        ("json", b'[{"start": -1, "text": "x"}]', "wrong type"),
        ("json", b'[{"start": NaN, "text": "x"}]', "wrong type"),
        ("json", b'[{"start": true, "text": "x"}]', "wrong type"),
        ("json", b'[{"start": 1, "text": 7}]', "wrong type"),
        ("json", b'{"start": [1], "end": [2, 3], "text": ["x"]}', "wrong type"),
        ("json", b'{"start": [], "end": [2], "text": ["x"]}', "wrong type"),
        ("csv", b"start,end\n1,2\n", "wrong columns"),
        ("csv", b"start,end,text\n1,2\n", "malformed line"),
        ("csv", b"start,end,text\n1,soon,x\n", "wrong type"),
        ("csv", b"start,end,text\n", "no subtitles"),
    ],
)
def test_what_is_no_subtitle_is_named(suffix: str, data: bytes, reason: str):
    with pytest.raises(FileError) as e:
        parse(suffix, data)
    assert e.value.reason == reason


def test_neighbours_are_joined_until_they_last():
    cues = [Cue(0, 3, "a"), Cue(1, 3, "b"), Cue(2, 6, "c"), Cue(6, 9, "d"), Cue(20, 21, "e")]
    assert joined(cues, 4) == [Cue(0, 6, "a b c"), Cue(6, 21, "d e")]
    assert joined(cues, 0) == [Cue(0, 1, "a"), Cue(1, 2, "b"), Cue(2, 6, "c"), Cue(6, 9, "d"), Cue(20, 21, "e")]
