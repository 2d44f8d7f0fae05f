"""Action tokens: the round trip errs by no more than the rounding, held-out motion is short, a hostile file is told."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgpt.tokens import actions
from mmgpt.tokens.actions import ActionError, ActionTokenizer

STEPS, DIMS = 16, 4


def motions(count: int, seed: int, steps: int = STEPS, dims: int = DIMS) -> list[np.ndarray]:
    """Smooth motions, a gripper that opens or closes once, and one joint that rests."""
    random = np.random.default_rng(seed)
    t = np.linspace(0, 1, steps)[:, None]
    found = []
    for _ in range(count):
        phase, speed, size = (
            random.uniform(0, 2 * np.pi, dims),
            random.uniform(0.5, 3, dims),
            random.uniform(0.2, 1, dims),
        )
        motion = size * np.sin(phase + speed * t) * np.array([1, 10, 0.01, 1][:dims])
        motion[:, -1] = np.where(np.arange(steps) < random.integers(0, steps), 1, -1)
        motion[:, 0] = 0.25
        found.append(motion.astype(np.float32))
    return found


@pytest.fixture(scope="module")
def trained() -> ActionTokenizer:
    return actions.train(motions(400, 0), 512)


def error(tokenizer: ActionTokenizer, motion: np.ndarray) -> float:
    """Root mean square of the round trip's error, in units of half the range of each dimension."""
    back = tokenizer.decode(tokenizer.encode(motion), *motion.shape)
    half = np.where(tokenizer.high > tokenizer.low, tokenizer.high - tokenizer.low, 1) / 2
    return float(np.sqrt(np.mean(((back - motion) / half) ** 2)))


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, STEPS))
def test_the_round_trip_errs_by_at_most_half_a_step(trained: ActionTokenizer, seed: int, steps: int):
    motion = np.random.default_rng(seed).uniform(trained.low, trained.high, (steps, DIMS))
    assert error(trained, motion) <= 0.5 / actions.SCALE + 1e-6


def test_a_finer_scale_errs_less():
    fine = actions.train(motions(50, 0), 4096, scale=100.0)
    assert max(error(fine, motion) for motion in motions(20, 2)) <= 0.5 / 100 + 1e-6


def test_held_out_motions_are_close_and_short(trained: ActionTokenizer):
    held_out = motions(100, 1)
    assert np.mean([error(trained, motion) for motion in held_out]) < 0.04
    lengths = [len(trained.encode(motion)) for motion in held_out]
    assert np.mean(lengths) < STEPS * DIMS / 3, "smooth motion needs few frequencies"
    ids = trained.encode(held_out[0])
    assert ids.dtype == np.int32 and ids.max() < trained.size == 512
    resting = trained.decode(ids, STEPS, DIMS)[:, 0]
    assert np.allclose(resting, 0.25, atol=1e-6), "a dimension that never moves comes back as it is"


def test_tokens_hold_low_frequencies_first(trained: ActionTokenizer):
    """The first tokens of a motion alone give its mean: the coefficients of frequency 0 come first."""
    motion = motions(1, 3)[0]
    ids = trained.encode(motion)
    parts = np.concatenate([trained._parts[i] for i in ids]) + trained.least
    mean = parts[:DIMS] / trained.scale / np.sqrt(STEPS)
    scaled = (motion - trained.low) / np.where(trained.high > trained.low, trained.high - trained.low, 1) * 2 - 1
    assert np.abs(mean - scaled.mean(0)).max() <= 0.5 / trained.scale


def test_training_twice_gives_the_same_file(trained: ActionTokenizer, tmp_path: Path):
    trained.save(tmp_path / "a.json")
    actions.train(motions(400, 0), 512).save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_saved_tokenizer_is_the_same(trained: ActionTokenizer, tmp_path: Path):
    trained.save(tmp_path / "a.json")
    loaded = actions.load(tmp_path / "a.json")
    assert loaded.fingerprint() == trained.fingerprint() != actions.train(motions(50, 0), 256).fingerprint()
    for motion in motions(20, 4):
        ids = trained.encode(motion)
        assert np.array_equal(loaded.encode(motion), ids)
        assert np.array_equal(loaded.decode(ids, STEPS, DIMS), trained.decode(ids, STEPS, DIMS))


