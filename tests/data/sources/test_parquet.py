"""Parquet: each published layout, pictures by bytes, path or downloaded URL, and damage that costs what it must."""

import json
import os
import tarfile
import tracemalloc
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from mmgpt.core.document import Image, Text
from mmgpt.data import columns
from mmgpt.data.importing import import_dataset
from mmgpt.data.record import Dataset
from mmgpt.data.sources import SourceError
from tests.data.sources.raw import canaries, picture, put, read, reasons, shown

CELL = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
COUNTING = pyarrow.proxy_memory_pool(pyarrow.default_memory_pool())
"""Counts what is allocated; it lives as long as the module, since buffers return to it."""
URL = "http://example.org/{}.png"


def write(path: Path, rows: dict[str, list], types: dict[str, pyarrow.DataType] | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: pyarrow.array(values, (types or {}).get(name)) for name, values in rows.items()}
    pyarrow.parquet.write_table(pyarrow.table(arrays), path, **options)
    return path


def cell(i: int) -> dict[str, Any]:
    return {"bytes": picture(i), "path": f"{i}.png"}


# --- pictures with captions


@pytest.mark.parametrize("image", ["image", "img", "jpg", "webp"])
@pytest.mark.parametrize("caption", ["caption", "text", "txt", "sentence"])
def test_pictures_with_captions(image: str, caption: str, tmp_path: Path):
    rows = {"__key__": ["x", "y"], image: [cell(1), cell(2)], caption: [" one ", "two"], "width": [6, None]}
    write(tmp_path / "train.parquet", rows, {image: CELL})
    documents, rejects = read("parquet", tmp_path)
    assert not rejects and [d.key for d in documents] == ["train.parquet:1", "train.parquet:2"]
    assert [shown(d) for d in documents] == [["one", picture(1)], ["two", picture(2)]]
    assert [d.meta for d in documents] == [{"__key__": "x", "width": "6"}, {"__key__": "y"}]
    assert documents[1].place == f"{tmp_path / 'train.parquet'}, row 2"


def test_a_picture_may_be_bytes_or_a_path_and_a_caption_a_list(tmp_path: Path):
    put(tmp_path, "pictures/3.png", picture(3))
    write(tmp_path / "a.parquet", {"image": [picture(1)], "captions": [["", "one", "eins", "un"]]})
    two = pyarrow.list_(pyarrow.string(), 2)
    write(tmp_path / "b.parquet", {"image": ["pictures/3.png"], "caption": [["three", "drei"]]}, {"caption": two})
    write(
        tmp_path / "c.parquet", {"image": [{"bytes": None, "path": "pictures/3.png"}], "text": ["3"]}, {"image": CELL}
    )
    documents, rejects = read("parquet", tmp_path)
    assert not rejects
    assert [shown(d) for d in documents] == [["one", picture(1)], ["three", picture(3)], ["3", picture(3)]]
    assert json.loads(documents[0].meta["captions"]) == ["eins", "un"]


def test_pairs_that_are_not_whole_are_refused(tmp_path: Path):
    images = [None, {"bytes": None, "path": None}, cell(1), cell(2), cell(3), {"bytes": b"", "path": None}, cell(4)]
    captions = ["a", "b", None, " ", "a\0b", "c", "good"]
    write(tmp_path / "a.parquet", {"image": images, "text": captions}, {"image": CELL})
    documents, rejects = read("parquet", tmp_path)
    assert [shown(d) for d in documents] == [["good", picture(4)]]
    expected = ["no image", "no image", "empty caption", "empty caption", "not a text", "no image"]
    assert list(reasons(rejects).values()) == expected


def test_nothing_outside_the_folder_is_read(tmp_path: Path):
    names = canaries(tmp_path, tmp_path / "raw")
    write(tmp_path / "raw" / "a.parquet", {"image": [*names, URL], "text": ["x"] * (len(names) + 1)})
    (tmp_path / "raw" / "b.parquet").symlink_to(write(tmp_path / "other.parquet", {"text": ["secret"]}))
    documents, rejects = read("parquet", tmp_path / "raw")
    assert not documents
    link = "link out of the folder"
    unsafe = "unsafe path"
    expected = [unsafe, unsafe, link, link, unsafe, unsafe, unsafe, "URL without a local copy", link]
    assert list(reasons(rejects).values()) == expected


