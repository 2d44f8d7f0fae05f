"""Speculative Jacobi decoding (arXiv 2410.01699): one pass verifies a window of drafts, and its outputs are the next
drafts, so that many ids can come of a pass without another model. What is sampled is distributed as it is one by one.

Why: a draft of position i was drawn from a known distribution q, and the pass gives p, the model's behind the drafts
before i. The draft stays with probability min(1, p / q) and is otherwise drawn again from max(0, p - q): it is then
distributed as p (arXiv 2211.17192) given all that happened before i, which never depended on what was drawn at i. This
holds at *every* position of the window, whether the drafts before it are right or not, so drafts may survive the passes
in which earlier ones change. Position i is settled by the first pass whose drafts before i are the settled ids. That,
too, is a matter of what stands before i alone, and p is then the model's own distribution.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmgpt.generate.passes import Passes
from mmgpt.generate.sampler import candidates, permitted


class _Settled(NamedTuple):
    """Rows up to their newest id: `made [B]` new ids, the newest `id [B]`, its `place [B, 2]`, and the automaton's
    `state [B, K]` behind it; `stopped [B]` where it was the stop id.
    """

    made: jax.Array
    id: jax.Array
    place: jax.Array
    state: jax.Array
    stopped: jax.Array


class _Seen(NamedTuple):
    """What a pass gave: `ids [B, W]`, the distributions `p [B, W, V]` that they were drawn from, and a `mark [B, W]` of
    what was permitted at each.
    """

    ids: jax.Array
    p: jax.Array
    mark: jax.Array


class _Drafts(NamedTuple):
    """Drafts `ids [B, W]` and what they were drawn from, `q [B, W, V]`; and before each of them: the automaton's
    `state [B, W, K]`, whether the row `stopped [B, W]`, and what is permitted, `may [B, W, V]` and its `mark [B, W]`.
    """

    ids: jax.Array
    q: jax.Array
    state: jax.Array
    stopped: jax.Array
    may: jax.Array
    mark: jax.Array


def in_windows(passes: Passes, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `one_by_one`, with up to `sampling.jacobi` new ids a pass."""
    return _Jacobi(passes, key).run()


