"""Generation with a run of random parameters: what comes out parses, fits its room, and follows from the model."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgpt.core.config import ConfigError
from mmgpt.core.document import Document, Image, Text, Video
from mmgpt.generate.decode import PromptError, Sampling
from mmgpt.generate.model import Model, Order, media_sizes, token_run
from mmgpt.generate.outputs import save
from mmgpt.generate.sampler import Sampler
from mmgpt.tokens.grammars.grammar import Automaton
from mmgpt.train.run import Opened, build
from tests import tiny

FREE = Sampler(temperature=1.0)


class Pixels:
    """An image tokenizer that shows codes as grey patches."""

    patch, temporal = 4, 1
    codebooks = tiny.BOOKS

    def decode(self, codes: np.ndarray) -> np.ndarray:
        grey = (codes @ np.array([tiny.BOOKS[1], 1])).astype(np.uint8)
        return np.repeat(np.repeat(grey, 4, axis=1), 4, axis=2)[..., None].repeat(3, axis=-1)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    built = build(tiny.run(tmp_path_factory.mktemp("run")))
    with jax.set_mesh(built.mesh):
        params, variables = jax.jit(built.structure.fresh)()
    return Opened(built, 0, params, variables)


@pytest.fixture(scope="module")
def model(opened: Opened) -> Model:
    _, data = token_run(opened.built.run)
    return Model(opened, tiny.text(), Pixels(), media_sizes(data), batch=8)  # pyright: ignore[reportArgumentType]


def captions(count: int) -> list[Document]:
    """Prompts of different lengths: the texts of documents, some with their picture."""
    found = tiny.documents(count, seed=9)
    return [dataclasses.replace(d, segments=d.segments[: 1 + i % 2]) for i, d in enumerate(found)]


def test_sizes_are_those_of_the_training_data(opened: Opened):
    _, data = token_run(opened.built.run)
    assert media_sizes(data) == ((0, 2, 3), (2, 1, 2))


@pytest.mark.parametrize("room", [1, 13, 40])
def test_everything_ends_within_its_room(model: Model, room: int):
    for continuation in model.go_on(captions(8), Sampling(room=room, text=FREE)):
        assert continuation.finished
        media = [part for part in continuation.made if part.frames is not None]
        assert all(part.frames.shape[1:3] in ((8, 12), (4, 8)) for part in media if part.frames is not None)
        if room < 17:
            assert not media  # a picture takes 4 + 2 + 2 * 7 + 1 tokens


def test_a_short_room_still_opens_the_media_that_fit(model: Model):
    """With room for the shorter of two media only, that one may be opened and the longer one may not."""
    automaton = model.grammar.automaton(model.sizes)
    boi = model.grammar.vocabulary.control("BOI")
    state = jnp.asarray(automaton.start(model.grammar.encode(Document(key="", segments=()), end=False).ids))[None]
    media = [Image(codes=np.zeros((2, 3, 2), np.int32)), Video(codes=np.zeros((2, 1, 2, 2), np.int32))]  # all blank
    short, long = sorted(len(model.grammar.encode(Document(key="", segments=(m,))).ids) - 1 for m in media)
    assert short < long
    for room, may in ((short - 1, False), (short, True)):
        assert bool(automaton.allowed(state, jnp.array([room], jnp.int32))[0, boi]) is may
    sizes = {tuple(tiny.grammar()._size(*(s[1:] if s[0] == 0 else s))) for s in model.sizes}
    for room, expected in ((short, 1), (long, 2)):
        assert len([size for size in sizes if _may_write(automaton, state, (boi, *size), room)]) == expected


def _may_write(automaton: Automaton, state: jax.Array, ids: tuple[int, ...], room: int) -> bool:
    """Whether an automaton allows these ids and then IMG, one after the other, in a room that shrinks."""
    for used, token in enumerate(ids):
        if not automaton.allowed(state, jnp.array([room - used], jnp.int32))[0, token]:
            return False
        state = automaton.advance(state, jnp.array([token], jnp.int32))
    img = tiny.grammar().img
    return bool(automaton.allowed(state, jnp.array([room - len(ids)], jnp.int32))[0, img])


def test_a_clip_goes_on_and_keeps_the_given_frames(model: Model):
    rng = np.random.default_rng(0)
    clips = [Document(key=str(i), segments=(Video(codes=tiny.grid(rng, (1, 2, 2))),)) for i in range(3)]
    for document, continuation in zip(clips, model.go_on(clips, Sampling(room=30), add_frames=1), strict=True):
        (clip, *_) = continuation.made
        assert clip.frames is not None and clip.clip and clip.given == 1 and len(clip.frames) == 2
        (shown,) = model.shown([document.segments])
        assert shown[0].frames is not None and np.array_equal(clip.frames[0], shown[0].frames[0])


def test_a_room_that_ends_inside_a_clip_is_unfinished_and_no_crash(model: Model):
    rng = np.random.default_rng(0)
    clip = Document(key="", segments=(Video(codes=tiny.grid(rng, (1, 2, 2))),))
    (continuation,) = model.go_on([clip], Sampling(room=3), add_frames=1)
    assert not continuation.finished and continuation.made == ()


def test_adding_frames_to_a_text_is_an_error(model: Model):
    with pytest.raises(ConfigError, match="does not end in a tokenised clip"):
        model.go_on([Document(key="a", segments=(Text(ids=np.array([1], np.int32)),))], Sampling(room=8), add_frames=1)


def test_shown_pictures_go_back_to_their_documents(model: Model):
    """Media of different sizes are decoded in groups; each still comes back in its place."""
    found = tiny.documents(9, seed=4)
    for document, parts in zip(found, model.shown([d.segments for d in found]), strict=True):
        for segment, part in zip(document.segments, parts, strict=True):
            if isinstance(segment, Text):
                assert segment.ids is not None and part.text == tiny.text().decode(segment.ids)
            else:
                codes = segment.codes if isinstance(segment, Video) else segment.codes[None]  # pyright: ignore
                assert part.frames is not None and np.array_equal(part.frames, Pixels().decode(codes))


def test_a_forced_size_is_drawn_at_once_and_fills_its_room(model: Model):
    for order, shape in ((Order(size=(2, 3)), (1, 8, 12, 3)), (Order(size=(1, 2), frames=2), (2, 4, 8, 3))):
        for continuation in model.generate("red", count=3, order=order, temperature=1.5):
            assert continuation.finished
            first = continuation.made[0]
            assert first.frames is not None and first.frames.shape == shape and first.clip == bool(order.frames)


def test_what_is_made_may_go_into_the_next_prompt(model: Model, tmp_path: Path):
    (first,) = model.generate("red", order=Order(size=(2, 3)))
    assert len(first.media) == 1 and isinstance(first.segments[0], Image)
    document = Document(key="", segments=(*first.segments, model.outline.words("what colour is it?")))
    (second,) = model.go_on([document], Sampling(room=9))
    assert second.prompt[0].frames is not None and np.array_equal(second.prompt[0].frames, first.media[0])
    files = save(tmp_path, [first, second])
    assert all(file.is_file() for file in files) and (tmp_path / "index.html").read_text().count("<section>") == 2


def test_guided_prompts_have_the_branches_that_guidance_compares(model: Model):
    """Two branches: the grammar's own. Three: neither text nor pictures, and the pictures alone."""
    picture = tiny.documents(1, seed=5)[0].segments[1]
    document = Document(key="", segments=(picture, model.outline.words("red")))
    head, prompt = model._prompt(document, Order(size=(2, 3), negative="blue"), Sampling(guidance=2.0))
    opening = model.grammar.open_image(2, 3)
    assert np.array_equal(prompt.ids, np.append(head, opening)) and prompt.image_only is None
    assert prompt.negative is not None and np.array_equal(
        prompt.negative, np.append(model.grammar.negative(document, text="blue"), opening)
    )
    _, prompt = model._prompt(document, Order(size=(2, 3)), Sampling(guidance=2.0, image_guidance=1.5))
    pictures = model.grammar.encode(Document(key="", segments=(picture,)), end=False).ids
    assert prompt.image_only is not None and np.array_equal(prompt.image_only, np.append(pictures, opening))
    assert prompt.negative is not None and np.array_equal(prompt.negative, np.append(head[:1], opening))


def test_arrays_that_are_no_pictures_are_told(model: Model):
    with pytest.raises(PromptError, match=r"found float64 \[2, 2, 3\]"):
        model.generate(np.zeros((2, 2, 3)))


def test_the_same_seed_makes_the_same_and_another_seed_something_else(model: Model):
    documents = captions(8)
    made = [[c.made for c in model.go_on(documents, Sampling(room=20, text=FREE, seed=seed))] for seed in (1, 1, 2)]
    texts = [[[part.text for part in parts] for parts in one] for one in made]
    assert texts[0] == texts[1] != texts[2]
