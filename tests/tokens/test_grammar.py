"""What every grammar promises: documents come back, lengths are known, and what does not fit is told."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmgpt.core.document import KINDS, Action, Document, Features, Image, Segment, Text, Video, equal
from mmgpt.data.index import segment_shape
from mmgpt.tokens import grammars
from mmgpt.tokens.grammars.emu3 import Emu3
from mmgpt.tokens.grammars.grammar import (
    ACTIONS_ONLY,
    ANSWERS,
    EVEN,
    PRETRAINING,
    RELEASED_SFT,
    VISION_ONLY,
    GrammarError,
    Weights,
)
from tests import tiny
from tests.tokens import cases
from tests.tokens.cases import CASES, Case

every = pytest.mark.parametrize("case", CASES, ids=str)


@every
@given(data=st.data())
def test_a_document_comes_back(case: Case, data: st.DataObject) -> None:
    document = data.draw(cases.documents(case))
    grammar = cases.build(case)
    tokens = grammar.encode(document)
    wanted = cases.canonical(case, document)
    assert equal(grammar.parse(tokens.ids), wanted)
    assert equal(grammar.parse(grammar.encode(document, end=False).ids), wanted)
    assert equal(grammar.parse(np.append(tokens.ids, [grammar.pad] * 3)), wanted)


@every
@given(data=st.data())
def test_lengths_are_known_from_the_shapes(case: Case, data: st.DataObject) -> None:
    document = data.draw(cases.documents(case))
    grammar = cases.build(case)
    kind = np.array([KINDS.index(type(s)) for s in document.segments], np.uint8)
    shape = np.array([segment_shape(s) for s in document.segments], np.int32).reshape(-1, 5)
    tokens = grammar.encode(document)
    assert grammar.segment_lengths(kind, shape).sum() + grammar.overhead == len(tokens.ids)
    assert len(tokens.ids) == len(tokens.modality) == len(tokens.weight) == len(tokens.place)
    assert tokens.ids.dtype == tokens.modality.dtype == tokens.place.dtype == np.int32
    assert tokens.weight.dtype == np.float32
    assert 0 <= tokens.ids.min() and tokens.ids.max() < grammar.vocabulary.used
    assert np.array_equal(grammar.places(tokens.ids), tokens.place)


@every
@given(data=st.data())
def test_damaged_ids_are_refused_or_still_a_document(case: Case, data: st.DataObject) -> None:
    grammar = cases.build(case)
    ids = grammar.encode(data.draw(cases.documents(case))).ids.copy()
    at = data.draw(st.integers(0, len(ids) - 1))
    ids[at] = data.draw(st.integers(-3, grammar.vocabulary.used + 3))
    try:
        found = grammar.parse(ids)
    except GrammarError as e:
        assert "position" in str(e)
    else:
        assert np.array_equal(grammar.encode(found, end=grammar.eos in ids).ids, ids)


@pytest.mark.parametrize(
    ("weights", "text", "code", "layout"),
    [(PRETRAINING, 1, 0.5, 0.5), (EVEN, 1, 1, 1), (RELEASED_SFT, 0, 1, 0), (VISION_ONLY, 0, 1, 1), (ANSWERS, 1, 0, 0)],
)
def test_weights_follow_what_an_id_is_and_its_segment(
    weights: Weights, text: float, code: float, layout: float
) -> None:
    grammar = Emu3.Config(weights=weights).build(tiny.text(), (5,))
    image = Image(codes=tiny.grid(np.random.default_rng(0), (1, 1), (5,)), loss=0.5)
    tokens = grammar.encode(Document(key="", segments=(Text(ids=np.arange(2, dtype=np.int32), loss=0.25), image)))
    # BOS; text; BOI 1 * 1 IMG, the code, EOL EOF EOI; EOS
    wanted = [text, *[text * 0.25] * 2, *[layout * 0.5] * 5, code * 0.5, *[layout * 0.5] * 3, text * 0.5]
    assert tokens.weight.tolist() == wanted


def test_answers_alone_are_learned_and_actions_alone() -> None:
    words = np.arange(3, dtype=np.int32)
    segments = (Text(ids=words, role="user"), Text(ids=words, role="assistant"), Action(codes=words))
    grammar = cases.build(Case("univla_video"))
    for weights, wanted in ((ANSWERS, [1, 0, 0, 0, 1, 1, 1]), (ACTIONS_ONLY, [0] * 7)):
        grammar.weights = weights
        made = grammar.encode(Document(key="", segments=segments)).weight.tolist()
        assert made == [*wanted, 1, 1, 1, 1, 1, weights.text]
    grammar.weights = PRETRAINING


@every
def test_places_are_rows_and_columns_of_the_picture(case: Case) -> None:
    grammar = cases.build(case)
    C = len(case.codebooks)
    codes = 1 + np.zeros((2, 3, C), np.int32)  # nothing blank
    head = Text(ids=np.array([1, 2], np.int32))
    tokens = grammar.encode(Document(key="", segments=(head, Image(codes=codes))))
    visual = tokens.ids >= grammar.vocabulary.visual_start
    visual &= ~np.isin(tokens.ids, list(grammar.vocabulary.controls.values()))
    assert tokens.place[visual].reshape(2, 3, C, 2).tolist() == [
        [[[row, column]] * C for column in (1, 2, 3)] for row in (1, 2)
    ]
    eol = {"each": [[1, 4], [2, 4]], "between": [[1, 4]], "never": []}[grammar.layout.eol]
    assert tokens.place[tokens.ids == grammar.eol].tolist() == eol
    around = [grammar.bos, grammar.boi, grammar.img, grammar.eoi, grammar.eos]
    assert not tokens.place[np.isin(tokens.ids, around)].any() and not tokens.place[1:3].any()


@every
def test_a_blank_place_is_one_id_and_the_next_place_follows(case: Case) -> None:
    if not case.blanks:
        return
    grammar = cases.build(case)
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, 2, (2, 3)), rng.integers(0, 8, (2, 3))], axis=-1).astype(np.int32)
    codes[codes[..., 0] == 0] = 0
    tokens = grammar.encode(Document(key="", segments=(Image(codes=codes),)))
    first, second = grammar.vocabulary.codebook_starts
    wanted = [i for a, b in codes.reshape(-1, 2).tolist() for i in ([first + a, second + b] if a else [first])]
    assert [i for i in tokens.ids.tolist() if first <= i < second + 8] == wanted


@every
def test_an_opened_picture_goes_on_to_be_the_picture(case: Case) -> None:
    grammar = cases.build(case)
    rng = np.random.default_rng(0)
    codes = cases.grid(case, rng, 11, 2, 3)
    whole = grammar.encode(Document(key="", segments=(Video(codes=codes),))).ids
    for shown in (0, 4, 11):
        opened = grammar.open_video(codes[:shown], 11)
        assert np.array_equal(opened, whole[1 : 1 + len(opened)])
    image = grammar.encode(Document(key="", segments=(Image(codes=codes[0]),))).ids
    opened = grammar.open_image(2, 3)
    assert np.array_equal(opened, image[1 : 1 + len(opened)])


@every
def test_a_picture_that_cannot_be_opened_is_told(case: Case) -> None:
    grammar = cases.build(case)
    H, W = case.grid
    if case.blanks:
        codes = np.zeros((1, H, W, 2), np.int32)
        codes[..., 1] = 5
        with pytest.raises(GrammarError, match="a blank place"):
            grammar.open_video(codes, 2)
    for frames in (0, 1000):
        with pytest.raises(GrammarError, match=f"a clip of {frames} frames"):
            grammar.open_video(np.zeros((1, H, W, len(case.codebooks)), np.int32), frames)
    with pytest.raises(GrammarError, match="an image of 0x5 places"):
        grammar.open_image(0, 5)


def test_what_cannot_be_laid_out_is_told() -> None:
    grammar = tiny.grammar()
    rng = np.random.default_rng(0)
    codes = tiny.grid(rng, (2, 2))
    bad: list[tuple[Segment, str]] = [
        (Text(ids=np.array([tiny.text().size], np.int32)), "outside the text tokenizer"),
        (Text(ids=np.array([-1], np.int32)), "outside the text tokenizer"),
        (Text(text="raw"), "raw or of another kind"),
        (Action(codes=np.array([1], np.int32)), "raw or of another kind"),
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
    with pytest.raises(GrammarError, match=r"lays out text, image, video; .*another kind of segment"):
        grammar.segment_lengths(np.array([3], np.uint8), np.array([[1, 0, 0, 0, 0]]))
    with pytest.raises(GrammarError, match=r"'k'.*a Features"):
        grammar.encode(Document(key="k", segments=(Features(),)))
    with pytest.raises(GrammarError, match=r"'k'.*action code is outside the 7"):
        cases.build(Case("univla_video")).encode(Document(key="k", segments=(Action(codes=np.array([7])),)))
    with pytest.raises(GrammarError, match=r"'k'.*frames of 2x3 places, found 2x2"):
        cases.build(Case("lwm", (4, 8))).encode(Document(key="k", segments=(Image(codes=codes),)))


def test_marks_stand_where_they_may() -> None:
    grammar = cases.build(Case("emu3_5"))
    none = np.zeros(0, np.int32)
    image = Image(codes=np.zeros((1, 1, 1), np.int32))
    for roles, message in (
        (["/answer"], "role '/answer' may not stand"),
        (["answer", "answer"], "role 'answer' may not stand"),
        (["global_cot", "/image_cot"], "role '/image_cot' may not stand"),
        (["image_cot", "image"], "a Image of role '' may not stand"),
        (["image_cot"], "a block is still open"),
    ):
        segments = tuple(image if role == "image" else Text(ids=none, role=role) for role in roles)
        with pytest.raises(GrammarError, match=f"'k'.*{message}"):
            grammar.encode(Document(key="k", segments=segments))


def test_a_mark_is_plain_text_to_a_grammar_without_it() -> None:
    marked = Document(key="", segments=(Text(ids=np.array([1, 2], np.int32), role="image_cot"),))
    plain = Document(key="", segments=(Text(ids=np.array([1, 2], np.int32)),))
    grammar = tiny.grammar()
    assert np.array_equal(grammar.encode(marked).ids, grammar.encode(plain).ids)
    assert grammar.segment_lengths(np.array([0]), np.array([segment_shape(marked.segments[0])])).tolist() == [2]


def test_sizes_may_have_three_digits() -> None:
    grammar = cases.build(Case("emu3"))
    codes = tiny.grid(np.random.default_rng(0), (128, 1), (5,), False)
    document = Document(key="", segments=(Image(codes=codes),))
    ids = grammar.encode(document).ids
    assert grammar.text_size(ids[2:7].tolist()) == "128*1" and equal(grammar.parse(ids), document)


@pytest.mark.parametrize("size", ["0*3", "3", "1*2*3*4", "03*3", "1000*1", "*", "", "2**3"])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    grammar = cases.build(Case("emu3"))
    symbols = dict(zip("0123456789*", grammar.symbols, strict=True))
    ids = [grammar.bos, grammar.boi, *(symbols[c] for c in size), grammar.img]
    with pytest.raises(GrammarError, match=f"position {len(ids) - 1}"):
        grammar.parse(np.array(ids))


def test_grammars_are_found_by_name() -> None:
    assert grammars.names() == ["emu3", "emu3_5", "lwm", "univla_video"]
    for name in grammars.names():
        assert grammars.config(name).build(tiny.text(), (5,)).name == name
    with pytest.raises(GrammarError, match="no grammar 'emu35'; there is emu3"):
        grammars.config("emu35")


def test_ids_are_one_space_without_gaps() -> None:
    vocabulary = tiny.grammar((4, 8)).vocabulary
    ids = [vocabulary.control(name) for name in vocabulary.controls]
    assert ids == list(range(vocabulary.text, vocabulary.visual_start))
    assert vocabulary.codebook_starts == (vocabulary.visual_start, vocabulary.visual_start + 4)
    assert vocabulary.used == vocabulary.visual_start + 12
    assert vocabulary.padded() % 128 == 0 and 0 <= vocabulary.padded() - vocabulary.used < 128
    assert dataclasses.replace(vocabulary, codebooks=()).codebook_starts[:1] == (vocabulary.visual_start,)
    acting = cases.build(Case("univla_video")).vocabulary
    assert acting.action_ids == range(acting.visual_start + 5, acting.used) and len(acting.action_ids) == 7
