"""The shapes world: small pictures and clips of coloured shapes whose content can be said in words exactly.

A `Scene` is what a picture shows. Its *content* (size, shape, colour, place of each object) is what a caption says;
positions are free within a place, so that many pictures share one caption. Some (colour, shape) pairs are held out
of all training documents, and so is one scene in eight by a hash of its objects: no picture of an evaluation is
ever a training picture, whatever the seed.
"""

import dataclasses
import functools
import random
import zlib
from collections.abc import Callable

import numpy as np

CANVAS = 96
"""Side of a picture in pixels."""
GAP = 5
"""Least distance in pixels between the boxes of two objects."""
MARGIN = 3
"""Least distance in pixels between an object's centre and a line that cuts the canvas into thirds."""
FRAMES = 4
STEP = 16
"""Pixels that a moving object moves from frame to frame."""
BACKGROUND = (240, 240, 235)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "orange": (245, 135, 20),
    "yellow": (235, 205, 25),
    "green": (40, 155, 60),
    "cyan": (40, 200, 220),
    "blue": (35, 70, 210),
    "purple": (140, 50, 170),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = {"small": 10, "large": 15}
"""Radius in pixels: an object lies within this distance of its centre along each axis."""
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
"""The nine thirds of the canvas in reading order."""
DIRECTIONS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
UNSEEN = frozenset(
    {
        ("red", "ring"),
        ("orange", "square"),
        ("yellow", "cross"),
        ("green", "triangle"),
        ("blue", "diamond"),
        ("purple", "circle"),
    }
)
"""(colour, shape) pairs that no training document shows or names."""
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in UNSEEN)
"""(colour, shape) pairs of training documents."""

Content = frozenset[tuple[str, str, str, str]]
"""What a caption says: {(size, shape, colour, place)}."""


@dataclasses.dataclass(frozen=True, order=True)
class Object:
    """One coloured shape; `x` (rightwards) and `y` (downwards) are its centre in canvas pixels."""

    shape: str
    colour: str
    size: str
    x: int
    y: int

    @property
    def place(self) -> str:
        """The third of the canvas that holds the centre."""
        return PLACES[3 * third(self.y) + third(self.x)]

    @property
    def radius(self) -> int:
        """Half the side of the object's box in pixels."""
        return SIZES[self.size]

    @property
    def pair(self) -> tuple[str, str]:
        """(colour, shape), which names the object in its scene."""
        return self.colour, self.shape


@dataclasses.dataclass(frozen=True)
class Scene:
    """What one picture shows."""

    objects: tuple[Object, ...]

    @property
    def content(self) -> Content:
        """{(size, shape, colour, place)}."""
        return frozenset((o.size, o.shape, o.colour, o.place) for o in self.objects)

    def as_json(self) -> dict:
        """The scene as JSON values; `from_json` reads it back."""
        content = sorted([o.size, o.shape, o.colour, o.place] for o in self.objects)
        return {"content": content, "objects": [dataclasses.asdict(o) for o in self.objects]}

    @classmethod
    def from_json(cls, value: dict) -> "Scene":
        """The scene that `as_json` wrote."""
        return cls(tuple(Object(**o) for o in value["objects"]))


@dataclasses.dataclass(frozen=True)
class Clip:
    """A scene whose objects move: `directions[i]` is where object i goes, STEP pixels a frame."""

    scene: Scene
    directions: tuple[str, ...]

    @property
    def frames(self) -> tuple[Scene, ...]:
        """The FRAMES scenes of the clip."""
        return tuple(
            Scene(tuple(_moved(o, d, n) for o, d in zip(self.scene.objects, self.directions, strict=True)))
            for n in range(FRAMES)
        )


