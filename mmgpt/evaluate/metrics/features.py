"""Features of pictures for the Frechet distance: a function from uint8 `[B, H, W, 3]` to `[B, D]`.

    pixels            an 8 x 8 thumbnail and each channel's spread: what a picture looks like from afar
    tokenizer         the image tokenizer's latents, averaged over the picture; its codes' shares where it has none
    module:function   your own, such as Inception's pool: imported from Python's path and called with pictures

Distances by different features, or at different sizes, cannot be compared.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.data.media import resize
from mmgpt.evaluate.metrics.captions import MetricError
from mmgpt.evaluate.subject import Subject
from mmgpt.train.run import Opened

Feature = Callable[[np.ndarray], np.ndarray]
BUILT_IN = ("pixels", "tokenizer")
THUMBNAIL = 8
"""Pixels a side."""
MOST_CODES = 4096


def require(name: str) -> None:
    """MetricError where a feature cannot be had, before anything is loaded."""
    if name not in BUILT_IN:
        _imported(name)


def load(name: str, subject: Subject) -> Feature:
    """The feature of a name; "tokenizer" is that of the subject."""
    if name == "pixels":
        return pixels
    if name == "tokenizer":
        return tokenizer(subject)
    return _imported(name)


def pixels(pictures_BHWC: np.ndarray) -> np.ndarray:
    """`[B, 195]` in 0..1: a thumbnail and the standard deviation of each channel."""
    small = np.stack([resize(picture, THUMBNAIL, THUMBNAIL) for picture in pictures_BHWC]).astype(np.float64) / 255
    spread = pictures_BHWC.astype(np.float64).std((1, 2)) / 255
    return np.concatenate([small.reshape(len(small), -1), spread], axis=1)


def tokenizer(subject: Subject) -> Feature:
    """What the subject's image tokenizer makes of pictures whose sides it takes."""
    opened = subject.vision_opened
    if hasattr(_module(opened), "latents"):
        return functools.partial(_latents, opened, _compiled(opened))
    sizes = subject.vision.codebooks
    if sum(sizes) > MOST_CODES:
        raise MetricError(
            f"the tokenizer has no latents, and the shares of {sum(sizes)} codes are too many for a covariance; choose "
            "another feature."
        )
    return lambda pictures: shares(subject.vision.encode(pictures), sizes)


def shares(codes_BHWC: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """`[B, sum(sizes)]`: how much of each picture has each code of each codebook."""
    columns = []
    for number, size in enumerate(sizes):
        flat = codes_BHWC[..., number].reshape(len(codes_BHWC), -1)
        columns.append(np.stack([np.bincount(codes, minlength=size) for codes in flat]) / flat.shape[1])
    return np.concatenate(columns, axis=1)


def _module(opened: Opened) -> type:
    """The tokenizer's class."""
    with jax.set_mesh(opened.built.mesh):
        return type(opened.built.structure.merge(*opened.built.structure.abstract()))


def _compiled(opened: Opened) -> Callable[..., jax.Array]:
    structure = opened.built.structure

    def averaged(params: object, variables: object, pictures: jax.Array) -> jax.Array:
        model = structure.merge(params, variables)
        return model.latents(pictures.astype(jnp.float32) / 127.5 - 1.0, False).mean((1, 2))

    return jax.jit(averaged)


def _latents(opened: Opened, compiled: Callable[..., jax.Array], pictures_BHWC: np.ndarray) -> np.ndarray:
    with jax.set_mesh(opened.built.mesh):
        return np.asarray(compiled(opened.params, opened.variables, jnp.asarray(pictures_BHWC)))


def _imported(name: str) -> Feature:
    module, colon, function = name.partition(":")
    if not colon:
        raise MetricError(f"no feature {name!r}; there are {', '.join(BUILT_IN)}, or your own as module:function.")
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as e:
        raise MetricError(f"feature {name}: {e}. Put its module on Python's path (PYTHONPATH=.).") from e
    if not callable(found):
        raise MetricError(f"feature {name}: it is a {type(found).__name__} and no function.")
    return cast(Feature, found)
