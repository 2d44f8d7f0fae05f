"""The shapes world keeps its own rules: layout, held-out pairs, motion, rendering."""

import itertools
import random

import numpy as np
import pytest

from mmgpt.evaluate.shapes import world
from mmgpt.evaluate.shapes.world import Object, Scene


def scenes(number: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [world.random_scene(rng, 1 + n % 3) for n in range(number)]


def test_random_scenes_keep_the_layout_rules() -> None:
    for scene in scenes(500):
        boxes = [(o.x - o.radius, o.y - o.radius, o.x + o.radius, o.y + o.radius) for o in scene.objects]
        assert all(min(b) >= 0 and max(b) <= world.CANVAS for b in boxes)
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                assert max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) >= world.GAP
        for o in scene.objects:
            assert all(abs(c - line) >= world.MARGIN for c in (o.x, o.y) for line in (32, 64))
        assert len({o.place for o in scene.objects}) == len({o.pair for o in scene.objects}) == len(scene.objects)
        assert world.valid(scene)


def test_every_place_colour_shape_and_size_occurs_and_held_out_pairs_never() -> None:
    objects = [o for scene in scenes(2000) for o in scene.objects]
    assert {o.place for o in objects} == set(world.PLACES)
    assert {o.pair for o in objects} == set(world.PAIRS)
    assert {o.size for o in objects} == set(world.SIZES)
    assert len(world.UNSEEN) == 6 and len(world.PAIRS) == 42
    assert len({c for c, _ in world.UNSEEN}) == len({s for _, s in world.UNSEEN}) == 6


def test_valid_refuses_each_broken_rule() -> None:
    good = Object("circle", "red", "small", 20, 20)
    assert world.valid(Scene((good,)))
    broken = {
        "empty": (),
        "outside": (Object("circle", "red", "large", 14, 20),),
        "near a third": (Object("circle", "red", "small", 30, 20),),
        "same pair": (good, Object("circle", "red", "small", 80, 80)),
        "same place": (Object("circle", "red", "small", 10, 10), Object("ring", "blue", "small", 29, 29)),
        "too near": (Object("circle", "red", "small", 20, 29), Object("ring", "blue", "small", 20, 53)),
        "held out": (Object("ring", "red", "small", 20, 20),),
    }
    for rule, objects in broken.items():
        assert not world.valid(Scene(objects)), rule
    assert world.valid(Scene(broken["held out"]), pairs=None)


def test_clips_move_sixteen_pixels_a_frame_and_every_frame_is_valid() -> None:
    rng = random.Random(1)
    seen = set()
    for n in range(300):
        clip = world.random_clip(rng, 1 + n % 2)
        frames = clip.frames
        assert len(frames) == world.FRAMES and any(d != "still" for d in clip.directions)
        assert all(world.valid(f) for f in frames)
        for i, direction in enumerate(clip.directions):
            dx, dy = world.DIRECTIONS[direction]
            steps = {
                (b.objects[i].x - a.objects[i].x, b.objects[i].y - a.objects[i].y)
                for a, b in itertools.pairwise(frames)
            }
            assert steps == {(16 * dx, 16 * dy)}
            seen.add(direction)
    assert seen == set(world.DIRECTIONS)


def test_the_evaluation_share_is_one_eighth_and_ignores_object_order() -> None:
    found = scenes(4000)
    assert 0.10 < np.mean([world.for_evaluation(s) for s in found]) < 0.15
    assert all(world.for_evaluation(s) == world.for_evaluation(Scene(s.objects[::-1])) for s in found)


def test_render_paints_objects_inside_their_boxes_only() -> None:
    for scene in scenes(50):
        image = world.render(scene)
        assert image.shape == (96, 96, 3) and image.dtype == np.uint8
        outside = np.ones((96, 96), bool)
        for o in scene.objects:
            outside[o.y - o.radius : o.y + o.radius, o.x - o.radius : o.x + o.radius] = False
            box = image[o.y - o.radius : o.y + o.radius, o.x - o.radius : o.x + o.radius]
            assert (box == world.COLOURS[o.colour]).all(-1).sum() > 50
        assert (image[outside] == world.BACKGROUND).all()


@pytest.mark.parametrize("shape", world.SHAPES)
def test_coverage_is_centred_antialiased_and_scales_with_the_radius(shape: str) -> None:
    mask = world.coverage(shape, 15, 20, 20, 40)
    assert mask.min() == 0.0 and mask.max() == 1.0 and ((mask > 0) & (mask < 1)).any()
    np.testing.assert_allclose(mask, mask[:, ::-1], atol=1e-5)
    assert mask[:4].sum() == mask[36:].sum() == mask[:, :4].sum() == mask[:, 36:].sum() == 0.0
    ratio = mask.sum() / world.coverage(shape, 10, 20, 20, 40).sum()
    assert ratio == pytest.approx(2.25, rel=0.05)


def test_same_content_ignores_order_and_position_within_a_place() -> None:
    a = Scene((Object("circle", "red", "small", 20, 20), Object("ring", "blue", "large", 80, 80)))
    moved = Scene((Object("ring", "blue", "large", 70, 75), Object("circle", "red", "small", 12, 25)))
    assert world.same_content(a, moved)
    assert not world.same_content(a, Scene(a.objects[:1]))
    assert not world.same_content(a, Scene((a.objects[0], Object("ring", "blue", "small", 80, 80))))


def test_scenes_round_trip_through_json() -> None:
    for scene in scenes(20):
        assert Scene.from_json(scene.as_json()) == scene
