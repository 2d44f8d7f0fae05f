"""Changes of a scene in words: edit instructions, and stories that change one thing a sentence.

Both speak of six changes: recolour, move, remove, add, resize, reshape. `Change.apply` makes the next scene,
`instruction` and `sentence` say it, and `read_change` reads either kind of text back on the level of content.
"""

import dataclasses
import random
import re
from collections.abc import Sequence

from mmgpt.evaluate.shapes import world
from mmgpt.evaluate.shapes.language import (
    AT_PATTERN,
    PAIR_PATTERN,
    PLACE_PATTERN,
    SIZE_PATTERN,
    SIZE_WORDS,
    at_place,
    caption,
    consistent,
    place_word,
    plain_place,
    plain_size,
    read_caption,
    thing,
)
from mmgpt.evaluate.shapes.world import COLOURS, PLACES, SHAPES, Content, Object, Scene

EDITS = ("recolour", "move", "remove", "add", "resize", "reshape")
STORY_CHANGES = ("add", "move", "recolour", "remove")
_FIRST = "first, "
_NEXT = ("", "then ", "now ", "next ")

_THE = f"the {PAIR_PATTERN}"
_NEW = f"a (?P<size>{SIZE_PATTERN}) (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})"
_COLOUR, _SHAPE = f"({'|'.join(COLOURS)})", f"({'|'.join(SHAPES)})"
_PATTERNS = {
    kind: tuple(re.compile(text) for text in texts)
    for kind, texts in {
        "recolour": (f"(?:make|paint) {_THE} {_COLOUR}", f"{_THE} (?:turns|becomes) {_COLOUR}"),
        "move": (
            f"(?:move|put) {_THE} (?:to|in|on|at) the ({PLACE_PATTERN})",
            f"{_THE} (?:moves|goes) to the ({PLACE_PATTERN})",
        ),
        "remove": (f"(?:remove|delete) {_THE}", f"{_THE} (?:disappears|goes away)"),
        "add": (f"(?:add|put) {_NEW} {AT_PATTERN}", f"{_NEW} (?:appears|shows up) {AT_PATTERN}"),
        "resize": (f"make {_THE} ({SIZE_PATTERN})",),
        "reshape": (f"(?:turn|change) {_THE} into a {_SHAPE}",),
    }.items()
}


@dataclasses.dataclass(frozen=True)
class Change:
    """One change: its kind (of EDITS), the object before (None for add) and the object after (None for remove)."""

    kind: str
    old: Object | None
    new: Object | None


def random_change(rng: random.Random, scene: Scene, kind: str) -> tuple[Change, Scene] | None:
    """A change of a kind and the scene after it (valid, training pairs only), or None where tries find none."""
    if (kind == "remove" and len(scene.objects) < 2) or (kind == "add" and len(scene.objects) > 2):
        return None
    for _ in range(8):
        index = rng.randrange(len(scene.objects))
        old = None if kind == "add" else scene.objects[index]
        rest = tuple(o for o in scene.objects if o is not old)
        new = _replacement(rng, Scene(rest), kind, old)
        if kind == "remove":
            return Change(kind, old, None), Scene(rest)
        if new is None:
            continue
        position = len(rest) if old is None else index
        after = Scene((*rest[:position], new, *rest[position:]))
        if world.valid(after):
            return Change(kind, old, new), after
    return None


def instruction(rng: random.Random, change: Change) -> str:
    """The change as a request: "make the red circle blue."."""
    return f"{_request(rng, change)}."


def _request(rng: random.Random, change: Change) -> str:
    old, new = change.old, change.new
    if old is None:
        assert new is not None
        return f"{rng.choice(('add', 'put'))} {thing(rng, new)} {at_place(rng, new.place)}"
    the = f"the {old.colour} {old.shape}"
    if new is None:
        return f"{rng.choice(('remove', 'delete'))} {the}"
    if change.kind == "move":
        where = rng.choice((f"to the {place_word(rng, new.place)}", at_place(rng, new.place)))
        return f"move {the} {where}" if where.startswith("to") else f"put {the} {where}"
    if change.kind == "recolour":
        return f"{rng.choice(('make', 'paint'))} {the} {new.colour}"
    if change.kind == "resize":
        return f"make {the} {rng.choice(SIZE_WORDS[new.size])}"
    return f"{rng.choice(('turn', 'change'))} {the} into a {new.shape}"