def third(coordinate: float) -> int:
    """Which third of the canvas, 0 to 2, holds a coordinate in canvas pixels."""
    return min(2, max(0, int(coordinate * 3 // CANVAS)))


def same_content(a: Scene, b: Scene) -> bool:
    """Whether two scenes show the same objects (size, shape, colour, place), in any order."""
    return len(a.objects) == len(b.objects) and a.content == b.content


def for_evaluation(scene: Scene) -> bool:
    """Whether the scene belongs to evaluation: one in eight, by a hash that knows neither seed nor object order."""
    return zlib.crc32(repr(sorted(scene.objects)).encode()) % 8 == 0


def valid(scene: Scene, *, pairs: frozenset[tuple[str, str]] | None = frozenset(PAIRS)) -> bool:
    """Whether a scene keeps the rules: inside, apart, clear of the thirds, one object a place and a (colour, shape).

    `pairs` are the (colour, shape) pairs allowed; None allows all.
    """
    objects = scene.objects
    if not objects or len({o.place for o in objects}) < len(objects) or len({o.pair for o in objects}) < len(objects):
        return False
    if pairs is not None and any(o.pair not in pairs for o in objects):
        return False
    if any(c not in _allowed(o.radius) for o in objects for c in (o.x, o.y)):
        return False
    return all(_apart(a, b) for i, a in enumerate(objects) for b in objects[:i])


def random_scene(rng: random.Random, count: int, *, first_pair: tuple[str, str] | None = None) -> Scene:
    """A valid scene of `count` objects with training pairs; `first_pair` sets one object's (colour, shape)."""
    while True:
        pairs = rng.sample(PAIRS, count)
        if first_pair is not None:
            pairs[0] = first_pair
        scene: Scene | None = Scene(())
        for place in rng.sample(PLACES, count):
            colour, shape = pairs.pop()
            scene = added(rng, scene, shape, colour, rng.choice(("small", "large")), place)
            if scene is None:
                break
        else:
            assert scene is not None
            return Scene(tuple(rng.sample(scene.objects, count)))


def added(rng: random.Random, scene: Scene, shape: str, colour: str, size: str, place: str) -> Scene | None:
    """The scene with one more object somewhere in a place, or None where eight tries find no room."""
    row, column = divmod(PLACES.index(place), 3)
    spans = _spans(SIZES[size])
    for _ in range(8):
        new = Object(shape, colour, size, rng.choice(spans[column]), rng.choice(spans[row]))
        if all(_apart(new, o) for o in scene.objects):
            return Scene((*scene.objects, new))
    return None


def random_clip(rng: random.Random, count: int) -> Clip:
    """A clip of `count` objects with training pairs, at least one moving, each frame a valid scene."""
    while True:
        directions = rng.choices(tuple(DIRECTIONS), k=count)
        if all(d == "still" for d in directions):
            continue
        objects = []
        for (colour, shape), direction in zip(rng.sample(PAIRS, count), directions, strict=True):
            size = rng.choice(("small", "large"))
            dx, dy = DIRECTIONS[direction]
            x, y = (rng.choice(_starts(SIZES[size], d)) for d in (dx, dy))
            objects.append(Object(shape, colour, size, x, y))
        clip = Clip(Scene(tuple(objects)), tuple(directions))
        if all(valid(frame) for frame in clip.frames):
            return clip


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene, uint8 [CANVAS, CANVAS, 3], edges antialiased."""
    image = np.empty((CANVAS, CANVAS, 3), np.uint8)
    image[:] = BACKGROUND
    for o in scene.objects:
        r = o.radius
        image[o.y - r : o.y + r, o.x - r : o.x + r] = _patch(o.shape, o.colour, r)
    return image


def coverage(shape: str, radius: float, x: float, y: float, side: int) -> np.ndarray:
    """The share of each pixel that a shape with centre (x, y) covers, float32 [side, side]; all in pixels."""
    centres = np.arange(side, dtype=np.float32) + 0.5
    u, v = (centres[None, :] - x) / radius, (centres[:, None] - y) / radius
    return np.clip(0.5 - _DISTANCE[shape](u, v) * radius, 0.0, 1.0).astype(np.float32)


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.hypot(u, v) - 1.0


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - 0.86


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(v - 1.0, (2.0 * np.abs(u) - v - 1.0) / 5.0**0.5)


def _diamond(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (np.abs(u) + np.abs(v) - 1.0) / 2.0**0.5


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v, arm = np.abs(u), np.abs(v), 0.36
    return np.minimum(np.maximum(u - 1.0, v - arm), np.maximum(u - arm, v - 1.0))


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(u, v) - 0.76) - 0.24


_DISTANCE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "ring": _ring,
}
"""Signed distance to the edge of each shape, negative inside, in units of its radius."""


@functools.cache
def _patch(shape: str, colour: str, radius: int) -> np.ndarray:
    covered = coverage(shape, radius, radius, radius, 2 * radius)[..., None]
    background, ink = np.array(BACKGROUND, np.float32), np.array(COLOURS[colour], np.float32)
    return np.rint(background + covered * (ink - background)).astype(np.uint8)


@functools.cache
def _allowed(radius: int) -> frozenset[int]:
    lines = (CANVAS // 3, 2 * CANVAS // 3)
    return frozenset(c for c in range(radius, CANVAS - radius + 1) if all(abs(c - line) >= MARGIN for line in lines))


@functools.cache
def _spans(radius: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(sorted(c for c in _allowed(radius) if third(c) == n)) for n in range(3))


@functools.cache
def _starts(radius: int, sign: int) -> tuple[int, ...]:
    allowed = _allowed(radius)
    return tuple(sorted(c for c in allowed if all(c + sign * STEP * n in allowed for n in range(FRAMES))))


def _apart(a: Object, b: Object) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + GAP


def _moved(o: Object, direction: str, frames: int) -> Object:
    dx, dy = DIRECTIONS[direction]
    return dataclasses.replace(o, x=o.x + dx * STEP * frames, y=o.y + dy * STEP * frames)
