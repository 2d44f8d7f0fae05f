"""Bytes that generation reads for a token on a TPU that is not there: Emu3 8B, compiled ahead of time by libtpu."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.core.config import ConfigError
from mmgpt.core.log import console
from mmgpt.dist import axes as rules
from mmgpt.dist.mesh import Mesh
from mmgpt.evaluate import bench_bytes
from mmgpt.generate.decode import compiled_for
from mmgpt.generate.passes import Inputs
from mmgpt.generate.sampler import Sampler, Sampling
from mmgpt.models.decoder import Decoder
from mmgpt.plan import chips, hlo
from mmgpt.tokens import grammars
from mmgpt.tokens.text import TextTokenizer
from mmgpt.train.state import Structure

EMU3_8B = Decoder.Config(
    vocab=184_832,
    layers=32,
    embed=4096,
    mlp=14336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    rope_theta=1e6,
    qk_norm="none",
    dtype="bfloat16",
)
IDS = 184_622
SIDE, PROMPT = 64, 64
"""A picture of 512 x 512 pixels, and the tokens of its prompt."""
TOPOLOGIES = {"v5p": "v5p:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2"}


def bytes_per_token(target: str, devices: int, batches: tuple[int, ...]) -> dict[str, float]:
    """Bytes that one step of the real generation program reads on each chip, guided, and what it must read at least.

    That is every weight but the embedding's other rows, and the caches whole.
    """
    if target not in TOPOLOGIES or devices not in (1, 2, 4):
        raise ConfigError(f"--target is one of {', '.join(TOPOLOGIES)}, --devices 1, 2 or 4.")
    mesh = Mesh.Config(fsdp=1, tensor=devices).build(chips.devices(TOPOLOGIES[target])[:devices])
    figures: dict[str, float] = {}
    for batch in batches:
        console.print(f"compiling for {devices} x {target}, batch {batch}")
        text, weights, caches = _compiled(mesh, batch)
        program = hlo.parse(text)
        loop = bench_bytes.decoding_loop(program.computations, program.entry)
        read = bench_bytes.bytes_read(program.computations, loop)
        figures |= {
            f"batch {batch}/GB read for a step": round(read / 1e9, 3),
            f"batch {batch}/GB of weights": round(weights / 1e9, 3),
            f"batch {batch}/GB of caches": round(caches / 1e9, 3),
            f"batch {batch}/read over weights and caches": round(read / (weights + caches), 4),
        }
    return figures


def _compiled(mesh: jax.sharding.Mesh, batch: int) -> tuple[str, int, int]:
    """The scheduled program of guided drawing, and the bytes of weights that are read whole and of caches, a chip."""
    words = TextTokenizer.train(["a red circle 0123456789*"] * 8, 300)
    codes = IDS - grammars.config("emu3").build(words, (1,)).vocabulary.visual_start
    grammar = grammars.config("emu3").build(words, (codes,))
    automaton = grammar.automaton(((0, SIDE, SIDE),))
    sampling = Sampling(
        room=SIDE * (SIDE + 1) + 64, guidance=3.0, image=Sampler(temperature=1.0, top_k=2048), text=Sampler()
    )
    with jax.set_mesh(mesh):
        structure = Structure(EMU3_8B.build, 0)
        whole = rules.sharding("", rules.ACT)

        def shaped(leaf: Any, dtype: Any) -> jax.ShapeDtypeStruct:
            spec = whole.spec if leaf.sharding is None else leaf.sharding.spec
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=jax.NamedSharding(mesh, spec))

        params = jax.tree.map(lambda leaf: shaped(leaf, jnp.bfloat16), structure.abstract()[0])

        def ints(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole)

        rows, states = batch * sampling.branches, len(automaton.start(np.array([grammar.vocabulary.control("BOS")])))
        inputs = Inputs(
            ints(rows, PROMPT), ints(rows, PROMPT, 5), ints(rows), ints(batch, states), ints(batch), ints(batch)
        )
        key = jax.ShapeDtypeStruct((), jax.eval_shape(lambda: jax.random.key(0)).dtype, sharding=whole)
        program = compiled_for(structure, automaton, sampling, scan=True).lower(params, {}, inputs, key).compile()

        def held(leaf: jax.ShapeDtypeStruct) -> int:
            assert leaf.sharding is not None
            return int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize

        slots = PROMPT + sampling.room
        cache = jax.eval_shape(lambda p: structure.merge(p, {}).caches(rows, slots, stacked=True), params)
        caches = sum(held(shaped(leaf, jnp.bfloat16)) for leaf in jax.tree.leaves(cache))
        weights = sum(
            held(leaf) for name, leaf in params.items() if name != "embedding" for leaf in jax.tree.leaves(leaf)
        )
    text = program.as_text()
    assert text is not None
    return text, weights, caches
