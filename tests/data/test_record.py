"""Records and dataset folders: what is written is read back, damage is named, half a folder is never read."""

import copy
import errno
import json
import os
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmgpt.core.document import Action, Document, Features, Image, Text, Video, equal
from mmgpt.data import record
from mmgpt.data.index import Index
from mmgpt.data.record import Dataset, DatasetError, RecordError, Writer


def example(i: int = 0) -> Document:
    return Document(
        key=f"key-{i}",
        segments=(
            Text(text="Grüße, 世界 \0 <b>", role="user", loss=0.0),
            Image(data=bytes(range(256)), time=1.5),
            Video(data=b"", fps=7.5),
            Text(ids=np.arange(i % 5, dtype=np.int32)),
            Image(codes=np.arange(12, dtype=np.int32).reshape(2, 3, 2), loss=0.25),
            Video(codes=np.ones((4, 2, 3, 1), np.int32), fps=2.0),
            Action(values=np.ones((2, 7), np.float32), codes=np.arange(3, dtype=np.int32)),
            Features(
                feats=np.zeros((2, 5), np.float32), boxes=np.ones((2, 4), np.float32), labels=np.zeros(2, np.int32)
            ),
        ),
        meta={"name": "wörld"},
    )


def written(directory: Path, documents: int = 10, **options: int) -> Dataset:
    with Writer(directory, name="some", **options) as writer:
        for i in range(documents):
            writer.write(example(i))
    return Dataset(directory)


def test_a_record_holds_the_document():
    for i in range(5):
        assert equal(record.decode(record.encode(example(i))), example(i))


@given(
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1),
    st.lists(st.tuples(st.text(st.characters(exclude_categories=("Cs",))), st.floats(0, 10), st.binary())),
)
def test_any_text_and_bytes_survive(key: str, parts: list[tuple[str, float, bytes]]):
    segments = tuple(s for t, loss, data in parts for s in (Text(text=t, loss=loss), Image(data=data, role=t)))
    document = Document(key=key, segments=segments)
    assert equal(record.decode(record.encode(document)), document)


@given(st.data())
def test_damaged_records_raise_record_errors_only(data: st.DataObject):
    damaged = bytearray(record.encode(example(3)))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    try:
        record.decode(bytes(damaged[:cut]), "here")
    except RecordError as e:
        assert e.where.startswith("here")


def test_every_cut_is_noticed():
    data = record.encode(example())
    for cut in range(len(data)):
        with pytest.raises(RecordError):
            record.decode(data[:cut])
    with pytest.raises(RecordError, match="the blobs end"):
        record.decode(data + b"x")


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"key": "a", "meta": {}, "segments": [{"kind": "pickle"}]},
        {"key": "a", "meta": {}, "segments": [{"kind": "text", "data": "x"}]},
        {"key": "a", "meta": {}, "segments": [{"kind": "text", "loss": 10**400}]},
        {"key": "a", "meta": {"n": 1}, "segments": []},
        {"key": "a", "meta": {}, "segments": [{"kind": "image", "blobs": [["codes", "int32", [1 << 60, 0, 1]]]}]},
        {"key": "a", "meta": {}, "segments": [{"kind": "image", "blobs": [["codes", "int32", [-1, 1, 1]]]}]},
        {"key": "a", "meta": {}, "segments": [{"kind": "image", "blobs": [["codes", "object", [1, 1, 1]]]}]},
        {"key": "a", "meta": {}, "segments": [{"kind": "image", "blobs": [["data", "bytes", [1 << 30]]]}]},
    ],
)
def test_hostile_headers_are_refused(header: object):
    body = json.dumps(header).encode()
    with pytest.raises(RecordError):
        record.decode(struct.pack("<I", len(body)) + body)


def test_wrong_documents_are_refused():
    for segment in (
        Text(ids=np.zeros(3, np.int64)),
        Image(codes=np.zeros((3, 3), np.int32)),
        Text(text="\ud800"),
        Text(text="a", loss=float("nan")),
    ):
        with pytest.raises(RecordError, match="'k'"):
            record.encode(Document(key="k", segments=(segment,)))


def test_random_access_over_shards(tmp_path: Path):
    dataset = written(tmp_path / "d", 10, shard_documents=3)
    assert len(dataset) == 10 and len(dataset.manifest["shards"]) == 4
    assert all(equal(dataset[i], example(i)) for i in (9, 0, 5, 3, 2))
    assert [d.key for d in dataset] == [f"key-{i}" for i in range(10)]
    with pytest.raises(IndexError):
        dataset[10]


