"""Attributes are judged as GenEval does: what is asked is required, what is not asked is free."""

import random

import pytest

from mmgpt.evaluate.shapes import attributes, world
from mmgpt.evaluate.shapes.attributes import KINDS, Demand, as_text, from_text, met, relations
from mmgpt.evaluate.shapes.oracle import read_scene
from mmgpt.evaluate.shapes.world import Object, Scene

RED = Object("circle", "red", "small", 16, 16)
BLUE = Object("square", "blue", "large", 78, 48)
CYAN = Object("circle", "cyan", "large", 48, 78)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rendered_scene_meets_its_demands_as_the_oracle_reads_it(kind: str):
    rng = random.Random(kind)
    scenes = [attributes.demands(rng, kind) for _ in range(20)]
    assert all(met(wanted, read_scene(world.render(scene))) for scene, wanted in scenes)
    assert all(world.for_evaluation(scene) for scene, _ in scenes)
    assert all(not met(wanted, Scene(())) for _, wanted in scenes)
    assert all(from_text(as_text(wanted)) == wanted for _, wanted in scenes)


def changed(scene: Scene, kind: str) -> Scene:
    """The scene with just that wrong which its kind asks for."""
    first, *rest = scene.objects
    shape = next(s for s in world.SHAPES if s not in {o.shape for o in scene.objects})
    colour = next(c for c in world.COLOURS if c not in {o.colour for o in scene.objects})
    if kind in ("single object", "two objects"):
        return Scene((Object(shape, first.colour, first.size, first.x, first.y), *rest))
    if kind == "counting":
        return Scene(scene.objects[1:])
    if kind == "colours":
        return Scene((Object(first.shape, colour, first.size, first.x, first.y),))
    (second,) = rest
    if kind == "position":  # they change places
        a = Object(first.shape, first.colour, first.size, second.x, second.y)
        return Scene((a, Object(second.shape, second.colour, second.size, first.x, first.y)))
    a = Object(first.shape, second.colour, first.size, first.x, first.y)  # they change colours
    return Scene((a, Object(second.shape, first.colour, second.size, second.x, second.y)))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_finds_its_own_fault(kind: str):
    rng = random.Random(kind)
    for _ in range(20):
        scene, wanted = attributes.demands(rng, kind)
        assert met(wanted, scene) and not met(wanted, changed(scene, kind))


def test_what_is_not_asked_for_is_free():
    both = Scene((RED, BLUE, CYAN))
    assert met((Demand(shape="circle"),), both)
    assert met((Demand(shape="circle", colour="cyan"), Demand(shape="square", colour="blue")), both)
    assert not met((Demand(shape="circle", colour="blue"),), both)


def test_counts_are_exact_only_where_asked():
    three = Scene((RED, CYAN, Object("circle", "blue", "small", 80, 16)))
    assert met((Demand(shape="circle", count=2),), three)
    assert not met((Demand(shape="circle", count=2, exactly=True),), three)
    assert met((Demand(shape="circle", count=3, exactly=True),), three)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (16, 48, {"left of"}),
        (80, 48, {"right of"}),
        (48, 16, {"above"}),
        (48, 80, {"below"}),
        (20, 20, {"left of", "above"}),
        (44, 48, set()),
        (48, 48, set()),
    ],
)
def test_relations_follow_geneval(x: int, y: int, expected: set[str]):
    """An offset within a tenth of the sizes is none; along an axis it must be over half of the distance."""
    assert relations(Object("ring", "red", "small", x, y), Object("cross", "blue", "small", 48, 48)) == expected


def test_every_pair_of_one_kind_must_lie_as_asked():
    left = Object("circle", "cyan", "small", 16, 80)
    wanted = (Demand(shape="circle", relation="left of"), Demand(shape="square"))
    assert met(wanted, Scene((RED, left, BLUE)))
    assert not met(wanted, Scene((Object("circle", "cyan", "small", 80, 80), RED, BLUE)))
