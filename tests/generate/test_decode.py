"""Generation beside the full forward pass: the same ids, whatever else is in the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgpt.core.document import Document, Image
from mmgpt.dist.mesh import Mesh
from mmgpt.generate import decode, passes
from mmgpt.generate.decode import Generator, Prompt, PromptError, Sampling
from mmgpt.generate.sampler import Sampler, filtered, guided
from tests import tiny
from tests.generate.untrained import SIZES, logits_after, one_device, opened

GREEDY = Sampling(room=48, text=Sampler(temperature=0.0), image=Sampler(temperature=0.0))
DRAWN = Sampling(room=48, text=Sampler(temperature=1.5, top_p=0.95), image=Sampler(temperature=1.0, top_k=5), seed=3)


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(opened(one_device()), SIZES, batch=4)


def prompts() -> list[Prompt]:
    """Of several lengths; the last end inside an image, before its first place, and inside a clip."""
    grammar, rng = tiny.grammar(blanks=True), np.random.default_rng(0)
    texts = [rng.integers(0, tiny.text().size, n).astype(np.int32) for n in (0, 3, 17, 30)]
    found = [np.concatenate([[grammar.bos], ids]) for ids in texts]
    image = grammar.encode(Document(key="", segments=(Image(codes=tiny.grid(rng, (2, 3))),)), end=False).ids
    clip = np.append(grammar.bos, grammar.open_video(tiny.grid(rng, (1, 1, 2)), 2))
    return [Prompt(ids=ids.astype(np.int32)) for ids in (*found, image[:9], image[:6], clip)]


def by_full_forward(generator: Generator, prompt: np.ndarray, room: int) -> np.ndarray:
    """Greedy decoding by the full forward pass over everything, once for each token."""
    machine, ids = generator.automaton, list(prompt)
    for made in range(room):
        state = jnp.asarray(machine.start(np.array(ids)))[None]
        mask = np.asarray(machine.allowed(state, jnp.array([room - made])))[0]
        found = logits_after(generator, [np.array(ids, np.int32)], len(prompt) + room)[0, : len(mask)]
        ids.append(int(np.where(mask, found, -np.inf).argmax()))
        if ids[-1] == generator.grammar.eos:
            break
    return np.array(ids, np.int32)


def test_greedy_is_the_argmax_of_the_full_forward(generator: Generator) -> None:
    made = generator.generate(prompts(), GREEDY)
    visual = generator.grammar.vocabulary.visual_start
    for number in (1, 4, 5, 6):
        prompt = prompts()[number].ids
        assert np.array_equal(made[number], by_full_forward(generator, prompt, GREEDY.room))
        assert number < 4 or (made[number][len(prompt) :] >= visual).any()


def test_what_is_made_goes_on_from_the_prompt_and_parses(generator: Generator) -> None:
    made = generator.generate(prompts(), DRAWN)
    assert len(made) == 7
    for prompt, ids in zip(prompts(), made, strict=True):
        assert ids.dtype == np.int32 and np.array_equal(ids[: len(prompt.ids)], prompt.ids)
        assert ids[-1] == generator.grammar.eos and len(ids) <= len(prompt.ids) + DRAWN.room
        generator.grammar.parse(ids)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, DRAWN.replace(guidance=3.0)], ids=["greedy", "drawn", "guided"])
def test_the_rest_of_the_batch_does_not_matter(generator: Generator, sampling: Sampling) -> None:
    """Each prompt's draws are its own by its place in the list, and longer neighbours only add padding."""
    together = generator.generate(prompts(), sampling)
    bare = Prompt(ids=prompts()[0].ids)
    for place in (0, 1, 4):
        others = [bare] * place + [prompts()[place]]
        assert np.array_equal(generator.generate(others, sampling)[place], together[place])


