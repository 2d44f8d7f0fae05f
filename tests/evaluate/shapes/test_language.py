"""Captions say exactly what a scene or clip shows, and the parsers accept nothing else."""

import random

import pytest

from mmgpt.evaluate.shapes import language, world
from mmgpt.evaluate.shapes.language import read_caption, read_clip_caption


def test_a_caption_reads_back_as_the_scenes_content() -> None:
    rng = random.Random(0)
    for n in range(1000):
        scene = world.random_scene(rng, 1 + n % 3)
        text = language.caption(rng, scene)
        assert read_caption(text) == scene.content, text
        assert text == text.lower().strip()


def test_a_scene_has_many_captions() -> None:
    rng = random.Random(0)
    scene = world.random_scene(rng, 2)
    assert len({language.caption(rng, scene) for _ in range(300)}) > 40


def test_a_clips_caption_reads_back_as_its_motion() -> None:
    rng = random.Random(1)
    for n in range(500):
        clip = world.random_clip(rng, 1 + n % 2)
        text = language.clip_caption(rng, clip)
        assert read_clip_caption(text) == language.motion_of(clip), text


def test_synonyms_mean_the_same() -> None:
    assert read_caption("a tiny red circle in the upper left") == {("small", "circle", "red", "top left")}
    assert read_caption("in the middle a big blue ring") == {("large", "ring", "blue", "centre")}
    assert read_clip_caption("a big red circle on the left does not move") == {
        ("large", "circle", "red", "left", "still")
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a picture of ",
        "a red circle in the top left",
        "a small red circle",
        "a small red circle in the top left and",
        "a small red blue circle in the top left",
        "a small red circle in the top left a large blue ring on the right",
        "a small red circle in the top left and a large red circle on the right",
        "a small red circle in the top left and a large blue ring in the upper left",
        "a small red circle in the top left moves right",
        "a small red circle in the top left, a small blue circle on the right, a small green circle on the left"
        " and a small black circle at the bottom",
        "A small red circle in the top left",
    ],
)
def test_the_parser_refuses_what_is_not_a_caption(text: str) -> None:
    assert read_caption(text) is None


def test_the_clip_parser_refuses_a_caption_without_motion() -> None:
    assert read_clip_caption("a small red circle in the top left") is None
    assert read_clip_caption("a small red circle in the top left moves away") is None
