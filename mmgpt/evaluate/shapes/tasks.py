"""Tasks of the shapes world, judged by its oracle and its parsers: what is right is decided by pixels and grammar."""

import json

import numpy as np

from mmgpt.evaluate.shapes import attributes
from mmgpt.evaluate.shapes.changes import read_story
from mmgpt.evaluate.shapes.language import read_caption
from mmgpt.evaluate.shapes.oracle import objects_right, read_scene, scene_right
from mmgpt.evaluate.shapes.world import Content, Scene
from mmgpt.evaluate.tasks import Judgement, Task, judge_text
from mmgpt.generate.model import Continuation, Part

OBJECTS = "objects drawn with the right colour, shape and place"
SCENES = "pictures exactly right: every object, its size too, and nothing else"


def _truth(meta: dict[str, str]) -> Scene:
    return Scene.from_json(json.loads(meta["scene"]))


def in_words(content: Content) -> str:
    """A scene's content, one phrase an object."""
    return ", ".join(sorted(f"{size} {colour} {shape} {place}" for size, shape, colour, place in content))


def _picture(made: Continuation) -> np.ndarray | None:
    """The first picture made, or the last frame of the first clip."""
    return next((part.frames[-1] for part in made.made if part.frames is not None), None)


def _read(picture: np.ndarray | None) -> Scene:
    """What a picture shows; nothing where there is none, or one that is not square as all of this world are."""
    return Scene(()) if picture is None or picture.shape[0] != picture.shape[1] else read_scene(picture)


def _drawn(truth: Content, picture: np.ndarray | None) -> tuple[bool, dict[str, tuple[float, float]]]:
    read = _read(picture)
    found = objects_right(truth, read)
    right = scene_right(truth, read)
    return right, {
        "objects": (found.right, found.total),
        "objects_with_size": (found.with_size, found.total),
        "scenes": (float(right), 1.0),
    }


def judge_picture(meta: dict[str, str], made: Continuation) -> Judgement:
    """The picture, or a clip's last frame, against the true scene."""
    truth = _truth(meta).content
    right, shares = _drawn(truth, _picture(made))
    return Judgement(right=right, truth=in_words(truth), shares=shares)


def judge_unseen(meta: dict[str, str], made: Continuation) -> Judgement:
    """As `judge_picture`, and the object whose pair of colour and shape was held out, on its own."""
    truth, picture = _truth(meta).content, _picture(made)
    right, shares = _drawn(truth, picture)
    held_out = frozenset(o for o in truth if f"{o[2]} {o[1]}" == meta["kind"])
    shares["unseen_objects"] = _drawn(held_out, picture)[1]["objects"]
    return Judgement(right=right, truth=in_words(truth), shares=shares)


def judge_attributes(meta: dict[str, str], made: Continuation) -> Judgement:
    """Whether the picture shows the one thing that the prompt's kind asks for."""
    wanted, picture = attributes.from_text(meta["demands"]), _picture(made)
    right = picture is not None and attributes.met(wanted, _read(picture))
    words = " and ".join(demand.words for demand in wanted)
    return Judgement(right=right, truth=words, shares={"right": (float(right), 1.0)})


def judge_caption(meta: dict[str, str], made: Continuation) -> Judgement:
    """The content that the caption states against the true one; and how much of it the codes of the picture keep."""
    truth = _truth(meta).content
    text = made.made[0].text if len(made.made) == 1 else ""
    stated = read_caption(text)
    right = stated == truth
    shares = {"exact": (float(right), 1.0), "objects": (len(truth & (stated or frozenset())), len(truth))}
    seen = next((part.frames[-1] for part in made.prompt if part.frames is not None), None)
    shares["codes_keep"] = _drawn(truth, seen)[1]["objects"]
    return Judgement(right=right, truth=meta["answer"] or in_words(truth), shares=shares)


def judge_story(meta: dict[str, str], made: Continuation) -> Judgement:
    """Whether an image follows each sentence, and shows what the story so far, the model's own sentences too, says."""
    parts = list(made.prompt)
    for part in made.made:
        if parts[-1].frames is None and part.frames is None:  # the model goes on with the prompt's sentence
            parts[-1] = Part(text=f"{parts[-1].text} {part.text}")
        else:
            parts.append(part)
    pictures = [i for i, part in enumerate(parts) if part.frames is not None]
    placed = len(pictures) > 1 and pictures == list(range(1, len(parts), 2)) and len(parts) % 2 == 0
    right = sum(_follows(parts[:i], parts[i]) for i in pictures)
    whole = placed and right == len(pictures)
    shares = {
        "image_placed": (float(placed), 1.0),
        "image_right": (float(right), float(max(1, len(pictures)))),
        "stories": (float(whole), 1.0),
    }
    return Judgement(right=whole, truth="", shares=shares)


def _follows(before: list[Part], picture: Part) -> bool:
    content = read_story([part.text for part in before if part.frames is None])
    return content is not None and picture.frames is not None and scene_right(content, _read(picture.frames[-1]))


_DRAWN = {"objects": OBJECTS, "scenes": SCENES, "objects_with_size": "objects right, size too"}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="draw",
            title="Text → image",
            about="The model draws what a caption says. The scenes were kept out of all training data.",
            figure="objects",
            metrics=_DRAWN,
            judge=judge_picture,
            guided=True,
        ),
        Task(
            name="unseen",
            title="Pairs never seen",
            about="Captions that name a colour with a shape that were never together in training.",
            figure="unseen_objects",
            metrics={"unseen_objects": "objects of held-out pairs drawn right", **_DRAWN},
            judge=judge_unseen,
            guided=True,
        ),
        Task(
            name="attributes",
            title="Text → image, by attribute",
            about="Of each picture one thing is asked: that objects are there, how many, in what colour, where.",
            figure="right",
            metrics={"right": "pictures with the attribute that was asked for"},
            judge=judge_attributes,
            guided=True,
        ),
        Task(
            name="caption",
            title="Image → caption",
            about="The model says what a picture shows; a parser reads it back. Synonyms are right too.",
            figure="exact",
            metrics={
                "exact": "captions exactly right",
                "objects": "objects named rightly in full",
                "codes_keep": "objects that the image tokenizer's codes keep: a ceiling",
            },
            judge=judge_caption,
        ),
        Task(
            name="answer",
            title="Image + question → answer",
            about="Questions about colour, shape, size, place and number, and yes-or-no questions with near misses.",
            figure="right",
            metrics={"right": "answers right"},
            judge=judge_text,
            stop=".",
        ),
        Task(
            name="next_frame",
            title="Video → next frame",
            about="Three frames are given; the model draws the fourth. Objects move a step a frame, or rest.",
            figure="scenes",
            metrics={"scenes": "frames exactly right", "objects": OBJECTS},
            judge=judge_picture,
            add_frames=1,
        ),
        Task(
            name="story",
            title="Story",
            about="From its first sentence the model goes on by itself: when to draw, what happens next, when to end.",
            figure="stories",
            metrics={
                "stories": "stories right from end to end",
                "image_placed": "stories with a picture after every sentence",
                "image_right": "pictures that show what the story says up to them",
            },
            judge=judge_story,
            long=True,
        ),
        Task(
            name="edit",
            title="Image + instruction → edited image",
            about="The asked change must be made, and all else must stay in its place.",
            figure="scenes",
            metrics={"scenes": "edits exactly right", "objects": OBJECTS},
            judge=judge_picture,
        ),
    )
}
