"""The oracle of the shapes world: reads a picture's scene from its pixels with classical vision, no learned part.

It works at one resolution, half the canvas, to which every picture is brought. Pixels are assigned to the palette
colour whose mixing line with the background they lie nearest to; connected pixels of a colour are an object; its
shape, size and centre are those of the rendered template that overlaps its soft mask best.
"""

import functools
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from mmgpt.evaluate.shapes import world
from mmgpt.evaluate.shapes.world import Content, Object, Scene

SIDE = world.CANVAS // 2
_WINDOW = 20
_REACH = 3
_FOREGROUND = 60.0
_CORE = 0.5
_LEAST_CORE = 8
_FRAGMENT = 30
_NEIGHBOURS = np.ones((3, 3), bool)
_PALETTE = np.array(list(world.COLOURS.values()), np.float32)
_NAMES = tuple(world.COLOURS)


class ObjectsRight(NamedTuple):
    """How many of a truth's `total` objects are found with colour, shape and place `right`, and with size too."""

    right: int
    total: int
    with_size: int


def read_scene(image: np.ndarray) -> Scene:
    """The scene that a square picture uint8 [H, W, 3] of any size shows; x and y are in canvas pixels.

    Objects come in reading order. The scene need not keep the world's rules: it is what the pixels show.

    Raises:
        ValueError: the picture is not uint8 [H, W, 3] with H equal to W.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1]:
        raise ValueError(f"read_scene: expected a square picture uint8 [H, W, 3], found {image.dtype} {image.shape}")
    pixels = _at_working_size(image).astype(np.float32)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    if np.abs(background - world.BACKGROUND).max() > 50:
        background = np.array(world.BACKGROUND, np.float32)
    alpha, nearest, strength = _mixing(pixels, background)
    pieces = _pieces(alpha, nearest, strength > _FOREGROUND)
    claimed = np.zeros(pixels.shape[:2], np.int32)
    for number, (piece, _) in enumerate(pieces, 1):
        claimed[piece] = number
    objects = []
    for number, (piece, colour) in enumerate(pieces, 1):
        reach = ndimage.binary_dilation(piece, _NEIGHBOURS, iterations=2) & ((claimed == 0) | (claimed == number))
        shape, size, x, y = _fit(alpha[..., colour] * reach, piece)
        objects.append(Object(shape, _NAMES[colour], size, x, y))
    return Scene(tuple(sorted(objects, key=lambda o: (o.y, o.x))))


def objects_right(truth: Scene | Content, read: Scene) -> ObjectsRight:
    """Counts the truth's objects that were read with the right colour, shape and place."""
    content = _content(truth)
    seen = {(shape, colour, place) for _, shape, colour, place in read.content}
    right = sum((shape, colour, place) in seen for _, shape, colour, place in content)
    return ObjectsRight(right, len(content), len(content & read.content))


def scene_right(truth: Scene | Content, read: Scene) -> bool:
    """Whether a picture shows exactly the truth's objects with the right size, shape, colour and place."""
    content = _content(truth)
    return len(read.objects) == len(content) and read.content == content


def _content(truth: Scene | Content) -> Content:
    return truth.content if isinstance(truth, Scene) else truth


def _at_working_size(image: np.ndarray) -> np.ndarray:
    if image.shape[0] == SIDE:
        return image
    method = Image.Resampling.BOX if image.shape[0] > SIDE else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), method))


def _mixing(pixels: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How much of each palette colour a pixel would hold [H, W, 8], its nearest colour, its distance from bare."""
    delta, lines = pixels - background, _PALETTE - background
    length = np.square(lines).sum(-1)
    dot = delta @ lines.T
    alpha = np.clip(dot / length, 0.0, 1.0)
    square = np.square(delta).sum(-1)
    residual = square[..., None] - 2.0 * alpha * dot + np.square(alpha) * length
    return alpha, residual.argmin(-1), np.sqrt(square)


def _pieces(alpha: np.ndarray, nearest: np.ndarray, foreground: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Masks [H, W] of the objects with their colour numbers: specks dropped, fragments joined to their object."""
    found: list[tuple[np.ndarray, int]] = []
    for colour in np.flatnonzero(np.bincount(nearest[foreground], minlength=len(_NAMES)) >= _LEAST_CORE):
        core = alpha[..., colour] >= _CORE
        labels = np.empty(nearest.shape, np.int32)
        ndimage.label(foreground & (nearest == colour), _NEIGHBOURS, output=labels)
        cores = np.bincount(labels[core & (labels > 0)])
        found += [(labels == n, int(colour)) for n in np.flatnonzero(cores >= _LEAST_CORE)]
    found.sort(key=lambda item: -int(item[0].sum()))
    kept: list[tuple[np.ndarray, int]] = []
    for mask, colour in found:
        for n, (larger, other) in enumerate(kept):
            if other == colour and mask.sum() < _FRAGMENT and _distance(mask, larger) < SIDE / 6:
                kept[n] = (larger | mask, other)
                break
        else:
            kept.append((mask, colour))
    return kept


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(np.argwhere(a).mean(0) - np.argwhere(b).mean(0)))


def _fit(mask: np.ndarray, piece: np.ndarray) -> tuple[str, str, int, int]:
    """Shape, size and centre (canvas pixels) of the template with the best soft overlap (Dice) over small shifts."""
    rows, columns = np.flatnonzero(piece.any(1)), np.flatnonzero(piece.any(0))
    y, x = (int(rows[0] + rows[-1] + 1) // 2, int(columns[0] + columns[-1] + 1) // 2)
    margin = _WINDOW // 2 + _REACH
    window = np.pad(mask, margin)[y : y + 2 * margin, x : x + 2 * margin]
    views = np.lib.stride_tricks.sliding_window_view(window, (_WINDOW, _WINDOW))
    shifts = views.reshape(-1, _WINDOW * _WINDOW)
    templates, energy, names = _templates()
    products = np.matmul(templates, shifts.T).reshape(len(names), -1)
    overlap = 2.0 * products / (energy[:, None] + np.square(mask).sum())
    best, shift = divmod(int(overlap.argmax()), len(shifts))
    down, right = divmod(shift, 2 * _REACH + 1)
    shape, size, half_x, half_y = names[best]
    return shape, size, 2 * (x + right - _REACH) + half_x, 2 * (y + down - _REACH) + half_y


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray, list[tuple[str, str, int, int]]]:
    """Soft masks [12, 8, WINDOW^2] of each shape and size at both phases of each axis, sharp and blurred; energies.

    One product a shape and size is too small for BLAS to thread; threads made a reading ten times slower on busy cores.
    """
    masks, names = [], []
    for shape in world.SHAPES:
        for size, radius in world.SIZES.items():
            for half_x in (0, 1):
                for half_y in (0, 1):
                    full = world.coverage(shape, radius, _WINDOW + half_x, _WINDOW + half_y, 2 * _WINDOW)
                    sharp = full.reshape(_WINDOW, 2, _WINDOW, 2).mean((1, 3))
                    masks += [sharp.ravel(), ndimage.gaussian_filter(sharp, 0.8).ravel()]
                    names += [(shape, size, half_x, half_y)] * 2
    stacked = np.stack(masks)
    kinds = len(world.SHAPES) * len(world.SIZES)
    return stacked.reshape(kinds, -1, _WINDOW * _WINDOW), np.square(stacked).sum(1), names
