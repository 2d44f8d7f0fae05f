"""Speculative Jacobi decoding makes what decoding one by one makes, in fewer passes and with the same distribution."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mmgpt.core.document import Document, Text
from mmgpt.dist.mesh import Mesh
from mmgpt.generate.decode import Generator, Prompt, Sampling
from mmgpt.generate.sampler import Sampler, filtered, guided
from tests import tiny
from tests.generate import untrained

GREEDY = Sampling(room=48, text=Sampler(temperature=0.0), image=Sampler(temperature=0.0))
DRAWN = Sampling(room=48, text=Sampler(temperature=1.5, top_p=0.95), image=Sampler(temperature=1.0, top_k=5), seed=3)


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(untrained.opened(untrained.one_device()), untrained.SIZES, batch=4)


def prompts() -> list[Prompt]:
    """Texts of several lengths, and an opened picture."""
    grammar, rng = tiny.grammar(blanks=True), np.random.default_rng(0)
    texts = [rng.integers(0, tiny.text().size, n).astype(np.int32) for n in (0, 3, 17)]
    found = [np.concatenate([[grammar.bos], ids]) for ids in texts]
    return [Prompt(ids=ids.astype(np.int32)) for ids in (*found, np.append(found[1], grammar.open_image(2, 3)))]


@pytest.mark.parametrize(("window", "guidance"), [(7, 1.0), (2, 3.0)])
def test_greedy_makes_the_same_ids_in_fewer_passes(generator: Generator, window: int, guidance: float) -> None:
    sampling = GREEDY.replace(guidance=guidance)
    plain = generator.run(prompts(), sampling)
    fast = generator.run(prompts(), sampling.replace(jacobi=window))
    for one, other, prompt in zip(plain, fast, prompts(), strict=True):
        assert np.array_equal(one.ids, other.ids)
        assert one.passes == len(one.ids) - len(prompt.ids)
        assert other.passes <= one.passes
    if window == 7:
        assert sum(made.passes for made in fast) < 0.8 * sum(made.passes for made in plain)


def test_what_is_drawn_parses_and_fits_its_room(generator: Generator) -> None:
    for room in (3, 40):
        for made in generator.run(prompts()[:3], DRAWN.replace(room=room, jacobi=5)):
            generator.grammar.parse(made.ids)
            assert made.ids[-1] == generator.grammar.eos


def test_nothing_stands_behind_the_end(generator: Generator) -> None:
    """Drafts behind an end that the very last pass settles are no ids of the row."""
    alone, prompt = Generator(generator.opened, untrained.SIZES, batch=1), prompts()[1]
    sampling = DRAWN.replace(room=150, jacobi=7, stop=266)
    seeds = (14, 16, 42, 56)  # one in fifteen ends so
    made = [alone.run([prompt], sampling.replace(seed=seed))[0].ids[len(prompt.ids) :] for seed in seeds]
    assert all(len(ids) < 150 for ids in made)
    for ids in made:
        assert np.flatnonzero(np.isin(ids, [266, alone.grammar.eos])).tolist() == [len(ids) - 1]


def test_the_rest_of_the_batch_does_not_matter(generator: Generator) -> None:
    sampling = DRAWN.replace(jacobi=4, guidance=2.0)
    together = generator.generate(prompts(), sampling)
    for place in (1, 3):
        others = [prompts()[0]] * place + [prompts()[place]]
        assert np.array_equal(generator.generate(others, sampling)[place], together[place])


def test_a_row_ends_after_its_stop_id(generator: Generator) -> None:
    whole = generator.generate(prompts(), GREEDY)
    stop = int(whole[1][len(prompts()[1].ids) + 1])
    sampling = GREEDY.replace(stop=stop)
    found = [generator.generate(prompts(), s) for s in (sampling, sampling.replace(jacobi=6))]
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
    for prompt, row, cut in zip(prompts(), whole, found[0], strict=True):
        ends = np.flatnonzero(row[len(prompt.ids) :] == stop)
        assert len(cut) == (len(prompt.ids) + ends[0] + 1 if len(ends) else len(row))


@pytest.mark.slow
def test_eight_devices_make_what_one_makes(generator: Generator) -> None:
    spread = Generator(untrained.opened(Mesh.Config(fsdp=4, tensor=2).build()), untrained.SIZES, batch=4)
    sampling = GREEDY.replace(jacobi=5)
    found = [g.generate(prompts(), sampling) for g in (generator, spread)]
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


# --- the distribution


def exact(generator: Generator, prompt: Prompt, sampling: Sampling, books: int) -> dict[tuple[int, ...], float]:
    """Probability of each code sequence of a 2 x 2 picture, one id after the other by full forward passes."""
    starts = [generator.grammar.vocabulary.visual_start + c for c in range(books)]
    eol = generator.grammar.vocabulary.control("EOL")
    chances: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(4):
        rows = [self_and_negative(prompt, codes, eol) for codes in chances]
        flat = [row for pair in zip(*rows, strict=True) for row in pair]
        logits = jnp.asarray(untrained.logits_after(generator, flat, 24))
        first, second = jnp.split(logits[:, : starts[-1] + 1], 2)
        may = jnp.isin(jnp.arange(starts[-1] + 1), jnp.array(starts))[None]
        mixed = jnp.where(may, guided(first, second, sampling.guidance), -jnp.inf)
        p = np.asarray(jax.nn.softmax(filtered(mixed, sampling.image), axis=-1))[:, starts]
        chances = {
            (*codes, int(c)): chance * float(p[i, c])
            for i, (codes, chance) in enumerate(chances.items())
            for c in range(books)
        }
    return chances


def self_and_negative(prompt: Prompt, codes: tuple[int, ...], eol: int) -> tuple[np.ndarray, np.ndarray]:
    visual = tiny.grammar((3,)).vocabulary.visual_start
    ids = [visual + c for c in codes]
    ids = [*ids[:2], *([eol] if len(ids) > 1 else []), *ids[2:]]
    assert prompt.negative is not None
    return np.append(prompt.ids, ids).astype(np.int32), np.append(prompt.negative, ids).astype(np.int32)


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(Sampling(image=Sampler(temperature=0.7)), marks=pytest.mark.slow),
        Sampling(image=Sampler(temperature=1.0, top_k=2), guidance=2.5),
        pytest.param(Sampling(image=Sampler(temperature=1.3, top_p=0.8), guidance=1.5), marks=pytest.mark.slow),
    ],
    ids=["temperature", "top-k, guided", "top-p, guided"],
)
def test_pictures_are_drawn_as_often_as_the_model_says(sampling: Sampling) -> None:
    """4,096 drawings of 81 possible ones: chi-square against the exact probabilities, and no other is drawn."""
    generator = Generator(untrained.opened(untrained.one_device(), (3,), blanks=False), ((0, 2, 2),), batch=512)
    grammar = generator.grammar
    caption = Document(key="", segments=(Text(ids=np.array(tiny.text().encode("red"), np.int32)),))
    head = grammar.encode(caption, end=False).ids
    opening = grammar.open_image(2, 2)
    prompt = Prompt(ids=np.append(head, opening), negative=np.append(head[:1], opening))
    rooms = sampling.replace(room=6, jacobi=4, seed=1)
    made = generator.run([prompt] * 4096, rooms)
    assert np.mean([m.passes for m in made]) < 5  # of 6 ids
    visual = grammar.vocabulary.visual_start
    drawn = [tuple(int(i) - visual for i in m.ids[len(prompt.ids) :] if i >= visual) for m in made]
    chances = exact(generator, prompt, sampling, 3)
    assert np.isclose(sum(chances.values()), 1.0, atol=1e-4)
    counts = dict.fromkeys(itertools.product(range(3), repeat=4), 0)
    for codes in drawn:
        counts[codes] += 1
    assert all(chances[codes] > 0 for codes, count in counts.items() if count)
    expected = np.array([chances[c] for c in counts]) * len(drawn)
    found = np.array(list(counts.values()))
    few = expected < 5  # together, as the test's approximation asks
    seen = np.append(found[~few], found[few].sum())
    hoped = np.append(expected[~few], expected[few].sum())
    keep = hoped > 0
    hoped = hoped[keep] * (seen.sum() / hoped[keep].sum())
    assert scipy.stats.chisquare(seen[keep], hoped).pvalue > 0.01
