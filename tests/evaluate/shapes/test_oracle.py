"""The oracle reads what was drawn: exactly when clean, nearly always when compressed or blurred."""

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from mmgpt.data.media import decode_image, decode_video, encode_jpeg, encode_mp4
from mmgpt.evaluate.shapes import world
from mmgpt.evaluate.shapes.oracle import objects_right, read_scene, scene_right
from mmgpt.evaluate.shapes.world import Object, Scene


def drawn(number: int) -> list[tuple[Scene, np.ndarray]]:
    rng = random.Random(7)
    found = [
        world.random_scene(rng, 1 + n % 3, first_pair=sorted(world.UNSEEN)[n % 6] if n % 4 == 0 else None)
        for n in range(number)
    ]
    return [(scene, world.render(scene)) for scene in found]


def resized(image: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX))


def blurred(image: np.ndarray) -> np.ndarray:
    return np.rint(ndimage.gaussian_filter(resized(image, 48).astype(np.float32), (1, 1, 0))).astype(np.uint8)


def faded(image: np.ndarray) -> np.ndarray:
    pale = 0.75 * resized(image, 48).astype(np.float32) + 0.25 * np.array(world.BACKGROUND, np.float32)
    return np.rint(pale).astype(np.uint8)


@pytest.mark.parametrize(
    ("view", "least"),
    [
        pytest.param(lambda image: image, 1.0, id="96"),
        pytest.param(lambda image: resized(image, 48), 1.0, id="48"),
        pytest.param(lambda image: resized(image, 32), 0.995, id="32"),
        pytest.param(lambda image: decode_image(encode_jpeg(image, 92)), 0.995, id="jpeg"),
        pytest.param(lambda image: resized(decode_image(encode_jpeg(image, 92)), 48), 0.995, id="jpeg-48"),
        pytest.param(blurred, 0.98, id="blurred"),
        pytest.param(faded, 0.98, id="faded"),
    ],
)
def test_reads_rendered_scenes(view: Callable[[np.ndarray], np.ndarray], least: float) -> None:
    right = [scene_right(scene, read_scene(view(image))) for scene, image in drawn(600)]
    assert np.mean(right) >= least


def test_centres_are_within_a_pixel() -> None:
    for scene, image in drawn(200):
        read = {o.pair: o for o in read_scene(image).objects}
        for o in scene.objects:
            assert max(abs(o.x - read[o.pair].x), abs(o.y - read[o.pair].y)) <= 1


def test_reads_the_frames_of_a_compressed_clip() -> None:
    rng = random.Random(3)
    right = []
    for n in range(40):
        clip = world.random_clip(rng, 1 + n % 2)
        frames, _ = decode_video(encode_mp4(np.stack([world.render(f) for f in clip.frames]), 4.0))
        right += [scene_right(truth, read_scene(frame)) for truth, frame in zip(clip.frames, frames, strict=True)]
    assert np.mean(right) >= 0.99


@pytest.mark.parametrize("shape", ["square", "circle", "diamond"])
def test_touching_objects_of_different_colours_are_two(shape: str) -> None:
    for left, right in itertools.permutations(world.COLOURS, 2):
        scene = Scene((Object(shape, left, "small", 33, 48), Object("square", right, "large", 54, 48)))
        assert scene_right(scene, read_scene(world.render(scene))), (left, right)


def test_empty_and_noisy_pictures_have_no_objects_and_do_not_fail() -> None:
    assert read_scene(np.full((48, 48, 3), world.BACKGROUND, np.uint8)) == Scene(())
    assert read_scene(np.zeros((48, 48, 3), np.uint8)).objects
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3)).astype(np.uint8)
    read_scene(noise)


def test_specks_are_ignored() -> None:
    scene, image = drawn(1)[0]
    spotted = image.copy()
    spotted[2:5, 92:95] = world.COLOURS["black"]
    assert scene_right(scene, read_scene(spotted))


def test_scores_tell_shape_place_and_size_apart() -> None:
    truth = Scene((Object("circle", "red", "small", 20, 20), Object("cross", "blue", "large", 80, 80)))
    assert objects_right(truth, truth) == (2, 2, 2)
    bigger = Scene((Object("circle", "red", "large", 20, 20), truth.objects[1]))
    assert objects_right(truth.content, bigger) == (2, 2, 1) and not scene_right(truth, bigger)
    moved = Scene((Object("circle", "red", "small", 48, 20), truth.objects[1]))
    assert objects_right(truth, moved) == (1, 2, 1)
    extra = Scene((*truth.objects, Object("ring", "black", "small", 48, 48)))
    assert objects_right(truth, extra).right == 2 and not scene_right(truth.content, extra)
    doubled = Scene((*truth.objects, truth.objects[0]))
    assert not scene_right(truth, doubled)


def test_a_picture_that_is_not_square_is_refused() -> None:
    with pytest.raises(ValueError, match="square picture"):
        read_scene(np.zeros((48, 40, 3), np.uint8))
