"""Which vector of a codebook stands for a place's latents: the nearest, or the one of largest dot product.

All scores of a picture are places x codes numbers (a gigabyte for 8,100 places and 32,768 codes), so they are made in
blocks of places that a CPU's cache holds.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mmgpt.nn.param import by_row

BLOCK = 1 << 21
"""Scores at a time: 8 MB."""


def nearest_code(codebook_VD: jax.Array, z_BHWD: jax.Array) -> jax.Array:
    """The code whose vector lies nearest to each place's, `[B, H, W, 1] int32`; of equals the first."""

    def scores(z_ND: jax.Array, book_VD: jax.Array) -> jax.Array:
        return 2.0 * z_ND @ book_VD.T - jnp.sum(jnp.square(book_VD), axis=1)[None]

    return _highest(scores, codebook_VD, z_BHWD)


def aligned_code(codebook_VD: jax.Array, z_BHWD: jax.Array) -> jax.Array:
    """The code whose vector has the largest dot product with each place's; otherwise as `nearest_code`."""
    return _highest(lambda z_ND, book_VD: z_ND @ book_VD.T, codebook_VD, z_BHWD)


def _highest(
    scores: Callable[[jax.Array, jax.Array], jax.Array], codebook_VD: jax.Array, z_BHWD: jax.Array
) -> jax.Array:
    codes = codebook_VD.shape[0]

    def block(z_ND: jax.Array, book_VD: jax.Array) -> jax.Array:
        score = scores(z_ND, book_VD)
        best = jnp.max(score, axis=1, keepdims=True)
        number = jnp.arange(codes, dtype=jnp.int32)[None]
        # Twice a plain reduction: a CPU's argmax looks at one number at a time.
        return jnp.min(jnp.where(score == best, number, codes), axis=1)

    def of_rows(z_BHWD: jax.Array, book_VD: jax.Array) -> jax.Array:
        z_ND = z_BHWD.reshape(-1, z_BHWD.shape[-1])
        size = max(1, min(len(z_ND), BLOCK // codes))
        padded = jnp.pad(z_ND, ((0, -len(z_ND) % size), (0, 0)))
        found = jax.lax.map(lambda part: block(part, book_VD), padded.reshape(-1, size, padded.shape[-1]))
        return found.reshape(-1)[: len(z_ND)].reshape(*z_BHWD.shape[:3], 1)

    return by_row(of_rows, z_BHWD.astype(jnp.float32), codebook_VD, "batch height width channels")
