"""Edit instructions and stories: what the words say is what happens to the scene."""

import random

import pytest

from mmgpt.evaluate.shapes import changes, world
from mmgpt.evaluate.shapes.changes import read_change, read_story


@pytest.mark.parametrize("kind", changes.EDITS)
def test_an_instruction_reads_back_as_the_edited_content(kind: str) -> None:
    rng = random.Random(kind)
    made = 0
    for n in range(300):
        scene = world.random_scene(rng, 1 + n % 3)
        found = changes.random_change(rng, scene, kind)
        if found is None:
            continue
        made += 1
        change, after = found
        text = changes.instruction(rng, change)
        assert world.valid(after) and after.content != scene.content
        assert read_change(scene.content, text) == after.content, text
        untouched = [o for o in scene.objects if o is not change.old]
        assert set(untouched) <= set(after.objects)
    assert made > 150


def test_remove_needs_two_objects_and_add_at_most_two() -> None:
    rng = random.Random(0)
    assert changes.random_change(rng, world.random_scene(rng, 1), "remove") is None
    assert changes.random_change(rng, world.random_scene(rng, 3), "add") is None


def test_a_story_reads_back_step_by_step() -> None:
    rng = random.Random(2)
    for n in range(400):
        sentences, scenes = changes.story(rng, 1 + n % 2)
        assert len(sentences) == len(scenes) == 3
        assert len({s.content for s in scenes}) == 3
        for step, scene in enumerate(scenes):
            assert world.valid(scene)
            assert read_story(sentences[: step + 1]) == scene.content, sentences


@pytest.mark.parametrize(
    "text",
    [
        "the blue ring disappears",
        "the red circle",
        "the red circle turns red",
        "the red circle turns square",
        "a small red circle appears on the right",
        "a small blue ring appears in the upper left",
        "the red circle disappears",
        "then",
        "",
    ],
)
def test_a_sentence_that_cannot_follow_is_refused(text: str) -> None:
    assert read_story(["first, a small red circle in the top left", text]) is None


def test_stories_refuse_an_empty_start_and_what_follows_nonsense() -> None:
    assert read_story([]) is None
    assert read_story(["a small red circle in the top left"]) is None
    assert read_story(["hello", "the red circle turns blue"]) is None
