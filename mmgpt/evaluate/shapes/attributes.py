"""Attributes of drawn pictures, scored as GenEval does (arXiv 2310.11513), with the shapes oracle as the detector.

Six kinds of prompts, each asking for one thing of the picture: that an object is there, two are, how many, in which
colour, how they lie to one another, and each in its own colour. A class of objects is a shape. The prompts are whole
captions of scenes, since a model of this world knows no others; what they say beyond that is not judged.
"""

import dataclasses
import json
import random
from collections.abc import Callable

from mmgpt.evaluate.shapes import world
from mmgpt.evaluate.shapes.world import Object, Scene

KINDS = ("single object", "two objects", "counting", "colours", "position", "colour attribution")
RELATIONS = ("left of", "right of", "above", "below")
_SLACK = 0.1
"""Part of the objects' sizes that an offset must exceed to count."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demand:
    """At least `count` objects of a shape, or exactly that many; in a colour, and lying so to the other demand's."""

    shape: str
    count: int = 1
    exactly: bool = False
    colour: str = ""
    relation: str = ""

    @property
    def words(self) -> str:
        """The demand as people say it."""
        number = f"exactly {self.count}" if self.exactly else str(self.count)
        return " ".join(word for word in (number, self.colour, self.shape, self.relation) if word)


Demands = tuple[Demand, ...]
"""What a picture must show. A demand with a relation lies so to the objects of the one after it."""


def demands(rng: random.Random, kind: str) -> tuple[Scene, Demands]:
    """A scene of a kind (of KINDS) and what its caption asks for."""
    return _MAKE[kind](rng)


def met(wanted: Demands, shown: Scene) -> bool:
    """Whether a picture shows all that is demanded."""
    groups = [_group(demand, shown) for demand in wanted]
    if any(group is None for group in groups):
        return False
    pairs = zip(wanted, groups, [*groups[1:], []], strict=True)
    return all(
        demand.relation in relations(a, b)
        for demand, mine, theirs in pairs
        if demand.relation
        for a in mine or ()
        for b in theirs or ()
    )


def _group(demand: Demand, shown: Scene) -> list[Object] | None:
    """The objects that a demand is about, None where it is not met."""
    alike = [o for o in shown.objects if o.shape == demand.shape]
    if demand.exactly and len(alike) != demand.count:
        return None
    found = [o for o in alike if demand.colour in ("", o.colour)]
    return found if len(found) >= demand.count else None


def relations(a: Object, b: Object) -> frozenset[str]:
    """How a lies to b: along each axis on which the offset, less some slack, is more than half of its length."""
    slack = _SLACK * 2 * (a.radius + b.radius)
    dx, dy = (_beyond(p - q, slack) for p, q in ((a.x, b.x), (a.y, b.y)))
    length = float((a.x - b.x) ** 2 + (a.y - b.y) ** 2) ** 0.5
    if not length:
        return frozenset()
    found = {("left of", -dx / length), ("right of", dx / length), ("above", -dy / length), ("below", dy / length)}
    return frozenset(name for name, share in found if share > 0.5)


def _beyond(offset: float, slack: float) -> float:
    return max(abs(offset) - slack, 0.0) * (1 if offset > 0 else -1)


def as_text(wanted: Demands) -> str:
    """Demands as JSON; `from_text` reads them back."""
    return json.dumps([dataclasses.asdict(demand) for demand in wanted])


def from_text(text: str) -> Demands:
    """The demands that `as_text` wrote."""
    return tuple(Demand(**demand) for demand in json.loads(text))


def _drawn(rng: random.Random, count: int, wanted: Callable[[Scene], bool] = lambda scene: True) -> Scene:
    """A scene for evaluation that fits."""
    while True:
        scene = world.random_scene(rng, count)
        if world.for_evaluation(scene) and wanted(scene):
            return scene


def _differ(scene: Scene) -> bool:
    a, b = scene.objects
    return a.shape != b.shape and a.colour != b.colour


def _single(rng: random.Random) -> tuple[Scene, Demands]:
    scene = _drawn(rng, 1)
    return scene, (Demand(shape=scene.objects[0].shape),)


def _two(rng: random.Random) -> tuple[Scene, Demands]:
    scene = _drawn(rng, 2, _differ)
    return scene, tuple(Demand(shape=o.shape) for o in scene.objects)


def _counting(rng: random.Random) -> tuple[Scene, Demands]:
    count = rng.choice((2, 3))
    scene = _drawn(rng, count, lambda scene: len({o.shape for o in scene.objects}) == 1)
    return scene, (Demand(shape=scene.objects[0].shape, count=count, exactly=True),)


def _colours(rng: random.Random) -> tuple[Scene, Demands]:
    scene = _drawn(rng, 1)
    return scene, (Demand(shape=scene.objects[0].shape, colour=scene.objects[0].colour),)


def _position(rng: random.Random) -> tuple[Scene, Demands]:
    relation = rng.choice(RELATIONS)
    scene = _drawn(rng, 2, lambda scene: _differ(scene) and relations(*scene.objects) == {relation})
    first, second = scene.objects
    return scene, (Demand(shape=first.shape, relation=relation), Demand(shape=second.shape))


def _attribution(rng: random.Random) -> tuple[Scene, Demands]:
    scene = _drawn(rng, 2, _differ)
    return scene, tuple(Demand(shape=o.shape, colour=o.colour) for o in scene.objects)


_MAKE: dict[str, Callable[[random.Random], tuple[Scene, Demands]]] = {
    "single object": _single,
    "two objects": _two,
    "counting": _counting,
    "colours": _colours,
    "position": _position,
    "colour attribution": _attribution,
}
