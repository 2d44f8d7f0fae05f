"""Whatever the logits, what the automaton guides to ends in its room and parses; it forbids no more than it must."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgpt.core.document import Document, Image, Segment, Text, Video
from mmgpt.tokens import grammars
from mmgpt.tokens.grammars.grammar import GrammarError
from mmgpt.tokens.grammars.raster_automaton import FRAMES, PHASE, H, W
from mmgpt.tokens.grammars.reading import ENDED, IN_CODES
from mmgpt.tokens.text.byte_pairs import BytePairs
from tests import tiny
from tests.tokens import cases
from tests.tokens.cases import CASES, Case


@functools.cache
def jitted(case: Case, sizes: tuple[tuple[int, int, int], ...]):
    machine = cases.build(case).automaton(sizes)
    return machine, jax.jit(machine.allowed), jax.jit(machine.advance)


# --- random logits


def prompts(case: Case) -> list[tuple[np.ndarray, int]]:
    """Prompts of all sorts, and the room that the shortest end of each takes at most."""
    g, rng = cases.build(case), np.random.default_rng(0)
    word = Text(ids=np.array(g.text.encode("a"), np.int32))
    height, width = case.grid
    codes = cases.grid(case, rng, 3, height, width)
    found = [(np.array([g.bos], np.int32), 1)]

    def add(document: tuple[Segment, ...], opened: np.ndarray, finished: tuple[Segment, ...], cut: int = 0) -> None:
        whole = g.encode(Document(key="", segments=(*document, *finished))).ids
        ids = np.concatenate([g.encode(Document(key="", segments=document), end=False).ids, opened])
        found.append(
            (ids, len(whole) - len(ids)) if not cut else (whole[: len(ids) + cut], len(whole) - len(ids) - cut)
        )

    nothing = np.zeros(0, np.int32)
    add((word,), nothing, ())
    add((Image(codes=codes[0]), word), nothing, ())
    add((word,), g.open_image(height, width), (Image(codes=codes[1]),))
    add((word,), g.open_image(height, width), (Image(codes=codes[1]),), cut=4)
    add((), g.open_video(codes[:1], 3), (Video(codes=codes),))
    add((word,), g.open_video(codes[:0], 3), (Video(codes=codes),), cut=len(codes[0]) * width + 2)
    for role in (role for role in g.marks.roles if not role.startswith("/")):
        add(
            (Text(ids=nothing, role=role),),
            nothing,
            tuple(Text(ids=nothing, role=r) for r in ["/" + role] if r in g.marks.roles),
        )
    if g.boa >= 0:
        found.append((np.array([g.bos, g.boa, g.vocabulary.action_ids[3]], np.int32), 2))
    return found


def played(case: Case, rows: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, np.ndarray]:
    """Prompts, what random logits made of them in each one's room, whether any id was ever allowed, last states."""
    g = cases.build(case)
    machine, allowed, advance = jitted(case, case.sizes)
    rng, known = np.random.default_rng(seed), prompts(case)
    chosen = [known[i] for i in rng.permutation(np.arange(rows) % len(known))]
    room = np.array([least + rng.choice([0, 1, 2, rng.integers(3, 25), rng.integers(25, 90)]) for _, least in chosen])
    start = jnp.asarray(np.stack([machine.start(ids) for ids, _ in chosen]))
    favour = np.zeros(g.vocabulary.used, np.float32)
    favour[list(g.vocabulary.controls.values())] = 4.0  # or no medium would ever be opened by chance
    favour[g.eos] = -2.0

    @jax.jit
    def play(state: jax.Array, room_B: jax.Array, key: jax.Array):
        def step(carry, inputs):
            made, key = inputs
            mask = allowed(carry, room_B - made)
            logits = favour[None, :] + jax.random.gumbel(key, mask.shape)
            token = jnp.argmax(jnp.where(mask, logits, -jnp.inf), axis=-1)
            return advance(carry, token), (token, mask.any(axis=-1))

        steps = int(room.max())
        return jax.lax.scan(step, state, (jnp.arange(steps), jax.random.split(key, steps)))

    last, (tokens, possible) = play(start, jnp.asarray(room), jax.random.key(seed))
    made = [row[:r] for row, r in zip(np.asarray(tokens).T, room, strict=True)]
    return [ids for ids, _ in chosen], made, np.asarray(possible), np.asarray(last)


SOME = {(case.grammar, case.blanks): case for case in CASES if case.blanks or case.published or case.grammar == "lwm"}


