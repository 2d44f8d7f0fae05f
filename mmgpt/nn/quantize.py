"""Vector quantisation with a codebook that follows its vectors by moving averages (arXiv 1711.00937, appendix A)."""

import jax
import jax.numpy as jnp
from flax import nnx

from mmgpt.nn.param import Variable, act, normal, param, take, zeros


class Quantizer(nnx.Module):
    """`codes` vectors of width `dim`; counts and sums are state, not parameters."""

    def __init__(self, rngs: nnx.Rngs, codes: int, dim: int):
        self.codebook = param(rngs, "codes pixels", (codes, dim), normal(dim**-0.5), kind=Variable)
        self.count = param(rngs, "codes", (codes,), zeros, kind=Variable)

    def encode(self, z_ND: jax.Array) -> jax.Array:
        """Nearest code of each vector, `[N] int32`."""
        return nearest(self.codebook[...], z_ND)

    def decode(self, code_N: jax.Array, axes: str = "batch pixels") -> jax.Array:
        """The vectors of codes, laid out by `axes`."""
        return take(self.codebook[...], code_N, axes)

    def follow(
        self, key: jax.Array, z_ND: jax.Array, code_N: jax.Array, weight_N: jax.Array, decay: float
    ) -> dict[str, jax.Array]:
        """The codebook after a batch: used codes move to their vectors' mean, unused ones restart at random vectors.

        Vectors of weight 0 do not count.
        """
        codes = self.count[...].shape[0]
        # The codebook sees the whole batch, on every device.
        z_ND = act(jax.lax.stop_gradient(z_ND), "codes pixels")
        code_N, weight_N = act(code_N, "codes"), act(weight_N, "codes")
        count = jnp.zeros((codes,), jnp.float32).at[code_N].add(weight_N)
        total = jnp.zeros_like(self.codebook[...]).at[code_N].add(z_ND * weight_N[:, None])
        new_count = decay * self.count[...] + (1.0 - decay) * count
        rate = jnp.where(count > 0, (1.0 - decay) * count / jnp.maximum(new_count, 1e-9), 0.0)
        mean = total / jnp.maximum(count, 1e-9)[:, None]
        book = self.codebook[...] + rate[:, None] * (mean - self.codebook[...])
        # A code that is hardly used is dead: put it where the error is. Uniform picks would land on what is common
        # and die again; picks by squared error spread over what is rare (as in k-means++).
        fair = jnp.sum(weight_N) / codes
        error = jnp.cumsum(weight_N * jnp.sum(jnp.square(z_ND - self.decode(code_N, "codes pixels")), axis=1))
        dead = (new_count < 0.1 * fair) & (error[-1] > 0)
        picks = jnp.searchsorted(error, jax.random.uniform(key, (codes,)) * error[-1])
        book = jnp.where(dead[:, None], z_ND.at[picks].get(), book)
        return {"codebook": book, "count": jnp.where(dead, 0.2 * fair, new_count)}


def nearest(codebook_VD: jax.Array, z_ND: jax.Array) -> jax.Array:
    """The code whose vector lies nearest to each of `z [N, D]`, `[N] int32`."""
    distance = jnp.sum(jnp.square(codebook_VD), axis=1)[None, :] - 2.0 * z_ND @ codebook_VD.T
    return jnp.argmin(distance, axis=1).astype(jnp.int32)
