"""The Frechet distance against closed forms, scipy's matrix root, and features in any batches."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgpt.evaluate.metrics.captions import MetricError
from mmgpt.evaluate.metrics.frechet import Moments, frechet_distance


def moments(*batches: np.ndarray) -> Moments:
    found = Moments()
    for batch in batches:
        found.add(batch)
    return found


def exact(mean: np.ndarray, root: np.ndarray) -> Moments:
    """Moments of samples whose mean and covariance are exactly these: a cross of points, stretched."""
    D = len(mean)
    cross = np.concatenate([np.eye(D), -np.eye(D)]) * np.sqrt((2 * D - 1) / 2)
    return moments(cross @ root.T + mean)


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_batches_do_not_matter(seed: int, first: int, second: int):
    x = np.random.default_rng(seed).normal(50, 2, (first + second + 3, 4))
    found = moments(x[:first], x[first : first + second], x[first + second :])
    assert found.mean == pytest.approx(x.mean(0), rel=1e-12)
    assert found.covariance == pytest.approx(np.cov(x.T), rel=1e-9, abs=1e-9)


def test_gaussians_that_differ_in_mean_and_spread_alone():
    """For covariances s^2 I and t^2 I the distance is |m - n|^2 + D (s - t)^2."""
    D, s, t = 7, 2.0, 0.5
    shift = np.arange(D) * 0.3
    a, b = exact(np.zeros(D), s * np.eye(D)), exact(shift, t * np.eye(D))
    assert frechet_distance(a, b) == pytest.approx((shift**2).sum() + D * (s - t) ** 2, rel=1e-10)


def test_commuting_covariances_differ_by_their_roots():
    """For covariances with the same eigenvectors it is the sum of (root - root)^2."""
    rng = np.random.default_rng(1)
    turn, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    s, t = rng.uniform(0, 3, 5), rng.uniform(0, 3, 5)
    s[0] = 0.0  # singular
    a, b = (exact(np.zeros(5), (turn * root) @ turn.T) for root in (s, t))
    assert frechet_distance(a, b) == pytest.approx(((s - t) ** 2).sum(), rel=1e-9)


def test_distance_is_that_with_scipys_matrix_root():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 12)) @ rng.normal(size=(12, 12)), rng.normal(1, 2, (300, 12))
    between = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * between)
    found = frechet_distance(moments(x), moments(y))
    assert found == pytest.approx(expected, rel=1e-8)
    assert found == pytest.approx(frechet_distance(moments(y), moments(x)), rel=1e-8)


def test_a_set_is_at_no_distance_from_itself_also_with_fewer_pictures_than_features():
    x = np.random.default_rng(0).normal(size=(9, 40))
    assert frechet_distance(moments(x), moments(x[::-1])) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("bad", [np.zeros(3), np.full((2, 2), np.nan), np.zeros((2, 3, 4))])
def test_features_of_another_form_are_an_error(bad: np.ndarray):
    with pytest.raises(MetricError, match="feature"):
        moments(bad)


def test_too_few_pictures_and_other_features_are_errors():
    with pytest.raises(MetricError, match="two pictures"):
        frechet_distance(moments(np.zeros((1, 2))), moments(np.zeros((5, 2))))
    with pytest.raises(MetricError, match="of 2 and of 3"):
        frechet_distance(moments(np.zeros((4, 2))), moments(np.zeros((4, 3))))
    with pytest.raises(MetricError, match=r"expected \[N, 2\]"):
        moments(np.zeros((4, 2)), np.zeros((4, 3)))
