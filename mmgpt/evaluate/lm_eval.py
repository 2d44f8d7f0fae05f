"""A model of ours as one of lm-eval's: its text tasks run on a run folder or a Hugging Face folder.

A text stands in a document by itself: the grammar's opening, then the text's ids. Nothing of lm-eval is imported
unless this module is.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows

from mmgpt.core.document import Document
from mmgpt.evaluate.likelihood import Likelihood, Scored, tokens_of
from mmgpt.evaluate.subject import Subject
from mmgpt.generate.decode import Generator, Prompt
from mmgpt.generate.sampler import Sampler, Sampling
from mmgpt.tokens.text import TextError

ROOM = 256
"""New tokens at most where a task does not say."""
ROUND = 128
"""Rows are as long as the longest request, rounded up to this."""


class TextModel(LM):
    """The three requests of lm-eval, answered by a subject. `seed` is that of sampling where a task asks for it."""

    def __init__(self, subject: Subject, batch: int = 32, seed: int = 0) -> None:
        super().__init__()
        self._opened, self._text, self._batch, self._seed = subject.opened, subject.text, batch, seed
        self._grammar = subject.grammar
        self._longest = subject.tokens[1].row_length
        self._opening = self._grammar.encode(Document(key="", segments=()), end=False).ids.tolist()
        self._generator = Generator(self._opened, (), batch)

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's caches of requests."""
        return f"mmgpt-{self._text.size}"

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether greedy decoding would give it."""
        parts = [self.pair(*_arguments(request)) for request in requests]
        sequences = []
        for context, continuation in parts:
            keep = max(0, self._longest - len(self._opening) - len(continuation))
            head = self._opening + context[len(context) - min(keep, len(context)) :]
            sequences.append((head + continuation)[-self._longest :])
        scored = self._scored(sequences)
        found = []
        for (_, continuation), one in zip(parts, scored, strict=True):
            last = slice(len(one.log_prob) - min(len(continuation), len(one.log_prob)), None)
            found.append((float(one.log_prob[last].sum(dtype=np.float64)), bool(one.likeliest[last].all())))
        return found

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probability of each whole text, every token predicted once; long texts in windows with full contexts."""
        windows, owner = [], []
        for number, request in enumerate(requests):
            ids = self._text.encode(_arguments(request)[0])
            prefix = self._opening[-1]
            for given, predicted in get_rolling_token_windows(ids, prefix, self._longest - 1, 1):
                windows.append(([*given, predicted[-1]], len(predicted)))
                owner.append(number)
        totals = [0.0] * len(requests)
        scored = self._scored([ids for ids, _ in windows])
        for number, (_, count), one in zip(owner, windows, scored, strict=True):
            totals[number] += float(one.log_prob[len(one.log_prob) - count :].sum(dtype=np.float64))
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the model goes on with, cut at the first of the task's stops."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[json.dumps(_arguments(request)[1], sort_keys=True)].append(number)
        answers = [""] * len(requests)
        for settings, numbers in groups.items():
            wanted = json.loads(settings)
            stops = _stops(wanted)
            room = min(int(wanted.get("max_gen_toks", ROOM)), self._longest // 2)
            prompts = [self._prompt(_arguments(requests[n])[0], room) for n in numbers]
            made = self._generator.generate([Prompt(ids=ids) for ids in prompts], self._sampling(wanted, room, stops))
            for number, prompt, ids in zip(numbers, prompts, made, strict=True):
                new = ids[len(prompt) :]
                answers[number] = _cut(self._text.decode(new[new < self._grammar.vocabulary.text].tolist()), stops)
        return answers

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context and of what follows it, spaces between them belonging to the continuation.

        Where a piece of the text tokenizer spans both, each is encoded by itself.
        """
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        head, whole = self._text.encode(context), self._text.encode(context + continuation)
        if whole[: len(head)] == head and len(whole) > len(head):
            return head, whole[len(head) :]
        return head, self._text.encode(continuation)

    def _prompt(self, text: str, room: int) -> np.ndarray:
        """A prompt; of one that is too long the end."""
        ids = self._text.encode(text)
        keep = self._longest - room - len(self._opening)
        return np.array(self._opening + ids[max(0, len(ids) - keep) :], np.int32)

    def _sampling(self, wanted: dict[str, Any], room: int, stops: Sequence[str]) -> Sampling:
        temperature = float(wanted.get("temperature", 1.0)) if wanted.get("do_sample") else 0.0
        sampler = Sampler(
            temperature=temperature, top_k=int(wanted.get("top_k", 0)), top_p=float(wanted.get("top_p", 1))
        )
        return Sampling(room=room, text=sampler, stop=self._stop(stops), seed=self._seed)

    def _stop(self, stops: Sequence[str]) -> int:
        """The id of the stop where it is the only one and one piece: decoding then ends sooner."""
        try:
            return self._text.symbol(stops[0]) if len(stops) == 1 else -1
        except TextError:
            return -1

    def _scored(self, sequences: Sequence[list[int]]) -> Iterator[Scored]:
        if not sequences:
            return iter(())
        longest = -(-max(map(len, sequences)) // ROUND) * ROUND
        likelihood = Likelihood(self._opened, longest, self._batch)
        return (found for _, found in likelihood.score(map(tokens_of, sequences)))


def _arguments(request: Instance) -> Any:
    """What a request asks about: (context, continuation), (text,), or (context, settings)."""
    return request.args


def _stops(wanted: dict[str, Any]) -> list[str]:
    until = wanted.get("until") or []
    return [until] if isinstance(until, str) else [stop for stop in until if stop]


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0]
    return text