class _Jacobi:
    def __init__(self, passes: Passes, key: jax.Array):
        self.passes, self.automaton, self.sampling = passes, passes.automaton, passes.sampling
        self.keys, self.window = passes.keys(key), passes.sampling.jacobi

    def run(self) -> tuple[jax.Array, jax.Array]:
        """New ids `[B, room]` and the passes `[B]` that each row took."""
        passes, B = self.passes, self.passes.inputs.state.shape[0]
        logits, caches = passes.prompt()
        zero, state = jnp.zeros((B,), jnp.int32), passes.inputs.state
        none = _Settled(zero, zero, jnp.zeros((B, 2), jnp.int32), state, zero > 0)
        may_BV = permitted(self.automaton, state, passes.inputs.room, none.stopped)
        p_B1V = self._distributions(logits[:, None], may_BV[:, None], state[:, None])
        ids_B1 = _drawn(p_B1V, self._keys(0, 0))
        settled = self._settle(none, state[:, None], none.stopped[:, None], ids_B1, zero)
        # What is permitted at the first position may be so at others, which then begin with its distribution.
        seen = _Seen(*(jnp.repeat(part, self.window, axis=1) for part in (ids_B1, p_B1V, _mark(may_BV)[:, None])))
        out = jnp.full((B, self.sampling.room + self.window), self.automaton.pad, jnp.int32)
        out = out.at[:, 0].set(ids_B1[:, 0])

        def step(carry: tuple) -> tuple:
            number, count, caches, settled, seen, used, out = carry
            count = count + ~passes.over(settled.state, settled.stopped, settled.made)
            caches, after, seen, used = self._pass(number, caches, settled, seen, used)
            return number + 1, count, caches, after, seen, used, jax.vmap(_put)(out, seen.ids, settled.made)

        def going(carry: tuple) -> jax.Array:
            settled = carry[3]
            return ~jnp.all(passes.over(settled.state, settled.stopped, settled.made))

        first = (jnp.int32(1), zero + 1, caches, settled, seen, zero + self.window, out)
        carry = jax.lax.while_loop(going, step, first)
        return carry[6][:, : self.sampling.room], carry[1]

    def _pass(self, number: jax.Array, caches: Any, settled: _Settled, seen: _Seen, used: jax.Array) -> tuple:
        """The caches, rows and window after one more pass, and how many `[B]` of its ids are settled."""
        drafts = self._draft(settled, seen, used, number)
        W = self.window
        places = jax.vmap(self.automaton.place, 1, 1)(drafts.state)
        places = jnp.concatenate([jnp.roll(places, 1, axis=1).at[:, 0].set(settled.place), places], axis=2)
        ids = jnp.concatenate([settled.id[:, None], drafts.ids[:, :-1]], axis=1)
        logits, caches = self.passes.run(ids, places, settled.made - 1, caches)
        p_BWV = self._distributions(logits, drafts.may, drafts.state)
        ids = _verified(drafts, p_BWV, self._keys(number, 0))
        same = jnp.cumprod(ids[:, : W - 1] == drafts.ids[:, : W - 1], axis=1)
        last = jnp.sum(same, axis=1)  # the first draft that changed is settled too
        after = self._settle(settled, drafts.state, drafts.stopped, ids, last)
        return caches, after, _Seen(ids, p_BWV, drafts.mark), last + 1

    def _settle(
        self, before: _Settled, states: jax.Array, stopped: jax.Array, ids: jax.Array, last: jax.Array
    ) -> _Settled:
        """Rows with the ids up to and with number `last [B]` of a window."""
        take = functools.partial(_take, at=last)
        state, chosen = take(states), take(ids)
        return _Settled(
            made=before.made + last + 1,
            id=chosen,
            place=self.automaton.place(state),
            state=self.automaton.advance(state, chosen),
            stopped=take(stopped) | (chosen == self.sampling.stop),
        )

    def _distributions(self, logits_RWV: jax.Array, may_BWV: jax.Array, state_BWK: jax.Array) -> jax.Array:
        """`p [B, W, V]` of the next ids."""
        (B, W, V), R = may_BWV.shape, logits_RWV.shape[0]
        visual = self.automaton.visual(state_BWK.reshape(B * W, -1))
        logits = logits_RWV.reshape(R * W, -1)
        found = candidates(self.sampling, logits, may_BWV.reshape(B * W, V), visual)
        return jax.nn.softmax(found, axis=-1).reshape(B, W, V)

    def _draft(self, settled: _Settled, seen: _Seen, used: jax.Array, number: jax.Array) -> _Drafts:
        """Drafts behind the settled ids: those that the last pass left behind its `used [B]`, then new ones.

        A new draft begins with the distribution of the nearest position that permits the same ids (in a picture, the
        place to the left), else with an equal chance for each. The last draft is of a position that no pass verifies.
        """
        W = self.window

        def step(carry: tuple, inputs: tuple) -> tuple:
            state, stopped = carry
            k, keys = inputs
            may = permitted(self.automaton, state, self.passes.inputs.room - settled.made - k, stopped)
            mark = _mark(may)
            alike = seen.mark == mark[:, None]
            kept = used + k < W
            at = jnp.where(kept, used + k, W - 1 - jnp.argmax(alike[:, ::-1], axis=1))
            even = may / jnp.sum(may, axis=-1, keepdims=True)
            q = jnp.where((kept | jnp.any(alike, axis=1))[:, None], _take(seen.p, at), even)
            chosen = jnp.where(kept, _take(seen.ids, at), _drawn(q[:, None], keys)[:, 0])
            after = self.automaton.advance(state, chosen), stopped | (chosen == self.sampling.stop)
            return after, _Drafts(chosen, q, state, stopped, may, mark)

        keys = self._keys(number, 1)
        keys = jax.vmap(lambda k: jax.vmap(jax.random.fold_in, (0, None))(keys, k))(jnp.arange(W))
        _, drafts = jax.lax.scan(step, (settled.state, settled.stopped), (jnp.arange(W), keys))
        return jax.tree.map(lambda part: jnp.moveaxis(part, 0, 1), drafts)

    def _keys(self, number: jax.Array | int, use: int) -> jax.Array:
        """Fresh keys `[B]` for one pass and use."""
        return jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, number), use))(self.keys)


def _verified(drafts: _Drafts, p_BWV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Ids `[B, W]` distributed as `p`: as many drafts as possible but the last, which no pass saw: all of p is left."""
    W = p_BWV.shape[1]
    known = (jnp.arange(W) < W - 1)[None, :]
    q = jnp.where(known[:, :, None], drafts.q, 0.0)
    chance_p, chance_q = (jnp.take_along_axis(a, drafts.ids[:, :, None], axis=2)[:, :, 0] for a in (p_BWV, q))
    uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0), (W,)))(keys_B)
    rest = jnp.maximum(p_BWV - q, 0.0)
    rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0.0, rest, p_BWV)  # rounding may leave nothing
    again = _drawn(rest, jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys_B))
    return jnp.where(known & (uniform * chance_q < chance_p), drafts.ids, again)


def _drawn(p_BWV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Ids `[B, W]` by weights that need not add up to 1; none of weight 0."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, p_BWV.shape[1:]))(keys_B)
    return jnp.argmax(jnp.log(p_BWV) + noise, axis=-1).astype(jnp.int32)


def _mark(may_BV: jax.Array) -> jax.Array:
    """A number `[B] int32` that equal rows share, and others hardly."""
    column = jnp.arange(1, may_BV.shape[1] + 1, dtype=jnp.int32)
    return jnp.sum(jnp.where(may_BV, column * jnp.int32(-1640531527) ^ (column << 7), 0), axis=1, dtype=jnp.int32)


def _take(part: jax.Array, at: jax.Array) -> jax.Array:
    """`part[b, at[b]]`."""
    return jax.vmap(lambda row, i: jax.lax.dynamic_index_in_dim(row, i, keepdims=False))(part, at)


def _put(row: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(row, new, (at,))
