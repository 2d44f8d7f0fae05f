"""What is wrong with a plan, in words: each warning has the number and the remedy."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from mmgpt.data.pages import percent
from mmgpt.data.plan_values import Described, Measured

FULL = 0.95
"""Fill that rows should reach."""
PASSES = 4
"""Passes over the same text after which a further one teaches much less (Muennighoff et al. 2023)."""
ALIKE = 1.1
"""Documents are of one length where the longest has so many times the tokens of the shortest."""
_COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def warnings(told: Described) -> list[str]:
    """All that is worth a thought before the run, what costs most first."""
    mixtures = zip(told.mixtures, told.values["mixtures"], strict=True)
    unfit = [warning for mixture, values in mixtures for warning in _misfits(told, mixture, values)]
    return [*unfit, *_fill(told, bool(unfit)), *_left_out(told), *_passes(told), *_thin(told), *_steps(told)]


@dataclasses.dataclass(frozen=True)
class Misfit:
    """Documents of one length, `count` of which leave `left` tokens of a row; `share` of all tokens are in such."""

    source: Measured
    length: int
    count: int
    left: int
    share: float

    @property
    def needed(self) -> float:
        """Tokens needed to fill what they leave, for each token of the mixture."""
        return self.share * self.left / (self.count * self.length)


def misfits(mixture: list[Measured], row_length: int) -> list[Misfit]:
    """Sources most of whose tokens are in documents of one length that leave an eighth of a row or more."""
    found = []
    for source in mixture:
        length, share = _typical(source.lengths)
        count = row_length // length if length else 0
        left = row_length - count * length
        if count and share >= 0.5 and source.weight * share >= 0.05 and left >= row_length / 8:
            found.append(Misfit(source, length, count, left, source.weight * share))
    return found


def padding_expected(mixture: list[Measured], found: list[Misfit]) -> tuple[float, float]:
    """The share of tokens in documents short enough to fill what is left, and the share of padding to expect."""
    room = max(misfit.left for misfit in found)
    filling = sum(source.weight * _held(source.lengths, room) for source in mixture)
    lacking = max(0.0, sum(misfit.needed for misfit in found) - filling)
    return filling, lacking / (1 + lacking)


def _typical(lengths: np.ndarray) -> tuple[int, float]:
    """The mean of the documents of about one length that hold most tokens, and their share of all tokens."""
    total = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    if not total[-1]:
        return 0, 0.0
    starts = np.unique(lengths)
    first, stop = np.searchsorted(lengths, starts), np.searchsorted(lengths, starts * ALIKE, "right")
    held = total[stop] - total[first]
    best = int(np.argmax(held))
    return round(float(held[best] / (stop[best] - first[best]))), float(held[best] / total[-1])


def _held(lengths: np.ndarray, most: int) -> float:
    """Share of the tokens that is in documents of at most so many."""
    return float(lengths[lengths <= most].sum(dtype=np.int64) / max(1, lengths.sum(dtype=np.int64)))


def _misfits(told: Described, mixture: list[Measured], values: dict[str, Any]) -> Iterator[str]:
    row, actual, step = told.values["row_length"], 1 - values["fill"], values["from_step"]
    found = misfits(mixture, row)
    filling, expected = padding_expected(mixture, found) if found else (0.0, 0.0)
    if expected < 0.02 or actual < 0.01:
        return
    where = f"mixture from step {step:,}" if len(told.mixtures) > 1 else "mixture"
    for misfit in found:
        more, length = misfit.count + 1, misfit.length
        words = _COUNTS[more] if more < len(_COUNTS) else f"{more:,}"
        held = "one" if misfit.count == 1 else f"{misfit.count:,} of them"
        yield (
            f"{misfit.source.name}: {words} documents of {length:,} tokens do not fit a row of {row:,} "
            f"({length:,} x {more} = {length * more:,}). A row that holds {held} has {misfit.left:,} tokens left, "
            f"which only shorter documents can fill; {percent(filling)} of the {where} is in such, so expect "
            f"{percent(expected)} padding (the plan has {percent(actual)} there). Rows of {length * more:,} tokens "
            f"(--data.row-length) hold {words}, or give sources of short documents more weight."
        )


def _fill(told: Described, explained: bool) -> Iterator[str]:
    values = told.values
    if values["fill"] >= FULL:
        return
    remedy = "" if explained else " Longer rows (--data.row-length) fill better, and so do short documents beside long."
    yield (
        f"Rows are {percent(values['fill'])} full: {values['padding']:,} of {values['context']:,} tokens are padding, "
        f"which costs as much as {percent(values['padding_share'])} of the training.{remedy}"
    )


def _left_out(told: Described) -> Iterator[str]:
    row = told.values["row_length"]
    for source in _each(told):
        rejected = told.values["sources"][source.name]["rejected"]
        if long := rejected.get(f"longer than {row} tokens"):
            split = f"Split those of several segments (--{_flag(source, 'split')} True), or raise"
            are = "document is" if long == 1 else "documents are"
            yield (
                f"{source.name}: {long:,} {are} longer than a row of {row:,} tokens and left out, with "
                f"{percent(source.lost)} of its tokens. {'Raise' if source.config.split else split} --data.row-length: "
                f"the longest document has {source.longest:,} tokens."
            )
        if long := rejected.get(f"segments longer than {row} tokens"):
            are = "segment is" if long == 1 else "segments are"
            yield (
                f"{source.name}: {long:,} {are} alone longer than a row of {row:,} tokens and left out. Raise "
                "--data.row-length. If they are pictures, tokenise at a smaller --area; a long text is imported in "
                "segments of up to 8,000 characters, some 2,000 tokens."
            )
        if told.config.held_out and not told.values["sources"][source.name]["held_out"]:
            yield (
                f"{source.name}: none of its documents is held out, so the first evaluation fails. Raise "
                f"--data.held-out above {told.config.held_out:g}, or import more documents."
            )


def _passes(told: Described) -> Iterator[str]:
    for source in _each(told):
        values, steps = told.values["sources"][source.name], told.values["steps"]
        epochs, documents = values["epochs"], values["epoch"]["documents"]
        if epochs > PASSES:
            share = PASSES * values["epoch"]["tokens"] / told.values["tokens"]
            its, each, less = f"its {documents:,} documents come", " each", "they teach less"
            if documents == 1:
                its, each, less = "its one document comes", "", "it teaches less"
            remedy = (
                f"{PASSES} times is {percent(share)} of the tokens, where it has {percent(values['share'])}: lower "
                f"--{_flag(source, 'weight')}, set max-epochs, or import more."
                if len(told.values["sources"]) > 1
                else f"{PASSES} times is {int(steps * PASSES / epochs):,} steps: set --steps, or import more."
            )
            yield f"{source.name}: {its} {epochs:.1f} times{each}, and beyond {PASSES} times {less}. {remedy}"
        if (end := values["ends_at_step"]) is not None and end < steps - 1:
            yield (
                f"{source.name}: max_epochs {source.config.max_epochs} ends at step {end:,} of {steps:,}; from then "
                f"on the other sources take its {percent(source.weight)}. Raise --{_flag(source, 'max-epochs')}, or "
                f"lower its weight to {percent(source.weight * end / steps)} of the mixture."
            )
        if not epochs:
            yield f"{source.name}: no document of it is ever read. Raise --{_flag(source, 'weight')}, or --steps."
        elif epochs < 1:
            yield (
                f"{source.name}: the run ends before its first pass does: {percent(1 - epochs)} of its {documents:,} "
                f"documents are never read. At this weight {math.ceil(steps / epochs):,} steps read all of them."
            )


def _thin(told: Described) -> Iterator[str]:
    for source in _each(told):
        values = told.values["sources"][source.name]
        if 0 < values["documents_a_batch"] < 1:
            yield (
                f"{source.name}: a batch holds {values['documents_a_batch']:.2g} documents of it on average: its loss "
                f"is that of few documents, in few steps. Raise --{_flag(source, 'weight')} or --data.batch-rows."
            )


def _steps(told: Described) -> Iterator[str]:
    steps = told.values["steps"]
    for i, change in enumerate(told.config.changes):
        if change.step >= steps:
            yield (
                f"The mixture from step {change.step:,} on is never reached: the run has {steps:,} steps. Raise "
                f"--steps, or lower --data.changes.{i}.step."
            )


def _each(told: Described) -> Iterator[Measured]:
    """Every source once, as in the first mixture that has it."""
    found: dict[str, Measured] = {}
    for source in (source for mixture in told.mixtures for source in mixture):
        found.setdefault(source.name, source)
    yield from found.values()


def _flag(source: Measured, name: str) -> str:
    return f"{source.flag}.{name}"
