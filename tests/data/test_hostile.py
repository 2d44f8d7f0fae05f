"""Data made to harm: bombs are refused from their headers; nothing outside the data is read, written, run or asked."""

import contextlib
import io
import json
import os
import socket
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mmgpt.data import media
from mmgpt.data.importing import import_dataset
from mmgpt.data.record import Dataset
from mmgpt.data.sources import SourceError

PNG = media.encode_png(np.zeros((4, 4, 3), np.uint8))
MP4 = media.encode_mp4(np.zeros((2, 16, 16, 3), np.uint8), 4)


# --- bombs


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(side: int, *before: bytes) -> bytes:
    """A whole black square of one bit a pixel, in few bytes; other chunks may stand before its pixels."""
    packed = zlib.compressobj(9)
    rows = b"".join(packed.compress(bytes(1 + -(-side // 8))) for _ in range(side)) + packed.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), *before, chunk(b"IDAT", rows), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def wide(data: bytes, size: bytes, format: str) -> bytes:
    """A small picture whose header says another size."""
    found = struct.pack(format, 4, 4)
    assert found in data
    return data.replace(found, size, 1)


def bombs() -> dict[str, tuple[bytes, str]]:
    """Files by name, and the reason that each must be refused for; none is over 150 KB."""
    made = {f"{side}.png": (png(side), "too many pixels") for side in (9_000, 12_000, 30_000)}
    filled = zlib.compress(bytes(64 << 20), 9)
    made["text.png"] = (png(8, chunk(b"zTXt", b"a\0\0" + filled)), "corrupt")
    gif = media.encode_gif(np.zeros((1, 4, 4, 3), np.uint8), 5)
    made["gif.gif"] = (wide(gif, b"\xff" * 4, "<HH"), "too many pixels")
    jpeg = media.encode_jpeg(np.zeros((4, 4, 3), np.uint8))
    made["jpeg.jpg"] = (wide(jpeg, b"\xff\xdc" * 2, ">HH"), "too many pixels")
    assert all(len(data) < 150_000 for data, _ in made.values())
    return made


MEASURE = """
import json, sys
from pathlib import Path
from mmgpt.data.importing import import_dataset
from mmgpt.data import media, sources

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

raw, out = map(Path, sys.argv[1:])
media.decode_image((raw / "good.png").read_bytes())
before = peak()
import_dataset("folder", raw, out)
print(json.dumps(peak() - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_bomb_costs_no_memory_and_is_refused_by_name(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    made = bombs()
    for name, (data, _) in {**made, "good.png": (PNG, "")}.items():
        (raw / name).write_bytes(data)
        (raw / name).with_suffix(".txt").write_text("a caption")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(raw), str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) < 150 << 20
    assert len(Dataset(tmp_path / "out")) == 1
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    found = {line["key"]: line["reason"].partition(":")[0] for line in lines}
    assert found == {name.rpartition(".")[0]: reason for name, (_, reason) in made.items()}


# --- canaries


class Canary:
    """A pipe that holds a secret, a place where nothing is, and a server that nobody calls."""

    def __init__(self, folder: Path) -> None:
        self.pipe, self.empty = folder / "secret", folder / "written"
        os.mkfifo(self.pipe)
        self._held = os.open(self.pipe, os.O_RDWR | os.O_NONBLOCK)
        os.write(self._held, b"secret")
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.setblocking(False)
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}/a.png"

    def check(self) -> None:
        """Whoever had opened the pipe would have read it; whoever had asked the server would wait in its queue."""
        assert os.read(self._held, 100) == b"secret"
        os.write(self._held, b"secret")
        with pytest.raises(BlockingIOError):
            self._server.accept()
        assert not os.path.lexists(self.empty)

    def close(self) -> None:
        os.close(self._held)
        self._server.close()


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Canary]:
    (tmp_path / "outside").mkdir()
    with contextlib.closing(Canary(tmp_path / "outside")) as made:
        made.check()
        yield made
        made.check()


def imported(format: str, raw: Path) -> tuple[list[str], str]:
    """Keys that were accepted, and all that the rejects say."""
    out = raw.parent / f"out-{raw.name}"
    try:
        import_dataset(format, raw, out)
        keys = [document.key for document in map(Dataset(out).__getitem__, range(len(Dataset(out))))]
    except SourceError:
        keys = []
    rejects = out / "rejects.jsonl"
    return keys, rejects.read_text() if rejects.exists() else ""


def scripts(canary: Canary) -> dict[str, str]:
    """Texts that a program which guesses formats would follow."""
    target = str(canary.pipe)
    return {
        "concat": f"ffconcat version 1.0\nfile '{target}'\n",
        "playlist": f"#EXTM3U\n#EXTINF:1,\n{canary.url}\n#EXTINF:1,\nfile://{target}\n#EXT-X-ENDLIST\n",
        "subfile": f"subfile,,start,0,end,0,,:{target}",
        "svg": f'<svg><image href="file://{target}"/><image href="{canary.url}"/></svg>',
        "eps": f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({target}) (r) file ({canary.empty}) (w) file\n",
        "mvg": f"push graphic-context\nimage over 0,0 0,0 '{canary.url}'\n",
        "sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video {canary.url.split(':')[2].split('/')[0]} RTP/AVP 96\n",
    }


@pytest.mark.parametrize(("format", "suffix"), [("mp4", "mp4"), ("mp4", "m4v"), ("folder", "png"), ("folder", "gif")])
def test_text_in_place_of_a_medium_is_never_obeyed(format: str, suffix: str, tmp_path: Path, canary: Canary) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, text in scripts(canary).items():
        for lead, start in (("plain", b""), ("boxed", b"\0\0\0\x10ftypmp42\0\0\0\0"), ("png", PNG[:8])):
            (raw / f"{name}-{lead}.{suffix}").write_bytes(start + text.encode())
            (raw / f"{name}-{lead}.txt").write_text("a caption")
    keys, rejects = imported(format, raw)
    assert keys == [] and len(rejects.splitlines()) == 3 * len(scripts(canary))


def test_a_clip_that_refers_to_another_file_does_not_read_it(tmp_path: Path, canary: Canary) -> None:
    """An MP4 may say that its samples lie elsewhere."""
    for place in (str(canary.pipe), f"file://{canary.pipe}", canary.url):
        start = MP4.index(b"url ")
        body = struct.pack(">I", 0) + place.encode() + b"\0"  # flags 0: not in this file
        box = struct.pack(">I", 8 + len(body)) + b"url " + body
        data = bytearray(MP4[: start - 4] + box + MP4[start + 8 :])
        for parent in (b"dref", b"dinf", b"minf", b"mdia", b"trak", b"moov"):
            at = data.rindex(parent, 0, start) - 4
            struct.pack_into(">I", data, at, struct.unpack_from(">I", data, at)[0] + len(box) - 12)
        with contextlib.suppress(media.MediaError):
            media.decode_video(bytes(data))
        canary.check()


def targets(canary: Canary) -> list[str]:
    pipe = str(canary.pipe)
    local = [pipe, f"file://{pipe}", f"file:{pipe}", f"//localhost{pipe}", f"concat:{pipe}", f"pipe:{pipe}"]
    below = ["../outside/secret", "a/../../outside/secret", "link", "linked/secret"]
    return [*local, *below, canary.url, canary.url.replace("http:", "HTTP:")]


def test_media_fields_lead_nowhere_else(tmp_path: Path, canary: Canary) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "link").symlink_to(canary.pipe)
    (raw / "linked").symlink_to(canary.pipe.parent)
    names = targets(canary)
    kinds = [(kind, i, name) for kind in ("image", "video") for i, name in enumerate(names)]
    lines = [{"key": f"{kind}{i}", "segments": [{"text": "a"}, {kind: name}]} for kind, i, name in kinds]
    (raw / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    keys, rejects = imported("jsonl", raw)
    assert keys == [] and len(rejects.splitlines()) == 2 * len(names)
    rows = pyarrow.table({"image": names, "caption": ["a"] * len(names)})
    pyarrow.parquet.write_table(rows, raw / "a.parquet")
    keys, rejects = imported("parquet", raw)
    assert keys == [] and len(rejects.splitlines()) == len(names)
    (raw / "captions.tsv").write_text("".join(f"{name}\ta caption\n" for name in names))
    keys, rejects = imported("folder", raw)
    assert keys == [] and len(rejects.splitlines()) >= len(names)


class Runs:
    """Pickled, it makes a file where it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_an_archive_runs_and_writes_nothing(tmp_path: Path, canary: Canary) -> None:
    """Pickles (which WebDataset's own loader reads), paths upwards, links and devices."""
    import pickle

    raw = tmp_path / "raw"
    raw.mkdir()
    harmful = pickle.dumps(Runs(canary.empty))
    with tarfile.open(raw / "a.tar", "w") as tar:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname, info.devmajor, info.devminor = len(data), kind, link, 1, 3
            tar.addfile(info, io.BytesIO(data))

        for suffix in ("pkl", "pickle", "pyd", "pth", "npy", "cls", "pt"):
            add(f"good.{suffix}", harmful)
        add("good.png", PNG)
        add("good.txt", b"a caption")
        add("run.png", harmful)
        add("run.txt", b"a caption")
        add("words.png", PNG)
        add("words.json", harmful)
        for name in ("../outside/written", str(canary.empty)):
            add(name, b"written")
        links = {"s": (tarfile.SYMTYPE, str(canary.pipe)), "h": (tarfile.LNKTYPE, "../outside/secret")}
        for name, kind in (("c", tarfile.CHRTYPE), ("b", tarfile.BLKTYPE), ("f", tarfile.FIFOTYPE)):
            links[name] = (kind, "")
        for name, (kind, link) in links.items():
            add(f"{name}.png", kind=kind, link=link)
        for _ in range(2):
            add("twice.png", PNG)
    keys, rejects = imported("webdataset", raw)
    assert keys == ["a/good"]
    refused = ("run", "words", "s", "h", "c", "b", "f", "twice")
    assert all(f'"a/{key}"' in rejects for key in refused) and rejects.count("written") >= 2
    assert not (raw.parent / "written").exists()


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """The header of a member; a size below 0 is written as GNU tar does."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "between",
    [
        header("back.png", -512),
        header("back.png", -(1 << 70)),
        header("x", 16, b"x") + b"16 size=-000512\n".ljust(512, b"\0") + header("back.png", 0),
        header("long", 600 << 20, tarfile.GNUTYPE_LONGNAME),
        header("long", 600 << 20, b"x"),
    ],
    ids=["back", "far back", "back by pax", "name of 600 MB", "pax of 600 MB"],
)
def test_sizes_that_lead_back_or_fill_the_memory_end_an_archive(between: bytes, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    with tarfile.open(raw / "a.tar", "w") as tar:
        for name, data in (("good.png", PNG), ("good.txt", b"a caption")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = (raw / "a.tar").read_bytes()[: 4 * 512]
    with open(raw / "a.tar", "wb") as file:
        file.write(data + between)
        file.truncate(700 << 20)  # zeros that take no space
    keys, rejects = imported("webdataset", raw)
    (line,) = map(json.loads, rejects.splitlines())
    assert keys == ["a/good"] and line["reason"].startswith("damaged archive") and "bytes" in line["reason"]
