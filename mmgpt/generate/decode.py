"""Generation with a static key-value cache: prompts of any lengths in one batch, grammar-guided, with guidance."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.core import config
from mmgpt.core.stream import Visibility
from mmgpt.dist import axes as rules
from mmgpt.generate.sampler import Sampler, filtered, guided
from mmgpt.models.decoder import Decoder
from mmgpt.tokens.grammars.grammar import Automaton
from mmgpt.train.run import Opened


class Sampling(config.Config):
    """How to sample: `room` new tokens at most, guidance inside media only (1 turns it off).

    A row also ends after the text id `stop` (-1: only at EOS).
    """

    room: int = 256
    guidance: float = 1.0
    text: Sampler = Sampler(temperature=0.0)
    image: Sampler = Sampler(temperature=1.0)
    seed: int = 0
    stop: int = -1


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Ids to go on from, and the ids of the branch that guidance pushes away from (None: the bare opening)."""

    ids: np.ndarray
    negative: np.ndarray | None = None


class Generator:
    """Generates with an opened run, `batch` prompts at a time or a few more, so that they divide over the devices.

    Compiled once for each width of prompts and way of sampling.

    `sizes` are the media sizes (T, H, W) it may open, T = 0 for an image.
    """

    def __init__(self, opened: Opened, sizes: Sequence[tuple[int, int, int]], batch: int = 32):
        grammar = opened.built.grammar
        if grammar is None:
            raise config.ConfigError("this run does not model tokens: generation needs a run with a grammar.")
        if batch < 1:
            raise config.ConfigError(f"the batch is {batch} prompts; it must be at least 1.")
        ways = rules.ways("batch", opened.built.mesh)
        self.opened, self.grammar, self.batch = opened, grammar, -(-batch // ways) * ways
        self.automaton: Automaton = grammar.automaton(tuple(sizes))

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[np.ndarray]:
        """Prompt and continuation of each prompt, up to and with EOS, without padding."""
        longest = max(max(len(p.ids), len(self._negative(p))) for p in prompts)
        width = -(-longest // 32) * 32  # few widths: few compilations
        results: list[np.ndarray] = []
        for first in range(0, len(prompts), self.batch):
            part = list(prompts[first : first + self.batch])
            rows = np.arange(first, first + self.batch)
            out = self._run(part + [part[-1]] * (self.batch - len(part)), rows, width, sampling)
            results += [self._trim(p.ids, row) for p, row in zip(part, out, strict=False)]
        return results

    def _negative(self, prompt: Prompt) -> np.ndarray:
        """The negative branch; by default the bare opening of a document."""
        return prompt.ids[:1] if prompt.negative is None else prompt.negative

    def _trim(self, prompt: np.ndarray, new: np.ndarray) -> np.ndarray:
        ends = np.flatnonzero(new == self.grammar.pad)
        return np.concatenate([prompt, new[: ends[0]] if len(ends) else new]).astype(np.int32)

    def _run(self, prompts: list[Prompt], rows: np.ndarray, width: int, sampling: Sampling) -> np.ndarray:
        branches = [p.ids for p in prompts]
        if sampling.guidance != 1.0:
            branches += [self._negative(p) for p in prompts]
        ids = np.full((len(branches), width), self.grammar.pad, np.int32)
        position = np.zeros((len(branches), width, 5), np.int32)
        for row, place, prompt in zip(ids, position, branches, strict=True):
            row[width - len(prompt) :] = prompt  # prompts end at the same slot, so that all rows step together
            place[width - len(prompt) :, 0] = np.arange(len(prompt))
            place[width - len(prompt) :, 1:3] = self.grammar.places(prompt)
            place[width - len(prompt) : -1, 3:] = place[width - len(prompt) + 1 :, 1:3]
        padding = np.array([width - len(b) for b in branches], np.int32)
        state = np.stack([self.automaton.start(p.ids) for p in prompts])
        built = self.opened.built
        with jax.set_mesh(built.mesh):
            compiled = _compiled(built.structure, self.automaton, sampling.replace(seed=0))
            arrays = [jnp.asarray(a) for a in (ids, position, padding, state, rows.astype(np.int32))]
            key = jax.random.key(sampling.seed)
            return np.asarray(compiled(self.opened.params, self.opened.variables, *arrays, key))


@functools.lru_cache(maxsize=64)
def _compiled(structure: Any, automaton: Automaton, sampling: Sampling) -> Any:
    """The jitted prefill and decoding loop of one model, grammar and way of sampling."""

    def run(
        params: Any,
        variables: Any,
        ids_RP: jax.Array,
        position_RPA: jax.Array,
        padding_R: jax.Array,
        state_BK: jax.Array,
        row_B: jax.Array,
        key: jax.Array,
    ) -> jax.Array:
        model: Decoder = structure.merge(params, variables)
        blocks = model.stack.unstacked()
        width, B = ids_RP.shape[1], state_BK.shape[0]
        slots = width + sampling.room
        caches = model.caches(ids_RP.shape[0], slots)
        branches = padding_R.shape[0] // B
        position_RPA = position_RPA.at[:, -1, 3:].set(jnp.tile(automaton.place(state_BK), (branches, 1)))
        visibility = _visibility(padding_R, 0, width, slots)
        hidden, caches = model.extend(blocks, ids_RP, position_RPA, visibility, caches, jnp.int32(0))
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(row_B)
        out = jnp.full((B, sampling.room), -1, jnp.int32)

        def step(carry: tuple) -> tuple:
            made, logits, state, caches, out, stopped = carry
            chosen = _choose(automaton, sampling, logits, state, made, keys)
            chosen = jnp.where(stopped, automaton.pad, chosen)
            stopped = stopped | (chosen == sampling.stop)
            out = jax.lax.dynamic_update_slice_in_dim(out, chosen[:, None], made, axis=1)
            fed, place = jnp.tile(chosen, branches), automaton.place(state)
            state = automaton.advance(state, chosen)
            places = jnp.tile(jnp.concatenate([place, automaton.place(state)], axis=1), (branches, 1))
            slot = width + made
            position = jnp.concatenate([(slot - padding_R)[:, None], places], axis=1)[:, None, :]
            visibility = _visibility(padding_R, slot, 1, slots)
            hidden, caches = model.extend(blocks, fed[:, None], position, visibility, caches, slot)
            return made + 1, _whole(model.logits(hidden)[:, 0]), state, caches, out, stopped

        def going(carry: tuple) -> jax.Array:
            made, _, state, _, _, stopped = carry
            return (made < sampling.room) & ~jnp.all(automaton.ended(state) | stopped)

        first = (jnp.int32(0), _whole(model.logits(hidden[:, -1:])[:, 0]), state_BK, caches, out, jnp.zeros((B,), bool))
        out = jax.lax.while_loop(going, step, first)[4]
        return jnp.where(out < 0, automaton.pad, out)

    return jax.jit(run)


def _whole(logits_RV: jax.Array) -> jax.Array:
    """Logits on every device: choosing an id is cheap and its state small."""
    return jax.sharding.reshard(logits_RV, rules.spec("", rules.ACT))


def _visibility(padding_R: jax.Array, slot: Any, length: int, slots: int) -> Visibility:
    """Causal over the cache for `length` queries from `slot` on; padding before a prompt is seen by nobody."""
    rows = padding_R.shape[0]
    index = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32)[None, :], (rows, slots))
    stop = jnp.broadcast_to((slot + 1 + jnp.arange(length, dtype=jnp.int32))[None, :], (rows, length))
    return Visibility(
        start=jnp.zeros((rows, length), jnp.int32),
        stop=stop,
        island=jnp.zeros((rows, length), jnp.int32),
        index=index,
        key_island=jnp.where(index < padding_R[:, None], -1, 0).astype(jnp.int32),
    )


def _choose(
    automaton: Automaton,
    sampling: Sampling,
    logits_RV: jax.Array,
    state_BK: jax.Array,
    made: jax.Array,
    keys: jax.Array,
) -> jax.Array:
    """The next id of each prompt, one that the automaton allows."""
    B = state_BK.shape[0]
    visual = automaton.visual(state_BK)[:, None]
    allowed = automaton.allowed(state_BK, jnp.full((B,), sampling.room, jnp.int32) - made)
    logits = logits_RV[:, : allowed.shape[1]]
    conditional = logits[:B]
    if sampling.guidance != 1.0:
        conditional = jnp.where(visual, guided(conditional, logits[B:], sampling.guidance), conditional)
    conditional = jnp.where(allowed, conditional, -jnp.inf)
    chosen = jnp.where(visual, filtered(conditional, sampling.image), filtered(conditional, sampling.text))
    noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, made), (chosen.shape[1],)))(keys)
    return jnp.argmax(chosen + noise, axis=-1).astype(jnp.int32)
