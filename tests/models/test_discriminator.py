"""PatchGAN beside torch's layers with the same weights: logits in training and after it, running statistics, loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmgpt.core.config import ConfigError
from mmgpt.dist.mesh import Mesh
from mmgpt.models.discriminator import PatchGAN, hinge

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(Mesh.Config().build(jax.devices()[:1])):
        yield


def theirs(ours: PatchGAN, channels: int, layers: int) -> "torch.nn.Sequential":
    """The N-layer discriminator of pix2pix, built from its description."""
    nn = torch.nn
    parts, width = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)], channels
    for i in range(1, layers + 1):
        wide = channels * min(2**i, 8)
        parts += [nn.Conv2d(width, wide, 4, 2 if i < layers else 1, 1, bias=False), nn.BatchNorm2d(wide)]
        parts, width = [*parts, nn.LeakyReLU(0.2)], wide
    made = nn.Sequential(*parts, nn.Conv2d(width, 1, 4, 1, 1))
    windows = [ours.enter, *ours.window, ours.leave]
    with torch.no_grad():
        for window, conv in zip(windows, (m for m in made if isinstance(m, nn.Conv2d)), strict=True):
            conv.weight.copy_(torch.from_numpy(np.array(window.kernel[...]).transpose(3, 2, 0, 1)))
            if conv.bias is not None:
                conv.bias.copy_(torch.from_numpy(np.array(window.bias[...])))
        for norm, other in zip(ours.norm, (m for m in made if isinstance(m, nn.BatchNorm2d)), strict=True):
            other.weight.copy_(torch.from_numpy(np.array(norm.scale[...])))
            other.bias.copy_(torch.from_numpy(np.array(norm.bias[...])))
    return made


@pytest.mark.parametrize(("channels", "layers"), [(4, 3), (3, 1)])
def test_logits_and_running_statistics_are_those_of_torch(channels: int, layers: int) -> None:
    rng = np.random.default_rng(0)
    ours = PatchGAN.Config(channels=channels, layers=layers).build(nnx.Rngs(0))
    for leaf in jax.tree.leaves(nnx.state(ours, nnx.Param), is_leaf=lambda x: isinstance(x, nnx.Variable)):
        leaf[...] = jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32)
    other = theirs(ours, channels, layers)
    pixels = rng.uniform(-1, 1, (2, 48, 40, 3)).astype(np.float32)
    structure, state = nnx.split(ours)

    @functools.partial(jax.jit, static_argnums=2)
    def run(state: nnx.State, pixels: jax.Array, train: bool) -> tuple[jax.Array, nnx.State]:
        module = nnx.merge(structure, state)
        return module(pixels, train), nnx.state(module)

    for train in (True, True, False):
        other.train(train)
        with torch.no_grad():
            expected = other(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))[:, 0].numpy()
        logits, state = run(state, pixels, train)
        assert logits.shape == expected.shape
        np.testing.assert_allclose(logits, expected, atol=2e-4 * np.abs(expected).max())
    nnx.update(ours, state)
    last = [m for m in other if isinstance(m, torch.nn.BatchNorm2d)][-1]
    np.testing.assert_allclose(ours.norm[-1].mean[...], last.running_mean.numpy(), atol=1e-4)
    np.testing.assert_allclose(ours.norm[-1].variance[...], last.running_var.numpy(), rtol=1e-3)


def test_hinge() -> None:
    real, drawn = jnp.array([2.0, 0.5, -1.0]), jnp.array([-3.0, 0.0, 1.0])
    np.testing.assert_allclose(hinge(real, drawn), [0.0, 0.5 * (0.5 + 1.0), 0.5 * (2.0 + 2.0)])


def test_sizes_that_make_none() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        PatchGAN.Config(layers=0).build(nnx.Rngs(0))
