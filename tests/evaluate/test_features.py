"""Features of pictures: sizes, what they tell apart, and functions of the user's own."""

from pathlib import Path

import numpy as np
import pytest

from mmgpt.evaluate.metrics import features
from mmgpt.evaluate.metrics.captions import MetricError
from mmgpt.evaluate.subject import Subject


def brightness(pictures_BHWC: np.ndarray) -> np.ndarray:
    """A feature of one's own."""
    return pictures_BHWC.mean((1, 2)) / 255.0


def pictures(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 24, 3)).astype(np.uint8)


def test_pixels_are_a_thumbnail_and_spreads():
    found = features.pixels(pictures())
    assert found.shape == (3, 8 * 8 * 3 + 3)
    flat = features.pixels(np.full((1, 16, 24, 3), 51, np.uint8))
    assert flat[0, :192] == pytest.approx(0.2) and flat[0, 192:] == pytest.approx(0.0)


def test_codes_count_by_codebook():
    codes = np.array([[[[0, 2], [1, 2]], [[0, 0], [0, 2]]]])
    assert features.shares(codes, (2, 3)) == pytest.approx(np.array([[0.75, 0.25, 0.25, 0.0, 0.75]]))


def test_a_tokenizer_without_latents_gives_the_shares_of_its_codes(model_run: Path):
    subject = Subject(model_run)
    feature = features.load("tokenizer", subject)
    x = pictures()
    assert feature(x) == pytest.approx(features.shares(subject.vision.encode(x), subject.vision.codebooks))


def test_a_function_of_ones_own_is_found_by_name(model_run: Path):
    assert features.load("tests.evaluate.test_features:brightness", Subject(model_run))(pictures()).shape == (3, 3)


@pytest.mark.parametrize("name", ["inception", "json:nothing", "no.such.module:f", "math:pi"])
def test_features_that_are_not_there_are_told(name: str):
    with pytest.raises(MetricError, match="feature"):
        features.require(name)
