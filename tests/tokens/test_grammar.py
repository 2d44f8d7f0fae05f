"""What every grammar promises: documents come back, lengths are known, and what it guides to ends and parses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgpt.core.document import KINDS, Document, Image, Segment, Text, Video, equal
from mmgpt.data.index import segment_shape
from mmgpt.tokens.grammars.emu3 import Emu3
from mmgpt.tokens.grammars.grammar import Grammar, GrammarError, Weights
from tests import tiny

LAYOUTS = (((5,), False), ((4, 8), False), ((4, 8), True))
"""Codebooks, and whether code 0 of the first is a blank place."""
SIZES = ((0, 2, 3), (0, 2, 10), (0, 12, 1), (2, 2, 2), (11, 1, 1))
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["1 book", "2 books", "blanks"])


@st.composite
def drawn(draw: st.DrawFn, layout: tuple[tuple[int, ...], bool]) -> Document:
    """Any tokenised document; ids and codes by a seed, which shrinks as well as drawing each."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    side = st.integers(1, 4) | st.integers(9, 12)
    segments: list[Segment] = []
    for kind in draw(st.lists(st.sampled_from([Text, Image, Video]), max_size=5)):
        if kind is Text:
            n = draw(st.integers(0, 6))
            segments.append(Text(ids=rng.integers(0, tiny.text().size, n).astype(np.int32)))
        elif kind is Image:
            segments.append(Image(codes=tiny.grid(rng, (draw(side), draw(side)), *layout)))
        else:
            segments.append(Video(codes=tiny.grid(rng, (draw(st.integers(1, 11)), draw(side), draw(side)), *layout)))
    return Document(key="", segments=tuple(segments))


def canonical(document: Document) -> Document:
    """Adjacent texts merged, empty ones gone, bare media."""
    segments: list[Segment] = []
    for segment in document.segments:
        if isinstance(segment, Text) and segments and isinstance(segments[-1], Text):
            segments[-1] = Text(ids=np.concatenate([segments[-1].ids, segment.ids]))
        else:
            segments.append(segment)
    return Document(key="", segments=tuple(s for s in segments if not isinstance(s, Text) or len(s.ids)))


@layouts
@given(data=st.data())
def test_a_document_comes_back(layout: tuple[tuple[int, ...], bool], data: st.DataObject) -> None:
    document = data.draw(drawn(layout))
    grammar = tiny.grammar(*layout)
    tokens = grammar.encode(document)
    assert equal(grammar.parse(tokens.ids), canonical(document))
    assert equal(grammar.parse(grammar.encode(document, end=False).ids), canonical(document))
    padded = np.append(tokens.ids, [grammar.pad] * 3)
    assert equal(grammar.parse(padded), canonical(document))


@layouts
@given(data=st.data())
def test_lengths_are_known_from_the_shapes(layout: tuple[tuple[int, ...], bool], data: st.DataObject) -> None:
    document = data.draw(drawn(layout))
    grammar = tiny.grammar(*layout)
    kind = np.array([KINDS.index(type(s)) for s in document.segments], np.uint8)
    shape = np.array([segment_shape(s) for s in document.segments], np.int32).reshape(-1, 5)
    tokens = grammar.encode(document)
    assert grammar.segment_lengths(kind, shape).sum() + grammar.overhead == len(tokens.ids)
    assert len(tokens.ids) == len(tokens.modality) == len(tokens.weight)
    assert tokens.ids.dtype == tokens.modality.dtype == np.int32 and tokens.weight.dtype == np.float32
    assert 0 <= tokens.ids.min() and tokens.ids.max() < grammar.vocabulary.used


def test_weights_follow_kind_and_segment() -> None:
    grammar = Emu3.Config(weights=Weights(text=1.0, vision=0.5, layout=0.5)).build(tiny.text(), (5,))
    rng = np.random.default_rng(0)
    text, image = Text(ids=np.arange(3, dtype=np.int32), loss=0.0), Image(codes=tiny.grid(rng, (1, 1), (5,)), loss=0.5)
    tokens = grammar.encode(Document(key="", segments=(text, image)))
    assert tokens.weight.tolist() == [1.0] + [0.0] * 3 + [0.25] * (len(tokens.ids) - 5) + [0.5]