def test_another_seed_draws_otherwise_and_the_same_one_again(generator: Generator) -> None:
    first, again, other = (generator.generate(prompts(), DRAWN.replace(seed=s)) for s in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_guidance_by_the_prompt_itself_changes_nothing(generator: Generator) -> None:
    """u + s (c - u) with u = c is c, at any scale."""
    plain = generator.generate(prompts(), GREEDY)
    itself = [Prompt(ids=p.ids, negative=p.ids) for p in prompts()]
    guided_ids = generator.generate(itself, GREEDY.replace(guidance=4.0))
    assert all(np.array_equal(a, b) for a, b in zip(plain, guided_ids, strict=True))


def test_guidance_acts_inside_media_alone(generator: Generator) -> None:
    plain, pushed = (generator.generate(prompts()[4:], GREEDY.replace(guidance=g)) for g in (1.0, 8.0))
    visual = generator.grammar.vocabulary.visual_start
    differ = np.flatnonzero(plain[0][: len(pushed[0])] != pushed[0][: len(plain[0])])
    assert len(differ) and plain[0][differ[0]] >= visual and pushed[0][differ[0]] >= visual


def test_three_branches_are_two_where_the_third_adds_nothing(generator: Generator) -> None:
    """u + a (i - u) + s (c - i): with i = u it is guidance by u, and another i pushes elsewhere."""
    negative = [Prompt(ids=p.ids, negative=p.ids[:2]) for p in prompts()[1:]]
    two, three = (generator.generate(negative, GREEDY.replace(guidance=3.0, image_guidance=g)) for g in (1.0, 1.7))
    assert all(np.array_equal(a, b) for a, b in zip(two, three, strict=True))
    other = [Prompt(ids=p.ids, negative=p.ids[:2], image_only=p.ids[:1]) for p in prompts()[1:]]
    pushed = generator.generate(other, GREEDY.replace(guidance=3.0, image_guidance=1.7))
    assert not all(np.array_equal(a, b) for a, b in zip(three, pushed, strict=True))


def test_a_prompt_that_leaves_nothing_to_generate_is_told_before_anything_runs() -> None:
    short = Generator(opened(one_device()), SIZES, batch=4, context=18)
    short.opened = dataclasses.replace(short.opened, params=None)
    with pytest.raises(PromptError, match="prompt 2 takes 18 tokens and the model knows documents of 18"):
        short.generate(prompts(), GREEDY)


def test_no_document_outgrows_the_context(generator: Generator) -> None:
    short = Generator(generator.opened, SIZES, batch=4, context=40)
    for prompt, ids in zip(prompts(), short.generate(prompts(), DRAWN), strict=True):
        assert len(prompt.ids) < len(ids) <= 40
        generator.grammar.parse(ids)


@pytest.mark.parametrize("window", [0, 3])
def test_scanned_layers_make_what_unrolled_ones_make(generator: Generator, window: int) -> None:
    """As on a TPU, whose caches of all layers are one array."""
    sampling = GREEDY.replace(jacobi=window, room=20)
    unrolled, scanned = (Generator(generator.opened, SIZES, batch=4, scan=s) for s in (False, True))
    found = [g.generate(prompts()[1:5], sampling) for g in (unrolled, scanned)]
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def test_long_prompts_go_through_the_model_in_parts(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generator.generate(prompts(), GREEDY)
    for module in (decode, passes):
        monkeypatch.setattr(module, "CHUNK", 16)
    again = Generator(generator.opened, SIZES, batch=4)
    found = again.generate(prompts(), GREEDY)
    assert all(np.array_equal(a, b) for a, b in zip(whole, found, strict=True))


@pytest.mark.slow
def test_eight_devices_make_what_one_makes(generator: Generator) -> None:
    spread = Generator(opened(Mesh.Config(fsdp=4, tensor=2).build()), SIZES, batch=4)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(generator.generate(prompts(), GREEDY), spread.generate(prompts(), GREEDY), strict=True)
    )


# --- the sampler


def logits(seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((3, 12)), jnp.float32)


def test_temperature_zero_keeps_the_likeliest() -> None:
    kept = np.asarray(filtered(logits(), Sampler(temperature=0.0)))
    assert np.array_equal(np.isfinite(kept).argmax(axis=1), np.asarray(logits()).argmax(axis=1))
    assert np.isfinite(kept).sum() == 3


def test_top_k_and_top_p_keep_the_likeliest_that_are_asked_for() -> None:
    given = np.asarray(logits(), np.float64)
    order = np.argsort(-given, axis=1)
    kept = np.isfinite(filtered(logits(), Sampler(top_k=4)))
    assert all(set(np.flatnonzero(row)) == set(first[:4]) for row, first in zip(kept, order, strict=True))
    kept = np.isfinite(filtered(logits(), Sampler(top_p=0.7, temperature=0.5)))
    for row, logit, first in zip(kept, given, order, strict=True):
        share = np.exp(logit / 0.5)[first] / np.exp(logit / 0.5).sum()
        least = int(np.searchsorted(np.cumsum(share), 0.7)) + 1  # the fewest that hold 0.7 together
        assert set(np.flatnonzero(row)) == set(first[:least])
    assert np.isfinite(filtered(logits(), Sampler(top_k=99))).all()


def test_what_is_not_allowed_stays_out() -> None:
    masked = jnp.where(jnp.arange(12)[None] % 2 == 0, logits(), -jnp.inf)
    for sampler in (Sampler(), Sampler(temperature=0.0), Sampler(top_k=8), Sampler(top_p=0.99)):
        kept = np.isfinite(filtered(masked, sampler))
        assert not kept[:, 1::2].any() and kept.any(axis=1).all()


def test_guidance_of_one_is_the_conditional() -> None:
    np.testing.assert_allclose(guided(logits(0), logits(1), 1.0), jax.nn.log_softmax(logits(0)), atol=1e-6)
    np.testing.assert_allclose(guided(logits(0), logits(1), 0.0), jax.nn.log_softmax(logits(1)), atol=1e-6)


def test_a_row_ends_after_its_stop_id_and_the_others_go_on(generator):
    whole = generator.generate(prompts(), GREEDY)
    start = len(prompts()[2].ids)
    stop = int(whole[2][start + 1])
    assert stop < tiny.text().size  # the model is fond of text here: an id that it says second
    cut = generator.generate(prompts(), GREEDY.replace(stop=stop))
    for prompt, row, shorter in zip(prompts(), whole, cut, strict=True):
        new = row[len(prompt.ids) :]
        ends = np.flatnonzero(new == stop)
        kept = new[: ends[0] + 1] if len(ends) else new
        np.testing.assert_array_equal(shorter, np.concatenate([prompt.ids, kept]))
