"""Judges: the truth, rendered or written, is right by every metric; anything else is wrong, and nothing crashes."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from mmgpt.core.document import Document
from mmgpt.evaluate import tasks
from mmgpt.evaluate.command import TASKS
from mmgpt.evaluate.shapes import changes, language, world
from mmgpt.evaluate.shapes.attributes import Demand, as_text
from mmgpt.evaluate.shapes.tasks import judge_story
from mmgpt.evaluate.tasks import Judgement, TaskError
from mmgpt.generate.model import Continuation, Part
from tests import tiny, tiny_run

SCENE = tiny_run.SCENE
META = {
    "task": "",
    "kind": "blue square",
    "answer": tiny_run.ANSWER,
    "scene": json.dumps(SCENE.as_json()),
    "demands": as_text((Demand(shape="circle", colour="red"), Demand(shape="square", colour="blue"))),
}
OTHER = world.Scene((world.Object("ring", "cyan", "small", 48, 48),))


def picture(scene: world.Scene, clip: bool = False) -> Part:
    frames = np.stack([world.render(OTHER), world.render(scene)] if clip else [world.render(scene)])
    return Part(frames=frames, clip=clip, given=int(clip))


def made(*parts: Part, prompt: tuple[Part, ...] = ()) -> Continuation:
    return Continuation(prompt=prompt or (picture(SCENE),), made=parts, finished=bool(parts))


def truth(task: str) -> Continuation:
    if task in ("draw", "unseen", "attributes", "edit"):
        return made(picture(SCENE))
    if task == "next_frame":
        return made(picture(SCENE, clip=True))
    return made(Part(text=language.caption(random.Random(1), SCENE) if task == "caption" else tiny_run.ANSWER))


SIMPLE = [name for name in TASKS if name != "story"]


@pytest.mark.parametrize("name", SIMPLE)
def test_the_truth_is_right_by_every_metric(name: str):
    judgement = TASKS[name].judge(META, truth(name))
    assert judgement.right
    assert set(judgement.shares) >= set(TASKS[name].metrics)
    assert all(total == weight > 0 for total, weight in judgement.shares.values())


@pytest.mark.parametrize("name", SIMPLE)
@pytest.mark.parametrize("wrong", ["nothing", "another scene", "two texts", "not square"])
def test_anything_else_is_wrong(name: str, wrong: str):
    output = {
        "nothing": made(),
        "another scene": made(picture(OTHER)),
        "two texts": made(Part(text="a"), Part(text="b")),
        "not square": made(Part(frames=np.zeros((1, 8, 16, 3), np.uint8))),
    }[wrong]
    judgement = TASKS[name].judge(META, output)
    assert not judgement.right
    assert judgement.shares[TASKS[name].figure][0] == 0 < judgement.shares[TASKS[name].figure][1]


def test_objects_count_in_part():
    half = world.Scene(SCENE.objects[:1])
    judgement = TASKS["draw"].judge(META, made(picture(half)))
    assert not judgement.right and judgement.shares["objects"] == (1, 2)


def test_unseen_counts_the_held_out_object_alone():
    for index, expected in ((0, 0), (1, 1)):
        only = world.Scene(SCENE.objects[index : index + 1])
        assert TASKS["unseen"].judge(META, made(picture(only))).shares["unseen_objects"] == (expected, 1)


def test_an_answer_may_differ_in_case_spaces_and_full_stop():
    meta = {**META, "answer": "top left"}
    for text, right in (("Top  left.", True), (" top left ", True), ("left top", False), ("", False)):
        assert TASKS["answer"].judge(meta, made(Part(text=text))).right is right


def story(seed: int) -> tuple[tuple[Part, ...], list[Part]]:
    sentences, scenes = changes.story(random.Random(seed), 1)
    parts = [part for s, scene in zip(sentences, scenes, strict=True) for part in (Part(text=s), picture(scene))]
    return tuple(parts[:1]), parts[1:]


def test_a_story_is_right_if_each_picture_follows_from_the_sentences_so_far():
    for seed in range(5):
        prompt, parts = story(seed)
        judgement = judge_story(META, made(*parts, prompt=prompt))
        assert judgement.right and judgement.shares["image_right"] == (3, 3)


def test_a_story_with_a_wrong_picture_is_wrong_there_only():
    prompt, parts = story(0)
    judgement = judge_story(META, made(parts[0], parts[1], picture(OTHER), *parts[3:], prompt=prompt))
    assert not judgement.right
    assert judgement.shares == {"image_placed": (1.0, 1.0), "image_right": (2.0, 3.0), "stories": (0.0, 1.0)}


@pytest.mark.parametrize("keep", [[], [0], [0, 1], [0, 2], [1, 2], [0, 1, 2, 3]])
def test_a_story_without_a_picture_after_each_sentence_is_misplaced(keep: list[int]):
    prompt, parts = story(0)
    shares = judge_story(META, made(*[parts[i] for i in keep], prompt=prompt)).shares
    assert shares["image_placed"][0] == shares["stories"][0] == 0.0


def test_a_first_sentence_that_the_model_goes_on_with_is_read_whole():
    prompt, parts = story(0)
    shares = judge_story(META, made(Part(text="and a large red cross in the centre"), *parts, prompt=prompt)).shares
    assert shares["image_placed"] == (1.0, 1.0) and shares["image_right"][0] == 0


def test_shares_add_up_over_prompts_and_by_kind():
    task = TASKS["draw"]
    judgements = [
        Judgement(right=bool(right), truth="", shares=dict.fromkeys(task.metrics, (right, total)))
        for right, total in ((1, 1), (0, 3), (2, 2))
    ]
    found = tasks.scores(task, ["a", "b", "a"], judgements)
    assert found["objects"] == 0.5 and found["objects/a"] == 1.0 and found["objects/b"] == 0.0 and found["count"] == 3


def test_prompts_of_no_known_task_are_an_error(tmp_path: Path):
    tiny.write(tmp_path / "other", [Document(key="a", segments=(), meta={"task": "juggle"})])
    with pytest.raises(TaskError, match="found 'juggle'"):
        tasks.load_prompts(tmp_path / "other", TASKS, None, tiny.text())


def test_limit_takes_the_first_prompts(model_run: Path):
    prompts = tasks.load_prompts(model_run.parent / "prompts" / "draw", TASKS, 2, tiny.text())
    assert [document.key for document in prompts.documents] == ["draw-0", "draw-1"]
