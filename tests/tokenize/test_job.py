"""What the tokenisation job promises: every document once, batches by size, and the same bytes after any kill."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mmgpt.core.document import Action, Document, Image, Text, Video, equal
from mmgpt.data.media import MediaError, decode_image, encode_mp4, encode_png
from mmgpt.data.record import Dataset, DatasetError, Writer
from mmgpt.tokenize import job, work
from mmgpt.tokenize.job import JobError, Order, parse_share, tokenize
from mmgpt.tokenize.tokenizers import Tokenizers
from mmgpt.tokens import actions
from mmgpt.tokens.text import TextTokenizer


class Bytes:
    """UTF-8 bytes as ids."""

    size = 256
    fingerprint = TextTokenizer.fingerprint

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class Means:
    """The mean red and green of each patch, as two codes of 256; `stop_at` kills the process at that call."""

    codebooks = (256, 256)
    patch = 4

    def __init__(self, shift: int = 0, stop_at: int | None = None, temporal: int = 1) -> None:
        self.temporal = temporal
        self.shapes: list[tuple[int, ...]] = []
        self._shift, self._stop_at = shift, stop_at

    def encode(self, images: np.ndarray) -> np.ndarray:
        self.shapes.append(images.shape)
        if len(self.shapes) == self._stop_at:
            os.kill(os.getpid(), signal.SIGKILL)
        b, h, w, _ = images.shape
        means = images.reshape(b, h // 4, 4, w // 4, 4, 3).mean(axis=(2, 4))[..., :2]
        return (means.astype(np.int32) + self._shift) % 256

    def encode_clip(self, frames: np.ndarray) -> np.ndarray:
        """Of each group of frames the first one's codes."""
        return self.encode(frames[:: self.temporal])

    def decode(self, codes: np.ndarray) -> np.ndarray:
        full = np.repeat(np.repeat(codes, 4, axis=1), 4, axis=2)
        return np.concatenate([full, full[..., :1]], axis=-1).astype(np.uint8)


