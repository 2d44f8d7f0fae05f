"""The attention layer: projections, positions, the key-value cache, and the kernel on each device's shard."""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mmgpt.core.stream import Visibility
from mmgpt.dist import axes as rules
from mmgpt.kernels.attention import api, balance
from mmgpt.kernels.attention.logits import LOG2E, merged
from mmgpt.kernels.attention.plan import Plan
from mmgpt.kernels.attention.ring import Ring
from mmgpt.kernels.heads import served, turned
from mmgpt.nn.layers import HeadNorm, RMSNorm, Turn, made_once, rotary
from mmgpt.nn.param import act, einsum, normal, param, use

QKNorm = Literal["none", "rms", "layer"]
"""What queries and keys go through before they turn: nothing, an RMSNorm, or Chameleon's LayerNorm of each head."""

Context = Literal["gather", "ring"]
"""How keys reach the devices that share a row: all at once, or round a ring while each device works."""

Seen = Visibility | Plan | Ring
"""What a layer's queries see: what `planned` makes of a visibility, once for all layers."""

CACHE = "batch kv_heads keys head_dim"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """One layer's cache: `k, v [B, G, S, K]`; or all layers' `[L, B, G, S, K]`, of which `layer` is the one at hand.

    Heads stand before slots, as attention multiplies them: the other order would be turned round in every step.
    """

    k: jax.Array
    v: jax.Array
    layer: jax.Array | None = None

    def apart(self) -> "list[KeyValues]":
        """All layers' caches as one for each."""
        return [KeyValues(self.k[i], self.v[i]) for i in range(self.k.shape[0])]


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions (arXiv 2305.13245) and optional QK-norm (arXiv 2302.05442)."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        embed: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        qk_norm: QKNorm,
        norm_epsilon: float,
        out_scale: float,
        dropout: float,
    ):
        for name, count in (("heads", heads), ("kv_heads", kv_heads)):
            rules.spec(name, rules.ACT, (count,), f"attention/{name[0].replace('h', 'q')}")
        # Heads side by side in two dimensions: the compiler would keep three in an order that gathers badly.
        self.q = param(rngs, "embed heads", (embed, heads * head_dim), normal(embed**-0.5))
        self.k = param(rngs, "embed kv_heads", (embed, kv_heads * head_dim), normal(embed**-0.5))
        self.v = param(rngs, "embed kv_heads", (embed, kv_heads * head_dim), normal(embed**-0.5))
        out_init = normal(out_scale * (heads * head_dim) ** -0.5)
        self.out = param(rngs, "heads embed", (heads * head_dim, embed), out_init)
        # Normed queries and keys bound a logit by sqrt(head_dim) x gains: small heads start with the range that 128
        # wide ones have, or they could not single out one key among hundreds.
        gain = max(1.0, (128 / head_dim) ** 0.25)

        def head_norm(axes: str, heads: int) -> RMSNorm | HeadNorm | None:
            if qk_norm == "layer":
                return HeadNorm(rngs, axes, heads, head_dim, gain)
            return RMSNorm(rngs, head_dim, norm_epsilon, gain) if qk_norm == "rms" else None

        self.q_norm, self.k_norm = head_norm("heads", heads), head_norm("kv_heads", kv_heads)
        self.dropout, self.head_dim = dropout, head_dim

    def __call__(
        self,
        x_BTD: jax.Array,
        turns: tuple[Turn, Turn],
        visibility: Seen,
        *,
        cache: KeyValues | None = None,
        slot: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValues | None]:
        """`x [B, T, D]` to `[B, T, D]`; with a cache, keys and values are written from `slot` on and read whole.

        `turns` are the rotary positions of queries and of keys; `visibility` is what `planned` made of one.
        """
        x_BTD = made_once(x_BTD)
        q, k, v = (
            checkpoint_name(einsum("btd,dh->bth", x_BTD, w, f"batch seq {heads}"), "projections")
            for w, heads in ((self.q, "heads"), (self.k, "kv_heads"), (self.v, "kv_heads"))
        )
        v, scale = self._heads(v, "kv_heads"), self.head_dim**-0.5
        if cache is None and served(self.head_dim) and not isinstance(self.q_norm, HeadNorm):
            # Queries come multiplied as attention's kernel wants them, which then has nothing to do to them.
            q = self._turned(q, "heads", turns[0], self.q_norm, scale * LOG2E)
            k = self._turned(k, "kv_heads", turns[1], self.k_norm)
            scale = 1.0 / LOG2E
        else:
            q, k = self._heads(q, "heads"), self._heads(k, "kv_heads")
            if self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            q, k = rotary(q, turns[0]), rotary(k, turns[1])
        if cache is None:
            out, _ = _sharded(q, k, v, visibility, self.dropout, key, self._logit_bound(), scale)
        else:
            assert slot is not None
            k, v = (new.astype(old.dtype) for new, old in ((k, cache.k), (v, cache.v)))
            out, cache = _cached(q, k, v, visibility, cache, slot)
        out = jnp.reshape(out, (*out.shape[:2], -1), out_sharding=rules.spec("batch seq heads", rules.ACT))
        return einsum("bth,hd->btd", out, self.out, "batch seq embed"), cache

    def _heads(self, x_BTH: jax.Array, heads: str) -> jax.Array:
        shape = (*x_BTH.shape[:2], -1, self.head_dim)
        return jnp.reshape(x_BTH, shape, out_sharding=rules.spec(f"batch seq {heads} head_dim", rules.ACT))

    def _turned(self, x_BTH: jax.Array, heads: str, by: Turn, norm: Any, factor: float = 1.0) -> jax.Array:
        """As `_heads`, normed (an RMSNorm or None), turned and multiplied: by a TPU's kernel, on each device's part."""
        gain, epsilon = (None, 0.0) if norm is None else (use(norm.scale), norm.epsilon)
        local = functools.partial(turned, head_dim=self.head_dim, factor=factor, epsilon=epsilon)
        axes = f"batch seq {heads}", "batch seq head_dim", "", f"batch seq {heads} head_dim"
        x, positions, whole, out = (rules.spec(a, rules.ACT) for a in axes)
        specs = x, positions, None if gain is None else whole
        return jax.shard_map(local, in_specs=specs, out_specs=out, check_vma=False)(x_BTH, by.both, gain)

    def _logit_bound(self) -> jax.Array | None:
        """What no logit can pass: gains bound the lengths of normed queries and keys, and turning keeps them."""
        if self.q_norm is None or self.k_norm is None:
            return None
        rounding = 1.02  # of queries and keys in bfloat16
        return self.q_norm.bound() * self.k_norm.bound() * (rounding * self.head_dim**0.5)


