"""How likely a model holds given tokens: the log-probability of every token of a sequence, many sequences a row."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.core.config import ConfigError
from mmgpt.core.stream import Batch
from mmgpt.data.pack import pack_all
from mmgpt.data.row import assemble, stacked
from mmgpt.dist import axes as rules
from mmgpt.kernels.cross_entropy.api import cross_entropy
from mmgpt.tokens.grammars.grammar import Grammar, Tokens
from mmgpt.train.run import Opened
from mmgpt.train.step import place

LOGITS = 1 << 27
"""Numbers in a batch's logits at most, unless one row a device has more: half a gigabyte in float32."""
WINDOW = 2048
"""Sequences that are packed together."""


class Scored(NamedTuple):
    """Of each token after the first: its natural log-probability, float32 [N - 1], and whether none was likelier."""

    log_prob: np.ndarray
    likeliest: np.ndarray


def tokens_of(ids: Sequence[int] | np.ndarray, place: np.ndarray | None = None) -> Tokens:
    """Ids to be scored, of text alone without `place`: modality and weight are not those of training."""
    array, flat = np.array(ids, np.int32), np.zeros((len(ids), 2), np.int32)
    weight = np.ones(len(ids), np.float32)
    return Tokens(ids=array, place=flat if place is None else place, modality=flat[:, 0], weight=weight)


class Likelihood:
    """Scores sequences with an opened run, in rows of `row_length` tokens that hold several each.

    What stands in a row together does not see each other: packing changes a score by rounding alone.
    """

    def __init__(self, opened: Opened, row_length: int, batch: int = 32):
        if opened.built.grammar is None:
            raise ConfigError("this run does not model tokens: likelihoods need a run with a grammar.")
        self.grammar: Grammar = opened.built.grammar
        self._opened, self.row_length = opened, row_length
        ways = rules.ways("batch", opened.built.mesh)
        most = max(1, LOGITS // (row_length * self.grammar.vocabulary.padded()))
        self._batch = -(-min(batch, most) // ways) * ways

    def score(self, sequences: Iterable[Tokens]) -> Iterator[tuple[Tokens, Scored]]:
        """Sequences, each one to `row_length` tokens long, with their scores, in order."""
        window: list[Tokens] = []
        for tokens in sequences:
            window.append(tokens)
            if len(window) == WINDOW:
                yield from self._scored(window)
                window = []
        yield from self._scored(window)

    def _scored(self, window: Sequence[Tokens]) -> list[tuple[Tokens, Scored]]:
        closed = pack_all(np.array([len(tokens.ids) for tokens in window], np.int64), self.row_length)
        found: dict[int, Scored] = {}
        for first in range(0, len(closed), self._batch):
            rows = closed[first : first + self._batch]
            rows += [[]] * (self._batch - len(rows))
            log_prob, likeliest = self._run([[window[i] for i in row] for row in rows])
            for number, row in enumerate(rows):
                at = 0
                for i in row:
                    end = at + len(window[i].ids)
                    found[i] = Scored(log_prob[number, at : end - 1], likeliest[number, at : end - 1])
                    at = end
        return [(tokens, found[i]) for i, tokens in enumerate(window)]

    def _run(self, rows: Sequence[Sequence[Tokens]]) -> tuple[np.ndarray, np.ndarray]:
        parts = [assemble(row, self.row_length, self.grammar.pad) for row in rows]
        built = self._opened.built
        with jax.set_mesh(built.mesh):
            compiled = _compiled(built.structure, self.grammar.vocabulary.used)
            log_prob, likeliest = compiled(self._opened.params, self._opened.variables, place(stacked(parts)))
            return np.asarray(log_prob), np.asarray(likeliest)


@functools.lru_cache(maxsize=8)
def _compiled(structure: Any, used: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The jitted forward pass that scores the target of every position; padded vocabulary rows take no part."""

    def run(params: Any, variables: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        stream, model = batch.streams["tokens"], structure.merge(params, variables)
        weight, rows = model.projection
        _, scores = cross_entropy(
            model.hidden(batch), weight[...], stream.target, jnp.zeros_like(stream.weight), used=used, rows=rows
        )
        return -scores.cross_entropy, scores.right

    return jax.jit(run)
