"""PSNR and SSIM beside their definitions, window by window in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgpt.nn.image_metrics import psnr, ssim


def pictures() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, (3, 15, 13, 3))
    return a.astype(np.float32), np.clip(
        a + rng.normal(size=a.shape) * [[[[0.1]]], [[[0.5]]], [[[1.0]]]], -1, 1
    ).astype(np.float32)


def test_psnr() -> None:
    a, b = pictures()
    expected = [10 * np.log10(4 / np.mean((x - y) ** 2)) for x, y in zip(a.astype(float), b.astype(float), strict=True)]
    np.testing.assert_allclose(psnr(jnp.asarray(a), jnp.asarray(b)), expected, rtol=1e-5)
    np.testing.assert_allclose(psnr((a + 1) / 2, (b + 1) / 2, span=1.0), expected, rtol=1e-5)
    assert float(psnr(a, a)[0]) == pytest.approx(100.0)


def test_ssim_is_the_mean_over_windows_of_the_formula() -> None:
    a, b = pictures()
    off = np.arange(11) - 5
    window = np.exp(-(off[:, None] ** 2 + off[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    expected = []
    for x, y in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
        values = []
        for row, column, channel in np.ndindex(15 - 10, 13 - 10, 3):
            p, q = (v[row : row + 11, column : column + 11, channel] for v in (x, y))
            mean_p, mean_q = np.sum(window * p), np.sum(window * q)
            var_p, var_q = np.sum(window * (p - mean_p) ** 2), np.sum(window * (q - mean_q) ** 2)
            both = np.sum(window * (p - mean_p) * (q - mean_q))
            c1, c2 = 0.02**2, 0.06**2
            values.append(
                (2 * mean_p * mean_q + c1) * (2 * both + c2) / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2))
            )
        expected.append(np.mean(values))
    assert expected[0] > expected[1] > expected[2]
    np.testing.assert_allclose(jax.jit(ssim)(a, b), expected, atol=1e-5)
    assert float(jax.jit(ssim)(a, a)[0]) == pytest.approx(1.0)
