"""WebVid: a row of the table and its clip are one document; a bad row or a missing clip costs itself."""

from pathlib import Path

import pytest

from mmgpt.core.document import Text, Video
from mmgpt.data.sources import SourceError
from tests.data.raw import MP4, put
from tests.data.sources.raw import read, reasons

HEADER = "videoid,contentUrl,duration,page_dir,name\n"
URL = "https://127.0.0.1/1066674784/preview/stock-footage.mp4"


def row(id: str, name: str, page: str = "006001_006050") -> str:
    return f"{id},{URL},PT00H00M13S,{page},{name}\n"


def table(root: Path, *rows: str | bytes) -> Path:
    data = b"".join(r if isinstance(r, bytes) else r.encode() for r in (HEADER, *rows))
    return put(root, {"results_2M_train.csv": data})


@pytest.mark.parametrize("name", ["videos/006001_006050/7.mp4", "006001_006050/7.mp4", "videos/7.mp4", "7.mp4"])
def test_a_row_and_its_clip_are_a_document(tmp_path: Path, name: str):
    table(put(tmp_path, {name: MP4}), row("7", '"Travel blogger, shoot a story.  "'))
    for place in (tmp_path, tmp_path / "results_2M_train.csv"):
        documents, rejects = read("webvid", place)
        assert not rejects and [d.key for d in documents] == ["7"]
        assert documents[0].segments == (Text(text="Travel blogger, shoot a story."), Video(data=MP4))
        assert documents[0].meta == {"contentUrl": URL, "duration": "PT00H00M13S", "page_dir": "006001_006050"}
        assert documents[0].place.endswith("results_2M_train.csv:2")


def test_tables_are_read_in_the_order_of_their_names(tmp_path: Path):
    put(tmp_path, {"1.mp4": MP4, "2.mp4": MP4, "b.csv": HEADER + row("1", "x"), "a.csv": HEADER + row("2", "x")})
    assert [d.key for d in read("webvid", tmp_path)[0]] == ["2", "1"]


def test_rows_fail_one_by_one(tmp_path: Path):
    put(tmp_path, {f"{id}.mp4": MP4 for id in ("1", "2", "3", "9")})
    table(
        tmp_path,
        row("1", "first"),
        row("2", "caf").encode()[:-1] + b"\xe9\n",
        row("3", " "),
        "4,too,few\n",
        row("5", "no clip"),
        row("../6", "x"),
        row("7", "x", "https://127.0.0.1/x"),
        row("", "x"),
        row("8", "x" * 200_000),
        row("9", "last"),
    )
    documents, rejects = read("webvid", tmp_path)
    assert [d.key for d in documents] == ["1", "9"]
    assert [(reason.partition(":")[0], place.rpartition(":")[2]) for _, reason, place in rejects] == [
        ("not UTF-8", "3"),
        ("empty caption", "4"),
        ("malformed line", "5"),
        ("video without a local copy", "6"),
        ("unsafe path", "7"),
        ("unsafe path", "8"),
        ("wrong type", "9"),
        ("malformed line", "10"),
    ]


def test_a_quote_that_never_closes_costs_what_it_swallows_and_no_more(tmp_path: Path):
    put(tmp_path, {"1.mp4": MP4, "9.mp4": MP4})
    swallowed = [row("2", "x" * 10_000)] * 20
    table(tmp_path, row("1", "first"), row("3", '"open'), *swallowed, row("9", "last"))
    documents, rejects = read("webvid", tmp_path)
    assert [d.key for d in documents] == ["1", "9"]
    assert rejects[0][1].startswith("malformed line") and rejects[0][2].endswith(":3")


@pytest.mark.parametrize("header", ["id,caption\n", "", "videoid,page_dir\n", b"videoid,page_dir,name\xff\n"])
def test_a_table_without_the_columns_is_refused(tmp_path: Path, header: str | bytes):
    put(tmp_path, {"1.mp4": MP4, "results.csv": header, "z.csv": HEADER + row("1", "x")})
    documents, rejects = read("webvid", tmp_path)
    assert [d.key for d in documents] == ["1"]
    assert reasons(rejects)["results.csv"] in ("wrong columns", "not UTF-8")


def test_clips_behind_links_and_in_odd_files_are_not_read(tmp_path: Path):
    put(tmp_path, {"secret.mp4": MP4, "raw/2.mp4/x": b""})
    (tmp_path / "raw" / "1.mp4").symlink_to(tmp_path / "secret.mp4")
    table(tmp_path / "raw", row("1", "x"), row("2", "x"))
    documents, rejects = read("webvid", tmp_path / "raw")
    assert not documents and reasons(rejects) == {"1": "link out of the folder", "2": "not a regular file"}


def test_webvid_needs_a_table(tmp_path: Path):
    with pytest.raises(SourceError, match=r"holds no \.csv file"):
        read("webvid", put(tmp_path, {"1.mp4": MP4}))
