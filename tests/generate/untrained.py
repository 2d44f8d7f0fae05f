"""A generator of random parameters, and the model's own probabilities of what it made, by the full forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.core.stream import Batch, Stream, packed_causal
from mmgpt.dist.mesh import Mesh
from mmgpt.generate.decode import Generator
from mmgpt.models.decoder import Decoder
from mmgpt.objectives.next_token import NextToken
from mmgpt.train.optimizer import Optimizer
from mmgpt.train.run import Built, Opened, Run
from mmgpt.train.state import Structure
from tests import tiny

SIZES = ((0, 2, 3), (2, 1, 2))


def one_device() -> jax.sharding.Mesh:
    return Mesh.Config().build(jax.devices()[:1])


def opened(mesh: jax.sharding.Mesh, codebooks: tuple[int, ...] = tiny.BOOKS, blanks: bool = True) -> Opened:
    """An untrained model that tells places apart."""
    grammar = tiny.grammar(codebooks, blanks=blanks)
    model = Decoder.Config(**vars(tiny.decoder(rope_grid=1, places=4, vocab=0))).fit(grammar.vocabulary)
    objective = NextToken.Config().fit(grammar.vocabulary)
    run = Run(model=model, objective=objective, data=tiny.decoder())  # pyright: ignore[reportArgumentType]
    with jax.set_mesh(mesh):
        structure = Structure(model.build, seed=0)
        params = tiny.drawn(structure.abstract()[0], seed=1)
    optimizer = Optimizer.Config().build(1000)
    return Opened(Built(run, mesh, grammar, structure, objective.build(), optimizer), 0, params, {})


@functools.lru_cache(maxsize=8)
def _forward(generator: Generator, width: int):
    built = generator.opened.built

    @jax.jit
    def logits(params, ids, position):
        stream = Stream(ids=ids, position=position)
        seen = packed_causal(np.zeros((1, width), np.int32))
        seen = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, ids.shape), seen)
        rows = jnp.zeros(ids.shape[:1], jnp.int32)
        batch = Batch(streams={"tokens": stream}, visibility={"tokens": seen}, row_id=rows)
        return built.structure.merge(params, {})(batch)

    return logits


def logits_after(generator: Generator, rows: list[np.ndarray], width: int) -> np.ndarray:
    """`[B, V]`: logits of what comes after each row, by one forward pass over everything; rows begin documents."""
    ids = np.full((len(rows), width), generator.grammar.pad, np.int32)
    position = np.zeros((len(rows), width, 5), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        position[i, : len(row), 0] = np.arange(len(row))
        position[i, : len(row), 1:3] = generator.grammar.places(row)
        position[i, : len(row) - 1, 3:] = position[i, 1 : len(row), 1:3]
        state = jnp.asarray(generator.automaton.start(row))[None]
        position[i, len(row) - 1, 3:] = np.asarray(generator.automaton.place(state))[0]
    with jax.set_mesh(generator.opened.built.mesh):
        arrays = jnp.asarray(ids), jnp.asarray(position)
        found = np.asarray(_forward(generator, width)(generator.opened.params, *arrays))
    return np.stack([found[i, len(row) - 1] for i, row in enumerate(rows)])
