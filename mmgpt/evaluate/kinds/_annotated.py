"""Questions about pictures and clips, and captions, from the annotation files of public benchmarks."""

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmgpt.core.document import Document, Image, Segment, Text, Video
from mmgpt.core.log import progress
from mmgpt.evaluate import annotations as formats
from mmgpt.evaluate.annotations import Annotation
from mmgpt.evaluate.kinds import Job, one_path
from mmgpt.evaluate.kinds._answers import JUDGES, Judge, cut
from mmgpt.evaluate.likelihood import Likelihood, tokens_of
from mmgpt.evaluate.metrics import captions
from mmgpt.evaluate.pictures import encoded, fitted, is_clip, read_media, require_media
from mmgpt.evaluate.subject import Options, Subject
from mmgpt.evaluate.tasks import TEXT_ROOM, Outcome, TaskError
from mmgpt.generate.model import Continuation, Part
from mmgpt.tokens.text import TextError

TEMPLATES = {"captions": "", "vqa": "Question: {question} Short answer:", "words": "Question: {question} Short answer:"}
TEMPLATES["choice"] = "Question: {question} Answer:"
LEAST_ROOM = 8
"""Tokens that an answer needs at least."""


class Pool:
    """Annotations with the folder of their media."""

    def __init__(self, name: str, files: Sequence[str], folder: str, limit: int | None) -> None:
        paths = [one_path(file, "annotation file") for file in files]
        self.annotations = formats.read(name, paths)[:limit]
        self.folder = one_path(folder, "folder of pictures or clips")
        require_media(self.annotations, self.folder)


def prepare(name: str, arguments: list[str], options: Options, subject: Subject) -> Job:
    """Files and folder, and the same again for the pool that examples (`--shots`) are taken from."""
    subject.require_tokens(name)
    module = formats.load(name)
    each = module.FILES.count(",") + 2
    if len(arguments) not in (each, 2 * each):
        raise TaskError(
            f"--tasks {name}={','.join(arguments)}: expected {name}={module.FILES},FOLDER, and the same again for the "
            "examples of --shots if they come from other files."
        )
    pool = Pool(name, arguments[: each - 1], arguments[each - 1], options.limit)
    examples = pool if len(arguments) == each else Pool(name, arguments[each:-1], arguments[-1], None)
    if options.shots >= len({a.media for a in examples.annotations}):
        raise TaskError(
            f"--shots {options.shots}: {arguments[each % len(arguments)]} has too few media to show so many."
        )
    answered = module.ANSWERED
    if answered == "choice" and not pool.annotations[0].choices:
        answered = "words"
    if answered == "captions":
        captions.require()
    template = TEMPLATES[answered] if options.template is None else options.template
    if answered != "captions" and "{question}" not in template:
        raise TaskError(f"--template {template!r}: it must hold {{question}}, which stands for the question.")
    title = f"{name}-{Path(arguments[0]).stem}"
    run = _Questions(pool, examples, template, options, subject)
    judge = JUDGES[answered](title, formats.described(name))
    return lambda: run.choices(judge) if answered == "choice" else run.texts(judge)