def test_places_are_rows_and_columns_of_the_picture() -> None:
    grammar = tiny.grammar()
    codes = tiny.grid(np.random.default_rng(0), (2, 3))
    tokens = grammar.encode(Document(key="", segments=(Text(ids=np.array([1, 2], np.int32)), Image(codes=codes))))
    visual = tokens.ids >= grammar.vocabulary.visual_start
    assert tokens.place[visual].reshape(2, 3, 2, 2).tolist() == [
        [[[row, column]] * 2 for column in (1, 2, 3)] for row in (1, 2)
    ]
    assert tokens.place[tokens.ids == grammar.eol].tolist() == [[1, 4], [2, 4]]
    layout = np.isin(tokens.ids, [grammar.bos, grammar.boi, grammar.img, grammar.eoi, grammar.eos])
    assert not tokens.place[layout].any() and not tokens.place[1:3].any()


def test_a_blank_place_is_one_id_and_the_next_place_follows() -> None:
    grammar = tiny.grammar((4, 8, 3), True)
    codes = np.array([[[0, 0, 0], [2, 7, 0], [0, 0, 0]]], np.int32)
    tokens = grammar.encode(Document(key="", segments=(Image(codes=codes),)))
    visual = tokens.ids >= grammar.vocabulary.visual_start
    starts = grammar.vocabulary.codebook_starts
    assert tokens.ids[visual].tolist() == [starts[0], starts[0] + 2, starts[1] + 7, starts[2], starts[0]]
    assert tokens.place[visual].tolist() == [[1, 1], [1, 2], [1, 2], [1, 2], [1, 3]]
    dense = tiny.grammar((4, 8, 3)).encode(Document(key="", segments=(Image(codes=codes),)))
    assert len(dense.ids) == len(tokens.ids) + 2 * 2


def test_an_opened_clip_goes_on_to_be_the_clip() -> None:
    grammar = tiny.grammar()
    codes = tiny.grid(np.random.default_rng(0), (11, 2, 2))
    whole = grammar.encode(Document(key="", segments=(Video(codes=codes),))).ids
    opened = grammar.open_video(codes[:4], 11)
    assert np.array_equal(opened, whole[1 : 1 + len(opened)])


def test_a_clip_that_cannot_be_opened_is_told() -> None:
    grammar = tiny.grammar((4, 8), True)
    codes = np.array([[[[0, 5]]]], np.int32)
    with pytest.raises(GrammarError, match="a blank place"):
        grammar.open_video(codes, 2)
    for frames in (0, 1000):
        with pytest.raises(GrammarError, match=f"a clip of {frames} frames"):
            grammar.open_video(np.zeros((1, 1, 1, 2), np.int32), frames)


def test_what_cannot_be_laid_out_is_told() -> None:
    grammar = tiny.grammar()
    rng = np.random.default_rng(0)
    codes = tiny.grid(rng, (2, 2))
    bad: list[tuple[Segment, str]] = [
        (Text(ids=np.array([tiny.text().size], np.int32)), "outside the text tokenizer"),
        (Text(ids=np.array([-1], np.int32)), "outside the text tokenizer"),
        (Text(text="raw"), "raw or of another kind"),
        (Image(codes=codes[..., :1]), "does not fit the grammar's 2 codebooks"),
        (Image(codes=tiny.grid(rng, (1000, 1))), "sides up to 999"),
        (Image(codes=tiny.grid(rng, (0, 3))), "0x3 places"),
        (Image(codes=codes[..., ::-1] + 4), "outside its codebook"),
        (Image(codes=codes - 8), "outside its codebook"),
    ]
    for segment, message in bad:
        with pytest.raises(GrammarError, match=f"'k'.*{message}"):
            grammar.encode(Document(key="k", segments=(segment,)))
    with pytest.raises(GrammarError, match=r"'k'.*a blank place .* has other codes"):
        tiny.grammar((4, 8), True).encode(Document(key="k", segments=(Image(codes=np.array([[[0, 1]]])),)))
    with pytest.raises(GrammarError, match="another kind of segment"):
        grammar.segment_lengths(np.array([3], np.uint8), np.array([[1, 0, 0, 0, 0]]))


