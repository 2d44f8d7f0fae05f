"""What a mixture promises: pure draws, exact lengths, token shares by weight."""

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest

from mmgpt.core.document import Document, Image, Text, Video, equal
from mmgpt.data import mixture, shuffle
from mmgpt.data.index import Index
from mmgpt.data.lengths import Lengths, Parts, document_parts
from mmgpt.data.mixture import DROP, SWAP, Draws, MixtureError, Source

GOLDEN = [86, 277, 153, 127, 799]


class Rule:
    """Two tokens around a document, two around each medium, one for each text id and code."""

    overhead = 2

    def segment_lengths(self, kind: np.ndarray, shape: np.ndarray) -> np.ndarray:
        return np.where(kind == 0, shape[:, 0], np.prod(shape[:, :4], axis=1, dtype=np.int64) + 2)


def text(n: int) -> Text:
    return Text(ids=np.arange(n, dtype=np.int32))


def image(h: int = 2, w: int = 3) -> Image:
    return Image(codes=np.zeros((h, w, 1), np.int32))


def doc(*segments) -> Document:
    return Document(key="d", segments=segments)


def source(name: str, lengths: np.ndarray, row_length: int = 512, held_out: float = 0.0, **knobs) -> Source:
    full = np.asarray(lengths, np.int32)
    drawable = np.ones(len(full), bool)
    measured = Lengths(full=full, no_text=full - full // 2, swappable=drawable, droppable=drawable, overhead=2)
    config = Source.Config(path=f"data/{name}", **knobs)
    return Source(config, name, measured, row_length, held_out=held_out)


def take(sources: list[Source], count: int, seed: int = 0, **options) -> Draws:
    parts, found = [], 0
    for draws in mixture.merged(sources, seed, **options):
        parts.append(draws)
        found += len(draws)
        if found >= count:
            return Draws.join(parts).take(slice(0, count))
    return Draws.join(parts)


def same(a: Draws, b: Draws) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_lengths_and_layouts_are_those_of_the_documents():
    video = Video(codes=np.zeros((2, 2, 2, 1), np.int32))
    documents = [
        doc(text(5)),
        doc(text(4), image()),
        doc(image(), text(4)),
        doc(),
        doc(text(1), video, text(2), image(1, 1)),
        doc(image()),
    ]
    lengths = Lengths.measure(Rule(), Index.of(documents))
    assert lengths.full.tolist() == [7, 14, 14, 2, 18, 10]
    assert lengths.no_text.tolist() == [2, 10, 10, 2, 15, 10]
    assert lengths.swappable.tolist() == [False, True, False, False, True, False]
    assert lengths.droppable.tolist() == [False, True, True, False, True, False]


def test_layout_of_a_document():
    config = Source.Config(path="x", first_loss=0.5)
    document = Document(key="d", segments=(image(), text(2), image(1, 1), text(3)), meta={"a": "b"})
    assert mixture.apply_layout(document, 0, config) is not None
    assert equal(mixture.apply_layout(document, 0, config), document)
    dropped = mixture.apply_layout(document, DROP, config)
    assert [(type(s), s.loss) for s in dropped.segments] == [(Image, 1.0), (Image, 1.0), (Text, 0.0)]
    assert not len(dropped.segments[2].ids)  # that nothing follows is not learned
    swapped = mixture.apply_layout(document, SWAP, config)
    assert [type(s) for s in swapped.segments] == [Image, Image, Text, Text]
    assert [s.loss for s in swapped.segments] == [1.0, 0.5, 1.0, 1.0]  # only what was moved
    told = Document(key="t", segments=(text(2), text(1), image(), text(3)), meta={})
    assert [s.loss for s in mixture.apply_layout(told, 0, config).segments] == [0.5, 0.5, 1.0, 1.0]
    assert [s.loss for s in mixture.apply_layout(told, SWAP, config).segments] == [0.5, 1.0, 1.0, 1.0]
    words = Document(key="w", segments=(text(2), text(1)), meta={})
    assert equal(mixture.apply_layout(words, 0, config), words)  # nothing follows that it could be the prompt of
    assert swapped.meta == document.meta and len(swapped.segments[3].ids) == 3


def test_flags_follow_their_probabilities_and_only_where_they_change_a_document():
    n = 20000
    one = source("a", np.full(n, 20), drop_text=0.2, swap=0.5)
    flags = one.flags(1, 0, np.arange(n))
    assert abs((flags == DROP).mean() - 0.2) < 0.01
    assert abs((flags == SWAP).mean() - 0.4) < 0.01  # half of those that keep their text
    assert set(np.unique(flags)) == {0, DROP, SWAP}
    fixed = dataclasses.replace(one.lengths, swappable=np.zeros(n, bool), droppable=np.arange(n) < 10)
    rigid = Source(one.config, "a", fixed, 512)
    assert not rigid.flags(1, 0, np.arange(10, n)).any()
    assert (one.flags(1, 1, np.arange(n)) != flags).any() and (one.flags(2, 0, np.arange(n)) != flags).any()
    assert np.array_equal(one.flags(1, 0, np.array([17, 3])), flags[[17, 3]])  # whatever is asked for with it


def test_hashes_are_fixed_and_even():
    # Golden: these numbers are the data order of every run. They may change only with a note that old runs
    # cannot be continued; print them anew with what stands before each `==`.
    assert shuffle.counter_hash(0, np.array([1])).tolist() == [0xE220A8397B1DCDAF]  # splitmix64's first from seed 0
    assert shuffle.key(0, "order", "a", 1) == int.from_bytes(
        __import__("hashlib").blake2b(b"0\x00order\x00a\x001", digest_size=8).digest(), "little"
    )
    assert shuffle.permuted(5, 1000, np.arange(5)).tolist() == GOLDEN
    u = shuffle.uniform(shuffle.key(7), np.arange(100_000))
    assert np.abs(np.histogram(u, 10, (0, 1))[0] / 10_000 - 1).max() < 0.05


def test_every_document_once_per_epoch_in_a_new_order():
    one = source("a", np.full(50, 20))
    draws = take([one], 150)
    epochs = [draws.document[draws.epoch == e] for e in range(3)]
    assert all(sorted(e) == list(range(50)) for e in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], take([one], 50, seed=1).document)


