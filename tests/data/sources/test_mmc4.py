"""MMC4: images join their texts by name, from loose files and archives; a lost image costs itself, not its document."""

import json
from pathlib import Path

import pytest

from mmgpt.core.document import Image, Text
from mmgpt.data.importing import NOTHING_LEFT, import_dataset
from mmgpt.data.media import encode_png
from mmgpt.data.record import Dataset
from mmgpt.data.sources import SourceError
from tests.data.raw import PNG, grey, put, tar, zipped
from tests.data.sources.raw import read, reasons

SHARD = "docs_no_face_shard_0_v2.jsonl"
PICTURES = {f"{i:012x}.jpg": encode_png(grey(i)) for i in range(3)}  # MMC4 names every image .jpg
A, B, C = PICTURES


def item(texts: list, *images: tuple[object, object], **more: object) -> dict:
    """A document as MMC4 writes it; `images` are name and matched text."""
    info = [
        {
            "face_detections": None,
            "image_name": name,
            "matched_sim": 0.27694183588027954,
            "matched_text_index": index,
            "raw_url": "http://127.0.0.1/index.90.jpg",
        }
        for name, index in images
    ]
    similarity = [[0.2] * len(texts)] * len(info)
    return {"image_info": info, "similarity_matrix": similarity, "text_list": texts, "url": "http://a.b/c.html", **more}


def shard(*items: object) -> bytes:
    return b"\n".join(i if isinstance(i, bytes) else json.dumps(i).encode() for i in items) + b"\n"


def test_an_image_comes_before_the_text_it_is_matched_with(tmp_path: Path):
    put(tmp_path, {f"images/{name}": data for name, data in PICTURES.items()})
    document = item(["one", " two ", "  ", "four"], (A, 3), (B, 1), (C, 1), could_have_url_duplicate=1)
    put(tmp_path, {SHARD: shard(document, b"", item(["x"], (A, 0)))})
    for place in (tmp_path, tmp_path / SHARD):
        documents, rejects = read("mmc4", place)
        assert not rejects
        assert [d.key for d in documents] == ["docs_no_face_shard_0_v2/1", "docs_no_face_shard_0_v2/3"]
        assert documents[0].segments == (
            Text(text="one"),
            Image(data=PICTURES[B]),
            Image(data=PICTURES[C]),
            Text(text="two"),
            Image(data=PICTURES[A]),
            Text(text="four"),
        )
        assert documents[0].meta == {"url": "http://a.b/c.html", "could_have_url_duplicate": "1"}
        assert documents[1].place.endswith(f"{SHARD}:3")


@pytest.mark.parametrize("where", ["images", "docs_no_face_shard_0_v2_images", "tar", "tar in images", "zip"])
def test_images_lie_loose_or_in_archives(tmp_path: Path, where: str):
    put(tmp_path, {f"{SHARD}.zip": b"", "images/notes.txt": b"x"})
    zipped(tmp_path / f"{SHARD}.zip", {SHARD: shard(item(["one", "two"], (A, 0), (B, 1)))})
    match where:
        case "tar":
            tar(tmp_path / "images_0.tar", {A: PICTURES[A]})
            tar(tmp_path / "images_1.tar", {f"shard/{B}": PICTURES[B]})
        case "tar in images":
            tar(tmp_path / "images" / "0.tar", PICTURES)
        case "zip":
            zipped(tmp_path / "images" / "a.zip", {f"x/{A}": PICTURES[A], B: PICTURES[B]})
        case _:
            put(tmp_path, {f"{where}/{name}": data for name, data in PICTURES.items()})
    documents, rejects = read("mmc4", tmp_path)
    assert not rejects and [d.key for d in documents] == ["docs_no_face_shard_0_v2/1"]
    media = [s.data for s in documents[0].segments if isinstance(s, Image)]
    assert media == [PICTURES[A], PICTURES[B]]


def test_a_lost_image_is_listed_and_its_document_stays(tmp_path: Path):
    put(tmp_path, {f"images/{A}": PICTURES[A]})
    put(tmp_path, {SHARD: shard(item(["one", "two"], (A, 0), (B, 1)), item(["x"], (B, 0)), item([" "], (A, 0)))})
    documents, rejects = read("mmc4", tmp_path)
    assert [d.key for d in documents] == ["docs_no_face_shard_0_v2/1"]
    assert documents[0].segments == (Image(data=PICTURES[A]), Text(text="one"), Text(text="two"))
    assert [(key.removeprefix("docs_no_face_shard_0_v2/"), reason.partition(":")[0]) for key, reason, _ in rejects] == [
        ("1/image 1", "image without a local copy"),
        ("2/image 0", "image without a local copy"),
        ("2", "no image and text left"),
        ("3", "no image and text left"),
    ]


