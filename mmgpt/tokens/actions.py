"""Robot actions as tokens, after FAST (Pertsch et al., arXiv 2501.09747).

A chunk of actions [T, A] is scaled by the 1st and 99th percentile of each dimension to [-1, 1], transformed along time
by an orthonormal DCT-II, multiplied by `scale` and rounded, laid out lowest frequency first (all dimensions of the
first, then of the second), and merged by byte-pair encoding. Token i below the size of the alphabet is the coefficient
low + i; a later one is two earlier ones put together, so the file holds numbers alone.

The rounding errs by at most half a step in each coefficient, hence by at most 0.5 / scale in the root mean square of a
chunk, in units of half the percentile range.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
import tokenizers
from tokenizers import models, trainers

from mmgpt.core.errors import UserError
from mmgpt.core.log import write_atomic

SCALE = 10.0
"""Steps per unit of the scaled actions; FAST's own."""
MAX_SIZE = 1 << 16
MAX_VALUES = 1 << 20
MAX_FILE_BYTES = 16 << 20
_MAX_RUN = 256
_FORMAT = "mmgpt-actions-1"
_FIRST = 0x20000
"""Code point of the lowest coefficient: from here on are 173,782 letters, no space, digit or mark among them."""


class ActionError(UserError, ValueError):
    """Actions, tokens or a file that an action tokenizer cannot read; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class ActionTokenizer:
    """`low` and `high` [A] are the percentiles; coefficients from `least` on have the first `alphabet` tokens."""

    low: np.ndarray
    high: np.ndarray
    scale: float
    least: int
    alphabet: int
    merges: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return self.alphabet + len(self.merges)

    @property
    def dims(self) -> int:
        return len(self.low)

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Tokens [N] int32 of actions [T, A]. Coefficients outside the alphabet become its nearest."""
        q = np.clip(_coefficients(values, self.low, self.high, self.scale), self.least, self.least + self.alphabet - 1)
        return np.array(self._pairs.encode(_letters(q - self.least)).ids, np.int32)

    def decode(self, ids: np.ndarray, steps: int, dims: int) -> np.ndarray:
        """Actions [steps, dims] float32 of tokens. Raises ActionError if they are not of that many coefficients."""
        if dims != self.dims:
            raise ActionError(f"the tokenizer is of {self.dims} dimensions, not {dims}; use the one of this robot.")
        ids = np.asarray(ids)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.size:
            raise ActionError(f"an action token is outside 0 to {self.size - 1}; use the tokenizer that made them.")
        lengths = np.array([len(self._parts[i]) for i in ids], np.int64)
        if lengths.sum() != steps * dims:
            raise ActionError(f"the tokens are of {lengths.sum()} coefficients, {steps} x {dims} need {steps * dims}.")
        q = np.concatenate([self._parts[i] for i in ids]).reshape(steps, dims) + self.least
        scaled = np.asarray(scipy.fft.idct(q / self.scale, axis=0, norm="ortho"))
        return ((scaled + 1) / 2 * _range(self.low, self.high) + self.low).astype(np.float32)

    @functools.cached_property
    def _parts(self) -> list[np.ndarray]:
        """The coefficients of each token, as numbers from 0."""
        parts = [np.array([i], np.int32) for i in range(self.alphabet)]
        for a, b in self.merges:
            parts.append(np.concatenate([parts[a], parts[b]]))
        return parts

    @functools.cached_property
    def _pairs(self) -> tokenizers.Tokenizer:
        words = [_letters(part) for part in self._parts]
        vocabulary = {word: i for i, word in enumerate(words)}
        return tokenizers.Tokenizer(models.BPE(vocabulary, [(words[a], words[b]) for a, b in self.merges]))

    def fingerprint(self) -> str:
        """What the tokens of actions depend on, as a hash."""
        return hashlib.sha256(self._file.encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Writes one JSON file."""
        write_atomic(Path(path), self._file)

    @property
    def _file(self) -> str:
        table = {
            "format": _FORMAT,
            "scale": self.scale,
            "low": self.low.tolist(),
            "high": self.high.tolist(),
            "least": self.least,
            "alphabet": self.alphabet,
            "merges": self.merges,
        }
        return json.dumps(table, separators=(",", ":")) + "\n"


def train(chunks: Iterable[np.ndarray], size: int = 1024, scale: float = SCALE) -> ActionTokenizer:
    """A tokenizer of `size` tokens, or fewer if the chunks [T, A] have no more pairs to merge.

    The alphabet has room for every chunk of these lengths whose scaled actions lie in [-1, 1].
    """
    chunks = [_sound(chunk) for chunk in chunks]
    if not chunks:
        raise ActionError("no actions to train on; give at least one chunk.")
    if dims := {chunk.shape[1] for chunk in chunks} - {chunks[0].shape[1]}:
        found = sorted({*dims, chunks[0].shape[1]})
        raise ActionError(f"chunks of {found[:5]} dimensions; train one tokenizer for each robot.")
    if not 1e-3 <= scale <= 1e4:
        raise ActionError(f"a scale of {scale} is outside 0.001 to 10000; {SCALE} is usual.")
    low, high = np.percentile(np.concatenate(chunks), [1, 99], axis=0)
    coefficients = [_coefficients(chunk, low, high, scale) for chunk in chunks]
    room = math.ceil(scale * math.sqrt(max(map(len, chunks))))
    least = min(-room, *(int(q.min()) for q in coefficients))
    alphabet = max(room, *(int(q.max()) for q in coefficients)) - least + 1
    if not alphabet <= size <= MAX_SIZE:
        raise ActionError(f"{size} tokens: {alphabet} coefficients need one each, and at most {MAX_SIZE} are allowed.")
    letters = [_letters(np.array([i])) for i in range(alphabet)]
    model = tokenizers.Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        show_progress=False,
        special_tokens=letters,  # which then have the first numbers, in order
        max_token_length=_MAX_RUN,
    )
    model.train_from_iterator((_letters(q - least) for q in coefficients), trainer)
    learned = json.loads(model.to_str())["model"]
    vocabulary: dict[str, int] = learned["vocab"]
    # "a" + "aa" and "aa" + "a" are one token of the vocabulary, of which the first way to it is enough.
    ways = {a + b: (vocabulary[a], vocabulary[b]) for a, b in reversed(learned["merges"])}
    merges = [ways[token] for token, i in sorted(vocabulary.items(), key=lambda item: item[1]) if i >= alphabet]
    return _checked(ActionTokenizer(low, high, float(scale), least, alphabet, tuple(merges)))


def load(path: Path) -> ActionTokenizer:
    """The tokenizer of a file that `save` wrote. Raises ActionError, naming the file, for anything else."""
    try:
        if Path(path).stat().st_size > MAX_FILE_BYTES:
            raise ActionError(f"over {MAX_FILE_BYTES} bytes")
        return _from_table(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as e:  # ActionError and UnicodeDecodeError are ValueErrors
        raise ActionError(f"{path}: no action tokenizer: {e}. `mmgpt tokenize actions` writes one.") from e


def _from_table(table: Any) -> ActionTokenizer:
    if not isinstance(table, dict) or table.get("format") != _FORMAT:
        raise ActionError(f"the format is not {_FORMAT!r}")
    low, high, scale, merges = (table.get(name) for name in ("low", "high", "scale", "merges"))
    for name, values in (("low", low), ("high", high), ("scale", [scale])):
        if not isinstance(values, list) or not values or not all(_finite(v) for v in values):
            raise ActionError(f"{name} must be finite numbers")
    for name in ("least", "alphabet"):
        if type(table.get(name)) is not int or abs(table[name]) > MAX_SIZE:
            raise ActionError(f"{name} must be a whole number of at most {MAX_SIZE}")
    if not isinstance(merges, list) or not all(isinstance(m, list) and len(m) == 2 for m in merges):
        raise ActionError("merges must be pairs of tokens")
    pairs = tuple((a, b) for a, b in merges)
    numbers = np.asarray(low, np.float64), np.asarray(high, np.float64)
    return _checked(ActionTokenizer(*numbers, float(scale), table["least"], table["alphabet"], pairs))  # pyright: ignore[reportArgumentType]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _checked(made: ActionTokenizer) -> ActionTokenizer:
    """`made`, if its parts fit each other and its longest token is bounded."""
    if made.low.shape != made.high.shape or (made.high < made.low).any():
        raise ActionError("low and high must be of one length, high at least low")
    if not 1e-3 <= made.scale <= 1e4 or made.alphabet < 1 or made.size > MAX_SIZE:
        raise ActionError(f"a scale of {made.scale} or {made.alphabet} and {len(made.merges)} tokens cannot be")
    lengths = [1] * made.alphabet
    for i, (a, b) in enumerate(made.merges, made.alphabet):
        if type(a) is not int or type(b) is not int or not (0 <= a < i and 0 <= b < i):
            raise ActionError(f"token {i} is made of {str(a)[:20]} and {str(b)[:20]}, which do not come before it")
        lengths.append(lengths[a] + lengths[b])
        if lengths[i] > _MAX_RUN:
            raise ActionError(f"token {i} is of {lengths[i]} coefficients, at most {_MAX_RUN}")
    if len({part.tobytes() for part in made._parts}) < made.size:
        raise ActionError("two tokens are of the same coefficients")
    return made


def _sound(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size or values.size > MAX_VALUES or not np.isfinite(values).all():
        raise ActionError(f"actions must be finite [steps, dimensions], found {list(values.shape)}.")
    return values


def _range(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """high - low; 1 where a dimension does not move, so that it stays where it is."""
    return np.where(high > low, high - low, 1.0)


def _coefficients(values: np.ndarray, low: np.ndarray, high: np.ndarray, scale: float) -> np.ndarray:
    values = _sound(values)
    if values.shape[1] != len(low):
        raise ActionError(f"actions of {values.shape[1]} dimensions; the tokenizer is of {len(low)}.")
    scaled = (values - low) / _range(low, high) * 2 - 1
    return np.rint(np.asarray(scipy.fft.dct(scaled, axis=0, norm="ortho")) * scale).astype(np.int64)


def _letters(numbers: np.ndarray) -> str:
    return (numbers.reshape(-1).astype(np.uint32) + _FIRST).astype("<u4").tobytes().decode("utf-32-le")