def test_text_alone(tmp_path: Path):
    write(tmp_path / "a.parquet", {"text": ["one", "two"], "url": ["x", "y"]})
    documents, _ = read("parquet", tmp_path)
    assert [(d.key, shown(d)) for d in documents] == [("x", ["one"]), ("y", ["two"])]


# --- interleaved documents


def obelics(path: Path, rows: list[tuple[list, list]], kind: pyarrow.DataType, **options: Any) -> Path:
    images, texts = [list(column) for column in zip(*rows, strict=True)]
    types = {"images": pyarrow.list_(kind), "texts": pyarrow.list_(pyarrow.string())}
    return write(path, {"images": images, "texts": texts, "metadata": ["{}"] * len(rows)}, types, **options)


@pytest.mark.parametrize("form", ["struct", "bytes", "path", "large"])
def test_interleaved_documents(form: str, tmp_path: Path):
    put(tmp_path, "1.png", picture(1))
    put(tmp_path, "2.png", picture(2))
    kinds = {"struct": CELL, "bytes": pyarrow.binary(), "path": pyarrow.string(), "large": pyarrow.large_binary()}
    make = {"struct": cell, "path": "{}.png".format}.get(form, picture)
    rows = [([None, make(1), None, None, make(2)], ["One.", None, "Two.", None, None]), ([make(2)] * 2, [None, None])]
    obelics(tmp_path / "a.parquet", [*rows, ([None], ["only text"])], kinds[form])
    documents, rejects = read("parquet", tmp_path)
    assert [shown(d) for d in documents] == [["One.", picture(1), "Two.", picture(2)]]
    assert documents[0].partial and documents[0].meta == {"metadata": "{}"}
    assert reasons(rejects) == {"a.parquet:2": "no image and text left", "a.parquet:3": "no image and text left"}


def test_a_document_that_loses_an_image_stays_while_one_is_left(tmp_path: Path):
    broken = {"bytes": b"<html>", "path": None}
    lost = {"bytes": None, "path": "../1.png"}
    rows = [
        ([cell(1), None, lost, broken], [None, "kept", None, None]),
        ([None, broken], ["lost", None]),
        ([None, lost], ["lost too", None]),
    ]
    obelics(tmp_path / "raw" / "a.parquet", rows, CELL)
    import_dataset("parquet", tmp_path / "raw", tmp_path / "out")
    dataset = Dataset(tmp_path / "out")
    assert [len(dataset), dataset[0].segments] == [1, (Image(data=picture(1)), Text(text="kept"))]
    found = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    # The order in which a lost image and the other faults are listed depends on the decoding threads' lead alone.
    assert {(line["key"], line["reason"].partition(":")[0]) for line in found} == {
        ("a.parquet:1/image 2", "unsafe path"),
        ("a.parquet:1/2", "not an image"),
        ("a.parquet:2/1", "not an image"),
        ("a.parquet:2", "no image and text left"),
        ("a.parquet:3/image 1", "unsafe path"),
        ("a.parquet:3", "no image and text left"),
    }


def test_lists_that_do_not_belong_together_are_refused(tmp_path: Path):
    rows = [([cell(1)], ["both"]), ([cell(1), None], ["short"]), (None, None), ([cell(1), None], [None, "a\0b"])]
    obelics(tmp_path / "a.parquet", rows, CELL)
    documents, rejects = read("parquet", tmp_path)
    assert not documents
    expected = ["wrong layout", "lists of two lengths", "no image and text left", "not a text"]
    assert list(reasons(rejects).values()) == expected


def downloads(root: Path, shards: dict[str, list[int]], *, failed: tuple[int, ...] = ()) -> None:
    """A folder as img2dataset writes it: pictures by number."""
    root.mkdir(parents=True)
    for shard, numbers in shards.items():
        keys = [f"{shard}{i:04d}" for i in range(len(numbers))]
        status = ["failed_to_download" if n in failed else "success" for n in numbers]
        rows = {"url": [URL.format(n) for n in numbers], "key": keys, "status": status}
        write(root / f"{shard}.parquet", rows)
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for key, number in zip(keys, numbers, strict=True):
                for name, data in ((f"{key}.png", picture(number)), (f"{key}.json", b"{}")):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    if number not in failed:
                        tar.addfile(info, BytesIO(data))


