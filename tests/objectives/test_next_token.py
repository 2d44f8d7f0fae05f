"""Next-token prediction against cross-entropy in float64."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgpt.core.config import ConfigError
from mmgpt.core.stream import Batch, Stream
from mmgpt.dist.mesh import Mesh
from mmgpt.objectives.next_token import NextToken
from mmgpt.objectives.objective import mean, total

USED, PADDED = 21, 32


@pytest.fixture(autouse=True)
def one_device() -> Iterator[None]:
    with jax.set_mesh(Mesh.Config().build(jax.devices()[:1])):
        yield


def stream(seed: int = 0) -> Stream:
    rng = np.random.default_rng(seed)
    shape = (2, 9)
    return Stream(
        ids=rng.integers(0, USED, shape).astype(np.int32),
        target=rng.integers(0, USED, shape).astype(np.int32),
        modality=rng.integers(0, 3, shape).astype(np.int32),
        position=np.zeros(shape, np.int32),
        weight=(rng.random(shape) * (rng.random(shape) < 0.8)).astype(np.float32),
    )


def logits(seed: int = 0) -> np.ndarray:
    return (3 * np.random.default_rng(seed + 10).standard_normal((2, 9, PADDED))).astype(np.float32)


class Given:
    """A model whose logits are those given."""

    def __init__(self, logits: jax.Array):
        self.logits = logits
        self.projection = jnp.eye(PADDED), False

    def hidden(self, batch: Batch, key: jax.Array | None) -> jax.Array:
        return self.logits


def losses(tokens: Stream, given: np.ndarray, z_loss: float = 1e-2):
    objective = NextToken.Config(vocab=USED, z_loss=z_loss).build()
    batch = Batch(streams={"tokens": tokens}, visibility={}, row_id=np.arange(2))
    return objective.loss(Given(jnp.asarray(given)), batch, None), objective.coefficients


def by_numpy(tokens: Stream, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy and log Z of each position, over the ids in use."""
    wide = given[..., :USED].astype(np.float64)
    log_z = np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1)) + wide.max(-1)
    return log_z - np.take_along_axis(wide, tokens.target[..., None], -1)[..., 0], log_z


def test_terms_equal_float64() -> None:
    tokens, given = stream(), logits()
    found, coefficients = losses(tokens, given)
    cross_entropy, log_z = by_numpy(tokens, given)
    weight = tokens.weight.astype(np.float64)
    z_loss = 1e-2 * (log_z**2 * weight).sum() / weight.sum()
    assert float(mean(found.metrics["z_loss"])) == pytest.approx(z_loss, rel=1e-5)
    expected = ((cross_entropy + 1e-2 * log_z**2) * weight).sum() / weight.sum()
    assert float(total(found, coefficients)) == pytest.approx(expected, rel=1e-5)


def test_metrics_count_tokens_by_modality() -> None:
    tokens, given = stream(), logits()
    found, _ = losses(tokens, given)
    cross_entropy, _ = by_numpy(tokens, given)
    right = given[..., :USED].argmax(-1) == tokens.target
    for number, name in enumerate(("text", "image", "video")):
        counted = (tokens.modality == number) & (tokens.weight > 0)
        assert float(found.metrics[f"loss/{name}"][1]) == counted.sum()
        assert float(mean(found.metrics[f"loss/{name}"])) == pytest.approx(cross_entropy[counted].mean(), abs=1e-5)
        assert float(mean(found.metrics[f"accuracy/{name}"])) == pytest.approx(right[counted].mean(), abs=1e-6)


def test_a_modality_that_is_not_there_gives_zero() -> None:
    tokens = dataclasses.replace(stream(), modality=np.zeros((2, 9), np.int32))
    found, _ = losses(tokens, logits())
    assert float(mean(found.metrics["loss/image"])) == 0.0 == float(mean(found.metrics["accuracy/video"]))


def test_all_weights_zero_give_zero_and_finite_gradients() -> None:
    tokens = dataclasses.replace(stream(), weight=np.zeros((2, 9), np.float32))

    def value(given: jax.Array) -> jax.Array:
        found, coefficients = losses(tokens, given)
        return total(found, coefficients)

    result, gradient = jax.value_and_grad(value)(jnp.asarray(logits()))
    assert float(result) == 0.0 and not np.asarray(gradient).any()


def test_padded_rows_of_the_vocabulary_leave_the_softmax() -> None:
    tokens, given = stream(), logits()
    other = given.copy()
    other[..., USED:] = 50.0
    first, second = (float(mean(losses(tokens, g)[0].terms["next_token"])) for g in (given, other))
    assert first == second

    def value(given: jax.Array) -> jax.Array:
        found, coefficients = losses(tokens, given)
        return total(found, coefficients)

    gradient = np.asarray(jax.grad(value)(jnp.asarray(other)))
    assert np.isfinite(gradient).all() and not gradient[..., USED:].any() and gradient[..., :USED].any()


def test_large_logits_stay_finite() -> None:
    found, coefficients = losses(stream(), logits() * 1e4)
    assert np.isfinite(float(total(found, coefficients)))


def test_a_vocabulary_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"objective\.vocab is 0"):
        NextToken.Config().build()