@layouts
@given(data=st.data())
def test_damaged_ids_are_refused_or_still_a_document(layout: tuple[tuple[int, ...], bool], data: st.DataObject) -> None:
    grammar = tiny.grammar(*layout)
    ids = grammar.encode(data.draw(drawn(layout))).ids.copy()
    at = data.draw(st.integers(0, len(ids) - 1))
    ids[at] = data.draw(st.integers(-3, grammar.vocabulary.used + 3))
    try:
        found = grammar.parse(ids)
    except GrammarError as e:
        assert "position" in str(e)
    else:
        assert np.array_equal(grammar.encode(found, end=grammar.eos in ids).ids, ids)


# --- the automaton


@functools.cache
def jitted(grammar: Grammar, sizes: tuple[tuple[int, int, int], ...] = SIZES):
    machine = grammar.automaton(sizes)
    return machine, jax.jit(machine.allowed), jax.jit(machine.advance)


@functools.cache
def jitted_place(grammar: Grammar):
    return jax.jit(grammar.automaton(SIZES).place)


@layouts
def test_random_choices_end_in_the_room_and_parse(layout: tuple[tuple[int, ...], bool]) -> None:
    """Controls are made likely, or no medium would ever be opened by chance."""
    grammar, room, rows = tiny.grammar(*layout), 150, 16
    machine, allowed, advance = jitted(grammar)
    state = jnp.asarray(np.repeat(machine.start(np.array([grammar.bos]))[None], rows, axis=0))

    @jax.jit
    def play(state: jax.Array, key: jax.Array) -> jax.Array:
        favour = jnp.zeros((1, grammar.vocabulary.used)).at[0, grammar.boi].set(4.0).at[0, grammar.eos].set(-2.0)

        def step(carry, inputs):
            made, key = inputs
            mask = allowed(carry, jnp.full((rows,), room) - made)
            logits = favour + jax.random.gumbel(key, mask.shape)
            chosen = jnp.argmax(jnp.where(mask, logits, -jnp.inf), axis=-1)
            return advance(carry, chosen), (chosen, mask.any(axis=-1))

        keys = jax.random.split(key, room)
        return jax.lax.scan(step, state, (jnp.arange(room), keys))[1]

    opened = set()
    for seed in range(2):
        chosen, possible = play(state, jax.random.key(seed))
        assert np.asarray(possible).all()
        for ids in np.asarray(chosen).T:
            ids = np.concatenate([[grammar.bos], ids])
            assert grammar.eos in ids  # within the room
            document = grammar.parse(ids)
            assert np.array_equal(grammar.encode(document).ids, ids[: ids.tolist().index(grammar.eos) + 1])
            for s in document.segments:
                if isinstance(s, Image | Video):
                    opened.add((0 if isinstance(s, Image) else s.codes.shape[0], *s.codes.shape[-3:-1]))
    assert opened == set(SIZES)


@layouts
@settings(max_examples=15)
@given(data=st.data())
def test_device_and_host_agree_on_every_prefix(layout: tuple[tuple[int, ...], bool], data: st.DataObject) -> None:
    grammar = tiny.grammar(*layout)
    machine, allowed, advance = jitted(grammar)
    place = jitted_place(grammar)
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    segments: list[Segment] = [Text(ids=rng.integers(0, tiny.text().size, 2).astype(np.int32))]
    T, H, W = SIZES[data.draw(st.integers(0, len(SIZES) - 1))]
    codes = tiny.grid(rng, (H, W) if T == 0 else (T, H, W), *layout)
    segments.append(Image(codes=codes) if T == 0 else Video(codes=codes))
    whole = grammar.encode(Document(key="", segments=tuple(segments)))
    ids = whole.ids
    state = machine.start(ids[:1])
    some = rng.integers(0, grammar.vocabulary.used, 4)
    for i in range(1, len(ids)):
        mask = np.asarray(allowed(state[None], jnp.array([1000])))[0]
        assert mask[ids[i]]
        assert np.array_equal(np.asarray(place(jnp.asarray(state[None])))[0], whole.place[i])
        assert np.array_equal(grammar.places(ids[: i + 1]), whole.place[: i + 1])
        for other in some if i % 5 == 0 else ():
            try:
                machine.start(np.append(ids[:i], other))
            except GrammarError:
                fits = False
            else:
                fits = True
            assert mask[other] <= fits  # the host also takes sizes that the device may not open
        state = np.asarray(advance(jnp.asarray(state[None]), jnp.array([ids[i]])))[0]
        assert np.array_equal(state, machine.start(ids[: i + 1]))
    assert np.asarray(machine.ended(jnp.asarray(state[None])))[0]


