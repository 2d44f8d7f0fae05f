"""Importing: everything good is kept in order, everything bad is listed, and half an import is never a dataset."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mmgpt.core.document import Document, Image, Text, Video, equal
from mmgpt.data import importing, inspect, media
from mmgpt.data.importing import import_dataset
from mmgpt.data.record import Dataset, DatasetError, Writer
from mmgpt.data.sources import Found, SourceError, jsonl


def picture(i: int = 0) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (24, 32, 3), np.uint8)


def folder(root: Path, n: int = 30) -> Path:
    root.mkdir()
    for i in range(n):
        (root / f"{i:03d}.jpg").write_bytes(media.encode_jpeg(picture(i)))
        (root / f"{i:03d}.txt").write_text(f"picture {i}")
    return root


def add(root: Path, name: str, data: bytes) -> None:
    (root / name).write_bytes(data)
    (root / name).with_suffix(".txt").write_text("a caption")


def rejects(directory: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (directory / "rejects.jsonl").read_text().splitlines()]


def test_a_folder_becomes_a_dataset(tmp_path: Path):
    raw = folder(tmp_path / "raw")
    done = import_dataset("folder", raw, tmp_path / "out")
    dataset = Dataset(tmp_path / "out")
    assert done.documents == len(dataset) == 30 and dataset.name == "out" and not done.rejected
    expected = (Text(text="picture 7"), Image(data=(raw / "007.jpg").read_bytes()))
    assert equal(dataset[7], Document(key="007", segments=expected))


def test_the_bytes_do_not_depend_on_the_threads(tmp_path: Path):
    raw = folder(tmp_path / "raw")
    add(raw, "0005.jpg", b"")
    for threads in (1, 7):
        import_dataset("folder", raw, tmp_path / str(threads), "same", threads=threads)
    one, seven = (Dataset(tmp_path / n).manifest for n in "17")
    assert one == seven and rejects(tmp_path / "1") == rejects(tmp_path / "7")


@pytest.mark.parametrize("threads", [1, 7])
def test_rejects_are_in_the_order_of_the_raw_data(tmp_path: Path, threads: int):
    line = json.dumps({"key": "a", "segments": [{"text": "one"}]})
    (tmp_path / "d.jsonl").write_text("\n".join(["{", *[line, "{"] * 40]))
    import_dataset("jsonl", tmp_path / "d.jsonl", tmp_path / "out", threads=threads)
    places = [int(line["place"].rpartition(":")[2]) for line in rejects(tmp_path / "out")]
    assert places == [1, *range(3, 82)]  # all but the first document, whose key the others have too


def test_what_a_source_rejected_before_it_failed_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def documents(path: Path, reject: Callable[[str, str, str], None]) -> Iterator[Found]:
        reject("a", "damaged", str(path))
        yield from ()
        raise SourceError("no more")

    monkeypatch.setattr(jsonl, "documents", documents)
    with pytest.raises(SourceError, match="no more"):
        import_dataset("jsonl", folder(tmp_path / "raw", 1), tmp_path / "out")
    assert [line["key"] for line in rejects(tmp_path / "out")] == ["a"]


def test_bad_media_are_listed_and_never_stop_the_import(tmp_path: Path):
    raw = folder(tmp_path / "raw", 3)
    jpeg = media.encode_jpeg(picture())
    add(raw, "empty.jpg", b"")
    add(raw, "cut.jpg", jpeg[: len(jpeg) // 2])
    add(raw, "text.png", b"not a picture")
    add(raw, "huge.png", media.encode_png(np.zeros((1, 4096 * 4096 + 1, 3), np.uint8)))
    add(raw, "twin.jpg", jpeg)
    add(raw, "twin.png", media.encode_png(picture()))
    done = import_dataset("folder", raw, tmp_path / "out")
    found = {line["key"]: line["reason"].partition(":")[0] for line in rejects(tmp_path / "out")}
    assert found == {
        "empty": "empty",
        "cut": "truncated",
        "text": "not an image",
        "huge": "too many pixels",
        "twin": "image without caption",
    }
    assert done.documents == 4 and done.rejected == dict.fromkeys(found.values(), 1)
    assert all(Path(line["place"]).parent == raw for line in rejects(tmp_path / "out"))


def test_bad_clips_are_listed(tmp_path: Path):
    raw = tmp_path / "raw"
    raw.mkdir()
    clip = media.encode_mp4(np.stack([picture(i) for i in range(4)]), 4)
    add(raw, "a.mp4", clip)
    add(raw, "b.mp4", b"ffconcat version 1.0\nfile a.txt\n")
    add(raw, "c.mp4", clip[: len(clip) // 2])
    add(raw, "d.mp4", b"")
    assert import_dataset("mp4", raw, tmp_path / "out").documents == 1
    found = {line["key"]: line["reason"].partition(":")[0] for line in rejects(tmp_path / "out")}
    assert found == {"b": "not a video", "c": "corrupt", "d": "empty"}


def test_a_key_is_taken_once(tmp_path: Path):
    lines = [json.dumps({"key": key, "segments": [{"text": str(i)}]}) for i, key in enumerate("abca")]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    import_dataset("jsonl", tmp_path / "d.jsonl", tmp_path / "out")
    assert [d.key for d in Dataset(tmp_path / "out")] == ["a", "b", "c"]
    (line,) = rejects(tmp_path / "out")
    assert line["key"] == "a" and line["reason"].startswith("duplicate key") and line["place"].endswith("d.jsonl:4")


def test_nothing_to_import_is_one_clear_error(tmp_path: Path):
    with pytest.raises(SourceError, match="no such file or folder"):
        import_dataset("folder", tmp_path / "gone", tmp_path / "out")
    (tmp_path / "raw").mkdir()
    with pytest.raises(SourceError, match="holds nothing that the format 'folder' reads"):
        import_dataset("folder", tmp_path / "raw", tmp_path / "out")
    with pytest.raises(SourceError, match=r"There are .*folder, .*jsonl"):
        import_dataset("hdf5", tmp_path / "raw", tmp_path / "out")
    with pytest.raises(SourceError, match="lies inside the raw data"):
        import_dataset("folder", tmp_path / "raw", tmp_path / "raw" / "out")
    assert not (tmp_path / "out").exists()


def test_when_nothing_is_accepted_the_error_names_the_rejects(tmp_path: Path):
    (tmp_path / "raw").mkdir()
    add(tmp_path / "raw", "a.jpg", b"")
    listed = tmp_path / "out" / "rejects.jsonl"
    with pytest.raises(SourceError, match=f"'empty' \\(1\\).*{re.escape(str(listed))}"):
        import_dataset("folder", tmp_path / "raw", tmp_path / "out")
    assert [line["key"] for line in rejects(tmp_path / "out")] == ["a"]
    with pytest.raises(DatasetError, match="interrupted"):
        Dataset(tmp_path / "out")


def test_importing_again(tmp_path: Path):
    raw = folder(tmp_path / "raw", 3)
    import_dataset("folder", raw, tmp_path / "out")
    with pytest.raises(DatasetError, match="Remove the folder, or pass --overwrite"):
        import_dataset("folder", raw, tmp_path / "out")
    add(raw, "more.jpg", media.encode_jpeg(picture()))
    assert import_dataset("folder", raw, tmp_path / "out", overwrite=True).documents == 4
    (tmp_path / "out" / "manifest.json").unlink()  # as after a kill
    assert import_dataset("folder", raw, tmp_path / "out").documents == 4


def test_an_interrupted_import_is_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    raw, checks = folder(tmp_path / "raw"), importing.check

    def stop(document: Document) -> str | None:
        if document.key == "020":
            raise KeyboardInterrupt
        return checks(document)

    monkeypatch.setattr(importing, "check", stop)
    with pytest.raises(KeyboardInterrupt):
        import_dataset("folder", raw, tmp_path / "out", shard_documents=4)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert import_dataset("folder", raw, tmp_path / "out").documents == 30


def test_statistics_and_page_of_raw_data(tmp_path: Path):
    raw = folder(tmp_path / "raw", 3)
    (raw / "000.txt").write_text("<script>alert(1)</script>")
    add(raw, "empty.jpg", b"")
    import_dataset("folder", raw, tmp_path / "out")
    found = inspect.statistics(Dataset(tmp_path / "out"))
    assert (
        found["form"] == "raw"
        and found["segments"] == {"text": 3, "image": 3}
        and found["rejected_for"] == {"empty": 1}
    )
    assert found["text_lengths"]["max"] == 25 and json.loads(json.dumps(found)) == found
    page = inspect.documents_html(Dataset(tmp_path / "out"), 3)
    assert page.count("<img ") == 3 and "<script" not in page and "&lt;script&gt;" in page


def test_statistics_and_page_of_tokenised_data(tmp_path: Path):
    with Writer(tmp_path / "d", name="codes") as writer:
        for i in range(4):
            ids, codes = np.arange(i, dtype=np.int32), np.zeros((2, 3, 1), np.int32)
            clip = Video(codes=np.zeros((5, 2, 3, 1), np.int32), fps=2.0)
            writer.write(Document(key=str(i), segments=(Text(ids=ids), Image(codes=codes), clip)))
    dataset = Dataset(tmp_path / "d")
    found = inspect.statistics(dataset)
    assert found["form"] == "tokenised" and found["codes"] == 4 * (6 + 30) and found["text_lengths"]["sum"] == 6
    assert found["grids"] == {"1x2x3x1": 4, "5x2x3x1": 4}
    assert "3 ids" in inspect.documents_html(dataset, 9)

    def grey(codes: np.ndarray) -> np.ndarray:
        return np.full((*codes.shape[:3], 3), 128, np.uint8)

    page = inspect.documents_html(dataset, 2, text=lambda ids: f"text of {len(ids)}", pixels=grey)
    assert page.count("image/png") == page.count("image/gif") == 2 and "text of 3" in page