def test_an_image_that_does_not_decode_is_listed_and_its_document_stays(tmp_path: Path):
    raw = put(tmp_path / "raw", {f"images/{A}": PICTURES[A], f"images/{B}": b"<html>gone</html>"})
    put(raw, {SHARD: shard(item(["one", "two"], (B, 0), (A, 1)), item(["x"], (B, 0)))})
    done = import_dataset("mmc4", raw, tmp_path / "out")
    dataset = Dataset(tmp_path / "out")
    assert len(dataset) == 1
    assert dataset[0].segments == (Text(text="one"), Image(data=PICTURES[A]), Text(text="two"))
    lines = [json.loads(line) for line in done.rejects_path.read_text().splitlines()]
    assert [(line["key"].partition("/")[2], line["reason"].partition(":")[0]) for line in lines] == [
        ("1/0", "not an image"),
        ("2/0", "not an image"),
        ("2", NOTHING_LEFT),
    ]


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "/etc/hostname", "http://127.0.0.1/a.jpg", "file:///etc/hostname", "a\\b.jpg"]
)
def test_names_do_not_leave_the_folder(tmp_path: Path, name: str):
    raw = put(tmp_path / "raw", {SHARD: shard(item(["one"], (name, 0))), "images/x": b""})
    put(tmp_path, {"secret.jpg": PNG, "raw/secret.jpg": PNG})
    documents, rejects = read("mmc4", raw)
    assert not documents and rejects[0][1].startswith("unsafe path")


def test_links_out_of_the_folder_are_not_read(tmp_path: Path):
    put(tmp_path, {"secret.jpg": PNG, f"raw/{SHARD}": shard(item(["one"], ("a.jpg", 0))), "raw/images/x": b""})
    (tmp_path / "raw" / "images" / "a.jpg").symlink_to(tmp_path / "secret.jpg")
    documents, rejects = read("mmc4", tmp_path / "raw")
    assert not documents and rejects[0][1].startswith("link out of the folder")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text_list": [', "malformed JSON"),
        (b"[" * 100_000, "malformed JSON"),
        (b'{"text_list": ["caf\xe9"]}', "not UTF-8"),
        ([], "wrong type"),
        ({"text_list": "one", "image_info": []}, "wrong type"),
        ({"text_list": ["one", 2], "image_info": []}, "wrong type"),
        ({"text_list": ["one"]}, "wrong type"),
        ({"text_list": ["one"], "image_info": []}, "no image and text left"),
    ],
)
def test_a_bad_line_costs_itself(tmp_path: Path, line: object, reason: str):
    good = item(["one"], (A, 0))
    put(tmp_path, {SHARD: shard(good, line, good), f"images/{A}": PICTURES[A]})
    documents, rejects = read("mmc4", tmp_path)
    assert [d.key[-1] for d in documents] == ["1", "3"]
    assert reasons(rejects) == {"docs_no_face_shard_0_v2/2": reason}


@pytest.mark.parametrize("entry", ["x", {}, {"image_name": A}, {"image_name": A, "matched_text_index": 1}])
def test_a_bad_image_entry_costs_itself(tmp_path: Path, entry: object):
    good = item(["one"], (A, 0))
    good["image_info"].append(entry)
    put(tmp_path, {SHARD: shard(good), f"images/{A}": PICTURES[A]})
    documents, rejects = read("mmc4", tmp_path)
    assert len(documents) == 1 and list(reasons(rejects).values()) == ["wrong type"]


def test_a_cut_zip_of_documents_is_named_and_the_next_shard_is_read(tmp_path: Path):
    put(tmp_path, {f"images/{A}": PICTURES[A], "docs_shard_1_v2.jsonl": shard(item(["one"], (A, 0)))})
    lines = [json.dumps(item([f"{i} {i**9}"], (A, 0))).encode() for i in range(4000)]
    whole = zipped(tmp_path / "docs_shard_0_v2.jsonl.zip", {"docs_shard_0_v2.jsonl": b"\n".join(lines)})
    data = bytearray(whole.read_bytes())
    data[len(data) // 2] ^= 255
    whole.write_bytes(bytes(data))
    documents, rejects = read("mmc4", tmp_path)
    assert documents[-1].key == "docs_shard_1_v2/1"
    assert 0 < len(documents) < 4001, "what lies before the damage is kept"
    assert reasons(rejects)["docs_shard_0_v2.jsonl.zip"] == "damaged archive"


def test_a_document_shard_that_is_a_bomb_is_refused(tmp_path: Path):
    put(tmp_path, {f"images/{A}": PICTURES[A], "docs_shard_1_v2.jsonl": shard(item(["one"], (A, 0)))})
    zipped(tmp_path / "docs_shard_0_v2.jsonl.zip", {"docs_shard_0_v2.jsonl": b" " * (4 << 20)})
    documents, rejects = read("mmc4", tmp_path)
    assert len(documents) == 1
    assert reasons(rejects) == {
        "docs_shard_0_v2.jsonl/docs_shard_0_v2.jsonl": "inflates out of proportion",
        "docs_shard_0_v2.jsonl.zip": "no documents",
    }


def test_an_archive_holds_one_shard(tmp_path: Path):
    lines = shard(item(["one"], (A, 0)))
    put(tmp_path, {f"images/{A}": PICTURES[A]})
    zipped(tmp_path / "docs_shard_0_v2.jsonl.zip", {"a.jsonl": lines, "b.jsonl": lines})
    zipped(tmp_path / "docs_shard_1_v2.jsonl.zip", {"a.json": lines})
    documents, rejects = read("mmc4", tmp_path)
    assert [d.key for d in documents] == ["docs_shard_0_v2/1"]
    assert reasons(rejects) == {
        "docs_shard_0_v2/b.jsonl": "second shard in an archive",
        "docs_shard_1_v2.jsonl.zip": "no documents",
    }


def test_mmc4_needs_documents(tmp_path: Path):
    with pytest.raises(SourceError, match=r"holds no \.jsonl or"):
        read("mmc4", put(tmp_path, {f"images/{A}": PICTURES[A]}))
