"""When a loss leaves its path, and what is remembered of it."""

import json
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
import pytest

from mmgpt.core.config import ConfigError
from mmgpt.train.spikes import WINDOW, Spike, Spikes

NAN = float("nan")


def watched(losses: Iterable[float], spikes: Spikes | None = None, first: int = 1, every: int = 1) -> Spikes:
    """The losses of steps from `first` on, read every so many steps; a NaN is a skipped step."""
    spikes = spikes or Spikes.Config().build()
    for step, loss in enumerate(losses, first):
        spikes.add(step, {"loss": jnp.float32(loss), "skipped": jnp.float32(np.isnan(loss))})
        if step % every == 0:
            spikes.read()
    return spikes


def path(count: int, seed: int = 0) -> list[float]:
    """Losses that fall, with noise."""
    rng = np.random.default_rng(seed)
    return list(3.0 + 2.0 * np.exp(-np.arange(count) / 300) + 0.05 * rng.standard_normal(count))


def test_noise_and_single_jumps_are_no_spike() -> None:
    losses = path(2000)
    for step in range(100, 2000, 50):
        losses[step : step + 4] = [50.0] * 4
    watched(losses)


@pytest.mark.parametrize("every", [1, 7, 50])
def test_a_spike_is_found_at_the_next_reading_whatever_came_after_it(every: int) -> None:
    losses = path(400)
    losses[299:304] = [9.0] * 5
    with pytest.raises(Spike) as found:
        watched(losses, every=every)
    assert (found.value.first, found.value.last) == (300, -(-304 // every) * every)
    assert "a loss of 9, above" in str(found.value)


def test_losses_that_are_no_numbers_are_a_spike_from_the_first_step_on() -> None:
    assert watched([NAN] * 4).read() == 0  # each reading tells the steps since the one before
    with pytest.raises(Spike, match="steps 1 to 5: gradients that are not finite"):
        watched([NAN] * 5)
    assert watched([NAN, NAN, 3.0] * 5, every=15).read() == 0
    spikes = watched([NAN, NAN, 3.0], every=4)
    assert spikes.read() == 2


def test_the_first_steps_are_not_judged_and_nor_is_another_mixture_by_the_one_before() -> None:
    watched([1.0] * 20 + [9.0] * WINDOW)
    losses = [1.0] * 200 + [9.0] * 200
    with pytest.raises(Spike):
        watched(losses)
    watched(losses, Spikes.Config().build(fresh=[201]))
    watched(losses, Spikes.Config(deviations=None).build())


def test_what_a_checkpoint_keeps_judges_as_if_nothing_had_happened() -> None:
    losses = path(300)
    losses[280:285] = [9.0] * 5
    for stop in (100, 200, 281, 284):
        memory = json.loads(json.dumps(watched(losses[:stop]).memory()))
        spikes = Spikes.Config().build()
        spikes.recall(memory)
        with pytest.raises(Spike) as found:
            watched(losses[stop:], spikes, first=stop + 1)
        assert (found.value.first, found.value.last) == (281, 285)
    spikes.recall(None)
    watched([9.0] * 20, spikes)


def test_a_spike_that_was_saved_unread_is_found_where_the_run_goes_on() -> None:
    losses = [*path(100), *[9.0] * 5]
    spikes = Spikes.Config().build()
    spikes.recall(watched(losses, every=200).memory())
    with pytest.raises(Spike, match="steps 101 to 105"):
        spikes.read()


@pytest.mark.parametrize("change", [{"in_a_row": 0}, {"skip": 0}, {"rollbacks": -1}, {"deviations": -1.0}])
def test_numbers_that_watch_nothing_are_told(change: dict) -> None:
    with pytest.raises(ConfigError, match=f"spikes.{next(iter(change))}"):
        Spikes.Config(**change).build()
