"""How near a picture is to another: PSNR and SSIM, one number for each picture."""

import jax
import jax.numpy as jnp
import numpy as np

SIGMA, SIDE = 1.5, 11
"""SSIM's Gaussian window in pixels."""


def psnr(a_BHWC: jax.Array, b_BHWC: jax.Array, span: float = 2.0) -> jax.Array:
    """Peak signal-to-noise ratio in dB, `[B]`, of pictures whose values span `span`; 100 dB at most."""
    error = jnp.mean(jnp.square(a_BHWC - b_BHWC), axis=(1, 2, 3))
    return 10.0 * jnp.log10(span**2 / jnp.maximum(error, span**2 * 1e-10))


def ssim(a_BHWC: jax.Array, b_BHWC: jax.Array, span: float = 2.0) -> jax.Array:
    """Structural similarity `[B]` (Wang et al., 2004): the mean over channels and over windows that lie inside.

    Gaussian windows of 11 pixels and sigma 1.5, constants (.01 span)^2 and (.03 span)^2. Sides of 11 pixels at least.
    """
    low, contrast = (0.01 * span) ** 2, (0.03 * span) ** 2
    mean_a, mean_b = _windowed(a_BHWC), _windowed(b_BHWC)
    spread_a = _windowed(jnp.square(a_BHWC)) - jnp.square(mean_a)
    spread_b = _windowed(jnp.square(b_BHWC)) - jnp.square(mean_b)
    together = _windowed(a_BHWC * b_BHWC) - mean_a * mean_b
    alike = (2 * mean_a * mean_b + low) * (2 * together + contrast)
    most = (jnp.square(mean_a) + jnp.square(mean_b) + low) * (spread_a + spread_b + contrast)
    return jnp.mean(alike / most, axis=(1, 2, 3))


def _windowed(x_BHWC: jax.Array) -> jax.Array:
    """Weighted means of the windows, `[B, H - 10, W - 10, C]`: over rows, then over columns."""
    off = np.arange(SIDE) - SIDE // 2
    weight = np.exp(-0.5 * (off / SIGMA) ** 2)
    weight = (weight / weight.sum()).astype(np.float32)
    for axis in (1, 2):
        left = x_BHWC.shape[axis] - SIDE + 1
        shifted = [jax.lax.slice_in_dim(x_BHWC, i, i + left, axis=axis) for i in range(SIDE)]
        x_BHWC = jnp.sum(jnp.stack(shifted, axis=-1) * weight.reshape(1, 1, 1, 1, -1), axis=-1)
    return x_BHWC