def test_the_index_holds_every_size(tmp_path: Path):
    index = written(tmp_path / "d", 7, shard_documents=3).index
    assert index.offset.tolist() == list(range(0, 57, 8))
    first = index.shape[: index.offset[1]].tolist()
    assert first[0] == [len("Grüße, 世界 \0 <b>"), 0, 0, 0, 0] and first[1] == first[2] == [0] * 5
    assert first[4:] == [[1, 2, 3, 2, 5], [4, 2, 3, 1, 24], [3, 0, 0, 0, 0], [2, 5, 0, 0, 0]]
    assert index.shape[index.offset[4] + 3].tolist() == [4, 0, 0, 0, 0]
    assert index.kind[:8].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert index.loss[:8].tolist() == [0, 1, 1, 1, 0.25, 1, 1, 1]


def test_many_threads_read_the_same(tmp_path: Path):
    dataset = written(tmp_path / "d", 60, shard_documents=16)
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda i: dataset[i % 60].key, range(600)))
    assert keys == [f"key-{i % 60}" for i in range(600)]


def test_a_dataset_is_copied_as_its_folder(tmp_path: Path):
    dataset = written(tmp_path / "d")
    dataset[0]
    assert equal(copy.deepcopy(dataset)[4], example(4))


def test_shards_written_apart_make_the_same_dataset(tmp_path: Path):
    whole = written(tmp_path / "a", 10, shard_documents=4)
    apart = tmp_path / "b"
    apart.mkdir()
    infos = [
        record.write_shard(apart / record.shard_name(n), (example(i) for i in span))
        for n, span in enumerate((range(4), range(4, 8), range(8, 10)))
    ]
    again = record.read_shard_info(apart / infos[0].file)
    assert again.sha256 == infos[0].sha256 and np.array_equal(again.index.shape, infos[0].index.shape)
    record.write_manifest(apart, "some", infos, rejected=0)
    assert Dataset(apart).manifest == whole.manifest
    assert np.array_equal(Dataset(apart).index.shape, whole.index.shape)


def test_a_folder_that_is_no_dataset_is_named(tmp_path: Path):
    with pytest.raises(DatasetError, match="no such folder"):
        Dataset(tmp_path / "gone")
    with pytest.raises(DatasetError, match="the folder is empty"):
        Dataset(tmp_path)
    record.write_shard(tmp_path / record.shard_name(0), [example()])
    with pytest.raises(DatasetError, match="interrupted"):
        Dataset(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "index-shape.npy", "index-offset.npy", "shard-00001.array_record"])
@pytest.mark.parametrize("part", [None, 0.0, 0.5, 0.99])
def test_lost_or_cut_files_are_named(tmp_path: Path, name: str, part: float | None):
    directory = tmp_path / "d"
    written(directory, 10, shard_documents=3)
    path = directory / name
    data = path.read_bytes()
    path.unlink(missing_ok=True)  # a reader that is open still has it
    if part is not None:
        path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(DatasetError, match=name if part is not None or name != "manifest.json" else "interrupted"):
        Dataset(directory)


def test_an_index_of_another_dataset_is_noticed(tmp_path: Path):
    written(tmp_path / "d", 10)
    other = written(tmp_path / "other", 9).directory
    shutil.copy(other / "index-shape.npy", tmp_path / "d")
    with pytest.raises(DatasetError, match=r"expected int32 \(80, 5\), found int32 \(72, 5\)"):
        Dataset(tmp_path / "d")


def test_a_dataset_of_another_version_is_told(tmp_path: Path):
    directory = written(tmp_path / "d").directory
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps(manifest | {"version": 1}))
    with pytest.raises(DatasetError, match="its format is version 1, this mmgpt reads 2"):
        Dataset(directory)


def test_flipped_bytes_are_noticed(tmp_path: Path):
    dataset = written(tmp_path / "d")
    path = tmp_path / "d" / record.shard_name(0)
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 16
    path.write_bytes(bytes(data))
    with pytest.raises(DatasetError, match="hash differs"):
        dataset.verify()


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path):
    written(tmp_path / "d")
    path = tmp_path / "d" / "manifest.json"
    path.write_text(path.read_text().replace("shard-00000", "../shard-00000"))
    with pytest.raises(DatasetError, match="damaged"):
        Dataset(tmp_path / "d")


def test_two_that_complete_a_dataset_at_once_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    index, save, first = Index.of([example(0), example(1)]), np.save, [True]

    def both(*args: Any, **options: Any) -> None:
        save(*args, **options)
        if first:
            first.clear()
            index.save(tmp_path)  # another process, that ends before this one

    monkeypatch.setattr(np, "save", both)
    index.save(tmp_path)
    monkeypatch.undo()
    assert np.array_equal(Index.load(tmp_path, 2, len(index.kind)).shape, index.shape)
    assert not list(tmp_path.glob("*.tmp"))


