"""Conversations: pictures stand where their marks are, turns keep their roles, and lists of any length are streamed."""

import functools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmgpt.core.document import Image, Text
from mmgpt.data import objects
from mmgpt.data.sources import SourceError
from tests.data.sources.raw import canaries, picture, put, read, reasons, shown

ASKED = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A kea."}]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for i in range(3):
        put(tmp_path, f"raw/images/{i}.png", picture(i))
    return tmp_path / "raw"


def write(raw: Path, *items: Any, name: str = "train.json") -> None:
    text = json.dumps(items) if name.endswith(".json") else "\n".join(map(json.dumps, items))
    put(raw, name, text)


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_llava(name: str, raw: Path):
    later = [{"from": "human", "value": "Compare <image> and\n<image>."}, {"from": "gpt", "value": "Both <b>."}]
    write(
        raw,
        {"id": "a", "image": "images/0.png", "conversations": [*ASKED, {"from": "human", "value": "Sure?"}], "n": 1},
        {"id": "a", "image": ["images/1.png", "images/2.png"], "conversations": later},
        {"id": 7, "image": None, "conversations": [{"from": "system", "value": "Be kind."}, *later[1:]]},
        name=name,
    )
    documents, rejects = read("chat", raw)
    assert not rejects and [d.key for d in documents] == [f"{name}:1", f"{name}:2", f"{name}:3"]
    assert documents[0].segments == (
        Image(data=picture(0), role="user"),
        Text(text="What is it?", role="user"),
        Text(text="A kea.", role="assistant"),
        Text(text="Sure?", role="user"),
    )
    assert shown(documents[1]) == ["Compare ", picture(1), " and", picture(2), ".", "Both <b>."]
    assert [s.role for s in documents[2].segments] == ["", "assistant"]
    assert [d.meta for d in documents] == [{"id": "a", "n": "1"}, {"id": "a"}, {"id": "7"}]
    assert all(s.loss == 1 for d in documents for s in d.segments)


def test_messages(raw: Path):
    parts = [{"type": "text", "text": "Before"}, {"type": "image"}, {"type": "text", "text": "and <image>?"}]
    named = [{"type": "image", "image": "images/2.png"}, {"type": "image_url", "image_url": {"url": "images/0.png"}}]
    write(
        raw,
        {"images": ["images/0.png", "images/1.png"], "messages": [{"role": "user", "content": parts}]},
        {"messages": [{"role": "user", "content": named}, {"role": "assistant", "content": "Two."}]},
    )
    documents, rejects = read("chat", raw)
    assert not rejects
    assert [shown(d) for d in documents] == [
        ["Before", picture(0), "and ", picture(1), "?"],
        [picture(2), picture(0), "Two."],
    ]
    assert [s.role for s in documents[1].segments] == ["user", "user", "assistant"]


def test_bad_conversations_cost_themselves_alone(raw: Path):
    def said(*turns: Any, **more: Any) -> dict[str, Any]:
        return {"conversations": list(turns), **more}

    human = {"from": "human", "value": "<image>"}
    bad = [
        ("number of images", said(human)),
        ("number of images", said(human, human, image="images/0.png")),
        ("number of images", said({"from": "gpt", "value": "no mark"}, image="images/0.png")),
        ("missing file", said(human, image="images/9.png")),
        ("wrong type", said(human, image=[3])),
        ("wrong type", said({"from": "human", "value": 3})),
        ("wrong type", said("hello")),
        ("unknown role", said({"from": "tool", "value": "x"})),
        ("wrong type", said({"value": "x"})),
        ("empty turn", said({"from": "human", "value": " "}, {"from": "gpt", "value": "x"})),
        ("not a text", said({"from": "human", "value": "a\0b"})),
        ("not UTF-8", said({"from": "human", "value": "a\ud800"})),
        ("unknown part", {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}),
        ("unknown part", {"messages": [{"role": "user", "content": ["text"]}]}),
        ("no conversation", {"messages": []}),
        ("no conversation", {"text": "x"}),
        ("wrong type", ["no table"]),
    ]
    write(raw, *(item for _, item in bad), said(human, image="images/1.png"))
    documents, rejects = read("chat", raw)
    assert [shown(d) for d in documents] == [[picture(1)]]
    assert list(reasons(rejects).values()) == [reason for reason, _ in bad]
    assert rejects[3][0] == "train.json:4" and rejects[3][2] == f"{raw / 'train.json'}, item 4"