def test_token_shares_follow_weights_at_every_point():
    rng = np.random.default_rng(0)
    sources = [
        source("a", rng.integers(20, 60, 3000), weight=1.0),
        source("b", rng.integers(100, 500, 500), weight=2.0, drop_text=0.3),
        source("c", rng.integers(5, 300, 1000), weight=0.5),
    ]
    draws = take(sources, 40_000)
    tokens = np.stack([np.cumsum(np.where(draws.source == i, draws.length, 0)) for i in range(3)])
    behind = tokens / np.array([[1.0], [2.0], [0.5]])
    assert (behind.max(0) - behind.min(0)).max() <= 300 / 0.5  # never more than one document apart
    assert np.allclose(tokens[:, -1] / tokens[:, -1].sum(), np.array([2, 4, 1]) / 7, atol=0.005)


def test_chunks_never_change_the_order(monkeypatch):
    sources = [source("a", np.full(100, 20)), source("b", np.arange(30, 90), weight=0.3)]
    whole = take(sources, 3000)
    monkeypatch.setattr(mixture, "CHUNK_TOKENS", 777)
    monkeypatch.setattr(mixture, "CHUNK_DOCUMENTS", 7)
    assert same(take(sources, 3000), whole)


def test_a_cursor_goes_on_where_the_source_was():
    one = source("a", np.full(30, 20), drop_text=0.5)
    assert same(take([one], 60, first={"a": (40, 0)}), take([one], 100).take(slice(40, 100)))


