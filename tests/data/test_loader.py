"""What a loader promises: the same rows for every restart and host count, and a bad sample that harms nobody."""

import itertools
import json
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from mmgpt.core.document import Document, Image, Text
from mmgpt.core.stream import IMAGE, TEXT, Batch
from mmgpt.data.loader import LoaderError, PackedRows
from mmgpt.data.mixture import Change, Source
from mmgpt.data.record import Dataset, RecordError, Writer
from mmgpt.tokens.grammars.grammar import GrammarError, Tokens
from tests import tiny

ROW, BATCH = 128, 8
BOS, EOS, PAD, BOI, EOI = range(5)


class Plain:
    """BOS, text ids, pictures as BOI codes EOI, EOS; text ids from 10 on, codes from 1000 on."""

    name, overhead, pad = "plain", 2, PAD
    text = tiny.text()

    def segment_lengths(self, kind: np.ndarray, shape: np.ndarray) -> np.ndarray:
        return np.where(kind == 0, shape[:, 0], np.prod(shape[:, 1:4], axis=1, dtype=np.int64) + 2)

    def places(self, ids: np.ndarray) -> np.ndarray:
        """Codes lie in row 1, in columns by their value."""
        return np.stack([ids >= 1000, np.where(ids >= 1000, ids - 999, 0)], axis=1).astype(np.int32)

    def encode(self, document: Document) -> Tokens:
        ids, modality, weight = [np.array([BOS])], [np.array([TEXT])], [np.array([1.0])]
        for segment in document.segments:
            is_text = isinstance(segment, Text)
            part = segment.ids + 10 if is_text else np.concatenate([[BOI], segment.codes.ravel() + 1000, [EOI]])
            if part.max(initial=0) >= 2000:
                raise GrammarError(f"document {document.key!r}: a code is outside its codebook.")
            ids.append(part)
            modality.append(np.full(len(part), TEXT if is_text else IMAGE))
            weight.append(np.full(len(part), segment.loss))
        return Tokens(
            ids=np.concatenate([*ids, [EOS]]).astype(np.int32),
            place=self.places(np.concatenate([*ids, [EOS]])),
            modality=np.concatenate([*modality, [TEXT]]).astype(np.int32),
            weight=np.concatenate([*weight, [1.0]]).astype(np.float32),
        )


def write(directory: Path, name: str, documents: list[Document]) -> str:
    with Writer(directory / name, name=name, shard_documents=100) as writer:
        for document in documents:
            writer.write(document)
    return str(directory / name)


def captions(count: int, seed: int) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [
        Document(
            key=f"{seed}-{i}",
            segments=(
                Text(ids=rng.integers(0, 900, rng.integers(3, 30)).astype(np.int32)),
                Image(codes=rng.integers(0, 900, (4, 4, 1)).astype(np.int32)),
            ),
        )
        for i in range(count)
    ]


def stories(count: int, seed: int) -> list[Document]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 100, count)
    return [
        Document(key=f"s{i}", segments=(Text(ids=rng.integers(0, 900, n).astype(np.int32)),))
        for i, n in enumerate(sizes)
    ]