def test_nothing_outside_the_folder_is_read(tmp_path: Path):
    names = [*canaries(tmp_path, tmp_path / "raw"), "http://example.org/a.png", "data:image/png;base64,aaaa", ""]
    write(tmp_path / "raw", *({"image": [name], "conversations": ASKED} for name in names))
    documents, rejects = read("chat", tmp_path / "raw")
    assert not documents
    expected = ["unsafe path"] * 2 + ["link out of the folder"] * 2 + ["unsafe path"] * 6
    assert list(reasons(rejects).values()) == expected


def test_no_conversations_at_all(raw: Path):
    with pytest.raises(SourceError, match=r"holds no \.json"):
        read("chat", raw)


# --- a list in a file


def items(root: Path, text: str | bytes, **options: Any) -> tuple[list[Any], list[str]]:
    put(root, "a.json", text)
    rejects: list[tuple[str, str, str]] = []
    found = list(objects.objects(root, "a.json", lambda *line: rejects.append(line), **options))
    assert all(f.place.endswith(f"item {f.key.partition(':')[2]}") for f in found)
    return [f.value for f in found], [f"{key} {reason}" for key, reason, _ in rejects]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(['"', "\\", "]}", "é😀", "{["]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(
    values=st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=5),
    options=st.fixed_dictionaries({"indent": st.sampled_from([None, 1]), "ensure_ascii": st.booleans()}),
    listed=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_items_are_read_wherever_the_window_ends(
    values: list[dict], options: dict, listed: bool, chunk: int, tmp_path_factory: pytest.TempPathFactory
):
    dumped = functools.partial(json.dumps, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "_CHUNK", chunk)
        text = "\ufeff" + (dumped(values) if listed else "\n".join(map(dumped, values)))
        assert items(tmp_path_factory.getbasetemp(), text) == (values, [])


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("text", "kept", "faults"),
    [
        ('[{"a": 1}, {"a": 2}', [1, 2], ["a.json malformed JSON: no comma and no end of the list after item 2"]),
        ('[{"a": 1}, {"a": ', [1], ["a.json malformed JSON: the file ends within item 2"]),
        ('[{"a": 1}, {"a": "x', [1], ["a.json malformed JSON: the file ends within item 2"]),
        ('[{"a": 1}] {"a": 2}', [1], ["a.json malformed JSON: the list ends after item 1, the file goes on"]),
        ('[{"a": 1} {"a": 2}]', [1], ["a.json malformed JSON: no comma and no end of the list after item 1"]),
        ('[{"a": 1}, {"a" 2}, {"a": 3}]', [1, 3], ["a.json:2 malformed JSON: "]),
        ('[{"a": NaN}, 17, "x]", {"a": 3}]', [3], ["a.json:1 malformed", "a.json:2 wrong", "a.json:3 wrong"]),
        (b'[{"a": 1}, {"a": "caf\xe9"}, {"a": 3}]', [1, 3], ["a.json:2 not UTF-8"]),
        ("[" + '{"a":' * 5000 + "1" + "}" * 5000 + ', {"a": 2}]', [2], ["a.json:1 malformed JSON"]),
        ("[]", [], []),
        ("", [], []),
        ("nothing", [], ["a.json:1 malformed JSON"]),
        ("}", [], ["a.json:1 malformed JSON"]),
    ],
)
def test_damage_costs_what_it_must(
    text: str | bytes, kept: list[int], faults: list[str], chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(objects, "_CHUNK", chunk)
    values, found = items(tmp_path, text)
    assert [value["a"] for value in values] == kept
    assert len(found) == len(faults) and all(f.startswith(fault) for f, fault in zip(found, faults, strict=True)), found


def test_a_list_larger_than_the_memory_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(objects, "_CHUNK", 1 << 14)
    item = json.dumps({"text": "word " * 400})
    path = put(tmp_path, "a.json", "[" + ",\n".join([item] * 2500) + "]")
    tracemalloc.start()
    count = sum(1 for _ in objects.objects(tmp_path, "a.json", lambda *line: None))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2500 and path.stat().st_size > 5_000_000 and peak < 500_000


def test_an_item_over_the_cap_ends_the_file_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(objects, "_CHUNK", 1 << 10)
    text = '[{"a": 1}, {"a": "' + "x" * 3_000_000 + '"}, {"a": 3}]'
    put(tmp_path, "a.json", text)
    tracemalloc.start()
    values, found = items(tmp_path, text, max_bytes=1 << 14)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert values == [{"a": 1}] and found == ["a.json over 16384 characters: item 2, where the file is left"]
    assert peak < 500_000 + len(text)  # the test writes the text once more
