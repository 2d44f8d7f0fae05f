"""Perplexity of a tokenised dataset by modality, each document on its own.

Counted are the tokens that the grammar gives a weight, under the modality of the token that is predicted; "codes" are
the visual codes alone, without the tokens of a picture's layout, which are easy.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mmgpt.core.log import progress
from mmgpt.core.stream import MODALITIES
from mmgpt.data.loader import check_text
from mmgpt.data.record import Dataset
from mmgpt.data.shuffle import is_held_out
from mmgpt.evaluate.kinds import Job, one_path
from mmgpt.evaluate.likelihood import Likelihood
from mmgpt.evaluate.subject import Options, Subject
from mmgpt.evaluate.tasks import Described, Outcome, TaskError
from mmgpt.tokens.grammars.grammar import Grammar, Tokens

USAGE = "DATASET[,held_out]"
CODES = "codes"
LEAST_ROW = 512
"""Tokens of a row at least, where the model was trained on that many: short documents are packed."""


@dataclasses.dataclass
class Sums:
    """Totals of one sort of tokens: natural log-probabilities in float64, how many, and how many were the likeliest."""

    log_prob: float = 0.0
    count: int = 0
    right: int = 0

    def add(self, log_prob: np.ndarray, right: np.ndarray) -> None:
        self.log_prob += float(log_prob.sum(dtype=np.float64))
        self.count += len(log_prob)
        self.right += int(right.sum())


def prepare(arguments: list[str], options: Options, subject: Subject) -> Job:
    """`held_out` takes only the documents that the run keeps from training."""
    subject.require_tokens("perplexity")
    if len(arguments) > 2 or (len(arguments) == 2 and arguments[1] != "held_out"):
        raise TaskError(f"perplexity={','.join(arguments)}: expected perplexity={USAGE}.")
    dataset = Dataset(one_path(arguments[0], "dataset"))
    check_text(dataset, subject.text)
    return lambda: _run(dataset, len(arguments) == 2, options, subject)


def _run(dataset: Dataset, held_out: bool, options: Options, subject: Subject) -> Outcome:
    _, data = subject.tokens
    numbers = np.arange(len(dataset))
    if held_out:
        numbers = np.flatnonzero(is_held_out(dataset.name, numbers, data.held_out))
    numbers = numbers[: options.limit]
    lengths = _lengths(subject.grammar, dataset)[numbers]
    fitting = numbers[lengths <= data.row_length]
    row_length = min(data.row_length, max(LEAST_ROW, int(lengths[lengths <= data.row_length].max(initial=1))))
    sums, failed = measure(Likelihood(subject.opened, row_length, options.batch), dataset, fitting)
    left_out = len(numbers) - len(fitting) + failed
    return _outcome(dataset, sums, len(numbers) - left_out, left_out)


def _lengths(grammar: Grammar, dataset: Dataset) -> np.ndarray:
    """Tokens of each document, from the index alone."""
    index = dataset.index
    lengths = np.asarray(grammar.segment_lengths(np.asarray(index.kind), np.asarray(index.shape)), np.int64)
    total, offset = np.concatenate(([0], np.cumsum(lengths))), np.asarray(index.offset)
    return grammar.overhead + total[offset[1:]] - total[offset[:-1]]


def measure(likelihood: Likelihood, dataset: Dataset, numbers: np.ndarray) -> tuple[dict[str, Sums], int]:
    """Totals of documents by modality and of visual codes, and how many documents could not be read or laid out."""
    sums = {name: Sums() for name in (*MODALITIES, CODES)}
    first_code = likelihood.grammar.vocabulary.visual_start
    failed = 0

    def laid_out() -> Iterator[Tokens]:
        nonlocal failed
        for number in progress(numbers.tolist(), label=f"perplexity of {dataset.name}"):
            try:
                tokens = likelihood.grammar.encode(dataset[number])
            except ValueError:  # RecordError, GrammarError
                failed += 1
                continue
            yield tokens

    for tokens, scored in likelihood.score(laid_out()):
        counted = tokens.weight[1:] > 0
        modality, ids = tokens.modality[1:], tokens.ids[1:]
        for number, name in enumerate(MODALITIES):
            mine = counted & (modality == number)
            sums[name].add(scored.log_prob[mine], scored.likeliest[mine])
        mine = counted & (ids >= first_code)
        sums[CODES].add(scored.log_prob[mine], scored.likeliest[mine])
    return sums, failed


def _outcome(dataset: Dataset, sums: dict[str, Sums], count: int, left_out: int) -> Outcome:
    seen = {name: s for name, s in sums.items() if s.count}
    if not seen:
        raise TaskError(
            f"{dataset.directory}: no token of it is scored: {left_out} documents are too long for a row or cannot be "
            "laid out, and the others have no weight."
        )
    metrics, scores = {}, {}
    for name, s in seen.items():
        loss = -s.log_prob / s.count
        scores |= {f"perplexity/{name}": math.exp(min(loss, 700.0)), f"loss/{name}": loss}
        scores |= {f"accuracy/{name}": s.right / s.count, f"tokens/{name}": s.count}
        metrics |= {f"perplexity/{name}": f"perplexity of {name}", f"accuracy/{name}": f"{name} predicted first"}
    described = Described(
        name=f"perplexity-{Path(dataset.directory).name}",
        title=f"Perplexity of {dataset.name}",
        about="How many tokens the model hesitates between, as if all were equally likely.",
        figure=next(iter(metrics)),
        metrics=metrics,
        numbers=frozenset({"perplexity", "loss", "tokens", "left_out"}),
    )
    return Outcome(described=described, scores={**scores, "count": count, "left_out": left_out})
