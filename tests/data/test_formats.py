"""Every format has a fixture and a page: the fixture imports twice to the same bytes, the page shows what came of it.

A format is a module of mmgpt/data/sources. tests/data/fixtures/<format>/ holds a small raw data set, made as
fixtures/README.md says; docs/formats/<format>.md has one ```json block, the first imported document of the fixture.
To write those blocks anew:

    MMGPT_WRITE_GOLDEN=1 python -m pytest tests/data/test_formats.py
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from mmgpt.core.document import Document, Features, Image, Text, Video
from mmgpt.data import sources
from mmgpt.data.importing import check, import_dataset
from mmgpt.data.inspect import described
from mmgpt.data.media import encode_jpeg, encode_mp4
from mmgpt.data.record import Dataset

FIXTURES = Path(__file__).parent / "fixtures"
BLOCK = re.compile(r"(?<=^```json\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
MAX_FIXTURE_BYTES = 64 << 10

each_format = pytest.mark.parametrize("name", sources.names())


def rendered(document: Document) -> str:
    return json.dumps(described(document), indent=2, ensure_ascii=False) + "\n"


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@each_format
def test_the_fixture_imports(name: str, tmp_path: Path):
    fixture = FIXTURES / name
    assert fixture.is_dir(), f"{fixture} is missing; {__doc__}"
    size = sum(path.stat().st_size for path in fixture.rglob("*") if path.is_file())
    assert size <= MAX_FIXTURE_BYTES, f"{fixture} has {size} bytes, at most {MAX_FIXTURE_BYTES}"
    for out in "ab":
        import_dataset(name, fixture, tmp_path / out, "same", threads=1 if out == "a" else 3)
    dataset = Dataset(tmp_path / "a")
    assert files(tmp_path / "a") == files(tmp_path / "b"), "two imports differ"
    assert len(dataset) > 0 and all(check(dataset[i]) is None for i in range(len(dataset)))
    rejects = [json.loads(line) for line in (tmp_path / "a" / "rejects.jsonl").read_text().splitlines()]
    assert rejects, f"{fixture} holds nothing that is refused"
    for reject in rejects:
        assert all(isinstance(reject[part], str) and reject[part] for part in ("key", "reason", "place")), reject


@each_format
def test_the_page_shows_a_record_as_it_is(name: str, tmp_path: Path, root: Path):
    page = root / "docs" / "formats" / f"{name}.md"
    assert page.is_file(), f"{page} is missing; {__doc__}"
    text = page.read_text(encoding="utf-8")
    assert f"mmgpt data import {name} " in text, f"{page} does not say how to import"
    assert len(BLOCK.findall(text)) == 1, f"{page} must have one ```json block; {__doc__}"
    import_dataset(name, FIXTURES / name, tmp_path / "out")
    block = rendered(Dataset(tmp_path / "out")[0])
    if "MMGPT_WRITE_GOLDEN" in os.environ:
        page.write_text(BLOCK.sub(lambda _: block, text), encoding="utf-8")
    assert BLOCK.findall(page.read_text(encoding="utf-8")) == [block], f"{page} shows another record; {__doc__}"


def test_pages_and_fixtures_are_of_formats(root: Path):
    known = set(sources.names())
    assert {page.stem for page in (root / "docs" / "formats").glob("*.md")} - {"README"} <= known
    folders = {path.name for path in FIXTURES.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert folders <= known
    told = (FIXTURES / "README.md").read_text(encoding="utf-8")
    assert not [name for name in folders if f"## {name}\n" not in told], "fixtures/README.md says how each was made"


def test_a_description_tells_what_media_are():
    frames = np.zeros((5, 16, 32, 3), np.uint8)
    jpeg, clip = encode_jpeg(frames[0]), encode_mp4(frames, 5)
    segments = (
        Text(text="a kea", role="user", loss=0.5),
        Image(data=jpeg, time=1.5),
        Video(data=clip, fps=5.0),
        Image(data=b"a page"),
        Image(codes=np.zeros((6, 8, 1), np.int32)),
        Features(feats=np.zeros((3, 7), np.float32), boxes=np.zeros((3, 4), np.float32)),
    )
    assert described(Document(key="k", meta={"by": "me"}, segments=segments)) == {
        "key": "k",
        "meta": {"by": "me"},
        "segments": [
            {"kind": "text", "text": "a kea", "role": "user", "loss": 0.5},
            {"kind": "image", "content": f"JPEG 32x16, {len(jpeg)} bytes", "time": 1.5},
            {"kind": "video", "content": f"MP4 32x16, 5 frames, {len(clip)} bytes", "fps": 5.0},
            {"kind": "image", "content": "not an image, 6 bytes"},
            {"kind": "image", "content": "codes [6, 8, 1]"},
            {"kind": "features", "content": "feats [3, 7], boxes [3, 4]"},
        ],
    }
