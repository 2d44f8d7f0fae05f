"""Quantisers beside float64 references: values, losses, and where gradients go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgpt.dist.mesh import Mesh
from mmgpt.nn.quantize import Quantized, entropies, index_backpropagation, vector_quantize

SHAPE, V, D = (4, 1, 3), 7, 3
N = 12


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(Mesh.Config().build(jax.devices()[:1])):
        yield


def drawn(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors, codebook, and the gradient that a decoder would send back."""
    rng = np.random.default_rng(seed)
    shapes = (*SHAPE, D), (V, D), (*SHAPE, D)
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def flat(found: Quantized) -> Quantized:
    """The same with all places in a row."""
    return Quantized(*(np.asarray(part).reshape(N, *part.shape[3:]) for part in found))


def gradients(function, z: np.ndarray, book: np.ndarray, back: np.ndarray, loss: float) -> tuple:
    """Gradients of <vectors, back> + loss x sum of losses, with respect to vectors and codebook."""

    def total(z: jax.Array, book: jax.Array) -> jax.Array:
        found = function(z, book, 0.25)
        return jnp.sum(found.vectors * back) + loss * jnp.sum(found.loss)

    return jax.jit(jax.grad(total, argnums=(0, 1)))(z, book)


def test_nearest_codes_straight_through() -> None:
    z, book, back = drawn()
    found = flat(jax.jit(vector_quantize)(z, book, 0.25))
    wide, books = z.reshape(N, D).astype(np.float64), book.astype(np.float64)
    distance = np.sum(np.square(wide[:, None] - books[None]), axis=2)
    code = distance.argmin(axis=1)
    assert np.array_equal(found.code, code) and len(set(code)) > 2
    assert np.array_equal(found.vectors, book[code])  # what is decoded later, to the bit
    np.testing.assert_allclose(found.scores, -distance, atol=1e-5)
    off = wide - books[code]
    np.testing.assert_allclose(found.loss, 1.25 * np.mean(off**2, axis=1), rtol=1e-5)
    to_z, to_book = gradients(vector_quantize, z, book, back, 0.0)
    assert np.array_equal(to_z, back) and not np.any(to_book)  # the decoder's gradient passes by the codebook
    to_z, to_book = gradients(vector_quantize, z, book, back, 1.0)
    np.testing.assert_allclose(to_z, back + (0.25 * 2 * off / D).reshape(*SHAPE, D), atol=1e-6)
    expected = np.zeros((V, D))
    np.add.at(expected, code, -2 * off / D)
    np.testing.assert_allclose(to_book, expected, atol=1e-6)
    assert not np.any(np.asarray(to_book)[np.setdiff1d(np.arange(V), code)])


def test_the_index_passes_gradients_to_every_code() -> None:
    """By hand: z_q = (onehot + softmax - fixed softmax) @ codebook, scores = z @ codebook."""
    z, book, back = drawn()
    found = flat(jax.jit(index_backpropagation)(z, book, 0.25))
    wide, books, g = (x.reshape(-1, D).astype(np.float64) for x in (z, book, back))
    scores = wide @ books.T
    code = scores.argmax(axis=1)
    assert np.array_equal(found.code, code) and np.array_equal(found.vectors, book[code])
    assert set(range(V)) - set(code.tolist())  # some code is chosen by nobody
    off = books[code] - wide
    np.testing.assert_allclose(found.loss, (1 + 1 + 0.25) * np.mean(off**2, axis=1), rtol=1e-5)
    share, onehot = softmax(scores), np.eye(V)[code]

    def backward(to_vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        to_share = to_vectors @ books.T
        to_scores = share * (to_share - np.sum(share * to_share, axis=1, keepdims=True))
        return to_scores @ books, onehot.T @ to_vectors + to_scores.T @ wide

    for weight in (0.0, 1.0):
        # The first square has gradients on both sides, the others on one each.
        to_z, to_book = backward(g + weight * 2 * off / D)
        to_z = to_z - weight * 2 * off / D - weight * 2 * off / D
        to_book = to_book + weight * 0.25 * onehot.T @ (2 * off / D)
        found_z, found_book = gradients(index_backpropagation, z, book, back, weight)
        np.testing.assert_allclose(found_z, to_z.reshape(*SHAPE, D), atol=1e-5)
        np.testing.assert_allclose(found_book, to_book, atol=1e-5)
        assert (np.abs(np.asarray(found_book)) > 1e-6).any(axis=1).all()


def test_entropies() -> None:
    rng = np.random.default_rng(0)
    scores, weight = rng.standard_normal((*SHAPE, V)).astype(np.float32), np.array([1, 0] * (N // 2), np.float32)
    weight = weight.reshape(SHAPE)
    each, of_mean = jax.jit(entropies)(scores, weight, 0.3)
    share = softmax(scores.reshape(N, V).astype(np.float64) / 0.3)
    np.testing.assert_allclose(each.reshape(N), -np.sum(share * np.log(share), axis=1), rtol=1e-5)
    mean = share[weight.reshape(N) > 0].mean(axis=0)
    assert float(of_mean) == pytest.approx(-np.sum(mean * np.log(mean)), rel=1e-5)
    slope = jax.jit(jax.grad(lambda s: sum(map(jnp.sum, entropies(s, weight, 1e-3)))))
    assert np.isfinite(slope(scores)).all()


@pytest.mark.parametrize("function", [vector_quantize, index_backpropagation])
def test_values_and_gradients_are_the_same_on_several_devices(function) -> None:
    z, book, back = drawn()
    one = gradients(function, z, book, back, 1.0)
    with jax.set_mesh(Mesh.Config().build(jax.devices()[:4])):
        rows = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.P("fsdp"))

        @jax.jit
        def both(z: jax.Array, book: jax.Array) -> tuple:
            def total(z: jax.Array, book: jax.Array) -> jax.Array:
                found = function(z, book, 0.25)
                each, of_mean = entropies(found.scores, jnp.ones_like(found.loss), 0.5)
                return jnp.sum(found.vectors * back) + jnp.sum(found.loss) + 0.0 * (jnp.sum(each) + of_mean)

            return jax.grad(total, argnums=(0, 1))(z, book)

        several = both(jax.device_put(z, rows), jnp.asarray(book))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), several, one)
