"""Questions have one right answer, which a reader that knows only the words and the scene finds too."""

import random
import re
from collections import Counter

import pytest

from mmgpt.evaluate.shapes import world
from mmgpt.evaluate.shapes.language import AT_PATTERN, plain_place, plain_size
from mmgpt.evaluate.shapes.questions import KINDS, NUMBERS, question
from mmgpt.evaluate.shapes.world import Object, Scene

WORDS = r"(?:(small|tiny|large|big) )?(?:(red|orange|yellow|green|cyan|blue|purple|black) )?"
NAME = re.compile(rf"{WORDS}(circle|square|triangle|diamond|cross|ring|object)(?:e?s)?(?: {AT_PATTERN})?")


def named(scene: Scene, text: str) -> list[Object]:
    """The objects that the noun phrase in a text can mean."""
    found = NAME.search(text)
    if found is None:
        at = re.search(AT_PATTERN, text)
        colour = re.search(r"which shape is (\w+)\?", text)
        if at:
            return [o for o in scene.objects if o.place == plain_place(at[1])]
        assert colour, text
        return [o for o in scene.objects if o.colour == colour[1]]
    size, colour, shape, place = found.groups()
    return [
        o
        for o in scene.objects
        if (size is None or o.size == plain_size(size))
        and (colour is None or o.colour == colour)
        and (shape == "object" or o.shape == shape)
        and (place is None or o.place == plain_place(place))
    ]


def answered(scene: Scene, kind: str, text: str) -> str:
    """The answer by the words alone; fails where they are ambiguous."""
    relation = re.fullmatch(r"is the (\w+ \w+) (left of|right of|above|below) the (\w+ \w+)\?", text)
    if relation:
        (a,), (b,) = named(scene, relation[1]), named(scene, relation[3])
        along = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[relation[2]]
        assert abs(along) >= 16, text
        return "yes" if along > 0 else "no"
    if kind == "yesno":
        return "yes" if named(scene, text) else "no"
    if kind == "count":
        return NUMBERS[len(named(scene, text))]
    (o,) = named(scene, text)
    return {"colour": o.colour, "shape": o.shape, "size": o.size, "place": o.place}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_follows_from_the_words(kind: str) -> None:
    rng = random.Random(kind)
    for n in range(600):
        scene = world.random_scene(rng, 1 + n % 3)
        text, answer = question(rng, scene, kind)
        assert answered(scene, kind, text) == answer, (text, scene)
        assert 1 <= len(answer.split()) <= 2


def test_answers_are_spread() -> None:
    rng = random.Random(0)
    asked = {kind: Counter() for kind in KINDS}
    for n in range(1500):
        scene = world.random_scene(rng, 1 + n % 3)
        for kind in KINDS:
            asked[kind][question(rng, scene, kind)[1]] += 1
    assert 0.45 < asked["yesno"]["yes"] / 1500 < 0.55
    assert max(asked["count"].values()) / 1500 < 0.5 and set(asked["count"]) == set(NUMBERS)
    assert set(asked["place"]) == set(world.PLACES)


def test_no_question_names_a_held_out_pair() -> None:
    rng = random.Random(0)
    for n in range(2000):
        text, _ = question(rng, world.random_scene(rng, 1 + n % 3), "yesno")
        assert not any(f"{colour} {shape}" in text for colour, shape in world.UNSEEN), text