def test_no_medium_is_opened_that_would_not_fit() -> None:
    grammar = tiny.grammar()
    machine, allowed, _ = jitted(grammar, ((0, 2, 3),))
    start = jnp.asarray(machine.start(np.array([grammar.bos])))[None]
    rng = np.random.default_rng(0)
    medium = (
        len(grammar.encode(Document(key="", segments=(Image(codes=tiny.grid(rng, (2, 3))),))).ids) - grammar.overhead
    )
    may = {room: bool(allowed(start, jnp.array([room]))[0, grammar.boi]) for room in (1, 2, medium, medium + 1)}
    assert may == {1: False, 2: False, medium: False, medium + 1: True}
    last = np.asarray(allowed(start, jnp.array([1])))[0]
    assert np.flatnonzero(last).tolist() == [grammar.eos]


def test_a_medium_that_fits_blank_is_opened_and_painted_as_far_as_there_is_room() -> None:
    grammar = tiny.grammar((4, 8, 3), True)
    machine, allowed, advance = jitted(grammar, ((0, 2, 3),))
    blank = Document(key="", segments=(Image(codes=np.zeros((2, 3, 3), np.int32)),))
    medium = len(grammar.encode(blank).ids) - grammar.overhead
    for spare in range(-1, 3 * 2 * 2 + 4):
        room = medium + 1 + spare
        state = jnp.asarray(machine.start(np.array([grammar.bos])))[None]
        assert bool(allowed(state, jnp.array([room]))[0, grammar.boi]) == (spare >= 0)
        if spare < 0:
            continue
        ids = [grammar.boi]
        while ids[-1] != grammar.eos:  # the highest allowed code: paints wherever it may
            state = advance(state, jnp.array(ids[-1:]))
            mask = np.asarray(allowed(state, jnp.array([room - len(ids)])))[0]
            assert mask.any() and len(ids) < room
            ends = grammar.eos if mask[grammar.eos] else np.flatnonzero(mask)[-1]
            ids.append(int(ends))
        image = grammar.parse(np.array([grammar.bos, *ids])).segments[0]
        assert isinstance(image, Image) and np.count_nonzero(image.codes[..., 0]) == min(6, spare // 2)


def test_without_sizes_no_medium_is_opened() -> None:
    grammar = tiny.grammar()
    machine, allowed, _ = jitted(grammar, ())
    start = jnp.asarray(machine.start(np.array([grammar.bos])))[None]
    mask = np.asarray(allowed(start, jnp.array([1 << 20])))[0]
    assert not mask[grammar.boi] and mask[: grammar.vocabulary.text].all() and mask[grammar.eos]


def test_a_size_that_cannot_be_finished_is_refused_in_a_prompt() -> None:
    grammar = tiny.grammar()
    machine = grammar.automaton(((0, 6, 6),))
    assert machine.start(np.array([grammar.bos, grammar.boi, grammar.digits[6]])).shape == (7,)
    with pytest.raises(GrammarError, match=r"position 2.*6\*6"):
        machine.start(np.array([grammar.bos, grammar.boi, grammar.digits[1]]))


def test_visual_tells_codes_from_layout() -> None:
    grammar = tiny.grammar()
    machine, _, _ = jitted(grammar, ((0, 2, 3),))
    rng = np.random.default_rng(0)
    ids = grammar.encode(Document(key="", segments=(Image(codes=tiny.grid(rng, (2, 3))),))).ids
    states = jnp.asarray(np.stack([machine.start(ids[:i]) for i in range(1, len(ids))]))
    assert np.array_equal(np.asarray(machine.visual(states)), ids[1:] >= grammar.vocabulary.visual_start)


def test_ids_are_one_space_without_gaps() -> None:
    vocabulary = tiny.grammar((4, 8)).vocabulary
    ids = [vocabulary.control(name) for name in vocabulary.controls]
    assert ids == list(range(vocabulary.text, vocabulary.visual_start))
    assert vocabulary.codebook_starts == (vocabulary.visual_start, vocabulary.visual_start + 4)
    assert vocabulary.used == vocabulary.visual_start + 12
    assert vocabulary.padded() % 128 == 0 and 0 <= vocabulary.padded() - vocabulary.used < 128
    assert dataclasses.replace(vocabulary, codebooks=()).codebook_starts[:1] == (vocabulary.visual_start,)