def png(seed: int, height: int = 16, width: int = 16) -> bytes:
    return encode_png(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def raw(count: int) -> list[Document]:
    found = []
    for i in range(count):
        segments = [Text(text=f"caption {i}", role="user", loss=0.5), Image(data=png(i))]
        if i % 3 == 1:
            segments.append(Image(data=png(100 + i, 16, 32), time=1.5))
        found.append(Document(key=f"d{i}", segments=tuple(segments), meta={"n": str(i)}))
    return found


def write(directory: Path, documents: list[Document], per_shard: int = 10) -> Path:
    with Writer(directory, name="raw", shard_documents=per_shard) as writer:
        for document in documents:
            writer.write(document)
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    documents = raw(35)
    documents[4] = Document(key="broken", segments=(Image(data=b"not a picture"),))
    documents[17] = Document(key="robot", segments=(Action(values=np.zeros((2, 3), np.float32)),))
    return write(tmp_path_factory.mktemp("data") / "raw", documents)


def run(source: Path, out: Path, image: Means | None = None, threads: int = 2, **options) -> job.Tokenised:
    tokenizers = Tokenizers(text=Bytes(), image=image or Means())
    (done,) = tokenize(Order(folders={source: out}, **{"area": 256, **options}), tokenizers, threads)
    return done


def contents(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("out") / "whole"
    run(source, out)
    return contents(out)


def test_documents_are_tokenised_in_order(source, tmp_path):
    done = run(source, tmp_path / "out")
    dataset = Dataset(tmp_path / "out")
    assert (done.written, done.shards, done.documents, done.rejected, done.complete) == (4, 4, 33, 2, True)
    kept = [d for i, d in enumerate(raw(35)) if i not in (4, 17)]
    assert [dataset[i].key for i in range(len(dataset))] == [d.key for d in kept] and dataset.name == "raw"
    for i, before in enumerate(kept):
        after = dataset[i]
        assert after.meta == before.meta
        text, image, *rest = after.segments
        assert text.text is None and bytes(text.ids.tolist()).decode() == before.segments[0].text
        assert (text.role, text.loss) == ("user", 0.5)
        pixels = decode_image(before.segments[1].data)
        assert image.data is None and np.array_equal(image.codes, Means().encode(pixels[None])[0])
        if rest:
            assert rest[0].time == 1.5 and rest[0].codes.shape[:2] == (3, 5)  # 16x32 at no more than 256 pixels
    assert dataset.index.shape[1, :4].tolist() == [1, 4, 4, 2]


def test_rejects_are_kept_with_reasons(source, tmp_path):
    run(source, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(line["key"], line["place"]) for line in lines] == [
        ("broken", "raw, document 4"),
        ("robot", "raw, document 17"),
    ]
    assert "no tokenizer for action" in lines[1]["reason"] and Dataset(tmp_path / "out").manifest["rejected"] == 2


def test_pictures_of_one_size_are_encoded_together(source, tmp_path):
    image = Means()
    run(source, tmp_path / "out", image)
    (probe, *shapes) = image.shapes
    assert probe == (1, 16, 16, 3)
    assert [shape[0] for shape in shapes] == [9, 2, 9, 4, 10, 3, 5, 2]  # two sizes, 16x16 and 12x20, a shard


def test_windows_and_threads_never_change_the_codes(source, tmp_path, expected, monkeypatch):
    monkeypatch.setattr(work, "WINDOW_DOCUMENTS", 3)
    run(source, tmp_path / "small", threads=1)
    assert contents(tmp_path / "small") == expected
    monkeypatch.setattr(work, "WINDOW_PIXELS", 1)
    run(source, tmp_path / "pixels", threads=7)
    assert contents(tmp_path / "pixels") == expected


def test_the_next_window_is_decoded_while_one_is_encoded_and_little_beyond(tmp_path, monkeypatch):
    """Also over the end of a shard."""
    monkeypatch.setattr(work, "WINDOW_DOCUMENTS", 4)
    documents = [Document(key=f"d{i}", segments=(Image(data=png(i)),)) for i in range(24)]
    source = write(tmp_path / "raw", documents, per_shard=12)
    decoded: list[bytes] = []
    real = work.decode_image
    monkeypatch.setattr(work, "decode_image", lambda data: (decoded.append(data), real(data))[1])

    class Waits(Means):
        """Each call encodes a window; it ends once the next one is decoded."""

        def encode(self, images: np.ndarray) -> np.ndarray:
            windows = len(self.shapes)  # begun, as the first call is the probe
            patience = 1000
            while windows and len(decoded) < min(24, 4 * (windows + 1)) and patience:
                time.sleep(0.01)
                patience -= 1
            assert patience and len(decoded) <= 4 * (windows + 1) + 2 * 2
            return super().encode(images)

    assert run(source, tmp_path / "out", Waits(), threads=2).complete


@pytest.mark.parametrize("error", [MediaError("corrupt", "x"), ValueError("x")])
def test_what_fails_in_a_thread_rejects_its_document_alone(source, tmp_path, monkeypatch, error):
    bad = raw(35)[20].segments[1].data
    real = work.decode_image

    def decode(data: bytes) -> np.ndarray:
        if data == bad:
            raise error
        return real(data)

    monkeypatch.setattr(work, "decode_image", decode)
    assert run(source, tmp_path / "out", threads=4).rejected == 3
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert lines[2] == {"key": "d20", "reason": str(error), "place": "raw, document 20"}


def test_a_fault_in_a_thread_ends_the_job_and_names_the_document(source, tmp_path, monkeypatch):
    def decode(data: bytes) -> np.ndarray:
        raise KeyError("a bug")

    monkeypatch.setattr(work, "decode_image", decode)
    with pytest.raises(KeyError) as raised:
        run(source, tmp_path / "out")
    assert raised.value.__notes__ == [f"{source}, document 0"]


def test_clips_become_grids_of_frames(tmp_path):
    frames = np.stack([np.full((16, 32, 3), level, np.uint8) for level in (20, 20, 200, 200)])
    documents = [Document(key="v", segments=(Text(text="x"), Video(data=encode_mp4(frames, 8.0), fps=8.0)))]
    run(write(tmp_path / "raw", documents), tmp_path / "out", area=512, fps=4.0)
    video = Dataset(tmp_path / "out")[0].segments[1]
    assert isinstance(video, Video) and video.codes.shape == (2, 4, 8, 2) and video.data is None and video.fps == 4.0
    assert np.abs(video.codes.mean(axis=(1, 2, 3)) - [20, 200]).max() < 8


def test_a_clip_that_is_cut_is_told(tmp_path):
    frames = np.stack([np.full((16, 32, 3), level, np.uint8) for level in (20, 20, 200, 200)])
    clip = Video(data=encode_mp4(frames, 8.0), fps=8.0)
    source = write(tmp_path / "raw", [Document(key="v", segments=(Text(text="x"), clip), meta={"a": "b"})])
    for most, told in ((3, {"a": "b", "cut": "segment 1 after 3 frames"}), (4, {"a": "b"})):
        run(source, tmp_path / str(most), area=512, frames=most)
        document = Dataset(tmp_path / str(most))[0]
        assert document.meta == told and len(document.segments[1].codes) == most


def test_frames_that_share_codes_are_encoded_as_a_clip(tmp_path):
    """And pictures of the same size beside them as pictures, in their own order."""
    frames = np.stack([np.full((16, 32, 3), 20 * t, np.uint8) for t in range(10)])
    clip = Video(data=encode_mp4(frames, 8.0), fps=8.0)
    documents = [Document(key="v", segments=(Image(data=png(0, 16, 32)), clip, Image(data=png(1, 16, 32))))]
    run(write(tmp_path / "raw", documents), tmp_path / "out", Means(temporal=4), area=512)
    first, video, last = Dataset(tmp_path / "out")[0].segments
    assert video.codes.shape == (3, 4, 8, 2) and video.fps == 8.0
    assert np.abs(video.codes.mean(axis=(1, 2, 3)) - [0, 80, 160]).max() < 8
    for number, image in enumerate((first, last)):
        expected = Means().encode(decode_image(png(number, 16, 32))[None])[0]
        np.testing.assert_array_equal(image.codes, expected)


def test_actions_become_ids_or_are_rejected_with_their_document(tmp_path):
    """By the tokenizer that is given, whose mark is in the settings; what it does not take is a reject."""
    rng = np.random.default_rng(0)
    values = [rng.normal(size=(8, 3)).astype(np.float32).cumsum(0) for _ in range(3)]
    values.append(np.zeros((8, 2), np.float32))  # of another robot
    documents = [Document(key=f"r{i}", segments=(Text(text="x"), Action(values=v))) for i, v in enumerate(values)]
    source, robots = write(tmp_path / "raw", documents), actions.train(values[:3], size=400)
    tokenizers = Tokenizers(text=Bytes(), image=Means(), actions=robots)
    (done,) = tokenize(Order(folders={source: tmp_path / "out"}, area=256), tokenizers)
    assert (done.documents, done.rejected) == (3, 1)
    dataset = Dataset(tmp_path / "out")
    for i in range(3):
        found = dataset[i].segments[1]
        assert isinstance(found, Action) and found.values is None
        np.testing.assert_array_equal(found.codes, robots.encode(values[i]))
    assert dataset.manifest["meta"]["settings"]["actions"] == robots.fingerprint()
    (line,) = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "r3"
    with pytest.raises(JobError, match="other settings"):
        run(source, tmp_path / "out")


KILLED = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("case", sys.argv[1])
case = importlib.util.module_from_spec(spec)
spec.loader.exec_module(case)
case.run(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]), case.Means(stop_at=int(sys.argv[4])))
"""


@pytest.mark.parametrize("call", [5, 8])
def test_a_killed_job_goes_on_to_the_same_bytes(source, tmp_path, expected, call):
    out = tmp_path / "out"
    arguments = [__file__, str(source), str(out), str(call)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    left = {p.name for p in out.iterdir()}
    assert any(name.endswith(".tmp") for name in left) and "manifest.json" not in left
    with pytest.raises(DatasetError):
        Dataset(out)
    markers = [name for name in left if name.endswith(".done")]
    again = run(source, out)
    assert again.complete and again.written == 4 - len(markers) and 0 < len(markers) < 4
    assert contents(out) == expected


def test_only_what_is_missing_is_done_again(source, tmp_path, expected):
    out = tmp_path / "out"
    run(source, out)
    assert run(source, out).written == 0
    (out / "shard-00000.array_record.npz").unlink()
    (out / "shard-00001.array_record.done").unlink()  # killed between the shard and its marker
    (out / "shard-00002.array_record").unlink()
    with open(out / "shard-00003.array_record", "ab") as file:
        file.write(b"more")
    (out / "manifest.json").unlink()
    again = run(source, out)
    assert (again.written, again.documents, again.rejected) == (4, 33, 2)
    assert contents(out) == expected


def test_a_finished_shard_is_never_read_again(source, tmp_path, expected):
    """Its marker says all: a job of many terabytes starts at once, and a rotten bit is for `Dataset.verify`."""
    out = tmp_path / "out"
    run(source, out)
    shard = out / "shard-00003.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(bytes(len(whole)))
    (out / "manifest.json").unlink()
    assert run(source, out).written == 0
    with pytest.raises(DatasetError, match="hash differs"):
        Dataset(out).verify()
    shard.write_bytes(whole)
    Dataset(out).verify()
    assert contents(out) == expected


def test_what_a_killed_writer_left_is_removed(source, tmp_path, expected):
    """But not what another process of the same folder may be writing."""
    out = tmp_path / "out"
    out.mkdir()
    left = [f".shard-0000{i}.array_record{part}.0123-4567ab.tmp" for i in (0, 1) for part in ("", ".done", ".npz")]
    left += [".manifest.json.12-34.tmp", ".rejects.jsonl.12-34.tmp"]
    for name in left:
        (out / name).write_bytes(b"half")
    run(source, out, share=(1, 2))
    assert {p.name for p in out.glob(".*")} == {name for name in left if "shard-00001" not in name}
    run(source, out)
    assert contents(out) == expected


def test_a_damaged_index_of_a_shard_is_told(source, tmp_path):
    out = tmp_path / "out"
    run(source, out)
    for damaged in (b"PK\3\4", (out / "shard-00003.array_record.npz").read_bytes()):
        (out / "shard-00002.array_record.npz").write_bytes(damaged)
        with pytest.raises(JobError, match=r"shard-00002.array_record.npz and run the job again"):
            run(source, out)


@pytest.mark.parametrize("damage", [b"", b"[]", b"{", b'{"settings": 3}'])
def test_a_damaged_marker_is_no_marker(source, tmp_path, expected, damage):
    out = tmp_path / "out"
    run(source, out)
    marker = out / "shard-00002.array_record.done"
    marker.write_bytes(damage or marker.read_bytes().replace(b"sha256", b"sha257"))
    assert run(source, out).written == 1 and contents(out) == expected


def test_shares_make_one_dataset(source, tmp_path, expected):
    out = tmp_path / "out"
    assert parse_share("1/2") == (1, 2)
    first = run(source, out, share=(1, 2))
    assert (first.written, first.complete) == (2, False)
    with pytest.raises(DatasetError):
        Dataset(out)
    assert run(source, out, share=(0, 2)).complete
    assert contents(out) == expected


@pytest.mark.parametrize("change", [{"area": 512}, {"fps": 2.0}, {"image": Means(shift=1)}])
def test_output_of_other_settings_is_never_mixed(source, tmp_path, change):
    run(source, tmp_path / "out")
    with pytest.raises(JobError, match="other settings"):
        run(source, tmp_path / "out", **change)


def test_ids_of_other_tokenizers_are_never_passed_on_as_ones_of_these(source, tmp_path):
    run(source, tmp_path / "out")
    with pytest.raises(JobError, match="tokenised already, with other tokenizers"):
        run(tmp_path / "out", tmp_path / "again", image=Means(shift=1))


def test_a_shard_of_rejects_alone_is_empty(tmp_path):
    documents = [Document(key=f"b{i}", segments=(Image(data=b"no"),)) for i in range(2)] + raw(2)
    done = run(write(tmp_path / "raw", documents, per_shard=2), tmp_path / "out")
    assert (done.documents, done.rejected, done.complete) == (2, 2, True)
    assert [d.key for d in map(Dataset(tmp_path / "out").__getitem__, range(2))] == ["d0", "d1"]
    again = run(tmp_path / "out", tmp_path / "again")  # what is tokenised stays, and so does the empty shard
    assert (again.documents, again.written, again.complete) == (2, 2, True)
    assert equal(Dataset(tmp_path / "again")[1], Dataset(tmp_path / "out")[1])


def test_wrong_folders_are_told(source, tmp_path):
    with pytest.raises(DatasetError, match="no such folder"):
        run(tmp_path / "none", tmp_path / "out")
    with pytest.raises(JobError, match="area 8 holds no patch"):
        run(source, tmp_path / "out", area=8)
    with pytest.raises(JobError, match="at nan frames a second"):
        run(source, tmp_path / "out", fps=float("nan"))
    with pytest.raises(JobError, match="share 2 of 2"):
        run(source, tmp_path / "out", share=(2, 2))
    with pytest.raises(JobError, match="the source itself"):
        run(source, source)
    for share in ("", "1", "1/", "a/2", "-1/2", "1/2/3"):
        with pytest.raises(JobError, match="is not i/n"):
            parse_share(share)
    two = {source: tmp_path / "out", tmp_path: tmp_path / "out"}
    with pytest.raises(JobError, match="one name"):
        tokenize(Order(folders=two, area=256), Tokenizers(text=Bytes(), image=Means()))
