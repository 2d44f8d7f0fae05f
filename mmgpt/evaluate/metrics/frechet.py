"""The Frechet distance between two sets of pictures, as Gaussians of their features (arXiv 1706.08500).

Which features is the caller's choice (`metrics.features`): with Inception's it is FID. Sums are kept in float64.
"""

import numpy as np

from mmgpt.evaluate.metrics.captions import MetricError


class Moments:
    """Mean and covariance of features that come in batches (Chan et al. 1979: sums of squares about the mean)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = np.zeros(0)
        self._squares = np.zeros((0, 0))

    def add(self, features_ND: np.ndarray) -> None:
        """Takes a batch in; MetricError where it is no finite `[N, D]` or D changes."""
        batch = np.asarray(features_ND, np.float64)
        if batch.ndim != 2 or (self.count and batch.shape[1] != len(self.mean)):
            wanted = f"[N, {len(self.mean)}]" if self.count else "[N, D]"
            raise MetricError(f"features of shape {batch.shape}, expected {wanted}; mend the feature function.")
        if not np.isfinite(batch).all():
            raise MetricError("features hold NaN or infinity; mend the feature function.")
        if not len(batch):
            return
        if not self.count:
            self.mean, self._squares = np.zeros(batch.shape[1]), np.zeros((batch.shape[1], batch.shape[1]))
        mean, total = batch.mean(0), self.count + len(batch)
        centred, shift = batch - mean, mean - self.mean
        self._squares += centred.T @ centred + np.outer(shift, shift) * (self.count * len(batch) / total)
        self.mean = self.mean + shift * (len(batch) / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """`[D, D]`, by N - 1; MetricError for fewer than two pictures."""
        if self.count < 2:
            raise MetricError(f"a covariance needs two pictures or more, found {self.count}.")
        return self._squares / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """`|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`, never below 0.

    The trace of the root is the sum of the singular values of `C_a^(1/2) C_b^(1/2)`: no complex numbers, and no root of
    a rounding error, also where a covariance is singular.
    """
    first, second = a.covariance, b.covariance
    if first.shape != second.shape:
        raise MetricError(f"features of {len(first)} and of {len(second)} numbers cannot be compared.")
    between = np.linalg.svd(_root(first) @ _root(second), compute_uv=False).sum()
    distance = np.square(a.mean - b.mean).sum() + np.trace(first) + np.trace(second) - 2.0 * between
    return max(0.0, float(distance))


def _root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric root; eigenvalues within rounding of 0 are 0, or their roots would be errors of 1e-8."""
    values, vectors = np.linalg.eigh(matrix)
    noise = len(matrix) * np.finfo(np.float64).eps * np.abs(values).max(initial=0.0)
    return (vectors * np.sqrt(np.where(values > noise, values, 0.0))) @ vectors.T
