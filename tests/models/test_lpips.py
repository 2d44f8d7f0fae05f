"""LPIPS beside torch's convolutions with the same random weights, and what a wrong file says."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from mmgpt.core.config import ConfigError
from mmgpt.models import lpips

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.startswith("lin"):
            return rng.uniform(0, 1, shape).astype(np.float32)
        scale = 0.1 if len(shape) == 1 else (2 / np.prod(shape[1:])) ** 0.5
        return scale * rng.standard_normal(shape, np.float32)

    return {name: draw(name, shape).astype(np.float32) for name, shape in lpips.shapes().items()}


@pytest.fixture(scope="module")
def file(tensors: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vgg") / "vgg.safetensors"
    save_file({**tensors, "classifier.0.weight": np.zeros((2, 2), np.float32)}, path)
    return path


def theirs(tensors: dict[str, np.ndarray], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The distance as the paper writes it, on torchvision's list of layers, whose numbers are those of the tensors."""
    nn, layers, inputs = torch.nn, [], 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2, 2)]
        inputs = width or inputs
    vgg = nn.ModuleDict({"features": nn.Sequential(*layers)})
    vgg.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items() if k.startswith("features")})
    shift, spread = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    both = [(torch.from_numpy(x) - shift) / spread for x in (a, b)]
    both, total, stage = [x.permute(0, 3, 1, 2) for x in both], 0, 0
    with torch.no_grad():
        for number, layer in enumerate(vgg["features"]):
            both = [layer(x) for x in both]
            if number in (3, 8, 15, 22, 29):
                p, q = (x / (x.norm(dim=1, keepdim=True) + 1e-10) for x in both)
                weight = torch.from_numpy(tensors[f"lin{stage}.model.1.weight"])
                total, stage = total + nn.functional.conv2d((p - q) ** 2, weight).mean(dim=(1, 2, 3)), stage + 1
    return total.numpy()


def test_distances_are_those_of_torch(tensors: dict[str, np.ndarray], file: Path) -> None:
    rng = np.random.default_rng(1)
    a = rng.uniform(-1, 1, (2, 16, 20, 3)).astype(np.float32)
    b = np.clip(a + np.array([0.02, 0.5]).reshape(2, 1, 1, 1) * rng.normal(size=a.shape), -1, 1).astype(np.float32)
    weights = lpips.load(file)
    assert weights.keys() == lpips.shapes().keys()

    def total(b: jax.Array, a: jax.Array, weights: lpips.Weights) -> tuple[jax.Array, jax.Array]:
        found = lpips.distance(weights, a, b)
        return jnp.sum(found), found

    sloped = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, found), slope = sloped(b, a, weights)
    expected = theirs(tensors, a, b)
    assert expected[1] > 2 * expected[0] > 0
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert np.isfinite(slope).all() and np.any(slope)
    (_, nothing), slope = sloped(a, a, weights)
    assert float(np.max(nothing)) < 1e-9 and np.isfinite(slope).all()


def test_what_is_wrong_with_a_file_is_told(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: no such file\. Give a safetensors file"):
        lpips.load(tmp_path / "nowhere")
    (tmp_path / "text").write_text("not tensors")
    with pytest.raises(ConfigError, match="not a safetensors file"):
        lpips.load(tmp_path / "text")
    some = {name: x for name, x in tensors.items() if not name.startswith(("features.2", "features.14"))}
    save_file({**some, "lin0.model.1.weight": np.zeros((1, 3, 1, 1), np.float32)}, tmp_path / "wrong")
    with pytest.raises(ConfigError, match=r"(?s)13 of 31 tensors.*found nothing, expected \[.*and 5 more") as told:
        lpips.load(tmp_path / "wrong")
    assert "features.14.weight: found nothing, expected [256, 256, 3, 3]" in str(told.value)


def test_pictures_that_are_too_small_are_told(file: Path) -> None:
    small = jnp.zeros((1, 8, 16, 3))
    with pytest.raises(ConfigError, match="at least 16 x 16 pixels"):
        lpips.distance(lpips.load(file), small, small)
