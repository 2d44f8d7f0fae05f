"""A trained image tokenizer: pixels to code grids and back, in batches of one compiled size."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.core.config import ConfigError
from mmgpt.dist import axes as rules
from mmgpt.models import VisionConfig
from mmgpt.train.run import Opened, open_run


class VisionTokenizer:
    """The tokenizer of a run: `codebooks` are the sizes in the order of a place's codes, `patch` its pixels a side."""

    def __init__(self, opened: Opened, batch: int = 64):
        """`batch` pictures at a time or a few more, so that they divide over the devices."""
        model = opened.built.run.model
        if not isinstance(model, VisionConfig):
            raise ConfigError("this run trains no image tokenizer; name one that does.")
        ways = rules.ways("batch", opened.built.mesh)
        self._opened, self._batch = opened, -(-batch // ways) * ways
        self.codebooks, self.patch = model.codebooks, model.patch
        structure = opened.built.structure
        self._encode = jax.jit(lambda p, v, x: structure.merge(p, v).encode(x.astype(jnp.float32) / 127.5 - 1.0))
        self._decode = jax.jit(lambda p, v, c: _to_uint8(structure.merge(p, v).decode(c)))

    @classmethod
    def load(cls, run_dir: Path) -> "VisionTokenizer":
        return cls(open_run(run_dir))

    def encode(self, images_BHWC: np.ndarray) -> np.ndarray:
        """Codes `[B, h, w, C] int32` of uint8 images `[B, H, W, 3]` whose sides are multiples of `patch`."""
        return self._batched(self._encode, images_BHWC)

    def decode(self, codes_BHWC: np.ndarray) -> np.ndarray:
        """Images uint8 `[B, H, W, 3]` of codes `[B, h, w, C]`."""
        return self._batched(self._decode, codes_BHWC.astype(np.int32))

    def _batched(self, function: jax.stages.Wrapped, items: np.ndarray) -> np.ndarray:
        out = []
        with jax.set_mesh(self._opened.built.mesh):
            for first in range(0, len(items), self._batch):
                part = items[first : first + self._batch]
                padded = np.concatenate([part, np.repeat(part[-1:], self._batch - len(part), axis=0)])
                done = function(self._opened.params, self._opened.variables, jnp.asarray(padded))
                out.append(np.asarray(done)[: len(part)])
        return np.concatenate(out)


def _to_uint8(pixels: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round((pixels + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
