"""Perceptual distance of two pictures: LPIPS on VGG16's features (arXiv 1801.03924), with weights from a file.

The weights are not part of mmgpt. The file is a safetensors file that holds torchvision's VGG16 convolutions under
their names there (`features.0.weight` `[64, 3, 3, 3]`, `features.0.bias`, ... `features.28.bias`) and the five learned
weights of LPIPS under theirs (`lin0.model.1.weight` `[1, 64, 1, 1]` ... `lin4.model.1.weight`).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mmgpt.core.config import ConfigError

STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Numbers of the convolutions of each stage; features are read after its last one, then pixels are halved."""
WIDTHS = (64, 128, 256, 512, 512)
SHIFT, SPREAD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""What LPIPS takes off pixels in -1..1 and divides them by."""
LEAST = 16
"""Pixels a side at least, which four halvings leave one of."""

Weights = dict[str, np.ndarray]


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors that the file holds and their shapes, as they lie there."""
    found: dict[str, tuple[int, ...]] = {}
    inputs = 3
    for stage, (numbers, width) in enumerate(zip(STAGES, WIDTHS, strict=True)):
        for number in numbers:
            found[f"features.{number}.weight"], found[f"features.{number}.bias"] = (width, inputs, 3, 3), (width,)
            inputs = width
        found[f"lin{stage}.model.1.weight"] = (1, width, 1, 1)
    return found


def load(path: Path) -> Weights:
    """The file's tensors, kernels as HWIO; others in the file do not matter. ConfigError says all that is wrong."""
    if not path.is_file():
        raise ConfigError(
            f"objective.vgg={path}: no such file. Give a safetensors file with VGG16's and LPIPS' weights, or nothing "
            "to train without the perceptual term."
        )
    try:
        tensors = load_file(path)
    except SafetensorError as e:
        raise ConfigError(f"objective.vgg={path}: not a safetensors file ({e}).") from e
    faults = [
        f"  {name}: found {list(tensors[name].shape) if name in tensors else 'nothing'}, expected {list(shape)}"
        for name, shape in shapes().items()
        if name not in tensors or tensors[name].shape != shape
    ]
    if faults:
        raise ConfigError(
            f"objective.vgg={path}: {len(faults)} of {len(shapes())} tensors are not those of VGG16 and LPIPS:\n"
            + "\n".join(faults[:8])
            + (f"\n  and {len(faults) - 8} more" if len(faults) > 8 else "")
        )
    kept = {name: tensors[name].astype(np.float32) for name in shapes()}
    return {name: x.transpose(2, 3, 1, 0) if x.ndim == 4 else x for name, x in kept.items()}


def distance(weights: Weights, a_BHWC: jax.Array, b_BHWC: jax.Array) -> jax.Array:
    """LPIPS `[B]` of two lots of pictures `[B, H, W, 3]` in -1..1; H and W at least 16."""
    if min(a_BHWC.shape[1:3]) < LEAST:
        raise ConfigError(
            f"LPIPS needs pictures of at least {LEAST} x {LEAST} pixels, found {a_BHWC.shape[1:3]}; leave "
            "objective.vgg empty."
        )
    total = jnp.zeros((a_BHWC.shape[0],), jnp.float32)
    a, b = (_scaled(x) for x in (a_BHWC, b_BHWC))
    for stage, numbers in enumerate(STAGES):
        if stage:
            a, b = _halved(a), _halved(b)
        for number in numbers:
            kernel, bias = weights[f"features.{number}.weight"], weights[f"features.{number}.bias"]
            a, b = (_layer(x, kernel, bias) for x in (a, b))
        lin_C = weights[f"lin{stage}.model.1.weight"].reshape(1, 1, 1, -1)
        total += jnp.mean(jnp.sum(jnp.square(_direction(a) - _direction(b)) * lin_C, axis=3), axis=(1, 2))
    return total


def _scaled(x_BHWC: jax.Array) -> jax.Array:
    shift, spread = (jnp.asarray(v, jnp.float32).reshape(1, 1, 1, 3) for v in (SHIFT, SPREAD))
    return (x_BHWC - shift) / spread


def _layer(x_BHWC: jax.Array, kernel: np.ndarray, bias: np.ndarray) -> jax.Array:
    dimensions = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(x_BHWC, jnp.asarray(kernel), (1, 1), "SAME", dimension_numbers=dimensions)
    return jax.nn.relu(out + jnp.asarray(bias).reshape(1, 1, 1, -1))


def _halved(x_BHWC: jax.Array) -> jax.Array:
    """The highest of 2 x 2 pixels; a last odd row or column is left out."""
    return jax.lax.reduce_window(x_BHWC, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def _direction(x_BHWC: jax.Array) -> jax.Array:
    # LPIPS adds 1e-10 to the length; under the root it also keeps the gradient of all-zero features finite.
    return x_BHWC / (jnp.sqrt(jnp.sum(jnp.square(x_BHWC), axis=3, keepdims=True) + 1e-20) + 1e-10)
