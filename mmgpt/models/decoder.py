"""A decoder-only transformer over one stream of ids: Emu3, Emu3.5, Qwen3, Llama and Chameleon are configs of it."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mmgpt.core.config import ConfigError
from mmgpt.core.stream import Batch, Visibility
from mmgpt.models import ModelConfig
from mmgpt.nn.attention import Attention, Context, KeyValues, QKNorm, Seen, empty_cache, planned
from mmgpt.nn.layers import GatedMLP, RMSNorm, RopeScaling, Turn, dropout, row_major, turn
from mmgpt.nn.param import einsum, lookup, normal, param, take, use
from mmgpt.nn.stack import Remat, Stack
from mmgpt.tokens.vocabulary import Vocabulary

Caches = list[KeyValues] | KeyValues
"""One cache a layer, or all layers in one."""


class Block(nnx.Module):
    """Attention and feed-forward, each with a residual; normed is what goes in, or with `post_norm` what comes out."""

    def __init__(self, rngs: nnx.Rngs, c: "Decoder.Config"):
        residual_scale = (2 * c.layers) ** -0.5  # keeps the residual stream's variance independent of depth
        self.attention_norm = RMSNorm(rngs, c.embed, c.norm_epsilon)
        self.attention = Attention(
            rngs,
            embed=c.embed,
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            qk_norm=c.qk_norm,
            norm_epsilon=c.norm_epsilon,
            out_scale=residual_scale,
            dropout=c.attention_dropout,
        )
        self.mlp_norm = RMSNorm(rngs, c.embed, c.norm_epsilon)
        self.mlp = GatedMLP(rngs, c.embed, c.mlp, residual_scale)
        self.dropout, self.post_norm = c.dropout, c.post_norm

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
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        into = x_BTD if self.post_norm else self.attention_norm(x_BTD)
        update, cache = self.attention(into, turns, visibility, cache=cache, slot=slot, key=keys[0])
        update = self.attention_norm(update) if self.post_norm else update
        x_BTD = checkpoint_name(row_major(x_BTD + dropout(update, self.dropout, keys[1])), "projections")
        update = self.mlp_norm(self.mlp(x_BTD)) if self.post_norm else self.mlp(self.mlp_norm(x_BTD))
        return row_major(x_BTD + dropout(update, self.dropout, keys[2])), cache


class Decoder(nnx.Module):
    """Embedding, a stack of blocks, final norm and a vocabulary projection."""

    class Config(ModelConfig):
        """Sizes of the decoder. `vocab` is the padded row count; 0 is filled in from the grammar at start-up.

        `rope_grid` of a head's `head_dim / 2` rotary frequencies follow the row in a picture and as many the column;
        0 is Emu3, whose positions are the numbers in the document alone. `places` rows and columns have an embedding
        that is added where the next id stands in a picture: a small model that must find "top left" learns it sooner.
        `context` is how keys reach the devices of a mesh that share a row (docs/attention.md).
        Emu3 and Llama have no `qk_norm`, Emu3.5 and Qwen3 "rms", Chameleon "layer", and its 34B `post_norm` (Swin's).
        """

        vocab: int = 0
        layers: int = 6
        embed: int = 192
        mlp: int = 512
        heads: int = 3
        kv_heads: int = 3
        head_dim: int = 64
        rope_theta: float = 1e4
        rope_scaling: RopeScaling | None = None
        rope_grid: int = 0
        rope_grid_theta: float = 100.0
        places: int = 0
        qk_norm: QKNorm = "rms"
        post_norm: bool = False
        norm_epsilon: float = 1e-5
        tied: bool = False
        dropout: float = 0.0
        attention_dropout: float = 0.0
        scan: bool = True
        remat: Remat = "none"
        context: Context = "gather"
        dtype: Literal["float32", "bfloat16"] = "float32"

        def fit(self, vocabulary: Vocabulary) -> "Decoder.Config":
            """The config with the vocabulary's rows, unless it names its own number."""
            return self if self.vocab else self.replace(vocab=vocabulary.padded())

        def step_flops(self, batch: Batch) -> float:
            """Matmul operations of one training step: weights and all T x T scores, forward and twice that backward."""
            B, T = batch.streams["tokens"].ids.shape
            block = self.embed * self.head_dim * 2 * (self.heads + self.kv_heads) + 3 * self.embed * self.mlp
            weights = self.layers * block + self.embed * self.vocab
            scores = self.layers * 2 * self.heads * self.head_dim * T
            return 6.0 * B * T * (weights + scores)

        def build(self, rngs: nnx.Rngs) -> "Decoder":
            if self.vocab <= 0:
                raise ConfigError(f"model.vocab is {self.vocab}: give the padded vocabulary size of the grammar.")
            sizes = ("layers", "embed", "mlp", "heads", "kv_heads", "head_dim")
            if wrong := [f"model.{name} is {getattr(self, name)}" for name in sizes if getattr(self, name) < 1]:
                raise ConfigError(f"{', '.join(wrong)}; sizes are 1 or more.")
            if not (0.0 <= self.dropout < 1.0 and 0.0 <= self.attention_dropout < 1.0):
                raise ConfigError(
                    f"model.dropout is {self.dropout} and model.attention_dropout {self.attention_dropout}; "
                    "they are shares from 0 to below 1."
                )
            if self.attention_dropout > 0.0 and self.context == "ring":
                raise ConfigError(
                    f"model.attention_dropout is {self.attention_dropout}, which keys that go round a ring do not "
                    'have: set it to 0, or model.context to "gather".'
                )
            if self.heads % self.kv_heads:
                raise ConfigError(
                    f"model.heads {self.heads} is not a multiple of model.kv_heads {self.kv_heads}; change one of them."
                )
            if self.head_dim % 2 or 4 * self.rope_grid >= self.head_dim:
                raise ConfigError(
                    f"model.head_dim {self.head_dim} must be even, since rotary positions turn pairs, and above "
                    f"4 x model.rope_grid {self.rope_grid}."
                )
            return Decoder(rngs, self)

    def __init__(self, rngs: nnx.Rngs, c: "Decoder.Config"):
        self.config = c
        self.embedding = param(rngs, "vocab embed", (c.vocab, c.embed), normal(1.0 if not c.tied else c.embed**-0.5))
        self.places = param(rngs, "norm norm embed", (2, c.places, c.embed), normal(0.5)) if c.places else None
        self.stack = Stack(rngs, lambda rngs: Block(rngs, c), c.layers, scan=c.scan, remat=c.remat)
        self.norm = RMSNorm(rngs, c.embed, c.norm_epsilon)
        self.head = None if c.tied else param(rngs, "embed vocab", (c.embed, c.vocab), normal(c.embed**-0.5))

    def __call__(self, batch: Batch, *, key: jax.Array | None = None) -> jax.Array:
        """Logits `[B, T, V] float32` of the stream "tokens"; `key` turns dropout on."""
        return self._projected(self.hidden(batch, key=key))

    def hidden(self, batch: Batch, *, key: jax.Array | None = None) -> jax.Array:
        """`[B, T, D]`: what the vocabulary projection multiplies; `key` turns dropout on."""
        c, stream, visibility = self.config, batch.streams["tokens"], batch.visibility["tokens"]
        keys = None
        x, turns = self._embed(stream.ids, stream.position), self._turns(stream.position)
        if key is not None and (c.dropout > 0.0 or c.attention_dropout > 0.0):
            embed_key, layers_key = jax.random.split(key)
            x = dropout(x, c.dropout, embed_key)  # Emu3 drops its input embeddings too
            keys = jax.random.split(layers_key, c.layers)
        dropped = c.attention_dropout if keys is not None else 0.0
        seen = self._planned(visibility, dropout=dropped, balanced=True, context=c.context)

        def call(block: Block, x: jax.Array, key: jax.Array | None) -> jax.Array:
            return block(x, turns, seen, key=key)[0]

        return self.norm(self.stack(call, x, keys))

    def extend(
        self,
        blocks: "list[Block] | None",
        ids_BT: jax.Array,
        position_BTA: jax.Array,
        visibility: Visibility,
        caches: Caches,
        slot: jax.Array,
    ) -> tuple[jax.Array, Caches]:
        """Hidden states `[B, T, D]` of tokens put at cache slots `slot...` (of each row, if `[B]`), and the caches.

        `blocks` is `self.stack.unstacked()`, made once outside the decoding loop, with a list of caches; None scans the
        layers, with the caches stacked.
        """
        x, turns = self._embed(ids_BT, position_BTA), self._turns(position_BTA)
        seen = self._planned(visibility)
        if isinstance(caches, KeyValues):
            assert blocks is None

            def call(block: Block, layer: jax.Array, carry: tuple[jax.Array, KeyValues]) -> tuple[jax.Array, KeyValues]:
                at = dataclasses.replace(carry[1], layer=layer)
                x, filled = block(carry[0], turns, seen, cache=at, slot=slot)
                assert filled is not None
                return x, dataclasses.replace(filled, layer=None)

            return self.stack.fold(call, (x, caches))
        assert blocks is not None
        out = []
        for block, cache in zip(blocks, caches, strict=True):
            x, filled = block(x, turns, seen, cache=cache, slot=slot)
            out.append(filled)
        return x, out

    def _embed(self, ids_BT: jax.Array, position_BTA: jax.Array) -> jax.Array:
        dtype = jnp.dtype(self.config.dtype)
        x = lookup(self.embedding, ids_BT, dtype)
        if self.places is None:
            return x
        tables = use(self.places, dtype)
        for axis in (0, 1):
            place_BT = jnp.minimum(position_BTA[..., 3 + axis], self.config.places - 1)
            x = x + take(tables[axis], place_BT, "batch seq embed")
        return x

    def _planned(self, visibility: Visibility, **options: Any) -> Seen:
        c = self.config
        return planned(visibility, heads=c.heads, kv_heads=c.kv_heads, head_dim=c.head_dim, **options)

    def _turns(self, position_BTA: jax.Array) -> tuple[Turn, Turn]:
        """Rotary positions of queries and of keys.

        A query turns with the place that it is about to fill, a key with the place that it holds: what stood at that
        place in another picture is then straight ahead, with no offset to learn (arXiv 2404.09562).
        """
        c = self.config
        rope = (c.head_dim, c.rope_theta, c.rope_grid, c.rope_grid_theta, c.rope_scaling)
        return turn(position_BTA[..., jnp.array([0, 3, 4])], *rope), turn(position_BTA[..., :3], *rope)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Logits `[B, T, V] float32` of what the last layer gave."""
        return self._projected(self.norm(hidden_BTD))

    @property
    def projection(self) -> tuple[Any, bool]:
        """The weight of the vocabulary projection, and whether its rows are the ids (or its columns)."""
        return (self.embedding, True) if self.head is None else (self.head, False)

    def _projected(self, hidden_BTD: jax.Array) -> jax.Array:
        weight, rows = self.projection
        equation = "btd,vd->btv" if rows else "btd,dv->btv"
        return einsum(equation, hidden_BTD, weight, "batch seq vocab").astype(jnp.float32)

    def caches(self, rows: int, slots: int, *, stacked: bool = False) -> Caches:
        """Empty caches, one a layer or all in one."""
        c = self.config
        made = functools.partial(empty_cache, rows, slots, c.kv_heads, c.head_dim, jnp.dtype(c.dtype))
        return made(layers=c.layers) if stacked else [made() for _ in range(c.layers)]
