"""Vector quantisation: vectors to codes of a codebook, and what trains both.

A codebook follows its vectors by moving averages (arXiv 1711.00937, appendix A: `Quantizer`), or by gradients: by
those of the chosen codes (`vector_quantize`), or of all codes at once (`index_backpropagation`, arXiv 2412.02692).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mmgpt.nn.param import Variable, act, normal, param, take, zeros


class Quantized(NamedTuple):
    """`vectors [B, H, W, D]` are those of the codes, with a gradient; `code [B, H, W]` int32.

    `loss [B, H, W]` binds vectors and codes. `scores [B, H, W, V]` say how well each code fits; the highest is chosen.
    """

    vectors: jax.Array
    code: jax.Array
    loss: jax.Array
    scores: jax.Array


def vector_quantize(z_BHWD: jax.Array, codebook_VD: jax.Array, commitment: float = 0.25) -> Quantized:
    """The nearest code of each place (arXiv 1711.00937): its latents get the gradient of the code, straight through.

    The loss moves codes to their latents and, `commitment` times as much, latents to their codes.
    """
    fixed = jax.lax.stop_gradient
    off = jnp.sum(jnp.square(z_BHWD), axis=-1, keepdims=True)
    scores = 2.0 * _products(z_BHWD, codebook_VD) - jnp.sum(jnp.square(codebook_VD), axis=1)[None, None, None] - off
    code, hard = _chosen(scores, codebook_VD)
    loss = _mean_square(hard - fixed(z_BHWD)) + commitment * _mean_square(fixed(hard) - z_BHWD)
    return Quantized(fixed(hard) + (z_BHWD - fixed(z_BHWD)), code, loss, scores)


def index_backpropagation(z_BHWD: jax.Array, codebook_VD: jax.Array, commitment: float = 0.25) -> Quantized:
    """The code with the largest dot product; its one-hot is that of a softmax over all codes, straight through.

    So a gradient reaches every code and not only the chosen one (arXiv 2412.02692, equations 4 to 6).
    """
    fixed = jax.lax.stop_gradient
    scores = _products(z_BHWD, codebook_VD)
    code, hard = _chosen(scores, codebook_VD)
    share = jax.nn.softmax(scores, axis=-1)
    # hard = onehot @ codebook, but exact in any matmul precision; the second summand is zero and has the gradient.
    vectors = hard + jnp.matmul(share - fixed(share), codebook_VD)
    bound = _mean_square(fixed(hard) - z_BHWD) + commitment * _mean_square(hard - fixed(z_BHWD))
    return Quantized(vectors, code, _mean_square(vectors - z_BHWD) + bound, scores)


def entropies(scores_BHWV: jax.Array, weight_BHW: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    """Entropy of each place's softmax over the codes, `[B, H, W]`, and of their mean over all places, in nats.

    The first is small where a code fits far better than others, the second large where all codes are used.
    Places of weight 0 do not count.
    """
    log_BHWV = jax.nn.log_softmax(scores_BHWV / temperature, axis=-1)
    share_BHWV = jnp.exp(log_BHWV)
    each_BHW = -jnp.sum(share_BHWV * log_BHWV, axis=-1)
    mean_V = jnp.sum(share_BHWV * weight_BHW[..., None], axis=(0, 1, 2)) / jnp.maximum(jnp.sum(weight_BHW), 1e-9)
    return each_BHW, -jnp.sum(mean_V * jnp.log(jnp.maximum(mean_V, 1e-12)))


def _products(z_BHWD: jax.Array, codebook_VD: jax.Array) -> jax.Array:
    return jnp.matmul(z_BHWD, codebook_VD.T, precision="highest")


def _chosen(scores_BHWV: jax.Array, codebook_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The code of the highest score, and its vector."""
    code = jnp.argmax(scores_BHWV, axis=-1).astype(jnp.int32)
    return code, take(codebook_VD, code, "batch height width channels")


def _mean_square(x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(x), axis=-1)


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
