"""Image edits: before, instruction, after, in that order, from rows, Parquet and folders of InstructPix2Pix."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from mmgpt.core.document import Image, Text
from mmgpt.data.sources import SourceError
from tests.data.sources.raw import canaries, picture, put, read, reasons, shown

EDIT = [picture(0), "make it night", picture(1)]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for i in range(2):
        put(tmp_path, f"raw/images/{i}.png", picture(i))
    return tmp_path / "raw"


def write(raw: Path, *items: Any, name: str = "edits.jsonl") -> None:
    put(raw, name, "\n".join(map(json.dumps, items)))


@pytest.mark.parametrize("before", ["source", "input", "before", "source_image"])
@pytest.mark.parametrize("words", ["instruction", "edit", "prompt", "edit_prompt"])
@pytest.mark.parametrize("after", ["target", "output", "edited", "after"])
def test_rows(before: str, words: str, after: str, raw: Path):
    write(raw, {before: "images/0.png", words: " make it night\n", after: "images/1.png", "turn": 1, "mask": ["x"]})
    documents, rejects = read("edits", raw)
    assert not rejects and [(d.key, d.meta) for d in documents] == [("edits.jsonl:1", {"turn": "1"})]
    assert documents[0].segments == (
        Image(data=picture(0), role="user"),
        Text(text="make it night", role="user"),
        Image(data=picture(1), role="assistant"),
    )


def test_a_caption_named_as_a_picture_elsewhere_is_meta(raw: Path):
    """HQ-Edit has the captions of its pictures in `input` and `output`."""
    pictures = {"input_image": "images/0.png", "output_image": "images/1.png"}
    write(raw, {"input": "a hill", "output": "a hill at night", "edit": "make it night", **pictures})
    documents, _ = read("edits", raw)
    assert shown(documents[0]) == EDIT and documents[0].meta == {"input": "a hill", "output": "a hill at night"}


def test_incomplete_rows_cost_themselves_alone(raw: Path):
    whole = {"source": "images/0.png", "instruction": "make it night", "target": "images/1.png"}
    bad = [
        ("incomplete edit", {k: v for k, v in whole.items() if k != "source"}),
        ("incomplete edit", whole | {"instruction": None}),
        ("incomplete edit", {k: v for k, v in whole.items() if k != "target"}),
        ("missing file", whole | {"target": "images/7.png"}),
        ("empty text", whole | {"instruction": " "}),
        ("not a text", whole | {"instruction": "a\0b"}),
        ("wrong type", whole | {"instruction": ["a"]}),
        ("wrong type", whole | {"source": 3}),
        ("no image", whole | {"source": ""}),
        ("wrong type", "no table"),
    ]
    write(raw, *(item for _, item in bad), whole)
    documents, rejects = read("edits", raw)
    assert [shown(d) for d in documents] == [EDIT]
    assert list(reasons(rejects).values()) == [reason for reason, _ in bad]


def test_nothing_outside_the_folder_is_read(raw: Path):
    names = [*canaries(raw.parent, raw), "http://example.org/a.png"]
    write(raw, *({"source": "images/0.png", "edit": "x", "target": name} for name in names))
    put(raw, "pairs/prompt.json", '{"edit": "x"}')
    put(raw, "pairs/1_0.png", picture(0))
    (raw / "pairs" / "1_1.png").symlink_to(raw.parent / "secret.png")
    documents, rejects = read("edits", raw)
    assert not documents
    unsafe, link = ["unsafe path"], ["link out of the folder"]
    assert list(reasons(rejects).values()) == unsafe * 2 + link * 2 + unsafe * 3 + ["URL without a local copy"] + link


@pytest.mark.parametrize(
    "names",
    [
        ("original_image", "edit_prompt", "edited_image"),
        ("source_img", "instruction", "target_img"),
        ("input_image", "edit", "output_image"),
    ],
)
def test_parquet(names: tuple[str, str, str], raw: Path):
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    cells = [{"bytes": picture(0), "path": "x.png"}, {"bytes": None, "path": None}, {"bytes": picture(0), "path": None}]
    after = [{"bytes": None, "path": "images/1.png"}] * 3
    columns = [pyarrow.array(cells, kind), pyarrow.array(["make it night"] * 2 + [None]), pyarrow.array(after, kind)]
    table = pyarrow.table({**dict(zip(names, columns, strict=True)), "img_id": [7, 8, 9], "mask_img": columns[0]})
    pyarrow.parquet.write_table(table, raw / "train.parquet")
    pyarrow.parquet.write_table(table.select([names[0], "img_id"]), raw / "z.parquet")
    documents, rejects = read("edits", raw)
    assert [(d.key, shown(d), d.meta) for d in documents] == [("train.parquet:1", EDIT, {"img_id": "7"})]
    assert reasons(rejects) == {
        "train.parquet:2": "no image",
        "train.parquet:3": "incomplete edit",
        "z.parquet": "unknown columns",
    }


def test_folders_of_instructpix2pix(raw: Path):
    prompt = json.dumps({"caption": "a hill", "edit": "make it night", "output": "a hill at night"})
    put(raw, "seeds.json", '[["0000001", ["71", "96"]]]')
    for folder, seeds in {"shard-00/0000001": ("71", "96"), "shard-01/0000002": ("5",)}.items():
        put(raw, f"{folder}/prompt.json", prompt)
        put(raw, f"{folder}/metadata.jsonl", '{"seed": 71, "clip_sim_0": 0.2}\n')
        for seed in seeds:
            put(raw, f"{folder}/{seed}_0.jpg", picture(0))
            put(raw, f"{folder}/{seed}_1.jpg", picture(1))
    documents, rejects = read("edits", raw)
    assert not rejects and all(shown(d) == EDIT for d in documents)
    assert [d.key for d in documents] == ["shard-00/0000001/71", "shard-00/0000001/96", "shard-01/0000002/5"]
    assert documents[0].meta == {"caption": "a hill", "output": "a hill at night"}


def test_folders_that_are_not_whole(raw: Path):
    good = '{"edit": "make it night"}'
    prompts = {"a": good, "b": good, "c": '{"edit": 3}', "d": "{", "e": b'{"edit": "caf\xe9"}', "f": "[1]"}
    for folder, prompt in prompts.items():
        put(raw, f"s/{folder}/prompt.json", prompt)
        if folder != "b":
            put(raw, f"s/{folder}/1_0.jpg", picture(0))
            put(raw, f"s/{folder}/1_1.jpg", picture(1))
    put(raw, "s/a/2_1.jpg", picture(1))
    put(raw, "s/a/3_0.jpg", picture(1))
    documents, rejects = read("edits", raw)
    assert [(d.key, shown(d)) for d in documents] == [("s/a/1", EDIT)]
    assert reasons(rejects) == {
        "s/a/2": "incomplete edit",
        "s/a/3": "incomplete edit",
        "s/b": "incomplete edit",
        "s/c/1": "wrong type",
        "s/d": "malformed JSON",
        "s/e": "not UTF-8",
        "s/f": "wrong type",
    }


def test_no_edits_at_all(raw: Path):
    with pytest.raises(SourceError, match=r"no folder with a prompt\.json"):
        read("edits", raw)
