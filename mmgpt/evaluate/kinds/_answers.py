"""How answers in words are judged: captions, the rule of VQA, plain words, and multiple choice."""

from collections.abc import Callable, Sequence
from typing import Protocol

from mmgpt.evaluate.annotations import Annotation
from mmgpt.evaluate.metrics import captions
from mmgpt.evaluate.metrics.vqa import normalised, vqa_accuracy
from mmgpt.evaluate.tasks import Described, Judgement, scores

Judged = tuple[dict[str, float], list[Judgement]]


class Judge(Protocol):
    """Scores of answers, and a judgement of each."""

    described: Described

    def judged(self, annotations: Sequence[Annotation], said: Sequence[str]) -> Judged: ...


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops, its ends trimmed; a stop at the start does not count."""
    text = text.strip()
    for stop in stops:
        at = text.find(stop, 1) if stop else -1
        text = text[:at].strip() if at > 0 else text
    return text


class Captions:
    """CIDEr, BLEU and ROUGE-L; a caption is marked right where a person gave the very same."""

    def __init__(self, name: str, about: str) -> None:
        self.described = Described(
            name=name,
            title=f"Captions: {name}",
            about=about,
            figure="cider",
            metrics=captions.METRICS,
            numbers=frozenset({"cider"}),
        )

    def judged(self, annotations: Sequence[Annotation], said: Sequence[str]) -> Judged:
        made = {a.key: text for a, text in zip(annotations, said, strict=True)}
        found, each = captions.caption_scores(made, {a.key: a.answers for a in annotations})
        judgements = [
            Judgement(
                right=normalised(text) in {normalised(answer) for answer in a.answers},
                truth=" | ".join(a.answers),
                shares={"cider": (each[a.key], 1.0)},
            )
            for a, text in zip(annotations, said, strict=True)
        ]
        return {**{name: round(value, 4) for name, value in found.items()}, "count": len(said)}, judgements


class Answers:
    """One share of right answers, over all and by kind."""

    def __init__(self, name: str, about: str, words: str, share: Callable[[str, Annotation], float]) -> None:
        self._share = share
        self.described = Described(
            name=name, title=f"Questions: {name}", about=about, figure="accuracy", metrics={"accuracy": words}
        )

    def judged(self, annotations: Sequence[Annotation], said: Sequence[str]) -> Judged:
        judgements = []
        for annotation, text in zip(annotations, said, strict=True):
            share = self._share(text, annotation)
            truth = ", ".join(dict.fromkeys(annotation.answers))
            judgements.append(Judgement(right=share >= 0.9, truth=truth, shares={"accuracy": (share, 1.0)}))
        return scores(self.described, [a.kind for a in annotations], judgements), judgements


def _vqa(name: str, about: str) -> Judge:
    words = "accuracy by the rule of VQA v2: right if three people said it"
    return Answers(name, about, words, lambda text, a: vqa_accuracy(text, a.answers))


def _words(name: str, about: str) -> Judge:
    def share(text: str, annotation: Annotation) -> float:
        return float(normalised(text) in {normalised(answer) for answer in annotation.answers})

    return Answers(name, about, "answers with the same words, normalised as VQA's are", share)


def _choice(name: str, about: str) -> Judge:
    return Answers(name, about, "the likeliest option is right", lambda text, a: float(text in a.answers))


JUDGES: dict[str, Callable[[str, str], Judge]] = {
    "captions": Captions,
    "vqa": _vqa,
    "words": _words,
    "choice": _choice,
}