def test_a_url_is_looked_up_in_what_was_downloaded(tmp_path: Path):
    downloads(tmp_path / "images", {"00000": [4, 1, 9], "00001": [2, 1]}, failed=(9,))
    rows = [([URL.format(n), None], [None, f"picture {n}"]) for n in (1, 2, 4, 9, 5)]
    obelics(tmp_path / "a.parquet", rows, pyarrow.string())
    documents, rejects = read("parquet", tmp_path)
    assert [shown(d) for d in documents] == [[picture(n), f"picture {n}"] for n in (1, 2, 4)]
    no_copy, nothing = "URL without a local copy", "no image and text left"
    assert reasons(rejects) == {
        "a.parquet:4/image 0": no_copy,
        "a.parquet:4": nothing,
        "a.parquet:5/image 0": no_copy,
        "a.parquet:5": nothing,
    }


def test_downloads_that_are_damaged_are_named(tmp_path: Path):
    downloads(tmp_path / "images", {"00000": [1, 2], "00001": [3], "00002": [4]})
    tar = tmp_path / "images" / "00000.tar"
    os.truncate(tar, 3 * 512 + 512 + 100)
    (tmp_path / "images" / "00001.parquet").write_bytes(b"none")
    (tmp_path / "images" / "00002.parquet").unlink()
    write(tmp_path / "a.parquet", {"image": [URL.format(n) for n in (1, 2, 3)], "text": ["one", "two", "three"]})
    documents, rejects = read("parquet", tmp_path)
    assert [shown(d) for d in documents] == [["one", picture(1)]]
    assert reasons(rejects) == {
        "00000.tar": "truncated archive",
        "00001.parquet": "damaged Parquet file",
        "00002.parquet": "missing file",
        "a.parquet:2": "URL without a local copy",
        "a.parquet:3": "URL without a local copy",
    }


# --- files that are not as expected


def test_unknown_columns_are_listed_with_what_is_read(tmp_path: Path):
    write(tmp_path / "a.parquet", {"label": [1], "image": [picture()]})
    with pytest.raises(SourceError, match=r"label \(int64\), image \(binary\).*OBELICS"):
        read("parquet", tmp_path)
    with pytest.raises(SourceError, match=r"holds no \.parquet"):
        read("parquet", put(tmp_path, "b.csv", "x"))


def test_a_file_of_other_columns_does_not_stop_the_others(tmp_path: Path):
    write(tmp_path / "a.parquet", {"text": ["one"]})
    write(tmp_path / "b.parquet", {"label": [1]})
    put(tmp_path, "c.parquet", (tmp_path / "a.parquet").read_bytes()[:-20])
    put(tmp_path, "d.parquet", b"")
    write(tmp_path / "e.parquet", {"text": ["two"]})
    documents, rejects = read("parquet", tmp_path)
    assert [shown(d) for d in documents] == [["one"], ["two"]]
    damaged = "damaged Parquet file"
    assert reasons(rejects) == {"b.parquet": "unknown columns", "c.parquet": damaged, "d.parquet": damaged}


def test_a_damaged_page_costs_its_row_group(tmp_path: Path):
    words = [f"text number {i}" for i in range(30)]
    options = {"row_group_size": 10, "write_page_checksum": True, "compression": "none", "use_dictionary": False}
    path = write(tmp_path / "a.parquet", {"text": words}, **options)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"number 15", b"numbEr 15", 1))
    documents, rejects = read("parquet", tmp_path)
    assert [shown(d)[0] for d in documents] == words[:10] + words[20:]
    assert [d.key for d in documents[9:11]] == ["a.parquet:10", "a.parquet:21"]
    assert reasons(rejects) == {"a.parquet:11": "damaged row group"} and "rows 11 to 20" in rejects[0][1]


