"""Plain text: every file, line and row is a document or a line of the rejects, and segments join to the text."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmgpt.core.document import Text
from mmgpt.data import objects, texts
from mmgpt.data.sources import SourceError
from tests.data.sources.raw import put, read, reasons, shown


def lines(*items: object) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def test_a_text_file_is_a_document(tmp_path: Path):
    put(tmp_path, "b.txt", "\ufeffZwei Wörter\n")
    put(tmp_path, "a/one.TXT", "one")
    put(tmp_path, "picture.png", b"\x89PNG")
    put(tmp_path, ".hidden.txt", "not shown")
    documents, rejects = read("text", tmp_path)
    assert [(d.key, shown(d)) for d in documents] == [("b", ["Zwei Wörter\n"]), ("a/one", ["one"])]
    assert not rejects and documents[1].place == str(tmp_path / "a/one.TXT")


@pytest.mark.parametrize("name", ["part.jsonl", "part.jsonl.gz", "part.json.gz"])
def test_lines_become_documents_with_meta(name: str, tmp_path: Path):
    items = lines(
        {"text": "first", "id": "a", "url": "https://x.org", "score": 0.5, "good": True, "tags": ["x"], "none": None},
        {"content": "second", "url": "https://y.org"},
        {"text": "third", "id": 7},
        {"text": "fourth", "id": "x" * 600},
    )
    put(tmp_path, name, gzip.compress(items.encode()) if name.endswith("gz") else items + "\n")
    documents, rejects = read("text", tmp_path)
    assert [d.key for d in documents] == ["a", "https://y.org", "7", f"{name}:4"]
    assert [shown(d) for d in documents] == [["first"], ["second"], ["third"], ["fourth"]]
    assert documents[0].meta == {"url": "https://x.org", "score": "0.5", "good": "true"}
    assert not rejects and documents[2].place == f"{tmp_path / name}:3"


def test_bad_lines_cost_themselves_alone(tmp_path: Path):
    bad = {
        "not UTF-8": b'{"text": "caf\xe9"}',
        "malformed JSON": b'{"text": "cut',
        "wrong type": b'["a list"]',
        "no text": b'{"title": "x"}',
        "empty text": b'{"text": " \\n"}',
        "not a text": b'{"text": "a\\u0000b"}',
    }
    more = [
        b'{"text": 3}',
        b'{"text": "\\ud800"}',
        b'{"text": NaN}',
        b"[" * 100_000,
        b'{"text": "x", "n": ' + b"9" * 5000 + b"}",
    ]
    put(tmp_path, "a.jsonl", b"\n".join([b'{"text": "first"}', *bad.values(), *more, b'{"text": "last"}']))
    documents, rejects = read("text", tmp_path)
    assert [shown(d) for d in documents] == [["first"], ["last"]]
    expected = [*bad, "wrong type", "not UTF-8", "malformed JSON", "malformed JSON", "malformed JSON"]
    assert list(reasons(rejects).values()) == expected
    assert rejects[0][0] == "a.jsonl:2" and rejects[0][2] == f"{tmp_path / 'a.jsonl'}:2"


def test_files_that_are_no_text_are_refused(tmp_path: Path):
    put(tmp_path, "latin.txt", b"caf\xe9")
    put(tmp_path, "binary.txt", b"a\0b")
    put(tmp_path, "blank.txt", "\n")
    put(tmp_path, "c4.jsonl.zst", b"x")
    put(tmp_path, "good.jsonl", lines({"text": "good"}))
    documents, rejects = read("text", tmp_path)
    assert [shown(d) for d in documents] == [["good"]]
    assert reasons(rejects) == {
        "latin.txt": "not UTF-8",
        "binary.txt": "not a text",
        "blank.txt": "empty text",
        "c4.jsonl.zst": "compressed file",
    }


def test_nothing_outside_the_folder_is_read(tmp_path: Path):
    put(tmp_path, "secret.txt", "secret")
    put(tmp_path, "secret.jsonl", lines({"text": "secret"}))
    root = put(tmp_path, "raw/ok.txt", "ok").parent
    (root / "a.txt").symlink_to(tmp_path / "secret.txt")
    (root / "b.jsonl").symlink_to("../secret.jsonl")
    (root / "folder").symlink_to(tmp_path, target_is_directory=True)
    (root / "c.txt").symlink_to("ok.txt")
    documents, rejects = read("text", root)
    assert [(d.key, shown(d)) for d in documents] == [("c", ["ok"]), ("ok", ["ok"])]
    assert reasons(rejects) == {"a.txt": "link out of the folder", "b.jsonl": "link out of the folder"}


def test_a_link_that_the_user_names_is_followed(tmp_path: Path):
    put(tmp_path, "disk/abc.txt", "here")
    put(tmp_path, "raw/other.txt", "there")
    (tmp_path / "raw" / "named.txt").symlink_to("../disk/abc.txt")
    assert shown(read("text", tmp_path / "raw" / "named.txt")[0][0]) == ["here"]
    assert reasons(read("text", tmp_path / "raw")[1]) == {"named.txt": "link out of the folder"}


def test_a_broken_archive_gives_what_comes_before(tmp_path: Path):
    packed = gzip.compress(lines(*({"text": f"{i} " * 500} for i in range(300))).encode(), mtime=0)
    put(tmp_path, "cut.jsonl.gz", packed[:-50])
    put(tmp_path, "none.jsonl.gz", b"no gzip")
    put(tmp_path, "other.jsonl", lines({"text": "other"}))
    documents, rejects = read("text", tmp_path)
    assert 200 < len(documents) < 302 and shown(documents[-1]) == ["other"]
    assert reasons(rejects) == {"cut.jsonl.gz": "damaged archive", "none.jsonl.gz": "damaged archive"}


def test_no_folder_of_text(tmp_path: Path):
    put(tmp_path, "a.zip", b"x")
    for path in (tmp_path, tmp_path / "a.zip"):
        with pytest.raises(SourceError, match=r"holds no \.txt"):
            read("text", path)


def test_rows_of_parquet(tmp_path: Path):
    table = pyarrow.table({"content": ["one", None, "", "four"], "id": ["a", "b", "c", "d"], "n": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), tmp_path / "b.parquet")
    documents, rejects = read("text", tmp_path)
    assert [(d.key, shown(d), d.meta) for d in documents] == [("a", ["one"], {"n": "1"}), ("d", ["four"], {"n": "4"})]
    assert reasons(rejects) == {"b": "no text", "c": "empty text", "b.parquet": "unknown columns"}


# --- lines and items of any size


def test_a_line_over_the_cap_is_passed_over_in_bounded_memory(tmp_path: Path):
    bomb = gzip.compress(b'{"text": "' + b"a" * 30_000_000 + b'"}\n{"text": "after"}\n')
    put(tmp_path, "a.jsonl.gz", bomb)
    rejects: list = []
    tracemalloc.start()
    found = list(objects.objects(tmp_path, "a.jsonl.gz", lambda *line: rejects.append(line), max_bytes=1 << 16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(o.key, o.value) for o in found] == [("a.jsonl.gz:2", {"text": "after"})]
    assert rejects[0][0] == "a.jsonl.gz:1" and "over 65536 bytes" in rejects[0][1] and peak < 2_000_000


# --- where a text is cut


@given(st.text(st.sampled_from("ab .!?\n\r\t。é"), max_size=300), st.integers(2, 40))
def test_segments_join_to_the_text(text: str, most: int):
    pieces = [segment.text or "" for segment in texts.segments(text, at_most=most)]
    assert "".join(pieces) == text and all(len(piece) <= most for piece in pieces)
    assert all(len(piece) >= most // 2 for piece in pieces[:-1]), "a cut lies in the second half"


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("One two. Three.\nFour.\n\nFive six.", ["One two. Three.\nFour.\n\n", "Five six."]),
        ("One two. Three.\nFour. Five six seven", ["One two. Three.\n", "Four. Five six seven"]),
        ('One two "three." Four five six.', ['One two "three."', " Four five six."]),
        ("one two three four five six seven", ["one two three four five", " six seven"]),
        ("一二三四五六七八。九十一二三四五六七八九十一二三", ["一二三四五六七八。九十一二三四五六七八九十一二三"]),
        ("x" * 30, ["x" * 24, "x" * 6]),
    ],
)
def test_a_text_is_cut_at_the_best_pause(text: str, pieces: list[str]):
    assert [s.text for s in texts.segments(text, "user", at_most=24)] == pieces
    assert texts.segments(text, "user")[0] == Text(text=text, role="user")