def test_an_index_that_cannot_be_saved_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space"):
        Index.of([example()]).save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_complete_folder_is_not_overwritten_unasked(tmp_path: Path):
    written(tmp_path / "d", 10)
    with pytest.raises(DatasetError, match="--overwrite"):
        Writer(tmp_path / "d", name="other")
    assert len(Dataset(tmp_path / "d")) == 10
    with pytest.raises(RuntimeError, match="stop"), Writer(tmp_path / "d", name="other", overwrite=True) as writer:
        writer.write(example())
        raise RuntimeError("stop")
    assert len(Dataset(tmp_path / "d")) == 10  # whole until the new one is
    with Writer(tmp_path / "d", name="other", overwrite=True) as writer:
        writer.write(example())
        assert len(Dataset(tmp_path / "d")) == 10
    assert len(Dataset(tmp_path / "d")) == 1 and [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_foreign_folder_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(DatasetError, match="thesis"):
        Writer(tmp_path, name="some")
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_half_written_folder_is_done_again(tmp_path: Path):
    with Writer(tmp_path / "killed", name="some", shard_documents=2) as writer:
        for i in range(5):
            writer.write(example(i))
        shutil.copytree(tmp_path / "killed", tmp_path / "d")  # two shards, a temporary file, no manifest
    assert list((tmp_path / "d").glob("*.tmp"))
    assert len(written(tmp_path / "d", 3)) == 3
    assert not list((tmp_path / "d").glob("*.tmp"))
    assert len(list((tmp_path / "d").glob("shard-*"))) == 1


def test_a_second_writer_of_a_folder_is_told_and_costs_the_first_nothing(tmp_path: Path):
    written(tmp_path / "whole", 2)
    for folder, overwrite in (("new", False), ("whole", True)):
        with Writer(tmp_path / folder, name="some", overwrite=overwrite) as writer:
            writer.write(example())
            with pytest.raises(DatasetError, match="another process writes it"):
                Writer(tmp_path / folder, name="some", overwrite=True)
        assert len(Dataset(tmp_path / folder)) == 1
        with Writer(tmp_path / folder, name="some", overwrite=True) as writer:  # it is free again
            writer.write(example())


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc", "a\nb", "\0", "n" * 300])
def test_a_name_that_no_folder_can_have_is_refused(tmp_path: Path, name: str):
    with pytest.raises(DatasetError, match="a folder cannot have the dataset's name"):
        Writer(tmp_path / "new", name=name)
    manifest = written(tmp_path / "d").manifest
    (tmp_path / "d" / "manifest.json").write_text(json.dumps({**manifest, "name": name}))
    with pytest.raises(DatasetError, match="a folder cannot have the dataset's name"):
        Dataset(tmp_path / "d")


@pytest.mark.parametrize("settings", [[1], {"codebooks": 5}, {"codebooks": [[1]]}])
def test_settings_of_wrong_types_are_damage(tmp_path: Path, settings: object):
    manifest = written(tmp_path / "d").manifest
    (tmp_path / "d" / "manifest.json").write_text(json.dumps({**manifest, "meta": {"settings": settings}}))
    with pytest.raises(DatasetError, match=r"damaged|not a manifest"):
        Dataset(tmp_path / "d")


def test_an_exception_leaves_the_rejects_only(tmp_path: Path):
    with pytest.raises(KeyError), Writer(tmp_path / "d", name="some", shard_documents=2) as writer:
        for i in range(5):
            writer.write(example(i))
        writer.reject("bad", "why", "where")
        raise KeyError("something else")
    assert os.listdir(tmp_path / "d") == ["rejects.jsonl"]
    assert json.loads((tmp_path / "d" / "rejects.jsonl").read_text()) == {
        "key": "bad",
        "reason": "why",
        "place": "where",
    }


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / record.shard_name(0)
    monkeypatch.setattr(record.secrets, "token_hex", lambda size: "0")
    path.with_name(f".{path.name}.0.tmp").symlink_to("/dev/full")
    with pytest.raises(DatasetError, match="disk is full"):
        record.write_shard(path, [example(i) for i in range(50)])
    assert os.listdir(tmp_path) == []


def test_a_bad_document_costs_only_itself(tmp_path: Path):
    with Writer(tmp_path / "d", name="some") as writer:
        writer.write(example(0))
        with pytest.raises(RecordError):
            writer.write(Document(key="bad", segments=(Text(text="\ud800"),)))
        writer.write(example(1))
    assert [d.key for d in Dataset(tmp_path / "d")] == ["key-0", "key-1"]
