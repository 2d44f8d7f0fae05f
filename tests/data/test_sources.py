"""Sources: each format gives its documents in order, and every bad input is one line with key, reason and place."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mmgpt.core.document import Image, Text, Video
from mmgpt.data import media, sources
from mmgpt.data.sources import Found, SourceError

PNG = media.encode_png(np.zeros((4, 4, 3), np.uint8))
MP4 = media.encode_mp4(np.zeros((2, 16, 16, 3), np.uint8), 4)
Rejects = list[tuple[str, str, str]]


def read(name: str, path: Path) -> tuple[list[Found], Rejects]:
    rejects: Rejects = []
    documents = list(sources.load(name).documents(path, lambda *line: rejects.append(line)))
    assert all(key and reason and place for key, reason, place in rejects)
    return documents, rejects


def put(root: Path, **files: bytes | str) -> None:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())


def reasons(rejects: Rejects) -> dict[str, str]:
    assert len({key for key, _, _ in rejects}) == len(rejects), "one line for each"
    return {key: reason.partition(":")[0] for key, reason, _ in rejects}


def test_every_format_is_found_by_its_file():
    assert sources.names() == sorted(sources.names()) and {"folder", "jsonl", "mp4", "webdataset"} <= set(
        sources.names()
    )
    assert all(sources.described(name) for name in sources.names())
    with pytest.raises(SourceError, match="Did you mean 'webdataset'"):
        sources.load("webdatset")


# --- folder


def test_folder_pairs_images_with_captions(tmp_path: Path):
    put(tmp_path, **{"b/two.png": PNG, "b/two.json": '{"caption": "Zwei", "likes": 3, "by": "me"}'})
    put(tmp_path, **{"one.PNG": PNG, "one.txt": "\ufeff  eins\n", ".DS_Store": b"x"})
    put(tmp_path, **{"three.png": PNG, "captions.tsv": 'three.png\tdrei "Bilder"\n'})
    documents, rejects = read("folder", tmp_path)
    assert not rejects
    assert [d.key for d in documents] == ["one", "three", "b/two"]
    assert [d.segments[0].text for d in documents if isinstance(d.segments[0], Text)] == [
        "eins",
        'drei "Bilder"',
        "Zwei",
    ]
    assert all(isinstance(d.segments[1], Image) and d.segments[1].data == PNG for d in documents)
    assert documents[2].meta == {"likes": "3", "by": "me"} and documents[2].place.endswith("b/two.png")


def test_folder_rejects(tmp_path: Path):
    put(tmp_path, **{"lonely.png": PNG, "words.txt": "no picture", "scan.tiff": b"x"})
    for key, caption in {"latin": b"caf\xe9", "blank": b" \n"}.items():
        put(tmp_path, **{f"{key}.png": PNG, f"{key}.txt": caption})
    for key, caption in {"broken": "{", "list": "[1]", "number": '{"text": 3}', "none": '{"title": "x"}'}.items():
        put(tmp_path, **{f"{key}.png": PNG, f"{key}.json": caption})
    documents, rejects = read("folder", tmp_path)
    assert not documents
    assert reasons(rejects) == {
        "lonely": "image without caption",
        "words": "caption without image",
        "scan": "unknown file type",
        "latin": "not UTF-8",
        "blank": "empty caption",
        "broken": "malformed JSON",
        "list": "wrong type",
        "number": "wrong type",
        "none": "no caption",
    }


def test_folder_reads_nothing_through_links_pipes_or_elsewhere(tmp_path: Path):
    secret, root = tmp_path / "secret.txt", tmp_path / "raw"
    secret.write_text("secret")
    put(root, **{"a.png": PNG, "b.txt": "caption", "c.png": PNG, "ok.png": PNG, "real.txt": "inside"})
    (root / "a.txt").symlink_to(secret)
    (root / "c.txt").symlink_to(root / "c.txt")
    (root / "ok.txt").symlink_to("real.txt")
    os.mkfifo(root / "b.png")
    documents, rejects = read("folder", root)
    assert [d.key for d in documents] == ["ok"]
    assert reasons(rejects) == {
        "a": "link out of the folder",
        "b": "not a regular file",
        "c": "unreadable",
        "real": "caption without image",
    }


def test_table_rows_fail_one_by_one(tmp_path: Path):
    put(tmp_path, **{"a.png": PNG, "b.png": PNG, "c.png": PNG, "d.png": PNG})
    table = (
        b'file,caption,by\na.png,"a, b",me\nb.png,two\nc.png,caf\xe9,me\n../d.png,x,me\na.png,again,me\ngone.png,x,me\n'
    )
    put(tmp_path, **{"captions.csv": table})
    documents, rejects = read("folder", tmp_path)
    assert [(d.key, d.meta) for d in documents] == [("a", {"by": "me"})]
    assert reasons(rejects) == {
        "captions.csv:3": "malformed line",
        "captions.csv:4": "not UTF-8",
        "captions.csv:5": "unsafe path",
        "captions.csv:6": "duplicate key",
        "b": "image without caption",
        "c": "image without caption",
        "d": "image without caption",
        "gone.png": "caption without image",
    }


def test_a_file_is_no_folder(tmp_path: Path):
    put(tmp_path, **{"a.png": PNG})
    for name in ("folder", "mp4"):
        with pytest.raises(SourceError, match="is a file"):
            read(name, tmp_path / "a.png")


# --- mp4


def test_mp4_pairs_clips_with_captions(tmp_path: Path):
    put(tmp_path, **{"a.mp4": MP4, "a.txt": "one", "sub/b.mp4": MP4, "captions.csv": "sub/b.mp4,two\n", "c.mp4": MP4})
    documents, rejects = read("mp4", tmp_path)
    assert [(d.key, d.segments) for d in documents] == [
        ("a", (Text(text="one"), Video(data=MP4))),
        ("sub/b", (Text(text="two"), Video(data=MP4))),
    ]
    assert reasons(rejects) == {"c": "video without caption"}


# --- jsonl


def lines(root: Path, *items: object) -> Path:
    path = root / "documents.jsonl"
    path.write_bytes(b"\n".join(i if isinstance(i, bytes) else json.dumps(i).encode() for i in items))
    return path


def test_jsonl_reads_interleaved_documents(tmp_path: Path):
    put(tmp_path, **{"images/a.png": PNG, "clips/a.mp4": MP4})
    parts = [
        {"text": "Look:"},
        {"image": "images/a.png", "time": 2},
        {"video": "clips/a.mp4"},
        {"text": "what?", "role": "user", "loss": 0.0},
        {"text": "", "role": "answer"},
    ]
    path = lines(
        tmp_path, {"key": "story", "segments": parts, "meta": {"by": "me"}}, b"", {"key": "x", "segments": parts}
    )
    for place in (path, tmp_path):
        documents, rejects = read("jsonl", place)
        assert not rejects and [d.key for d in documents] == ["story", "x"]
        assert documents[0].meta == {"by": "me"} and documents[1].place.endswith("documents.jsonl:3")
        assert documents[0].segments == (
            Text(text="Look:"),
            Image(data=PNG, time=2.0),
            Video(data=MP4),
            Text(text="what?", role="user", loss=0.0),
            Text(text="", role="answer"),
        )


@pytest.mark.parametrize(
    "name",
    [
        "/etc/hostname",
        "../a.png",
        "images/../../a.png",
        "http://127.0.0.1/a.png",
        "file:///etc/hostname",
        "data:,x",
        "a\\b",
        "a\0b",
        ".",
    ],
)
def test_jsonl_media_stay_below_their_folder(tmp_path: Path, name: str):
    documents, rejects = read("jsonl", lines(tmp_path, {"key": "a", "segments": [{"image": name}]}))
    assert not documents and reasons(rejects) == {"a": "unsafe path"}


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (b'{"key": "a", ', "malformed JSON"),
        (b"[" * 100_000, "malformed JSON"),
        (b'{"key": "a", "segments": [{"text": "a", "loss": NaN}]}', "malformed JSON"),
        (b'{"key": "a", "segments": [{"text": "a", "loss": ' + b"1" * 5000 + b"}]}", "malformed JSON"),
        ({"key": "a", "segments": [{"text": "a", "loss": 1e200}]}, "wrong type"),
        (b'{"key": "caf\xe9"}', "not UTF-8"),
        ([], "wrong type"),
        ({"segments": [{"text": "a"}]}, "wrong type"),
        ({"key": 3, "segments": [{"text": "a"}]}, "wrong type"),
        ({"key": "a", "segments": "text"}, "wrong type"),
        ({"key": "a", "segments": []}, "wrong type"),
        ({"key": "a", "segments": ["text"]}, "wrong type"),
        ({"key": "a", "segments": [{"text": 3}]}, "wrong type"),
        ({"key": "a", "segments": [{"text": "", "role": "user"}]}, "wrong type"),
        ({"key": "a", "segments": [{"text": "\ud800"}]}, "wrong type"),
        ({"key": "a", "segments": [{"image": ["a.png"]}]}, "wrong type"),
        ({"key": "a", "segments": [{"text": "a", "image": "a.png"}]}, "wrong type"),
        ({"key": "a", "segments": [{"text": "a", "role": 1}]}, "wrong type"),
        ({"key": "a", "segments": [{"text": "a", "loss": True}]}, "wrong type"),
        ({"key": "a", "segments": [{"text": "a", "loss": -1}]}, "wrong type"),
        ({"key": "a", "segments": [{"text": "a", "time": "1 s"}]}, "wrong type"),
        ({"key": "a", "segments": [{"text": "a", "los": 0}]}, "wrong type"),
        ({"key": "a", "segment": [], "segments": [{"text": "a"}]}, "wrong type"),
        ({"key": "a", "segments": [{"text": "a"}], "meta": {"n": 1}}, "wrong type"),
        ({"key": "a", "segments": [{"image": "gone.png"}]}, "missing file"),
    ],
)
def test_jsonl_rejects_one_line_and_goes_on(tmp_path: Path, item: object, reason: str):
    good = {"key": "good", "segments": [{"text": "a"}]}
    documents, rejects = read("jsonl", lines(tmp_path, good, item, {**good, "key": "last"}))
    assert [d.key for d in documents] == ["good", "last"]
    assert [(r.partition(":")[0], p.rpartition(":")[2]) for _, r, p in rejects] == [(reason, "2")]


@pytest.mark.parametrize(("name", "suffix"), [("jsonl", "jsonl"), ("webdataset", "tar")])
def test_a_folder_that_is_named_like_a_file_is_rejected(tmp_path: Path, name: str, suffix: str):
    (tmp_path / f"a.{suffix}").mkdir()
    documents, rejects = read(name, tmp_path)
    assert not documents and list(reasons(rejects)) == [f"a.{suffix}"]


def test_jsonl_needs_a_file(tmp_path: Path):
    with pytest.raises(SourceError, match=r"holds no \.jsonl file"):
        read("jsonl", tmp_path)


# --- webdataset


def archive(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(n: int) -> list[tuple[str, bytes]]:
    return [m for i in range(n) for m in ((f"{i:04d}.png", PNG), (f"{i:04d}.txt", f"caption {i}".encode()))]


def test_webdataset_reads_archives_in_order(tmp_path: Path):
    archive(tmp_path / "00001.tar", [("x.mp4", MP4), ("x.json", b'{"text": "clip", "id": 7}')])
    archive(
        tmp_path / "00000.tar",
        [*samples(2), ("d/a.b.txt", b"dotted"), ("d/z.txt", b"z"), ("d/z.png", PNG), ("d/z.cls", b"3")],
    )
    documents, rejects = read("webdataset", tmp_path)
    assert [d.key for d in documents] == ["00000/0000", "00000/0001", "00000/d/z", "00001/x"]
    assert documents[1].segments == (Text(text="caption 1"), Image(data=PNG))
    assert documents[3].segments == (Text(text="clip"), Video(data=MP4)) and documents[3].meta == {"id": "7"}
    assert not rejects  # a.b.txt is of the suffix "b.txt", which is nothing we read
    assert [d.key for d in read("webdataset", tmp_path / "00001.tar")[0]] == ["00001/x"]


def test_webdataset_rejects(tmp_path: Path):
    members = [("lonely.png", PNG), ("words.txt", b"x"), ("twice.png", PNG), ("twice.png", PNG), ("latin.png", PNG)]
    members += [
        ("latin.txt", b"\xff"),
        ("../out.txt", b"x"),
        ("/abs.txt", b"x"),
        ("good.png", PNG),
        ("good.txt", b"fine"),
    ]
    documents, rejects = read("webdataset", archive(tmp_path / "a.tar", members))
    assert [d.key for d in documents] == ["a/good"]
    assert reasons(rejects) == {
        "a/lonely": "image without caption",
        "a/words": "caption without image",
        "a/twice": "duplicate key",
        "a/latin": "not UTF-8",
        "a/../out": "unsafe path",
        "a/abs": "unsafe path",
    }
    assert all("offset" in place for _, _, place in rejects)


def test_webdataset_takes_no_links_or_devices(tmp_path: Path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("l", tarfile.SYMTYPE),
            ("h", tarfile.LNKTYPE),
            ("c", tarfile.CHRTYPE),
            ("p", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(f"{name}.txt")
            info.type, info.linkname = kind, "/etc/hostname"
            tar.addfile(info)
    documents, rejects = read("webdataset", path)
    assert not documents and set(reasons(rejects).values()) == {"not a regular file"} and len(rejects) == 4


def test_every_cut_of_an_archive_keeps_what_came_before(tmp_path: Path):
    whole = archive(tmp_path / "a.tar", samples(4))
    data = whole.read_bytes()
    end = 4 * 4 * 512  # four samples of two members, each a header block and a data block
    for cut in range(0, end + 1, 256):
        whole.write_bytes(data[:cut])
        documents, rejects = read("webdataset", whole)
        # a sample is whole after its fourth block's 9 bytes of caption
        assert len(documents) == (cut + 512 - 9) // 2048, cut
        assert [d.key for d in documents] == [f"a/{i:04d}" for i in range(len(documents))]
        assert len(rejects) == 1 and rejects[0][1].split(":")[0] in ("truncated archive", "damaged archive")
        assert "offset" in rejects[0][1]


def test_a_damaged_header_does_not_end_an_archive_silently(tmp_path: Path):
    path = archive(tmp_path / "a.tar", samples(4))
    data = bytearray(path.read_bytes())
    data[2 * 2048 + 5] ^= 255
    path.write_bytes(bytes(data))
    documents, rejects = read("webdataset", path)
    assert len(documents) == 2 and reasons(rejects) == {"a": "damaged archive"} and "4096" in rejects[0][1]


def test_webdataset_needs_plain_archives(tmp_path: Path):
    with pytest.raises(SourceError, match="holds no uncompressed"):
        read("webdataset", tmp_path)
    put(tmp_path, **{"a.tar.gz": b"x", "b.tar": b"this is no archive" * 100})
    documents, rejects = read("webdataset", tmp_path)
    assert not documents and reasons(rejects) == {"a.tar.gz": "compressed archive", "b": "damaged archive"}