def test_held_out_share_is_fixed_by_name_alone():
    documents = np.arange(10_000)
    away = shuffle.is_held_out("stories", documents, 0.02)
    assert 150 < away.sum() < 250
    assert np.array_equal(
        shuffle.is_held_out("stories", documents[:5000], 0.02), away[:5000]
    )  # growing keeps the split
    assert not np.array_equal(shuffle.is_held_out("captions", documents, 0.02), away)
    assert not shuffle.is_held_out("stories", documents, 0.0).any()
    one = source("stories", np.full(10_000, 20), held_out=0.02)
    assert one.held_out == away.sum() and np.array_equal(one.select(documents), ~away)
    assert sorted(take([one], one.documents).document) == np.flatnonzero(~away).tolist()


def test_documents_no_row_holds_are_counted():
    one = source("a", np.array([10, 513, 2, 512, 900]))
    assert one.select(np.arange(5)).tolist() == [True, False, False, True, False] and one.documents == 2
    assert one.tokens == 522
    assert one.rejected == {"longer than 512 tokens": 2, "empty": 1}
    with pytest.raises(MixtureError, match="no document fits a row of 8 tokens"):
        source("a", np.array([10, 20]), row_length=8)


@pytest.mark.parametrize(
    "knobs",
    [
        {"weight": 0.0},
        {"weight": -1.0},
        {"weight": math.inf},
        {"max_epochs": 0},
        {"max_documents": 0},
        {"max_tokens": 0},
        {"swap": 1.5},
        {"drop_text": -0.1},
    ],
)
def test_knobs_out_of_range_are_errors(knobs):
    with pytest.raises(MixtureError, match=next(iter(knobs))):
        source("a", np.array([10]), **knobs)


def test_a_mixture_of_nothing_is_an_error():
    with pytest.raises(MixtureError, match="at least one source"):
        next(mixture.merged([], 0))


def test_draws_are_endless():
    tiny = source("a", np.array([20]))
    assert [d.epoch[0] for d in itertools.islice(tiny.draws(0), 4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 1000, 65_537])
