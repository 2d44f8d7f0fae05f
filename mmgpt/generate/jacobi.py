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
from typing import NamedTuple

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


class _Window(NamedTuple):
    """W positions: `ids [B, W]`, the distributions `p [B, W, V]` that they were drawn from, and a `mark [B, W]` of what
    was permitted at each.
    """

    ids: jax.Array
    p: jax.Array
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
        zero = jnp.zeros((B,), jnp.int32)
        none = _Settled(zero, zero, jnp.zeros((B, 2), jnp.int32), passes.inputs.state, zero > 0)
        p_BWV, mark = self._distributions(logits[:, None], none.state[:, None], none.stopped[:, None], none.made)
        first = _Window(_drawn(p_BWV, self._keys(0, 0)), p_BWV, mark)
        settled = self._settle(none, none.state[:, None], none.stopped[:, None], first.ids, zero)
        # What is permitted at the first position may be so at others, which then begin with its distribution.
        seen = _Window(*(jnp.repeat(part, self.window, axis=1) for part in first))
        drafts = self._draft(settled, seen, zero + self.window, 0)
        out = jnp.full((B, self.sampling.room + self.window), self.automaton.pad, jnp.int32)
        out = out.at[:, 0].set(first.ids[:, 0])

        def step(carry: tuple) -> tuple:
            number, count, caches, settled, drafts, out = carry
            count = count + ~passes.over(settled.state, settled.stopped, settled.made)
            caches, settled, drafts, ids, made = self._pass(number, caches, settled, drafts)
            return number + 1, count, caches, settled, drafts, jax.vmap(_put)(out, ids, made)

        def going(carry: tuple) -> jax.Array:
            settled = carry[3]
            return ~jnp.all(passes.over(settled.state, settled.stopped, settled.made))

        carry = jax.lax.while_loop(going, step, (jnp.int32(1), zero + 1, caches, settled, drafts, out))
        _, count, _, settled, _, out = carry
        kept = jnp.arange(out.shape[1])[None, :] < settled.made[:, None]  # behind them lie drafts of the last pass
        return jnp.where(kept, out, self.automaton.pad)[:, : self.sampling.room], count

    def _pass(self, number: jax.Array, caches: object, settled: _Settled, drafts: _Window) -> tuple:
        """The caches, rows and drafts after one more pass, and the ids `[B, W]` it puts at position `made [B]`."""
        states, stopped = self._walk(settled, drafts.ids)
        places = jnp.stack([self.automaton.place(states[:, k]) for k in range(self.window)], axis=1)
        places = jnp.concatenate([jnp.roll(places, 1, axis=1).at[:, 0].set(settled.place), places], axis=2)
        ids = jnp.concatenate([settled.id[:, None], drafts.ids], axis=1)
        logits, caches = self.passes.run(ids, places, settled.made - 1, caches)
        p_BWV, mark = self._distributions(logits, states, stopped, settled.made)
        ids = _verified(drafts, p_BWV, self._keys(number, 0))
        same = jnp.cumprod(ids[:, :-1] == drafts.ids, axis=1)
        last = jnp.sum(same, axis=1)  # the first draft that changed is settled too
        settled_after = self._settle(settled, states, stopped, ids, last)
        drafts = self._draft(settled_after, _Window(ids, p_BWV, mark), last + 1, number)
        return caches, settled_after, drafts, ids, settled.made

    def _walk(self, settled: _Settled, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`[B, W, K]` and `[B, W]`: the automaton, and whether the row stopped, before each output of a pass."""

        def step(carry: tuple, id_B: jax.Array) -> tuple:
            state, stopped = carry
            after = self.automaton.advance(state, id_B), stopped | (id_B == self.sampling.stop)
            return after, after

        first = settled.state, settled.stopped
        _, rest = jax.lax.scan(step, first, ids.T)
        states, stopped = (jnp.concatenate([a[None], b]) for a, b in zip(first, rest, strict=True))
        return jnp.moveaxis(states, 0, 1), stopped.T

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

    def _distributions(
        self, logits_RWV: jax.Array, states: jax.Array, stopped: jax.Array, made: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """`p [B, W, V]` of the ids at `made [B]` and after it, and their marks `[B, W]`."""
        R, W, _ = logits_RWV.shape
        B = made.shape[0]
        room = self.passes.inputs.room[:, None] - made[:, None] - jnp.arange(W)[None, :]
        flat = states.reshape(B * W, -1)
        may = permitted(self.automaton, flat, room.reshape(-1), stopped.reshape(-1))
        logits = logits_RWV.reshape(R * W, -1)
        found = candidates(self.sampling, logits, may, self.automaton.visual(flat))
        return jax.nn.softmax(found, axis=-1).reshape(B, W, -1), _mark(may).reshape(B, W)

    def _draft(self, settled: _Settled, seen: _Window, used: jax.Array, number: jax.Array | int) -> _Window:
        """W - 1 drafts behind the settled ids: those that the last pass left behind its `used [B]`, then new ones.

        A new draft begins with the distribution of the nearest position that permits the same ids (in a picture, the
        place to the left), else with that of an equal chance for each.
        """
        W = self.window

        def step(carry: tuple, inputs: tuple) -> tuple:
            state, stopped = carry
            k, keys = inputs
            may = permitted(self.automaton, state, self.passes.inputs.room - settled.made - k, stopped)
            mark = _mark(may)
            alike = seen.mark == mark[:, None]
            nearest = W - 1 - jnp.argmax(alike[:, ::-1], axis=1)
            even = may / jnp.sum(may, axis=-1, keepdims=True)
            p = jnp.where(jnp.any(alike, axis=1)[:, None], _take(seen.p, nearest), even)
            kept = used + k < W
            at = jnp.minimum(used + k, W - 1)
            p = jnp.where(kept[:, None], _take(seen.p, at), p)
            chosen = jnp.where(kept, _take(seen.ids, at), _drawn(p[:, None], keys)[:, 0])
            state, stopped = self.automaton.advance(state, chosen), stopped | (chosen == self.sampling.stop)
            return (state, stopped), _Window(chosen, p, mark)

        keys = jax.vmap(lambda k: jax.vmap(jax.random.fold_in, (0, None))(self._keys(number, 1), k))(jnp.arange(W - 1))
        _, drafts = jax.lax.scan(step, (settled.state, settled.stopped), (jnp.arange(W - 1), keys))
        return jax.tree.map(lambda part: jnp.moveaxis(part, 0, 1), drafts)

    def _keys(self, number: jax.Array | int, use: int) -> jax.Array:
        """Fresh keys `[B]` for one pass and use."""
        return jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, number), use))(self.keys)


def _verified(drafts: _Window, p_BWV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Ids `[B, W]` distributed as `p`: as many drafts as possible, and an id behind them."""
    q = jnp.pad(drafts.p, ((0, 0), (0, 1), (0, 0)))  # behind the drafts nothing was drawn: all of p is left
    draft = jnp.pad(drafts.ids, ((0, 0), (0, 1)))[:, :, None]
    chance_p, chance_q = (jnp.take_along_axis(a, draft, axis=2)[:, :, 0] for a in (p_BWV, q))
    uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0), q.shape[1:2]))(keys_B)
    rest = jnp.maximum(p_BWV - q, 0.0)
    rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0.0, rest, p_BWV)  # rounding may leave nothing
    again = _drawn(rest, jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys_B))
    return jnp.where(uniform * chance_q < chance_p * (chance_q > 0.0), draft[:, :, 0], again)


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
