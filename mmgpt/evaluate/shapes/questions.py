"""Questions about a scene with one right answer of one or two words.

Six kinds: colour, shape, size, place, count, yesno. An object is named by (colour, shape), by its place, or by one
attribute where no other object shares it. Answers to yesno are balanced, and a "no" is near the truth: attributes
of present objects swapped, or one attribute changed.
"""

import random

from mmgpt.evaluate.shapes.language import SIZE_WORDS, at_place
from mmgpt.evaluate.shapes.world import COLOURS, PAIRS, SHAPES, Object, Scene

KINDS = ("colour", "shape", "size", "place", "count", "yesno")
NUMBERS = ("zero", "one", "two", "three")
CLEARLY = 16
"""Least difference in pixels along an axis for a question about left, right, above or below."""
_SEEN = frozenset(PAIRS)
_RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def question(rng: random.Random, scene: Scene, kind: str) -> tuple[str, str]:
    """A question of a kind (of KINDS) about a scene, and its answer."""
    return _ASK[kind](rng, scene)


def _colour(rng: random.Random, scene: Scene) -> tuple[str, str]:
    o = rng.choice(scene.objects)
    if _alone(scene, shape=o.shape) and rng.random() < 0.6:
        return rng.choice((f"what colour is the {o.shape}?", f"which colour does the {o.shape} have?")), o.colour
    return f"what colour is the object {at_place(rng, o.place)}?", o.colour


def _shape(rng: random.Random, scene: Scene) -> tuple[str, str]:
    o = rng.choice(scene.objects)
    if _alone(scene, colour=o.colour) and rng.random() < 0.6:
        return rng.choice((f"what shape is the {o.colour} object?", f"which shape is {o.colour}?")), o.shape
    return rng.choice(("what shape is {}?", "what shape is the object {}?")).format(at_place(rng, o.place)), o.shape


def _size(rng: random.Random, scene: Scene) -> tuple[str, str]:
    o = rng.choice(scene.objects)
    return rng.choice(("what size is {}?", "how big is {}?")).format(_named(rng, scene, o)), o.size


def _place(rng: random.Random, scene: Scene) -> tuple[str, str]:
    o = rng.choice(scene.objects)
    names = [f"the {o.colour} {o.shape}"]
    names += [f"the {o.shape}"] if _alone(scene, shape=o.shape) else []
    names += [f"the {o.colour} object"] if _alone(scene, colour=o.colour) else []
    return f"where is {rng.choice(names)}?", o.place


def _count(rng: random.Random, scene: Scene) -> tuple[str, str]:
    o = rng.choice(scene.objects)
    by_answer: dict[int, list[str]] = {len(scene.objects): ["objects"]}
    for colour in (o.colour, rng.choice(tuple(COLOURS))):
        by_answer.setdefault(sum(p.colour == colour for p in scene.objects), []).append(f"{colour} objects")
    for shape in (o.shape, rng.choice(SHAPES)):
        name = "crosses" if shape == "cross" else f"{shape}s"
        by_answer.setdefault(sum(p.shape == shape for p in scene.objects), []).append(name)
    size = f"{rng.choice(SIZE_WORDS[o.size])} objects"
    by_answer.setdefault(sum(p.size == o.size for p in scene.objects), []).append(size)
    answer = rng.choice(sorted(by_answer))
    return f"how many {rng.choice(by_answer[answer])} are there?", NUMBERS[answer]


def _yesno(rng: random.Random, scene: Scene) -> tuple[str, str]:
    if rng.random() < 0.5:
        pairs = [(a, b, r) for a in scene.objects for b in scene.objects for r in _RELATIONS if _sign(a, b, r)]
        if pairs:
            answer = rng.random() < 0.5
            a, b, relation = rng.choice([p for p in pairs if (_sign(*p) > 0) == answer])
            text = f"is the {a.colour} {a.shape} {relation} the {b.colour} {b.shape}?"
            return text, "yes" if answer else "no"
    return _existence(rng, scene, rng.random() < 0.5)


def _existence(rng: random.Random, scene: Scene, answer: bool) -> tuple[str, str]:
    o = rng.choice(scene.objects)
    with_place = rng.random() < 0.3
    size, colour, shape, place = o.size, o.colour, o.shape, o.place
    if not answer:
        size, colour, shape, place = _near_miss(rng, scene, o, with_place)
    text = f"is there a {rng.choice(SIZE_WORDS[size])} {colour} {shape}"
    return f"{text} {at_place(rng, place)}?" if with_place else f"{text}?", "yes" if answer else "no"


def _near_miss(rng: random.Random, scene: Scene, o: Object, with_place: bool) -> tuple[str, str, str, str]:
    """An object (size, colour, shape, place) that is not there: one attribute taken from another object or changed."""
    others = [p for p in scene.objects if p is not o]
    while True:
        size, colour, shape, place = o.size, o.colour, o.shape, o.place
        attribute = rng.choice(("size", "colour", "shape", "place") if with_place else ("size", "colour", "shape"))
        source = rng.choice(others) if others and rng.random() < 0.6 else None
        if attribute == "size":
            size = "small" if o.size == "large" else "large"
        elif attribute == "colour":
            colour = source.colour if source else rng.choice(tuple(COLOURS))
        elif attribute == "shape":
            shape = source.shape if source else rng.choice(SHAPES)
        elif source:
            place = source.place
        there = any(
            (p.size, p.colour, p.shape) == (size, colour, shape) and (not with_place or p.place == place)
            for p in scene.objects
        )
        if not there and (colour, shape) in _SEEN:
            return size, colour, shape, place


def _sign(a: Object, b: Object, relation: str) -> int:
    """1 where the relation clearly holds from a to b, -1 where its opposite clearly holds, else 0."""
    dx, dy = _RELATIONS[relation]
    along = (a.x - b.x) * dx + (a.y - b.y) * dy
    return 0 if abs(along) < CLEARLY else (1 if along > 0 else -1)


def _named(rng: random.Random, scene: Scene, o: Object) -> str:
    names = [f"the {o.colour} {o.shape}", f"the object {at_place(rng, o.place)}"]
    names += [f"the {o.shape}"] if _alone(scene, shape=o.shape) else []
    return rng.choice(names)


def _alone(scene: Scene, *, shape: str | None = None, colour: str | None = None) -> bool:
    return sum(shape in (None, o.shape) and colour in (None, o.colour) for o in scene.objects) == 1


_ASK = {"colour": _colour, "shape": _shape, "size": _size, "place": _place, "count": _count, "yesno": _yesno}