def mixture(directory: Path) -> PackedRows.Config:
    """Captions that swap and drop, and stories."""
    return PackedRows.Config(
        sources=(
            Source.Config(path=write(directory, "captions", captions(300, 1)), swap=0.5, drop_text=0.1),
            Source.Config(path=write(directory, "stories", stories(150, 2)), weight=2.0),
        ),
        row_length=ROW,
        batch_rows=BATCH,
        held_out=0.1,
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> PackedRows.Config:
    return mixture(tmp_path_factory.mktemp("data"))


def build(config: PackedRows.Config, rows: int = 96, seed: int = 0, folder: Path | None = None) -> PackedRows:
    return config.build(Plain(), seed=seed, rows=rows, folder=folder)


def every(batch: Batch) -> list[np.ndarray]:
    return jax.tree.leaves(batch)


def same(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(every(a), every(b), strict=True))


def joined(parts: list[Batch]) -> Batch:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def test_batches_hold_the_rows_in_order(config):
    rows = build(config)
    batches = list(rows.batches(0))
    assert [b.row_id.tolist() for b in batches] == [list(range(i, i + BATCH)) for i in range(0, 96, BATCH)]
    stream = batches[0].streams["tokens"]
    assert {n: getattr(stream, n).dtype.name for n in ("ids", "target", "modality", "position", "weight")} == {
        "ids": "int32", "target": "int32", "modality": "int32", "position": "int32", "weight": "float32",
    }  # fmt: skip
    assert stream.ids.shape == (BATCH, ROW) and batches[0].row_id.dtype == np.int64
    assert all(isinstance(leaf, np.ndarray) for leaf in every(batches[0]))
    assert rows.sources == ("captions", "stories")


def test_a_row_shows_whole_documents_that_see_only_themselves(config):
    batch = next(build(config).batches(0))
    stream, seen = batch.streams["tokens"], batch.visibility["tokens"]
    for r in range(BATCH):
        ids, start = stream.ids[r], seen.start[r]
        firsts = np.flatnonzero(ids == BOS)
        ends = np.flatnonzero(ids == EOS)
        assert len(firsts) == len(ends) >= 1 and (firsts[1:] == ends[:-1] + 1).all()
        for first, end in zip(firsts, ends, strict=True):
            assert (start[first : end + 1] == first).all()
            assert np.array_equal(stream.position[r, first : end + 1, 0], np.arange(end + 1 - first))
            place = Plain().places(stream.ids[r, first : end + 1])
            assert np.array_equal(stream.position[r, first : end + 1, 1:3], place)
            assert np.array_equal(stream.position[r, first:end, 3:], place[1:])
            assert not stream.position[r, end, 3:].any()
            assert np.array_equal(stream.target[r, first:end], ids[first + 1 : end + 1])
            assert stream.weight[r, first:end].all() and stream.weight[r, end] == 0
        padding = np.arange(ROW) > ends[-1]
        assert (ids[padding] == PAD).all() and not stream.weight[r, padding].any()
        assert (seen.key_island[r, padding] == -1).all()
        assert (seen.stop[r, padding] <= seen.start[r, padding]).all()
        assert np.array_equal(seen.stop[r, ~padding], np.flatnonzero(~padding) + 1)


def test_every_training_document_once_per_epoch_as_its_layout_says(config):
    rows = build(config.replace(sources=config.sources[:1]), rows=400)
    documents = captions(300, 1)
    by_codes = {tuple(d.segments[1].codes.ravel() + 1000): d for d in documents}
    met: list[str] = []
    for batch in rows.batches(0):
        for ids in batch.streams["tokens"].ids:
            for part in np.split(ids, np.flatnonzero(ids == BOS))[1:]:
                codes = part[np.flatnonzero(part == BOI)[0] + 1 : np.flatnonzero(part == EOI)[0]]
                document = by_codes[tuple(codes)]
                before, after = part[1 : np.flatnonzero(part == BOI)[0]], part[np.flatnonzero(part == EOI)[0] + 1 :]
                after = after[: np.flatnonzero(after == EOS)[0]]
                text = document.segments[0].ids + 10
                layouts = [len(before) == len(after) == 0, np.array_equal(before, text), np.array_equal(after, text)]
                assert sum(layouts) == 1
                met.append(document.key)
    held_out = rows.summary()["held_out"]["captions"]
    assert 10 < held_out < 60
    counts = np.unique(met, return_counts=True)[1]
    assert len(counts) == 300 - held_out
    assert counts.max() <= rows.summary()["sources"]["captions"]["epochs"]


def test_a_restart_at_any_row_gives_the_same_batches(config):
    whole = joined(list(build(config).batches(0)))
    for start in (0, BATCH, 13, 40, 88):
        batches = list(build(config).batches(start))
        assert len(batches) == (96 - start) // BATCH
        part = slice(start, start + len(batches) * BATCH)
        assert same(joined(batches), jax.tree.map(lambda leaf, part=part: leaf[part], whole))
    assert list(build(config).batches(96)) == []


def test_one_two_and_four_hosts_load_the_same_rows(config):
    whole = list(build(config).batches(16))
    for count in (2, 4):
        parts = [list(build(config).batches(16, (i, count))) for i in range(count)]
        assert all(len(part[0].row_id) == BATCH // count for part in parts)
        for i, batch in enumerate(whole):
            assert same(joined([part[i] for part in parts]), batch)


def test_hosts_run_out_together(config):
    rows = build(config, rows=96)  # from row 3 on, 5 rows are left over: a whole share for one host of four
    assert [len(list(rows.batches(3, (i, 4)))) for i in range(4)] == [11] * 4


def test_a_longer_run_begins_with_the_same_rows(config):
    short, long = build(config, rows=48), build(config, rows=96)
    assert all(same(a, b) for a, b in itertools.zip_longest(short.batches(0), itertools.islice(long.batches(0), 6)))
    assert not same(next(short.batches(0)), next(build(config, seed=1).batches(0)))


def test_the_cache_changes_nothing(config):
    cached = list(build(config).batches(0))
    for budget in (0, 5000):
        rows = build(config.replace(cache_bytes=budget, threads=4))
        assert all(same(a, b) for a, b in zip(cached, rows.batches(0), strict=True))


def test_what_comes_first_takes_its_loss(config):
    halved = config.sources[0].replace(swap=1.0, drop_text=0.0, first_loss=0.5)
    stream = next(build(config.replace(sources=(halved,))).batches(0)).streams["tokens"]
    codes = (stream.target >= 1000) & (stream.weight > 0)
    assert codes.any() and (stream.weight[codes] == 0.5).all()
    words = (stream.target >= 10) & (stream.target < 1000) & (stream.weight > 0)
    assert words.any() and (stream.weight[words] == 1.0).all()


def test_a_changed_mixture_keeps_the_rows_before_it(config):
    only = config.replace(changes=(Change(step=5, sources=config.sources[1:]),))
    before, after = list(build(config).batches(0)), list(build(only).batches(0))
    assert all(same(a, b) for a, b in zip(before[:5], after[:5], strict=True))
    late = joined(list(build(only, rows=400).batches(384))).streams["tokens"]
    assert (late.ids == BOS).any() and not (late.ids == BOI).any()
    assert build(only).sources == ("captions", "stories")


def damage(directory: Path, documents: list[int]) -> None:
    """Flips a byte inside the stored records, which lie in the shard in order of their number."""
    dataset = Dataset(directory)
    shard = directory / dataset.manifest["shards"][0]["file"]
    data = bytearray(shard.read_bytes())
    for document in documents:
        key = dataset.raw(document)[4:40]
        at = data.find(key)
        assert at > 0
        data[at + 8] ^= 0xFF
    shard.write_bytes(bytes(data))


def test_a_corrupt_record_is_padding_and_a_line_and_nothing_else_changes(tmp_path):
    directory = tmp_path / "captions"
    with Writer(directory, name="captions", options="group_size:1,uncompressed") as writer:
        for document in captions(100, 1):
            writer.write(document)
    config = PackedRows.Config(
        sources=(Source.Config(path=str(directory)),), row_length=ROW, batch_rows=4, held_out=0.0
    )
    sound = build(config, rows=60)
    expected = joined(list(sound.batches(0))).streams["tokens"]
    damage(directory, [7, 31])
    with pytest.raises(RecordError):
        Dataset(directory)[7]
    rows = build(config, rows=60, folder=tmp_path / "run")
    found = joined(list(rows.batches(0)))
    stream, seen = found.streams["tokens"], found.visibility["tokens"]
    gone = stream.ids != expected.ids
    lost = [len(Plain().encode(captions(100, 1)[i]).ids) for i in (7, 31)]
    assert gone.any() and set(np.add.reduce(gone, axis=1)[gone.any(axis=1)].tolist()) <= {*lost, sum(lost)}
    assert (stream.ids[gone] == PAD).all() and (stream.weight[gone] == 0).all() and (seen.key_island[gone] == -1).all()
    for name in ("ids", "target", "modality", "position", "weight"):
        assert np.array_equal(getattr(stream, name)[~gone], getattr(expected, name)[~gone])
    lines = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == ["captions:31", "captions:7"]
    assert all(line["reason"] and str(directory) in line["place"] for line in lines)
    assert rows.summary()["rejected_at_load"] == 2


def test_a_document_the_grammar_refuses_is_left_out(tmp_path):
    documents = stories(40, 3)
    documents[5] = Document(key="bad", segments=(Text(ids=np.full(30, 5000, np.int32)),))
    path = write(tmp_path, "stories", documents)
    config = PackedRows.Config(sources=(Source.Config(path=path),), row_length=ROW, batch_rows=4, held_out=0.0)
    rows = build(config, rows=40, folder=tmp_path)
    assert len(list(rows.batches(0))) == 10
    [line] = (tmp_path / "rejects.jsonl").read_text().splitlines()
    assert "outside its codebook" in json.loads(line)["reason"]


def test_a_run_ends_when_nothing_loads(tmp_path):
    bad = [Document(key=f"b{i}", segments=(Text(ids=np.full(30, 5000, np.int32)),)) for i in range(30)]
    config = PackedRows.Config(
        sources=(Source.Config(path=write(tmp_path, "bad", bad)),), row_length=ROW, batch_rows=4, held_out=0.0
    )
    with pytest.raises(LoaderError, match=r"1\d\d of the last 1\d\d samples failed"):
        list(build(config, rows=200).batches(0))


def test_a_grammar_that_miscounts_ends_the_run(config):
    class Miscounting(Plain):
        def segment_lengths(self, kind, shape):
            return super().segment_lengths(kind, shape) + 1

    rows = config.build(Miscounting(), seed=0, rows=16, folder=None)
    with pytest.raises(LoaderError, match="the grammar encodes"):  # raised in a thread, seen here
        next(rows.batches(0))


def test_held_out_batches_are_fixed_and_never_trained_on(config):
    rows = build(config)
    batches = rows.held_out_batches("captions", 3)
    again = build(config, seed=9).held_out_batches("captions", 3)
    assert 1 <= len(batches) <= 3 and all(same(a, b) for a, b in zip(batches, again, strict=True))
    assert all(b.streams["tokens"].ids.shape == (BATCH, ROW) for b in batches)
    used = [b.row_id for b in build(config).held_out_batches("captions", 100)]
    assert (np.concatenate(used) == -1).sum() == -sum((r >= 0).sum() for r in used) % BATCH
    trained = np.concatenate([b.streams["tokens"].ids for b in build(config, rows=400).batches(0)]).tobytes()
    held = np.concatenate([b.streams["tokens"].ids for b in batches])
    starts = np.argwhere(held == BOI)
    assert len(starts) > 5
    assert not any(held[r, c : c + 18].tobytes() in trained for r, c in starts)  # a whole picture of 16 codes
    with pytest.raises(LoaderError, match="there is captions, stories"):
        rows.held_out_batches("caption", 1)
    with pytest.raises(LoaderError, match="no held-out document"):
        build(config.replace(held_out=0.0)).held_out_batches("captions", 1)


def test_summary_is_plain_and_tells_shares(config):
    summary = build(config, rows=400).summary()
    assert json.loads(json.dumps(summary)) == summary
    tokens = {name: s["tokens"] for name, s in summary["sources"].items()}
    assert abs(tokens["stories"] / sum(tokens.values()) - 2 / 3) < 0.02
    assert summary["fill"] > 0.9 and summary["rejected_at_load"] == 0


def test_wrong_use_is_told(config, tmp_path):
    rows = build(config)
    with pytest.raises(LoaderError, match="outside the plan's rows 0 to 96"):
        next(rows.batches(97))
    with pytest.raises(LoaderError, match="equal parts of 8 rows"):
        next(rows.batches(0, (0, 3)))
    with pytest.raises(LoaderError, match="need a grammar"):
        config.build(None, seed=0, rows=8, folder=None)
    raw = write(tmp_path, "raw", [Document(key="a", segments=(Text(text="a red circle"),))])
    with pytest.raises(LoaderError, match="mmgpt tokenize"):
        build(config.replace(sources=(Source.Config(path=raw),)))
    twin = write(tmp_path / "other", "captions", captions(300, 5))
    for wrong in (twin, config.sources[0].path):
        with pytest.raises(LoaderError, match=r"both named 'captions'.* a `name` of its own"):
            build(config.replace(sources=(*config.sources, Source.Config(path=wrong))))
    with pytest.raises(LoaderError, match="both named 'captions'"):
        build(config.replace(changes=(Change(step=2, sources=(Source.Config(path=twin),)),)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"row_length": 0},
        {"batch_rows": 0},
        {"workers": -1},
        {"threads": -1},
        {"prefetch": -1},
        {"cache_bytes": -1},
        {"held_out": 1.0},
        {"held_out": -0.5},
        {"held_out": float("nan")},
        {"max_rejected": float("nan")},
    ],
)
def test_numbers_out_of_range_are_named(config, wrong):
    ((field, value),) = wrong.items()
    with pytest.raises(LoaderError, match=rf"data\.{field} is {value}; give"):
        build(config.replace(**wrong))


@pytest.mark.parametrize("taken", [1, 12])  # left early, and read to its end
def test_a_batch_iterator_leaves_no_threads(config, taken):
    before = set(threading.enumerate())
    batches = build(config).batches(0)
    next(batches)
    started = set(threading.enumerate()) - before
    assert started
    assert len(list(itertools.islice(batches, taken))) == min(taken, 11)
    if taken == 1:
        del batches
    for thread in started:
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in started)
