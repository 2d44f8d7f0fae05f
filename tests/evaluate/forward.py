"""What a decoder says of every next id, by whole forward passes, one sequence a row: the slow way to a likelihood."""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
import scipy.special

from mmgpt.data.row import assemble, stacked
from mmgpt.tokens.grammars.grammar import Tokens
from mmgpt.train.run import Opened
from mmgpt.train.state import Structure
from mmgpt.train.step import place

ROWS = 8


def log_probs(opened: Opened, sequences: Sequence[Tokens], length: int) -> list[np.ndarray]:
    """Log-probabilities of all ids in use after each token, float64 `[N, V]`, in rows of `length` tokens."""
    grammar, built = opened.built.grammar, opened.built
    assert grammar is not None
    forward = _compiled(built.structure)
    found: list[np.ndarray] = []
    with jax.set_mesh(built.mesh):
        for first in range(0, len(sequences), ROWS):
            part = sequences[first : first + ROWS]
            rows = [assemble([tokens], length, grammar.pad) for tokens in part]
            rows += [assemble([], length, grammar.pad)] * (ROWS - len(rows))
            logits = np.asarray(forward(opened.params, opened.variables, place(stacked(rows))), np.float64)
            used = scipy.special.log_softmax(logits[..., : grammar.vocabulary.used], axis=-1)
            found += [row[: len(tokens.ids)] for row, tokens in zip(used, part, strict=False)]
    return found


@functools.cache
def _compiled(structure: Structure) -> Callable[..., jax.Array]:
    return jax.jit(lambda params, variables, batch: structure.merge(params, variables)(batch))


def of_text(opened: Opened, ids: Sequence[int]) -> Tokens:
    """Text ids after a document's opening."""
    grammar = opened.built.grammar
    assert grammar is not None
    array = np.array([grammar.bos, *ids], np.int32)  # pyright: ignore[reportAttributeAccessIssue]
    flat = np.zeros((len(array), 2), np.int32)
    return Tokens(ids=array, place=flat, modality=flat[:, 0], weight=np.ones(len(array), np.float32))
