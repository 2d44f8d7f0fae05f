"""A trained image tokenizer: pixels to code grids and back, in batches of one compiled size; clips in windows."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.core.config import ConfigError
from mmgpt.dist import axes as rules
from mmgpt.interop.open import open_folder
from mmgpt.models import VisionConfig
from mmgpt.train.run import Opened

PIXELS = 1 << 20
"""Pixels encoded or drawn at once: at full size a layer of Emu3's tokenizer then holds 1 GB."""


class ClipModel(Protocol):
    """What a model of `temporal` above 1 offers beside `encode` and `decode`: single frames, and what binds them."""

    def features(self, pixels_BHWC: jax.Array, /) -> jax.Array: ...
    def codes_of(self, features_BTHWC: jax.Array, /) -> jax.Array: ...
    def vectors(self, codes_BTHWC: jax.Array, /) -> jax.Array: ...
    def frames_of(self, vectors_BTHWC: jax.Array, /) -> tuple[jax.Array, jax.Array]: ...
    def draw(self, hidden_BHWC: jax.Array, steering_BHWC: jax.Array, /) -> jax.Array: ...


class VisionTokenizer:
    """The tokenizer of a run or of a Hugging Face folder.

    `codebooks` are the sizes in the order of a place's codes, `patch` its pixels a side, `temporal` its frames.
    """

    def __init__(self, opened: Opened, batch: int = 64):
        """`batch` pictures at a time, fewer where they are large; a few more where devices share them."""
        model = opened.built.run.model
        if not isinstance(model, VisionConfig):
            raise ConfigError("this run trains no image tokenizer; name one that does.")
        self._ways = rules.ways("batch", opened.built.mesh)
        self._opened, self._batch = opened, batch
        self.codebooks, self.patch, self.temporal = model.codebooks, model.patch, model.temporal
        self._past = model.past
        self._window = max(model.past, batch // model.temporal, 1)  # codes over time that are worked out at once
        self._encode = self._jitted(lambda model, x: model.encode(_from_uint8(x)))
        self._decode = self._jitted(lambda model, codes: _to_uint8(model.decode(codes)))
        self._features = self._jitted(lambda model, x: model.features(_from_uint8(x)))
        self._codes_of = self._jitted(lambda model, features: model.codes_of(features))
        self._frames_of = self._jitted(_frames_of)
        self._draw = self._jitted(lambda model, frames: _to_uint8(model.draw(*jnp.split(frames, 2, axis=-1))))

    @classmethod
    def load(cls, folder: Path, batch: int = 64) -> "VisionTokenizer":
        """Opens a run folder or a Hugging Face folder; its errors say what is missing."""
        return cls(open_folder(folder, part="vision"), batch)

    def encode(self, images_BHWC: np.ndarray) -> np.ndarray:
        """Codes `[B, h, w, C] int32` of uint8 images `[B, H, W, 3]` whose sides are multiples of `patch`."""
        return self._batched(self._encode, images_BHWC, images_BHWC.shape[1] * images_BHWC.shape[2])

    def decode(self, codes_BHWC: np.ndarray) -> np.ndarray:
        """Images uint8 `[B, H, W, 3]` of codes `[B, h, w, C]`."""
        return self._batched(self._decode, codes_BHWC.astype(np.int32), self._pixels(codes_BHWC))

    def encode_clip(self, frames_THWC: np.ndarray) -> np.ndarray:
        """Codes `[t, h, w, C] int32` of a clip uint8 `[T, H, W, 3]`, t = T / `temporal` rounded up.

        A last group of frames that is not full is filled up with the last frame.
        """
        parts = (frames_THWC[i : i + self._batch] for i in range(0, len(frames_THWC), self._batch))
        return np.concatenate(list(self.encode_parts(parts)))

    def decode_clip(self, codes_THWC: np.ndarray) -> np.ndarray:
        """Frames uint8 `[T * temporal, H, W, 3]` of codes `[T, h, w, C]`."""
        parts = (codes_THWC[i : i + self._window] for i in range(0, len(codes_THWC), self._window))
        return np.concatenate(list(self.decode_parts(parts)))

    def encode_parts(self, parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """As `encode_clip` for a clip of any length that comes in parts of any lengths: the same codes, in parts.

        The large layers see single frames. What binds frames looks at few numbers of each, and back in time only: a
        window of them needs those of `past` codes before it.
        """
        if self.temporal == 1:
            yield from (self.encode(part) for part in parts)
            return
        features = (self._batched(self._features, part, part.shape[1] * part.shape[2]) for part in parts)
        times = self.temporal
        for window, before, count in _windows(features, self._window * times, self._past * times):
            codes = self._alone(self._codes_of, window)[before // times :]
            yield codes[: -(-count // times)]

    def decode_parts(self, parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """As `decode_clip` for codes of any length that come in parts of any lengths: the same frames, in parts."""
        if self.temporal == 1:
            yield from (self.decode(part) for part in parts)
            return
        codes = (part.astype(np.int32) for part in parts)
        for window, before, count in _windows(codes, self._window, self._past):
            frames = self._alone(self._frames_of, window)[before * self.temporal :][: count * self.temporal]
            yield self._batched(self._draw, frames, self._pixels(window))

    def _pixels(self, codes: np.ndarray) -> int:
        """Pixels of a picture by its codes `[..., h, w, C]`."""
        return codes.shape[-3] * codes.shape[-2] * self.patch**2

    def _jitted(self, function: Callable[[Any, jax.Array], jax.Array]) -> Callable[[np.ndarray], jax.Array]:
        """A function of the model, compiled; rows of its argument lie on the devices in equal parts."""
        merge = self._opened.built.structure.merge
        jitted = jax.jit(lambda params, variables, x: function(merge(params, variables), x))

        def call(rows: np.ndarray) -> jax.Array:
            axes = "batch height width channels" if rows.ndim == 4 else "batch time height width channels"
            placed = jax.device_put(rows, rules.sharding(axes, rules.ACT))
            return jitted(self._opened.params, self._opened.variables, placed)

        return call

    def _batched(self, function: Callable[[np.ndarray], jax.Array], items: np.ndarray, pixels: int) -> np.ndarray:
        """All items by full batches, one compiled shape; each stands for so many `pixels`."""
        size = max(1, min(self._batch, PIXELS // pixels))
        size += -size % self._ways
        out: list[np.ndarray] = []
        begun: jax.Array | None = None
        with jax.set_mesh(self._opened.built.mesh):
            for first in range(0, len(items), size):
                part = items[first : first + size]
                before, begun = begun, function(np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)]))
                if before is not None:  # fetched while the device works on the next batch
                    out.append(np.asarray(before))
            out.append(np.asarray(begun))
        return np.concatenate(out)[: len(items)]

    def _alone(self, function: Callable[[np.ndarray], jax.Array], clip: np.ndarray) -> np.ndarray:
        """A function of clips on a single one, which every device works out."""
        with jax.set_mesh(self._opened.built.mesh):
            return np.asarray(function(np.repeat(clip[None], self._ways, axis=0)))[0]


def _windows(parts: Iterable[np.ndarray], size: int, past: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Rows that come in parts, as windows of `size` rows after the `past` rows before them: (rows, before, count).

    The first window has none before it, and the last, of `count` rows, repeats its last row until it is full: two
    shapes, however long the clip is. `size` is at least `past`.
    """
    waiting: list[np.ndarray] = []
    before: np.ndarray | None = None
    for part in _ended(parts):
        if part is not None:
            waiting.append(part)
        while waiting and (sum(map(len, waiting)) >= size or part is None):
            rows = np.concatenate(waiting)
            count = min(len(rows), size)
            full = np.concatenate([rows[:count], np.repeat(rows[count - 1 : count], size - count, axis=0)])
            seen = 0 if before is None else len(before)
            yield full if before is None else np.concatenate([before, full]), seen, count
            before = full[len(full) - past :]
            waiting = [rows[size:]] if len(rows) > size else []


def _ended(parts: Iterable[np.ndarray]) -> Iterator[np.ndarray | None]:
    yield from parts
    yield None


def _frames_of(model: ClipModel, codes_BTHWC: jax.Array) -> jax.Array:
    """What each frame is drawn from, side by side along the channels."""
    return jnp.concatenate(model.frames_of(model.vectors(codes_BTHWC)), axis=-1)


def _from_uint8(pixels: jax.Array) -> jax.Array:
    return pixels.astype(jnp.float32) / 127.5 - 1.0


def _to_uint8(pixels: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round((pixels + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