def sentence(rng: random.Random, change: Change) -> str:
    """The change as a step of a story: "then the red circle turns blue." (kinds of STORY_CHANGES)."""
    return f"{_event(rng, change)}."


def _event(rng: random.Random, change: Change) -> str:
    old, new, lead = change.old, change.new, rng.choice(_NEXT)
    if old is None:
        assert new is not None
        return f"{lead}{thing(rng, new)} {rng.choice(('appears', 'shows up'))} {at_place(rng, new.place)}"
    the = f"{lead}the {old.colour} {old.shape}"
    if new is None:
        return f"{the} {rng.choice(('disappears', 'goes away'))}"
    if change.kind == "move":
        return f"{the} {rng.choice(('moves', 'goes'))} to the {place_word(rng, new.place)}"
    if change.kind == "recolour":
        return f"{the} {rng.choice(('turns', 'becomes'))} {new.colour}"
    raise ValueError(f"sentence: stories know the changes {STORY_CHANGES}, found {change.kind!r}")


def read_change(content: Content, text: str) -> Content | None:
    """The content after an instruction or a story's sentence, or None where the text is no change of this content."""
    text = text.removesuffix(".")
    text = text[len(max((lead for lead in _NEXT if text.startswith(lead)), key=len)) :]
    for kind, patterns in _PATTERNS.items():
        for pattern in patterns:
            if m := pattern.fullmatch(text):
                return _changed(content, kind, m)
    return None


def opening(rng: random.Random, scene: Scene) -> str:
    """A story's first sentence, which says that more will follow: "first, there is a tiny red circle at the top."."""
    return _FIRST + caption(rng, scene)


def story(rng: random.Random, count: int, steps: int = 3) -> tuple[list[str], list[Scene]]:
    """Sentences and the scenes they tell, from a first scene of `count` objects; `read_story` reads them back."""
    while True:
        scenes = [world.random_scene(rng, count)]
        sentences = [opening(rng, scenes[0])]
        while len(scenes) < steps:
            found = random_change(rng, scenes[-1], rng.choice(STORY_CHANGES))
            if found is not None:
                change, after = found
                if any(after.content == earlier.content for earlier in scenes):
                    break
                scenes.append(after)
                sentences.append(sentence(rng, change))
        if len(scenes) == steps:
            return sentences, scenes


def read_story(sentences: Sequence[str]) -> Content | None:
    """The content that the picture after these sentences must show, or None where they make no story."""
    if not sentences or not sentences[0].startswith(_FIRST):
        return None
    content = read_caption(sentences[0].removeprefix(_FIRST))
    for text in sentences[1:]:
        if content is None:
            return None
        content = read_change(content, text)
    return content


def _replacement(rng: random.Random, rest: Scene, kind: str, old: Object | None) -> Object | None:
    free = [p for p in PLACES if p not in {o.place for o in (*rest.objects, *([old] if old else []))}]
    if old is None:
        colour, shape = rng.choice(world.PAIRS)
        grown = world.added(rng, rest, shape, colour, rng.choice(("small", "large")), rng.choice(free))
        return grown.objects[-1] if grown else None
    if kind == "move":
        grown = world.added(rng, rest, old.shape, old.colour, old.size, rng.choice(free))
        return grown.objects[-1] if grown else None
    if kind == "recolour":
        return dataclasses.replace(old, colour=rng.choice([c for c in COLOURS if c != old.colour]))
    if kind == "reshape":
        return dataclasses.replace(old, shape=rng.choice([s for s in SHAPES if s != old.shape]))
    if kind == "resize":
        return dataclasses.replace(old, size="small" if old.size == "large" else "large")
    return None


def _changed(content: Content, kind: str, m: re.Match[str]) -> Content | None:
    objects = sorted(content)
    if kind == "add":
        new = (plain_size(m["size"]), m["shape"], m["colour"], plain_place(m[m.re.groups]))
        return _checked([*objects, new])
    named = [o for o in objects if (o[2], o[1]) == (m[1], m[2])]
    if not named:
        return None
    (old,) = named
    objects.remove(old)
    size, shape, colour, place = old
    if kind == "remove":
        return _checked(objects)
    if kind == "move":
        place = plain_place(m[3])
    elif kind == "recolour":
        colour = m[3]
    elif kind == "resize":
        size = plain_size(m[3])
    else:
        shape = m[3]
    new = (size, shape, colour, place)
    return None if new == old else _checked([*objects, new])


def _checked(objects: list[tuple[str, str, str, str]]) -> Content | None:
    return frozenset(objects) if consistent(objects) else None
