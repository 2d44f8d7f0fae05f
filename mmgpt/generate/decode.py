"""Generation with a static key-value cache: prompts of any lengths in one batch, grammar-guided, with guidance."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.core import config
from mmgpt.core.errors import UserError
from mmgpt.dist import axes as rules
from mmgpt.generate.jacobi import in_windows
from mmgpt.generate.passes import CHUNK, Inputs, Passes, one_by_one
from mmgpt.generate.sampler import Sampling
from mmgpt.tokens.grammars.grammar import Automaton
from mmgpt.train.run import Opened


class PromptError(UserError, ValueError):
    """A prompt that cannot be gone on from; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Ids to go on from, and those of the branches of guidance.

    `negative` is pushed away from (None: the bare opening). `image_only`, the prompt's pictures without its text,
    stands between the two where `image_guidance` is on (None: the negative branch).
    """

    ids: np.ndarray
    negative: np.ndarray | None = None
    image_only: np.ndarray | None = None

    def branches(self, count: int) -> list[np.ndarray]:
        """The ids of the first `count` branches."""
        negative = self.ids[:1] if self.negative is None else self.negative
        return [self.ids, negative, negative if self.image_only is None else self.image_only][:count]


@dataclasses.dataclass(frozen=True)
class Made:
    """`ids` of a prompt and its continuation, up to and with EOS, without padding; `passes` through the model."""

    ids: np.ndarray
    passes: int


class Generator:
    """Generates with an opened run, `batch` prompts at a time or a few more, so that they divide over the devices.

    Compiled once for each width of prompts and way of sampling.

    `sizes` are the media sizes (T, H, W) it may open, T = 0 for an image. `context` is the longest document that the
    model knows; 0 sets no limit. `scan` runs the layers in a loop (None: everywhere but on a CPU, where a scanned step
    takes twice as long).
    """

    def __init__(
        self,
        opened: Opened,
        sizes: Sequence[tuple[int, int, int]],
        batch: int = 32,
        context: int = 0,
        scan: bool | None = None,
    ):
        grammar = opened.built.grammar
        if grammar is None:
            raise config.ConfigError("this run does not model tokens: generation needs a run with a grammar.")
        if batch < 1:
            raise config.ConfigError(f"the batch is {batch} prompts; it must be at least 1.")
        ways = rules.ways("batch", opened.built.mesh)
        self.opened, self.grammar, self.batch, self.context = opened, grammar, -(-batch // ways) * ways, context
        self.automaton: Automaton = grammar.automaton(tuple(sizes))
        self.scan = opened.built.mesh.devices.flat[0].platform != "cpu" if scan is None else scan

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[np.ndarray]:
        """Prompt and continuation of each prompt, up to and with EOS, without padding."""
        return [made.ids for made in self.run(prompts, sampling)]

    def run(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Made]:
        """What is made of each prompt; PromptError and GrammarError say which cannot be gone on from."""
        branches = [prompt.branches(sampling.branches) for prompt in prompts]
        longest = max((len(ids) for branch in branches for ids in branch), default=1)
        if self.context:
            self._check(branches)
        states = [self.automaton.start(prompt.ids) for prompt in prompts]
        width = -(-longest // 32) * 32  # few widths: few compilations
        width = width if width <= CHUNK else -(-width // CHUNK) * CHUNK
        results: list[Made] = []
        for first in range(0, len(prompts), self.batch):
            few = slice(first, min(first + self.batch, len(prompts)))
            results += self._batch(branches[few], states[few], np.arange(first, first + self.batch), width, sampling)
        return results

    def _check(self, branches: list[list[np.ndarray]]) -> None:
        for number, branch in enumerate(branches):
            for ids, name in zip(branch, ("prompt", "negative prompt", "prompt without its text"), strict=False):
                if len(ids) >= self.context:
                    raise PromptError(
                        f"{name} {number} takes {len(ids)} tokens and the model knows documents of {self.context}: "
                        "nothing is left to generate. Give a shorter prompt, or smaller pictures."
                    )

    def _batch(
        self,
        branches: list[list[np.ndarray]],
        states: list[np.ndarray],
        rows: np.ndarray,
        width: int,
        sampling: Sampling,
    ) -> list[Made]:
        fill = self.batch - len(branches)
        padded, states = branches + branches[-1:] * fill, states + states[-1:] * fill
        flat = [branch[i] for i in range(sampling.branches) for branch in padded]
        ids = np.full((len(flat), width), self.grammar.pad, np.int32)
        position = np.zeros((len(flat), width, 5), np.int32)
        for row, place, prompt in zip(ids, position, flat, strict=True):
            row[width - len(prompt) :] = prompt  # prompts end at the same slot, so that all rows step together
            place[width - len(prompt) :, 0] = np.arange(len(prompt))
            place[width - len(prompt) :, 1:3] = self.grammar.places(prompt)
            place[width - len(prompt) : -1, 3:] = place[width - len(prompt) + 1 :, 1:3]
        lengths = np.array([[len(ids) for ids in branch] for branch in padded], np.int32)
        room = np.full(self.batch, sampling.room, np.int32)
        if self.context:
            room = np.minimum(room, self.context - lengths.max(axis=1)).astype(np.int32)
        padding = np.array([width - len(prompt) for prompt in flat], np.int32)
        inputs = Inputs(ids, position, padding, np.stack(states), room, rows.astype(np.int32))
        built = self.opened.built
        with jax.set_mesh(built.mesh):
            compiled = compiled_for(built.structure, self.automaton, sampling.replace(seed=0), self.scan)
            arrays = jax.tree.map(jnp.asarray, inputs)
            new, passes = compiled(self.opened.params, self.opened.variables, arrays, jax.random.key(sampling.seed))
        made = zip(branches, np.asarray(new), np.asarray(passes), strict=False)
        return [Made(self._trimmed(branch[0], row), int(count)) for branch, row, count in made]

    def _trimmed(self, prompt: np.ndarray, new: np.ndarray) -> np.ndarray:
        ends = np.flatnonzero(new == self.grammar.pad)
        return np.concatenate([prompt, new[: ends[0]] if len(ends) else new]).astype(np.int32)


@functools.lru_cache(maxsize=64)
def compiled_for(structure: Any, automaton: Automaton, sampling: Sampling, scan: bool) -> Any:
    """The jitted prefill and decoding loop of one model, grammar and way of sampling."""

    def run(params: Any, variables: Any, inputs: Inputs, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        passes = Passes(structure.merge(params, variables), automaton, sampling, inputs, scan=scan)
        return in_windows(passes, key) if sampling.jacobi else one_by_one(passes, key)

    return jax.jit(run)