def planned(
    visibility: Visibility,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dropout: float = 0.0,
    balanced: bool = False,
    context: Context = "gather",
) -> Seen:
    """The visibility as all layers' attention takes it: each device's block plan, made once, where there is one.

    `heads` and `kv_heads` are the whole model's; `dropout` is what the layers apply, 0 without a key. `balanced`: rows
    may be in the order that `balance` gives them.
    """
    split = rules.spec("batch seq", rules.ACT, visibility.start.shape, "visibility")
    ways, T = _ways(split[1]), visibility.start.shape[1]
    ring = "context" if context == "ring" and ways > 1 and dropout == 0.0 else None
    shape = T // ways, visibility.index.shape[1]
    if ring is None and api.chosen(shape, heads, kv_heads, head_dim, None, dropout > 0.0) == "reference":
        return visibility
    unit = balance.unit(T, ways) if balanced else None

    def local(visibility: Visibility) -> Any:
        return api.plan_for(
            visibility, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dropout=dropout, unit=unit, ring=ring
        )

    whole, specs = _sides(visibility)
    return jax.shard_map(local, in_specs=(specs,), out_specs=_each_device(), check_vma=False)(whole)


def _ways(axes: Any) -> int:
    """Into how many parts an entry of a spec divides a dimension."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[a] for a in jax.tree.leaves(axes))


def _each_device() -> jax.P:
    """The spec of a plan's arrays: what the devices of each part of the rows and positions made, one after another."""
    return jax.P(tuple(jax.tree.leaves(tuple(rules.spec("batch seq", rules.ACT)))))


def _sides(visibility: Visibility) -> tuple[Visibility, Visibility]:
    """The visibility with keys whole on every device, and its specs."""
    axes = Visibility(
        start="batch seq", stop="batch seq", island="batch seq", index="batch keys", key_island="batch keys"
    )
    specs = jax.tree.map(lambda a: rules.spec(a, rules.ACT), axes)
    return jax.tree.map(act, visibility, axes), specs


def _cached(
    q: jax.Array, k: jax.Array, v: jax.Array, visibility: Seen, cache: KeyValues, slot: jax.Array
) -> tuple[jax.Array, KeyValues]:
    """What new queries see of the cache and of the new keys and values, which are put into it from `slot` on."""
    layer = cache.layer
    if jax.sharding.get_abstract_mesh().shape["context"] > 1:
        raise rules.ShardingError("a cache of keys and values needs a mesh whose context is 1: decoding splits no row.")
    filled = KeyValues(_write(cache.k, k, slot, layer), _write(cache.v, v, slot, layer), layer)
    if layer is None or q.shape[1] > 1:
        k, v = (jnp.moveaxis(c if layer is None else _layer(c, layer), 1, 2) for c in (filled.k, filled.v))
        return _sharded(q, k, v, visibility, 0.0, None)[0], filled
    # A step of one id reads the layer's cache before it is written, and its own key apart: a TPU's compiler then reads
    # the cache in place, where it would copy the layer out first, half as many bytes again.
    assert isinstance(visibility, Visibility)  # one query has no plan
    before, own = _apart(visibility, slot)
    old_k, old_v = (jnp.moveaxis(_layer(c, layer), 1, 2) for c in (cache.k, cache.v))
    out, _ = merged(_sharded(q, old_k, old_v, before, 0.0, None), _sharded(q, k, v, own, 0.0, None))
    return out.astype(old_v.dtype), filled


