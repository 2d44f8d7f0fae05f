"""What image rows promise: a pure function of (seed, row), every picture once per epoch, one size, bad ones blank."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from mmgpt.core.document import Document, Image, Text, Video
from mmgpt.core.stream import Batch
from mmgpt.data import images
from mmgpt.data.images import ImageRows, Pictures
from mmgpt.data.loader import LoaderError
from mmgpt.data.media import encode_mp4, encode_png
from mmgpt.data.record import Writer

SIZE = 16


def picture(level: int, height: int = SIZE, width: int = SIZE) -> bytes:
    return encode_png(np.full((height, width, 3), level, np.uint8))


def clip(levels: list[int]) -> bytes:
    frames = np.stack([np.full((32, 32, 3), level, np.uint8) for level in levels])
    return encode_mp4(frames, 8.0)


def write(directory: Path, name: str, documents: list[Document]) -> str:
    with Writer(directory / name, name=name) as writer:
        for document in documents:
            writer.write(document)
    return str(directory / name)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> ImageRows.Config:
    directory = tmp_path_factory.mktemp("data")
    one = [
        Document(key=f"a{i}", segments=(Text(text="grey"), Image(data=picture(2 * i)), Image(data=picture(2 * i + 1))))
        for i in range(60)
    ]
    two = [Document(key=f"v{i}", segments=(Video(data=clip([40, 120, 200])),)) for i in range(4)]
    return ImageRows.Config(
        sources=(
            Pictures.Config(path=write(directory, "stills", one), weight=3.0),
            Pictures.Config(path=write(directory, "clips", two)),
        ),
        height=SIZE,
        width=SIZE,
        batch_rows=8,
        held_out=0.1,
    )


def build(config: ImageRows.Config, rows: int = 200, seed: int = 0, folder: Path | None = None) -> ImageRows:
    return config.build(None, seed=seed, rows=rows, folder=folder)


def pixels(batches: list[Batch]) -> np.ndarray:
    return np.concatenate([b.streams["pixels"].feats for b in batches])


def test_pictures_are_a_function_of_seed_and_row(config):
    whole = pixels(list(build(config).batches(0)))
    assert np.array_equal(whole, pixels(list(build(config).batches(0))))
    assert np.array_equal(whole[:80], pixels(list(build(config, rows=80).batches(0))))
    assert np.array_equal(whole[37:197], pixels(list(build(config).batches(37))))
    assert not np.array_equal(whole, pixels(list(build(config, seed=1).batches(0))))
    parts = [list(build(config).batches(0, (i, 2))) for i in range(2)]
    assert np.array_equal(whole, pixels(list(itertools.chain(*zip(*parts, strict=True)))))
    assert np.array_equal(whole, pixels(list(build(config.replace(cache_bytes=0, threads=4)).batches(0))))


def test_pictures_are_float_in_minus_one_to_one(config):
    batch = next(build(config).batches(0))
    stream = batch.streams["pixels"]
    assert stream.feats.shape == (8, SIZE, SIZE, 3) and stream.feats.dtype == np.float32 and stream.kind == "pixels"
    assert stream.weight.tolist() == [[1.0]] * 8 and stream.weight.dtype == np.float32
    assert batch.row_id.tolist() == list(range(8)) and batch.visibility == {}
    assert np.abs(stream.feats).max() <= 1


def test_a_picture_keeps_its_values(tmp_path):
    documents = [Document(key=str(i), segments=(Image(data=picture(v)),)) for i, v in enumerate((0, 255))]
    path = write(tmp_path, "two", documents)
    rows = build(ImageRows.Config(sources=(Pictures.Config(path=path),), height=8, width=8, batch_rows=2, held_out=0.0))
    found = next(rows.batches(0)).streams["pixels"].feats
    assert sorted(found[:, 0, 0, 0].tolist()) == [-1.0, 1.0] and (found == found[:, :1, :1, :1]).all()


def test_every_picture_once_per_epoch(config):
    stills = build(config.replace(sources=config.sources[:1], held_out=0.0), rows=240)
    levels = np.round((pixels(list(stills.batches(0)))[:, 0, 0, 0] + 1) * 127.5).astype(int)
    assert sorted(levels[:120]) == sorted(levels[120:]) == list(range(120))
    assert levels[:120].tolist() != levels[120:].tolist()


def test_rows_follow_weights_and_turns_count_draws():
    turns = images.Turns([3.0, 1.0])
    found = [turns[row] for row in range(2500)]
    for source, share in ((0, 0.75), (1, 0.25)):
        mine = [n for s, n in found if s == source]
        assert mine == list(range(len(mine)))  # every draw once, in order, across the pattern's end
        assert len(mine) == pytest.approx(2500 * share, abs=1)
    assert {s for s, _ in found[:4]} == {0, 1}  # they take turns
    with pytest.raises(LoaderError, match="smallest share"):
        images.Turns([1.0, 1e-6])


def test_clips_give_frames_of_every_time(config):
    clips = build(config.replace(sources=config.sources[1:], held_out=0.0), rows=48)
    levels = np.round((pixels(list(clips.batches(0))).mean(axis=(1, 2, 3)) + 1) * 127.5)
    near = np.array([40, 120, 200])[np.abs(levels[:, None] - np.array([40, 120, 200])).argmin(1)]
    assert np.abs(levels - near).max() < 6 and set(near) == {40, 120, 200}


def test_aspect_is_kept_by_cropping():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    assert images.centred(wide, 5, 5).shape == (10, 10, 3) and (images.centred(wide, 5, 5) == 255).all()
    assert images.centred(wide, 8, 24).shape == (10, 30, 3)
    assert images.centred(wide.transpose(1, 0, 2), 5, 5).shape == (10, 10, 3)
    assert images.centred(wide, 1000, 1).shape == (10, 1, 3)


def test_rows_show_the_centre_at_full_height(tmp_path):
    image = np.zeros((10, 30, 3), np.uint8)
    image[:5, 10:20] = 255
    documents = [Document(key="wide", segments=(Image(data=encode_png(image)),))]
    sources = (Pictures.Config(path=write(tmp_path, "wide", documents)),)
    rows = build(ImageRows.Config(sources=sources, height=2, width=2, batch_rows=1, held_out=0.0), rows=1)
    assert next(rows.batches(0)).streams["pixels"].feats[0, ..., 0].tolist() == [[1, 1], [-1, -1]]


def test_a_picture_that_does_not_decode_is_blank_with_weight_zero(tmp_path):
    documents = [Document(key=f"p{i}", segments=(Image(data=picture(10 * i + 5)),)) for i in range(10)]
    sound = write(tmp_path / "sound", "stills", documents)
    broken = [
        d if i != 3 else Document(key="p3", segments=(Image(data=b"\x89PNG not"),)) for i, d in enumerate(documents)
    ]
    path = write(tmp_path / "broken", "stills", broken)

    def batches(path: str) -> tuple[ImageRows, list[Batch]]:
        config = ImageRows.Config(sources=(Pictures.Config(path=path),), height=8, width=8, batch_rows=5, held_out=0.0)
        rows = build(config, rows=30, folder=tmp_path)
        return rows, list(rows.batches(0))

    expected = pixels(batches(sound)[1])
    rows, found = batches(path)
    weight = np.concatenate([b.streams["pixels"].weight for b in found])[:, 0]
    assert weight.tolist().count(0.0) == 3 and (pixels(found)[weight == 0] == 0).all()
    assert np.array_equal(pixels(found)[weight > 0], expected[weight > 0])
    [line] = (tmp_path / "rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "stills:3" and rows.summary()["rejected_at_load"] == 1


def test_held_out_pictures_are_fixed_and_never_trained_on(config):
    rows = build(config, rows=400)
    held = rows.held_out_batches("stills", 2)
    again = build(config, seed=4).held_out_batches("stills", 2)
    assert all(
        np.array_equal(a.streams["pixels"].feats, b.streams["pixels"].feats) for a, b in zip(held, again, strict=True)
    )
    real = pixels(held)[np.concatenate([b.streams["pixels"].weight for b in held])[:, 0] > 0]
    assert all(len(b.row_id) == 8 for b in held) and 2 <= len(real) <= 16
    only = config.replace(sources=config.sources[:1])
    trained = {p.tobytes() for p in pixels(list(build(only, rows=400).batches(0)))}
    assert not trained & {p.tobytes() for p in real}
    with pytest.raises(LoaderError, match="there is stills, clips"):
        rows.held_out_batches("x", 1)
    with pytest.raises(LoaderError, match="no held-out picture"):
        build(config.replace(held_out=0.0)).held_out_batches("clips", 1)


def test_wrong_data_is_told(config, tmp_path):
    codes = write(tmp_path, "codes", [Document(key="c", segments=(Image(codes=np.zeros((2, 2, 1), np.int32)),))])
    words = write(tmp_path, "words", [Document(key="w", segments=(Text(text="no picture"),))])
    for sources, message in (
        ((Pictures.Config(path=codes),), "holds codes"),
        ((Pictures.Config(path=words),), "no picture to train on"),
        ((Pictures.Config(path=words, weight=0.0),), "must be above 0"),
        ((config.sources[0], config.sources[0]), "one name"),
        ((), "at least one source"),
    ):
        with pytest.raises(LoaderError, match=message):
            build(config.replace(sources=sources))


@pytest.mark.parametrize(
    "wrong",
    [
        {"height": 0},
        {"width": 0},
        {"batch_rows": 0},
        {"cache_bytes": -1},
        {"threads": -1},
        {"prefetch": -1},
        {"workers": -1},
        {"held_out": 1.0},
        {"max_rejected": float("nan")},
    ],
)
def test_numbers_out_of_range_are_named(config, wrong):
    ((field, value),) = wrong.items()
    with pytest.raises(LoaderError, match=rf"data\.{field} is {value}; give"):
        build(config.replace(**wrong))


def test_summary_is_plain(config):
    rows = build(config)
    summary = rows.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["sources"]["stills"]["share"] == 0.75 and rows.sources == ("stills", "clips")
