"""The passes of one generation: the prompt's, which fills the key-value cache, and then those over new ids.

Rows end their prompts at the same slot, `width`. R rows are the branches of guidance one after the other, each of the
B prompts.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mmgpt.core.stream import Visibility
from mmgpt.dist import axes as rules
from mmgpt.generate.sampler import Sampling, candidates, permitted
from mmgpt.kernels import few_rows
from mmgpt.models.decoder import Decoder
from mmgpt.nn.layers import SummedMLP
from mmgpt.tokens.grammars.grammar import Automaton

CHUNK = 512
"""Ids of a prompt that go through the model at once: attention's memory grows with them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """Prompts as arrays: `ids [R, P]`, `position [R, P, 5]`, `padding [R]` slots before each, the automaton's `state
    [B, K]` after each, `room [B]` new ids at most, and the number `row [B]` that a prompt's draws depend on.
    """

    ids: Any
    position: Any
    padding: Any
    state: Any
    room: Any
    row: Any


class Passes:
    """A model, its automaton and one batch of prompts, inside jit.

    `scan` runs the layers of a step in a loop, as the prompt's always are: one body to compile, and no copy of the
    stacked weights. On a CPU a scanned step takes twice as long as an unrolled one.
    """

    def __init__(self, model: Decoder, automaton: Automaton, sampling: Sampling, inputs: Inputs, *, scan: bool):
        self.model, self.automaton, self.sampling, self.inputs = model, automaton, sampling, inputs
        self.scan = scan
        self.layers: list[Any] | None = None
        self.width = inputs.ids.shape[1]
        self.slots = self.width + sampling.room + sampling.jacobi

    def prompt(self) -> tuple[jax.Array, Any]:
        """Logits `[R, V]` of the first new id, and the caches with the prompts in them."""
        inputs, chunk = self.inputs, min(self.width, CHUNK)
        place_RA = jnp.tile(self.automaton.place(inputs.state), (self.sampling.branches, 1))
        position = inputs.position.at[:, -1, 3:].set(place_RA)
        caches = self.model.caches(inputs.ids.shape[0], self.slots, stacked=True)

        def part(number: jax.Array, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            slot = number * chunk
            ids, places = (jax.lax.dynamic_slice_in_dim(a, slot, chunk, axis=1) for a in (inputs.ids, position))
            hidden, caches = self.model.extend(None, ids, places, self._visibility(slot, chunk), carry[0], slot)
            return caches, hidden[:, -1:]

        first = part(jnp.int32(0), (caches, jnp.zeros(0)))
        caches, last = jax.lax.fori_loop(1, self.width // chunk, part, first) if self.width > chunk else first
        logits = _whole(self.model.logits(last))[:, 0]
        if not self.scan:
            self.layers, caches = self.model.stack.unstacked(), caches.apart()
            rows = inputs.ids.shape[0] * max(self.sampling.jacobi, 1)
            if self.model.config.dtype == "float32" and few_rows.pays(rows):
                for layer in self.layers:
                    layer.mlp = SummedMLP(layer.mlp)
        return logits, caches

    def run(self, ids_BT: jax.Array, place_BTA: jax.Array, made: jax.Array, caches: Any) -> tuple[jax.Array, Any]:
        """Logits `[R, T, V]` behind each of T new ids.

        `place [B, T, 4]` are the places of the ids and of those after them, `made` or `made [B]` how many new ids stand
        before them.
        """
        length, branches = ids_BT.shape[1], self.sampling.branches
        slot = self.width + (jnp.tile(made, branches) if made.ndim else made)
        number = (slot - self.inputs.padding)[:, None] + jnp.arange(length)[None, :]
        places = jnp.tile(place_BTA, (branches, 1, 1))
        position = jnp.concatenate([number[:, :, None], places], axis=2)
        ids = jnp.tile(ids_BT, (branches, 1))
        hidden, caches = self.model.extend(self.layers, ids, position, self._visibility(slot, length), caches, slot)
        return _whole(self.model.logits(hidden)), caches

    def keys(self, key: jax.Array) -> jax.Array:
        """A random key `[B]` for each prompt, whatever else is in the batch."""
        return jax.vmap(lambda row: jax.random.fold_in(key, row))(self.inputs.row)

    def over(self, state_BK: jax.Array, stopped_B: jax.Array, made: jax.Array) -> jax.Array:
        """`[B] bool`: rows to which no id is added any more."""
        return self.automaton.ended(state_BK) | stopped_B | (made >= self.inputs.room)

    def _visibility(self, slot: jax.Array, length: int) -> Visibility:
        """Causal over the cache for `length` queries from `slot` on; padding before a prompt is seen by nobody."""
        padding = self.inputs.padding
        index = jnp.broadcast_to(jnp.arange(self.slots, dtype=jnp.int32)[None, :], (padding.shape[0], self.slots))
        stop = jnp.broadcast_to(slot, padding.shape)[:, None] + 1 + jnp.arange(length, dtype=jnp.int32)[None, :]
        return Visibility(
            start=jnp.zeros_like(stop),
            stop=stop,
            island=jnp.zeros_like(stop),
            index=index,
            key_island=jnp.where(index < padding[:, None], -1, 0).astype(jnp.int32),
        )


def one_by_one(passes: Passes, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """New ids `[B, room]`, padding behind each end, and the passes `[B]` that each row took, the prompt's included."""
    automaton, sampling, inputs = passes.automaton, passes.sampling, passes.inputs
    keys = passes.keys(key)

    def draw(logits: jax.Array, state: jax.Array, made: jax.Array, out: jax.Array, stopped: jax.Array) -> tuple:
        may = permitted(automaton, state, inputs.room - made, stopped)
        found = candidates(sampling, logits, may, automaton.visual(state))
        if not sampling.greedy:  # the largest after Gumbel noise is a sample
            noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, made), (found.shape[1],)))(keys)
            found = found + noise
        chosen = jnp.argmax(found, axis=-1).astype(jnp.int32)
        out = jax.lax.dynamic_update_slice_in_dim(out, chosen[:, None], made, axis=1)
        after = automaton.advance(state, chosen)
        places = jnp.concatenate([automaton.place(state), automaton.place(after)], axis=1)
        return chosen, places, after, out, stopped | (chosen == sampling.stop)

    def step(carry: tuple) -> tuple:
        made, count, caches, (chosen, places, state, out, stopped) = carry
        count = count + ~passes.over(state, stopped, made)
        logits, caches = passes.run(chosen[:, None], places[:, None], made - 1, caches)
        return made + 1, count, caches, draw(logits[:, 0], state, made, out, stopped)

    def going(carry: tuple) -> jax.Array:
        made, _, _, (_, _, state, _, stopped) = carry
        return ~jnp.all(passes.over(state, stopped, made))

    logits, caches = passes.prompt()
    B = inputs.state.shape[0]
    out = jnp.full((B, sampling.room), automaton.pad, jnp.int32)
    drawn = draw(logits, inputs.state, jnp.int32(0), out, jnp.zeros((B,), bool))
    carry = jax.lax.while_loop(going, step, (jnp.int32(1), jnp.ones((B,), jnp.int32), caches, drawn))
    return carry[3][3], carry[1]


def _whole(logits: jax.Array) -> jax.Array:
    """Logits on every device: choosing an id is cheap and its state small."""
    return jax.sharding.reshard(logits, rules.spec("", rules.ACT))
