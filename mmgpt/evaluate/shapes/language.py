"""Words of the shapes world: captions of pictures and clips and the strict parsers that read them back.

A caption names size, colour, shape and place of every object, in free order and with synonyms, so that it fixes the
scene's content. Changes of a scene and questions about it are in `changes` and `questions`.
"""

import random
import re

from mmgpt.evaluate.shapes.world import COLOURS, DIRECTIONS, SHAPES, Clip, Content, Object, Scene

Motion = frozenset[tuple[str, str, str, str, str]]
"""What a clip's caption says: {(size, shape, colour, first place, direction)}."""

SIZE_WORDS = {"small": ("small", "tiny"), "large": ("large", "big")}
PLACE_WORDS = {
    "top left": ("top left", "upper left"),
    "top": ("top",),
    "top right": ("top right", "upper right"),
    "left": ("left",),
    "centre": ("centre", "middle"),
    "right": ("right",),
    "bottom left": ("bottom left", "lower left"),
    "bottom": ("bottom",),
    "bottom right": ("bottom right", "lower right"),
}
_SIZE_OF = {word: size for size, words in SIZE_WORDS.items() for word in words}
_PLACE_OF = {word: place for place, words in PLACE_WORDS.items() for word in words}
_LEADS = ("", "a picture of ", "an image with ", "there is ", "we see ", "this shows ")
_CLIP_LEADS = ("", "in this clip ", "a video where ")
_VERBS = ("moves", "goes", "slides")
_STILL = ("stays still", "does not move")

SIZE_PATTERN = "|".join(_SIZE_OF)
PAIR_PATTERN = f"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
PLACE_PATTERN = "|".join(sorted(_PLACE_OF, key=len, reverse=True))
AT_PATTERN = f"(?:in|on|at) the ({PLACE_PATTERN})"
_THING_PATTERN = f"a ({SIZE_PATTERN}) {PAIR_PATTERN}"
_MOTION_PATTERN = f"(?:(?:{'|'.join(_VERBS)}) ({'|'.join(DIRECTIONS)})|{'|'.join(_STILL)})"
_AFTER = re.compile(f"{_THING_PATTERN} {AT_PATTERN}")
_BEFORE = re.compile(f"{AT_PATTERN} {_THING_PATTERN}")
_MOVING = re.compile(f"{_THING_PATTERN} {AT_PATTERN} {_MOTION_PATTERN}")
_JOIN = re.compile(r", and |, | and ")


def thing(rng: random.Random, o: Object) -> str:
    """An object with its article and without its place: "a tiny red circle"."""
    return f"a {rng.choice(SIZE_WORDS[o.size])} {o.colour} {o.shape}"


def at_place(rng: random.Random, place: str) -> str:
    """A place with its preposition: "in the upper left"."""
    preposition = {"top": "at", "bottom": "at", "left": "on", "right": "on"}.get(place, "in")
    return f"{preposition} the {place_word(rng, place)}"


def place_word(rng: random.Random, place: str) -> str:
    """One of a place's names."""
    return rng.choice(PLACE_WORDS[place])


def caption(rng: random.Random, scene: Scene) -> str:
    """A caption that fixes the scene's content; `read_caption` reads it back."""
    place_first = rng.random() < 0.25
    phrases = []
    for o in rng.sample(scene.objects, len(scene.objects)):
        where, what = at_place(rng, o.place), thing(rng, o)
        phrases.append(f"{where} {what}" if place_first else f"{what} {where}")
    lead = "" if place_first else rng.choice(_LEADS)
    return f"{lead}{_joined(rng, phrases)}."


def read_caption(text: str) -> Content | None:
    """The content that a caption states, or None where it is not a caption of one valid scene."""
    phrases = _phrases(text, _LEADS)
    found = [read_object(p) for p in phrases]
    objects = [o for o in found if o is not None]
    if len(objects) < len(found) or not consistent(objects):
        return None
    return frozenset(objects)


def clip_caption(rng: random.Random, clip: Clip) -> str:
    """A caption that fixes each object of the first frame and its direction; `read_clip_caption` reads it back."""
    pairs = list(zip(clip.scene.objects, clip.directions, strict=True))
    phrases = []
    for o, direction in rng.sample(pairs, len(pairs)):
        motion = rng.choice(_STILL) if direction == "still" else f"{rng.choice(_VERBS)} {direction}"
        phrases.append(f"{thing(rng, o)} {at_place(rng, o.place)} {motion}")
    return f"{rng.choice(_CLIP_LEADS)}{_joined(rng, phrases)}."


def read_clip_caption(text: str) -> Motion | None:
    """What a clip's caption states, or None where it is not the caption of one valid clip."""
    found = [_MOVING.fullmatch(p) for p in _phrases(text, _CLIP_LEADS)]
    stated = [(*_stated(*m.groups()[:4]), m[5] or "still") for m in found if m is not None]
    if len(stated) < len(found) or not consistent([s[:4] for s in stated]):
        return None
    return frozenset(stated)


def motion_of(clip: Clip) -> Motion:
    """What a caption of the clip says."""
    pairs = zip(clip.scene.objects, clip.directions, strict=True)
    return frozenset((o.size, o.shape, o.colour, o.place, direction) for o, direction in pairs)


def consistent(objects: list[tuple[str, str, str, str]]) -> bool:
    """Whether stated objects (size, shape, colour, place) can be one scene: places and (colour, shape) differ."""
    places, pairs = {o[3] for o in objects}, {o[1:3] for o in objects}
    return 1 <= len(objects) <= 3 and len(places) == len(objects) == len(pairs)


def plain_size(word: str) -> str:
    """The size that a size word means."""
    return _SIZE_OF[word]


def plain_place(words: str) -> str:
    """The place that a place's name means."""
    return _PLACE_OF[words]


def read_object(phrase: str) -> tuple[str, str, str, str] | None:
    """(size, shape, colour, place) that one phrase states, such as "a tiny red circle in the upper left"."""
    if m := _AFTER.fullmatch(phrase):
        return _stated(m[1], m[2], m[3], m[4])
    if m := _BEFORE.fullmatch(phrase):
        return _stated(m[2], m[3], m[4], m[1])
    return None


def _stated(size: str, colour: str, shape: str, place: str) -> tuple[str, str, str, str]:
    return _SIZE_OF[size], shape, colour, _PLACE_OF[place]


def _joined(rng: random.Random, phrases: list[str]) -> str:
    if len(phrases) == 3:
        first, second = rng.choice(((", ", " and "), (" and ", " and "), (", ", ", and "), (", ", ", ")))
        return f"{phrases[0]}{first}{phrases[1]}{second}{phrases[2]}"
    return rng.choice((" and ", ", ")).join(phrases)


def _phrases(text: str, leads: tuple[str, ...]) -> list[str]:
    text = text.removesuffix(".")
    lead = max((lead for lead in leads if text.startswith(lead)), key=len)
    return _JOIN.split(text[len(lead) :])