class _Questions:
    """Annotations as prompts."""

    def __init__(self, pool: Pool, examples: Pool, template: str, options: Options, subject: Subject) -> None:
        self.pool, self.examples, self.template = pool, examples, template
        self.options, self.subject = options, subject

    def texts(self, judge: Judge) -> Outcome:
        """The model answers in words."""
        model, options = self.subject.model, self.options
        sampling = options.sampling.replace(guidance=1.0, stop=self._stop())
        documents, made = [], []
        size = 4 * options.batch
        chunks = range(0, len(self.pool.annotations), size)
        for first in progress(chunks, label=judge.described.name):
            prompts = self._prompts(self.pool.annotations[first : first + size])
            free = self._free(prompts, LEAST_ROOM)
            room = TEXT_ROOM if free >= TEXT_ROOM else free // LEAST_ROOM * LEAST_ROOM  # few rooms: few compilations
            documents += prompts
            made += [self._answer(c) for c in model.go_on(prompts, sampling.replace(room=room))]
        said = [m.made[0].text if m.made else "" for m in made]
        scores, judgements = judge.judged(self.pool.annotations, said)
        return Outcome(
            described=judge.described,
            scores=scores,
            documents=tuple(documents),
            made=tuple(made),
            judgements=tuple(judgements),
        )

    def choices(self, judge: Judge) -> Outcome:
        """The likeliest option of each question, by the sum over its tokens, is the answer."""
        grammar, text = self.subject.grammar, self.subject.text
        documents, said = [], []
        for first in progress(range(0, len(self.pool.annotations), self.options.batch), label=judge.described.name):
            part = self.pool.annotations[first : first + self.options.batch]
            prompts = self._prompts(part)
            options = [(p, text.encode(c)) for p, a in zip(prompts, part, strict=True) for c in a.choices]
            answer = max(len(ids) for _, ids in options)
            longest = self.subject.tokens[1].row_length - self._free(prompts, answer) + answer
            likelihood = Likelihood(self.subject.opened, -(-longest // 128) * 128, self.options.batch)
            heads = {id(p): grammar.prompt(p) for p in prompts}
            whole = [np.concatenate([heads[id(p)], ids]) for p, ids in options]
            scored = [s for _, s in likelihood.score(tokens_of(ids, grammar.places(ids)) for ids in whole)]
            sums = iter(
                [float(s.log_prob[len(heads[id(p)]) - 1 :].sum()) for s, (p, _) in zip(scored, options, strict=True)]
            )
            said += [max(a.choices, key={c: next(sums) for c in a.choices}.__getitem__) for a in part]
            documents += prompts
        scores, judgements = judge.judged(self.pool.annotations, said)
        shown = self.subject.model.shown([d.segments for d in documents])
        made = [
            Continuation(prompt=prompt, made=(Part(text=text),), finished=True)
            for prompt, text in zip(shown, said, strict=True)
        ]
        return Outcome(
            described=judge.described,
            scores=scores,
            documents=tuple(documents),
            made=tuple(made),
            judgements=tuple(judgements),
        )

    def _prompts(self, annotations: Sequence[Annotation]) -> list[Document]:
        """Each with its examples before it; every picture is encoded once."""
        shots = [self._shots(a) for a in annotations]
        media: dict[tuple[Path, str], None] = {}
        for annotation, examples in zip(annotations, shots, strict=True):
            media |= {(self.examples.folder, e.media): None for e in examples if self.options.shot_media}
            media[self.pool.folder, annotation.media] = None
        model = self.subject.model
        height, width = self.subject.image_size
        area = height * width * model.vision.patch**2
        frames = [
            fitted(read_media(folder, name, self.options.frames), area, model.vision.patch) for folder, name in media
        ]
        clips = [self._is_clip(name) for _, name in media]
        codes = dict(zip(media, encoded(model.vision, frames, clips), strict=True))
        documents = []
        for annotation, examples in zip(annotations, shots, strict=True):
            segments: list[Segment] = []
            for example in examples:
                if self.options.shot_media:
                    segments += self._shown(example.media, codes[self.examples.folder, example.media])
                answer = Counter(example.answers).most_common(1)[0][0]
                segments += self._said(f"{self._asked(example)} {answer}".strip() + "\n\n")
            segments += self._shown(annotation.media, codes[self.pool.folder, annotation.media])
            segments += self._said(self._asked(annotation))
            documents.append(Document(key=annotation.key, segments=tuple(segments), meta={"kind": annotation.kind}))
        return documents

    def _shots(self, annotation: Annotation) -> list[Annotation]:
        """Examples about other media, drawn by the seed and the key."""
        rng = random.Random(f"shots {self.options.seed} {annotation.key}")
        found: dict[str, Annotation] = {}
        while len(found) < self.options.shots:
            example = rng.choice(self.examples.annotations)
            if example.media != annotation.media:
                found.setdefault(example.media, example)
        return list(found.values())

    def _asked(self, annotation: Annotation) -> str:
        return self.template.replace("{question}", annotation.question)

    def _said(self, text: str) -> list[Segment]:
        role = "user" if self.options.chat else ""
        return [Text(ids=np.array(self.subject.text.encode(text), np.int32), role=role)] if text.strip() else []

    def _shown(self, name: str, codes: np.ndarray) -> list[Segment]:
        """A clip where the run was trained on clips, else its frames as pictures."""
        role = "user" if self.options.chat else ""
        if self._is_clip(name):
            return [Video(codes=codes, role=role)]
        return [Image(codes=grid, role=role) for grid in codes]

    def _is_clip(self, name: str) -> bool:
        return is_clip(name) and self.subject.reads_clips

    def _stop(self) -> int:
        """The id of the stop text where it is one piece; the answer is cut there in any case."""
        try:
            return self.subject.text.symbol(self.options.stop) if self.options.stop else -1
        except TextError:
            return -1

    def _answer(self, continuation: Continuation) -> Continuation:
        """The first text made, cut where the next example would begin."""
        text = next((part.text for part in continuation.made if part.frames is None), "")
        lead = self.template.partition("{question}")[0].strip()
        made = Part(text=cut(text, (self.options.stop, "\n", lead if self.options.shots else "")))
        return Continuation(prompt=continuation.prompt, made=(made,), finished=continuation.finished)

    def _free(self, prompts: Sequence[Document], least: int) -> int:
        """Tokens that the longest prompt leaves of a row; TaskError where an answer of `least` has no room."""
        _, data = self.subject.tokens
        longest = max(len(self.subject.grammar.prompt(p)) for p in prompts)
        if longest + least > data.row_length:
            raise TaskError(
                f"a prompt takes {longest} tokens and an answer {least} or more; a row of the run holds "
                f"{data.row_length}. Give fewer --shots or --frames, or --shot-media False."
            )
        return data.row_length - longest