@pytest.mark.parametrize(
    ("case", "rows"),
    [*((case, 60) for case in SOME.values()), *(pytest.param(case, 1000, marks=pytest.mark.slow) for case in CASES)],
    ids=str,
)
def test_random_logits_end_in_the_room_and_parse(case: Case, rows: int) -> None:
    """A thousand rows of each of the ten cases: ten thousand generations, none wrong."""
    g = cases.build(case)
    machine = g.automaton(case.sizes)
    heads, made, possible, last = played(case, rows, seed=0)
    assert possible.all()
    opened = set()
    for ids, new, state in zip(heads, made, last, strict=True):
        whole = np.concatenate([ids, new])
        assert g.eos in new  # within the room
        document = g.parse(whole)
        assert np.array_equal(g.encode(document).ids, whole[: whole.tolist().index(g.eos) + 1])
        assert np.array_equal(machine.start(whole), state)
        for s in document.segments:
            if isinstance(s, Image | Video):
                opened.add((0 if isinstance(s, Image) else s.codes.shape[0], *s.codes.shape[-3:-1]))
    sizes = {(0 if T == 1 or not g.layout.clips else T, h, w) for T, h, w in case.sizes}
    assert opened <= sizes | {(3, *case.grid)} and (rows < 1000 or opened >= sizes)


# --- against every way to go on


def graph(case: Case, sizes: tuple[tuple[int, int, int], ...]):
    """All states that a document goes through by the host's rules, by the ids that lead on, and ids to the end of each.

    Of the ids that a grammar cannot tell apart, such as most of the text's, one stands for all.
    """
    g = cases.build(case)
    machine = g.automaton(sizes)
    frames_allowed = {max(T, 1) for T, _, _ in sizes}
    kinds = {(max(T, 1) if g.layout.clips else 1, h, w) for T, h, w in sizes}
    plain = [int(i) for i in np.flatnonzero(g.is_text(np.arange(g.vocabulary.text)))]
    special = {*g.symbols, *g.vocabulary.action_ids}
    plain = [i for i in plain if i not in special]
    tried = [plain[0], *(special - {-1}), *g.vocabulary.controls.values(), *range(*_visual(g))]
    nodes: dict[tuple[int, ...], list[int]] = {tuple(machine.start(np.zeros(0, np.int32)).tolist()): []}
    edges: dict[tuple[int, ...], dict[int, tuple[int, ...]]] = {}
    pending = list(nodes)
    while pending:
        state = pending.pop()
        edges[state] = {}
        for token in tried:
            try:
                after = machine.start(np.array([*nodes[state], token]))
            except GrammarError:
                continue
            inside = after[PHASE] == IN_CODES
            if inside and not g.grid and (after[FRAMES], after[H], after[W]) not in kinds:
                continue  # the host reads sizes that may not be opened
            if inside and g.grid and after[FRAMES] > 0 and after[FRAMES] not in frames_allowed:
                continue
            frame = g.layout.frame(after[H], after[W], machine.C)
            if inside and g.grid and after[FRAMES] < 0 and after[1] >= frame * max(frames_allowed):
                continue
            following = tuple(after.tolist())
            edges[state][token] = following
            if following not in nodes:
                nodes[following] = [*nodes[state], token]
                pending.append(following)
    distance = {state: 0 for state in nodes if state[PHASE] == ENDED}
    while True:
        found = {s: 1 + min(distance[n] for n in out.values() if n in distance) for s, out in edges.items()
                 if s not in distance and any(n in distance for n in out.values())}  # fmt: skip
        better = {s: d for s, d in found.items() if d == min(found.values())}
        if not better:
            return nodes, edges, distance, tried, plain
        distance |= better


def _visual(g) -> tuple[int, int]:
    return g.vocabulary.visual_start, g.vocabulary.visual_start + sum(g.vocabulary.codebooks)


BRUTE = tuple(
    Case(c.grammar, (2,) if len(c.codebooks) == 1 else (2, 2), c.blanks, c.published, (1, 2))
    for c in CASES
    if c.blanks or c.published or c.grammar == "lwm"
)


@pytest.mark.parametrize("case", BRUTE, ids=str)
def test_exactly_what_some_way_to_the_end_goes_on_with_is_allowed(case: Case) -> None:
    sizes = ((0, 1, 2), (3, 1, 2)) if case.grammar == "lwm" else ((0, 1, 2), (2, 1, 1), (0, 2, 12))
    g = cases.build(case)
    machine, allowed, advance = jitted(case, sizes)
    nodes, edges, distance, tried, plain = graph(case, sizes)
    order = list(nodes)
    assert set(distance) == set(order)  # from everywhere there is a way to the end
    states = jnp.asarray(np.array(order, np.int32))
    least = np.array([distance[s] for s in order])
    for spare in (0, 1, 2, 3, 5, 8, 20, 1000):
        room = least + spare
        mask = np.asarray(allowed(states, jnp.asarray(room)))
        for row, (state, r) in enumerate(zip(order, room, strict=True)):
            wanted = sorted(t for t, n in edges[state].items() if 1 + distance[n] <= r)
            assert [t for t in sorted(tried) if mask[row, t]] == wanted or (state[PHASE] == ENDED and r == 0), (
                nodes[state],
                r,
            )
        others = np.setdiff1d(np.arange(g.vocabulary.used), [*tried, *plain])
        assert not mask[:, others].any() and (mask[:, plain] == mask[:, plain[:1]]).all()
    assert np.asarray(allowed(states, jnp.zeros(len(order), jnp.int32))).any(axis=1).all()  # there is always an id
    which = [(row, t, n) for row, s in enumerate(order) for t, n in edges[s].items()]
    rows, tokens, after = zip(*which, strict=True)
    assert np.array_equal(np.asarray(advance(states[np.array(rows)], jnp.asarray(tokens))), np.array(after))
    told = jax.jit(lambda states: (machine.place(states), machine.visual(states), machine.ended(states)))
    place, visual, ended = (np.asarray(a) for a in told(states))
    for row, state in enumerate(order):
        token, _ = next(iter(edges[state].items()), (g.pad, None))
        ids = np.array([*nodes[state], token])
        assert place[row].tolist() == g.places(ids)[-1].tolist()
        low, high = _visual(g)
        assert visual[row] == (low <= token < high) and ended[row] == (state[PHASE] == ENDED)