def test_names_of_columns_that_are_not_utf8(tmp_path: Path):
    data = write(tmp_path / "a.parquet", {"text": ["one"], "namexname": [1]}, store_schema=False).read_bytes()
    first, last = data.index(b"namexname"), data.rindex(b"namexname")
    assert first < last, "in the schema, and in a row group, where the name of a column that is not wanted is not read"
    for name, at in (("b", first), ("c", last)):
        put(tmp_path, f"{name}.parquet", data[:at] + b"name\xffname" + data[at + 9 :])
    documents, rejects = read("parquet", tmp_path)
    assert [(d.key, shown(d)) for d in documents] == [("a.parquet:1", ["one"]), ("c.parquet:1", ["one"])]
    assert reasons(rejects) == {"b.parquet": "damaged Parquet file"}


def test_texts_that_are_not_utf8_and_rows_over_the_cap(tmp_path: Path):
    raw = pyarrow.array([b"good", b"caf\xe9", b"x" * 3000, b"last"], pyarrow.binary())
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 4, raw.buffers())
    write(tmp_path / "a.parquet", {"text": texts})
    rejects: list = []
    found = list(columns.rows(tmp_path, "a.parquet", ["text"], lambda *line: rejects.append(line), max_bytes=2000))
    assert [(row.key, row.value) for row in found] == [
        ("a.parquet:1", {"text": "good"}),
        ("a.parquet:4", {"text": "last"}),
    ]
    assert reasons(rejects) == {"a.parquet:2": "not UTF-8", "a.parquet:3": "too many bytes"}


def test_a_large_file_is_read_in_bounded_memory(tmp_path: Path):
    size, count = 256 << 10, 200
    images = [bytes([i % 256]) + os.urandom(size) for i in range(count)]
    # Pages of a few pictures, as newer writers make them: a page is what a reader must hold.
    options = {"row_group_size": count, "write_batch_size": 4, "use_dictionary": False}
    write(tmp_path / "a.parquet", {"image": images, "text": ["x"] * count, "other": images}, **options)
    del images
    pool = pyarrow.default_memory_pool()
    before, most, seen = pool.bytes_allocated(), 0, 0
    tracemalloc.start()
    for row in columns.rows(tmp_path, "a.parquet", ["image", "text"], lambda *line: None):
        most = max(most, pool.bytes_allocated() - before)
        seen += len(row.value["image"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == count * (size + 1)
    assert most < 40 << 20 and peak < 8 << 20, (most, peak)  # of 52 MB in the one row group


def repeated(value: bytes, count: int) -> pyarrow.Array:
    """A value that a file stores once, however often it names it."""
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), pyarrow.array([value]))


@pytest.mark.parametrize("listed", [False, True])
def test_a_value_that_is_named_many_times_does_not_fill_the_memory(listed: bool, tmp_path: Path):
    value, count = bytes(1 << 20), 256
    column = repeated(value, count)
    if listed:
        column = pyarrow.ListArray.from_arrays(
            pyarrow.array([0, count, count + 1], pyarrow.int32()), repeated(value, count + 1)
        )
    options = {"compression": "zstd", "store_schema": False, "dictionary_pagesize_limit": 8 << 20}
    path = write(tmp_path / "a.parquet", {"images": column}, **options)
    assert path.stat().st_size < 2000
    rejects: list = []
    pyarrow.set_memory_pool(COUNTING)
    try:
        found = columns.rows(tmp_path, "a.parquet", ["images"], lambda *line: rejects.append(line), max_bytes=8 << 20)
        sizes = [len(row.value["images"]) for row in found]
    finally:
        pyarrow.set_memory_pool(pyarrow.default_memory_pool())
    assert sizes == ([1] if listed else [1 << 20] * count)
    assert reasons(rejects) == ({"a.parquet:1": "too many bytes"} if listed else {})
    assert COUNTING.max_memory() < 40 << 20


def test_values_of_lists_are_whole_where_the_dictionary_ends(tmp_path: Path):
    """A writer gives up the dictionary when it grows: batches then hold values of both kinds."""
    rows = [([None, {"bytes": bytes([i]) * 9000, "path": None}], [f"{i} " * 3000, None]) for i in range(100)]
    obelics(tmp_path / "a.parquet", rows, CELL, write_batch_size=3, dictionary_pagesize_limit=60_000)
    documents, rejects = read("parquet", tmp_path)
    assert not rejects and [d.segments[-1] for d in documents] == [Image(data=bytes([i]) * 9000) for i in range(100)]