def _apart(visibility: Visibility, slot: jax.Array) -> tuple[Visibility, Visibility]:
    """The visibility of the cache's slots before `slot`, a number or one for each row, and of that slot alone."""
    at_BS = jnp.arange(visibility.index.shape[1])[None, :]
    slot_B1 = jnp.broadcast_to(slot, visibility.index.shape[:1])[:, None]
    before = dataclasses.replace(visibility, key_island=jnp.where(at_BS < slot_B1, visibility.key_island, -1))

    def of_slot(part_BS: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(at_BS == slot_B1, part_BS, 0), axis=1, keepdims=True)

    own = dataclasses.replace(visibility, index=of_slot(visibility.index), key_island=of_slot(visibility.key_island))
    return before, own


def _write(cache: jax.Array, new_BTGK: jax.Array, slot: jax.Array, layer: jax.Array | None) -> jax.Array:
    """The cache with new keys or values in place from `slot` on, a number or one for each row."""
    new = jnp.moveaxis(new_BTGK, 1, 2)
    new = new if layer is None else new[None]
    first = () if layer is None else (layer,)
    if slot.ndim == 0:
        return jax.lax.dynamic_update_slice(cache, new, (*first, 0, 0, slot, 0))
    axes = ("" if layer is None else "layers ") + CACHE
    whole, rows, own = (rules.spec(a, rules.ACT) for a in ("", "batch", axes))

    def local(cache: jax.Array, new: jax.Array, slot: jax.Array, first: tuple[jax.Array, ...]) -> jax.Array:
        def row(cache: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(cache, new, (*first, 0, slot, 0))

        axis = cache.ndim - 4
        return jax.vmap(row, (axis, axis, 0), axis)(cache, new, slot)

    write = jax.shard_map(local, in_specs=(own, own, rows, (whole,) * len(first)), out_specs=own)
    return write(cache, act(new, axes), act(slot, "batch"), first)


def _layer(cache_LBGSK: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(cache_LBGSK, layer, axis=0, keepdims=False)


def _sharded(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visibility: Seen,
    dropout: float,
    key: jax.Array | None,
    logit_bound: jax.Array | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The kernel on each device's own queries and heads; keys and values are gathered, or go round a ring.

    Returns its output and the logarithms of its sums.
    """
    keys = "batch seq kv_heads head_dim" if isinstance(visibility, Ring) else "batch keys kv_heads head_dim"
    k, v = act(k, keys), act(v, keys)
    by_blocks = not isinstance(visibility, Visibility)
    visibility, visibility_specs = (visibility, _each_device()) if by_blocks else _sides(visibility)
    q_spec, kv_spec, whole = (
        rules.spec("batch seq heads head_dim", rules.ACT),
        rules.spec(keys, rules.ACT),
        rules.spec("", rules.ACT),
    )

    def local(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Any, key: Any, bound: Any) -> Any:
        if key is not None:  # each device's part of the output draws its own
            for axis in jax.tree.leaves(tuple(q_spec)):
                key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        return api.attention(q, k, v, visibility, scale=scale, dropout=dropout, key=key, logit_bound=bound)

    key = key if dropout > 0.0 else None
    bound = logit_bound if by_blocks else None
    specs = (q_spec, kv_spec, kv_spec, visibility_specs, *(None if x is None else whole for x in (key, bound)))
    out_specs = q_spec, rules.spec("batch seq heads", rules.ACT)
    # A Pallas kernel does not say over which axes its outputs vary.
    split = jax.shard_map(local, in_specs=specs, out_specs=out_specs, check_vma=not by_blocks)
    return split(q, k, v, visibility, key, bound)


def empty_cache(
    rows: int, slots: int, kv_heads: int, head_dim: int, dtype: jnp.dtype | type, *, layers: int | None = None
) -> KeyValues:
    """A cache of zeros; which slots count is the visibility's business (`key_island` -1 on empty ones)."""
    zero = jnp.zeros((*(() if layers is None else (layers,)), rows, kv_heads, slots, head_dim), dtype)
    zero = act(zero, ("" if layers is None else "layers ") + CACHE)
    return KeyValues(zero, zero)