def test_no_two_tokens_are_the_same_run():
    """Runs of zeros are put together in several ways; each run is one token."""
    still = [np.zeros((64, 2), np.float32) + i % 2 for i in range(40)]
    tokenizer = actions.train(still, 4096)
    assert len({part.tobytes() for part in tokenizer._parts}) == tokenizer.size
    assert len(tokenizer.encode(still[0])) < 8


def test_a_coefficient_outside_the_alphabet_becomes_the_nearest(trained: ActionTokenizer):
    far = np.full((STEPS, DIMS), 1e6)
    back = trained.decode(trained.encode(far), STEPS, DIMS)
    assert np.isfinite(back).all() and (back[:, 1:] > trained.high[1:] * 0.99).all()


@pytest.mark.parametrize(
    ("chunks", "size", "message"),
    [
        ([], 512, "no actions"),
        ([np.zeros((0, 2))], 512, "finite"),
        ([np.zeros(3)], 512, "finite"),
        ([np.full((3, 2), np.nan)], 512, "finite"),
        ([np.zeros((3, 2)), np.zeros((3, 4))], 512, r"\[2, 4\] dimensions"),
        ([np.zeros((3, 2))], 8, "need one each"),
        ([np.zeros((3, 2))], 1 << 20, "at most"),
    ],
)
def test_training_tells_what_is_wrong(chunks: list[np.ndarray], size: int, message: str):
    with pytest.raises(ActionError, match=message):
        actions.train(chunks, size)


def test_decoding_tells_what_is_wrong(trained: ActionTokenizer):
    ids = trained.encode(motions(1, 0)[0])
    for wrong, steps, dims in (
        (ids, STEPS + 1, DIMS),
        (ids[:-1], STEPS, DIMS),
        (ids[:0], STEPS, DIMS),
        (ids, STEPS, 3),
    ):
        with pytest.raises(ActionError, match=r"coefficients|dimensions"):
            trained.decode(wrong, steps, dims)
    for wrong in (-1, trained.size):
        with pytest.raises(ActionError, match="outside"):
            trained.decode(np.array([wrong]), STEPS, DIMS)
    with pytest.raises(ActionError, match="2 dimensions"):
        trained.encode(np.zeros((3, 2)))


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"scale": 0},
        {"scale": "10"},
        {"scale": float("nan")},
        {"low": []},
        {"low": [0.0]},
        {"low": [[0.0] * DIMS]},
        {"low": [1e9] * DIMS},
        {"high": [float("inf")] * DIMS},
        {"least": 0.5},
        {"least": 10**9},
        {"alphabet": 0},
        {"alphabet": 10**9},
        {"alphabet": None},
        {"merges": None},
        {"merges": [[0]]},
        {"merges": [[0, 10**6]]},
        {"merges": [[0, -1]]},
        {"merges": [["a", "b"]]},
        {"merges": [[True, 1]]},
        {"merges": [[0, 1], [0, 1]]},
        {"merges": [[0, 1]] + [[-2, -2]] * 40},
        {"merges": [[0, 0]] * (1 << 17)},
    ],
)
def test_a_file_that_is_no_tokenizer_is_told(trained: ActionTokenizer, tmp_path: Path, change: dict[str, Any]):
    path = tmp_path / "actions.json"
    trained.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ActionError, match=r"actions\.json: no action tokenizer"):
        actions.load(path)


def test_a_chain_of_doublings_does_not_fill_the_memory(trained: ActionTokenizer, tmp_path: Path):
    path = tmp_path / "actions.json"
    trained.save(path)
    table = json.loads(path.read_text())
    table["merges"] = [[table["alphabet"] + i - 1] * 2 if i else [0, 0] for i in range(60)]
    path.write_text(json.dumps(table))
    with pytest.raises(ActionError, match="at most 256"):
        actions.load(path)


@pytest.mark.parametrize(
    "data", [b"", b"[", b"[" * 100_000, b"[1]", b"\xff", b"null", b" " * (actions.MAX_FILE_BYTES + 1)]
)
def test_a_file_that_is_no_table_is_told(tmp_path: Path, data: bytes):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ActionError, match="no action tokenizer"):
        actions.load(tmp_path / "a.json")
    with pytest.raises(ActionError, match="no action tokenizer"):
        actions.load(tmp_path / "gone.json")