# --- what else is promised


def test_no_medium_is_opened_that_would_not_fit() -> None:
    case = Case("emu3", (4, 8))
    grammar = cases.build(case)
    machine, allowed, _ = jitted(case, ((0, 2, 3),))
    start = jnp.asarray(machine.start(np.array([grammar.bos])))[None]
    rng = np.random.default_rng(0)
    image = Document(key="", segments=(Image(codes=tiny.grid(rng, (2, 3))),))
    medium = len(grammar.encode(image).ids) - grammar.overhead
    may = {room: bool(allowed(start, jnp.array([room]))[0, grammar.boi]) for room in (1, 2, medium, medium + 1)}
    assert may == {1: False, 2: False, medium: False, medium + 1: True}
    last = np.asarray(allowed(start, jnp.array([1])))[0]
    assert np.flatnonzero(last).tolist() == [grammar.eos]


@pytest.mark.parametrize("case", [Case("emu3", (4, 8), blanks=True), Case("lwm", (4, 8), blanks=True)], ids=str)
def test_a_medium_that_fits_blank_is_opened_and_painted_as_far_as_there_is_room(case: Case) -> None:
    grammar = cases.build(case)
    machine, allowed, advance = jitted(case, ((0, 2, 3),))
    blank = Document(key="", segments=(Image(codes=np.zeros((2, 3, 2), np.int32)),))
    medium = len(grammar.encode(blank).ids) - grammar.overhead
    for spare in range(-1, 3 * 2 + 4):
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
            ids.append(int(grammar.eos if mask[grammar.eos] else np.flatnonzero(mask)[-1]))
        image = grammar.parse(np.array([grammar.bos, *ids])).segments[0]
        assert isinstance(image, Image) and np.count_nonzero(image.codes[..., 0]) == min(6, spare)


@pytest.mark.parametrize("case", [Case("emu3"), Case("lwm")], ids=str)
def test_without_sizes_no_medium_is_opened(case: Case) -> None:
    grammar = cases.build(case)
    machine, allowed, _ = jitted(case, ())
    start = jnp.asarray(machine.start(np.array([grammar.bos])))[None]
    mask = np.asarray(allowed(start, jnp.array([1 << 20])))[0]
    assert not mask[grammar.boi] and mask[: grammar.vocabulary.text].all() and mask[grammar.eos]


def test_a_size_that_cannot_be_finished_is_refused_in_a_prompt() -> None:
    grammar = tiny.grammar()
    machine = grammar.automaton(((0, 6, 6),))
    assert machine.start(np.array([grammar.bos, grammar.boi, grammar.digits[6]])).shape == (7,)
    with pytest.raises(GrammarError, match=r"position 2.*6\*6"):
        machine.start(np.array([grammar.bos, grammar.boi, grammar.digits[1]]))
    with pytest.raises(GrammarError, match="cannot write the size 0x1000x1"):
        grammar.automaton(((0, 1000, 1),))
    with pytest.raises(GrammarError, match="frames of 2x3 places, found 2x2"):
        cases.build(Case("lwm")).automaton(((0, 2, 2),))


def test_no_table_grows_with_the_vocabulary() -> None:
    """Emu3.5's 282,926 ids: `allowed` runs at every step of the decoder."""
    text = BytePairs({bytes([i]): i for i in range(256)} | {bytes(divmod(i, 256)): 256 + i for i in range(60_000)})
    for name in grammars.names():
        config = grammars.config(name)
        books = (min(131_072, config.build(text, (1,)).codes),)
        machine = config.build(text, books).automaton(((0, 16, 16),))
        state, room = jnp.zeros((2, 7), jnp.int32), jnp.array([9, 9])
        constants: Callable = jax.make_jaxpr(machine.allowed)
        assert sum(np.size(c) for c in constants(state, room).consts) < 2000