def test_a_permutation_holds_every_number_and_any_part_of_it_is_had_alone(count):
    whole = shuffle.permuted(9, count, np.arange(count))
    assert np.array_equal(np.sort(whole), np.arange(count))
    some = np.arange(count)[:: max(1, count // 7)]
    assert np.array_equal(shuffle.permuted(9, count, some), whole[some])


def test_permutations_are_even():
    firsts = np.array([shuffle.permuted(shuffle.key(s), 50, np.arange(50)) for s in range(4000)])
    counts = np.stack([np.bincount(firsts[:, place], minlength=50) for place in range(50)])
    assert ((counts - 80) ** 2 / 80).sum() / 49**2 < 1.2  # chi-square over its degrees of freedom
    follows = (firsts[:, 1:] - firsts[:, :-1]) % 50
    assert np.abs(np.bincount(follows.ravel(), minlength=50)[1:] / (4000 * 49 / 49) - 1).max() < 0.08


def test_filters_and_caps():
    lengths = np.arange(10, 210)
    one = source("a", lengths, min_tokens=20, max_tokens=100)
    assert sorted(one.lengths.full[take([one], one.documents).document]) == list(range(20, 101))
    assert one.rejected == {"longer than max_tokens 100": 109, "shorter than min_tokens 20": 10}
    capped = source("a", lengths, max_documents=50)
    first, later = (take([capped], 50, seed=seed) for seed in (0, 1))
    assert len(set(first.document)) == 50 and set(first.document) == set(later.document)
    assert not np.array_equal(first.document, later.document)
    assert max(first.document) > 150  # not simply the first ones of the file
    twice = take([source("a", lengths, max_epochs=2)], 10_000)
    assert len(twice) == 400 and np.bincount(twice.document).tolist() == [2] * 200


def test_a_source_that_has_ended_leaves_its_share_to_the_others():
    draws = take([source("a", np.full(10, 20), max_epochs=1), source("b", np.full(10, 20), weight=3.0)], 100)
    assert (draws.source == 0).sum() == 10 and (draws.source[:36] == 0).sum() == 9 and len(draws) == 100


def test_keep_filters_documents(tmp_path):
    keep = np.arange(30) % 3 > 0
    np.save(tmp_path / "keep.npy", keep)
    one = source("a", np.full(30, 20), keep=str(tmp_path / "keep.npy"))
    assert sorted(take([one], 20).document) == np.flatnonzero(keep).tolist()
    assert one.rejected == {"filtered by keep": 10}
    np.save(tmp_path / "short.npy", keep[:-1])
    for name in ("short.npy", "none.npy"):
        with pytest.raises(MixtureError, match=f"keep=.*{name}"):
            source("a", np.full(30, 20), keep=str(tmp_path / name))


def split(documents: list[Document], row_length: int, **knobs) -> tuple[Source, Parts]:
    index = Index.of(documents)
    lengths = Lengths.measure(Rule(), index)
    split = functools.partial(Parts.of, Rule(), index, row_length)
    one = Source(Source.Config(path="a", split=True, **knobs), "a", lengths, row_length, split=split)
    return one, split(np.flatnonzero(lengths.full > row_length))


def test_long_documents_are_split_between_segments():
    long = doc(text(5), image(), text(4), image(), text(30), text(3), text(2))  # 5, 8, 4, 8, 30, 3, 2 of 18 tokens
    one, parts = split([doc(text(3)), long, doc(text(40)), doc(text(10))], 20)
    assert parts.document.tolist() == [1, 2] and parts.refused == 2
    found = list(zip(parts.first.tolist(), parts.stop.tolist(), parts.length.tolist(), strict=True))
    assert found == [(0, 3, 19), (3, 4, 10), (5, 7, 7)]
    assert one.rejected == {"longer than 20 tokens": 1, "segments longer than 20 tokens": 2}
    draws = take([one], 5)
    assert sorted(zip(draws.document.tolist(), draws.part.tolist(), draws.length.tolist(), strict=True)) == [
        (0, 0, 5), (1, 1, 19), (1, 2, 10), (1, 3, 7), (3, 0, 12),
    ]  # fmt: skip
    alone = document_parts(Rule(), Index.of([doc(), long]), 1, 20)
    assert np.array_equal(alone.first, parts.first) and np.array_equal(alone.stop, parts.stop)


def test_parts_are_those_of_a_walk_through_each_document():
    rng = np.random.default_rng(0)
    documents = [doc(*(text(int(n)) for n in rng.integers(1, 30, rng.integers(1, 12)))) for _ in range(200)]
    _, parts = split([*documents, doc(text(3))], 22)
    at = 0
    for i, document in enumerate(documents):
        sizes = [len(s.ids) for s in document.segments]
        if sum(sizes) <= 20:
            continue
        expected, first, used = [], None, 0
        for k, size in enumerate(sizes):
            if size > 20 or (first is not None and used + size > 20):
                expected += [] if first is None else [(i, first, k)]
                first, used = None, 0
            if size <= 20:
                first, used = (k if first is None else first), used + size
        expected += [] if first is None else [(i, first, len(sizes))]
        place = int(np.searchsorted(parts.document, i))
        mine = slice(int(parts.offset[place]), int(parts.offset[place + 1]))
        assert mine.start == at
        assert [(i, int(a), int(b)) for a, b in zip(parts.first[mine], parts.stop[mine], strict=True)] == expected
        at = mine.stop


def test_a_cursor_inside_a_split_document_goes_on_with_its_next_part():
    one, _ = split([doc(*(text(9) for _ in range(6))), doc(text(5)), doc(text(7))], 20, swap=0.5)
    whole = take([one], 20)
    for count in range(1, 20):
        at, part = int(whole.at[count - 1]), int(whole.part[count - 1])
        cursor = (at, part) if part else (at + 1, 0)
        assert same(take([one], 20 - count, first={"a": cursor}), whole.take(slice(count, 20)))
