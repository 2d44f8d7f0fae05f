"""Frechet distance between pictures and what the model draws from their captions; what it draws is one picture each.

Captions and pictures come from a raw dataset, or from COCO's captions and a folder. It is FID where FEATURE is a
function of yours that computes Inception's features; with another feature it is a distance of that feature alone.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from mmgpt.core.document import Document, Text
from mmgpt.core.log import progress
from mmgpt.data.record import Dataset
from mmgpt.evaluate import annotations
from mmgpt.evaluate.kinds import Job, one_path
from mmgpt.evaluate.metrics import features
from mmgpt.evaluate.metrics.frechet import Moments, frechet_distance
from mmgpt.evaluate.pictures import Picture, fitted, of_annotations, of_dataset, require_media
from mmgpt.evaluate.subject import Options, Subject
from mmgpt.evaluate.tasks import Described, Judgement, Outcome, TaskError
from mmgpt.generate.model import Continuation

USAGE = "DATASET[,FEATURE] or fid=CAPTIONS.json,FOLDER[,FEATURE]"


def prepare(arguments: list[str], options: Options, subject: Subject) -> Job:
    """`--temperature 1` draws as the model was trained to; the likeliest pictures alone are a narrower set."""
    subject.require_tokens("fid")
    first = one_path(arguments[0], "dataset or caption file")
    used = 2 if first.is_file() else 1
    if not used <= len(arguments) <= used + 1:
        raise TaskError(f"fid={','.join(arguments)}: expected fid={USAGE}.")
    feature = arguments[used] if len(arguments) > used else "pixels"
    features.require(feature)
    if first.is_file():
        folder = one_path(arguments[1], "folder of pictures")
        captions = annotations.read("captions", [first])[: options.limit]
        require_media(captions, folder)
        pictures = of_annotations(captions, folder)
    else:
        pictures = itertools.islice(_captioned(Dataset(first)), options.limit)
    return lambda: _run(f"fid-{first.stem}", pictures, feature, options, subject)


def _captioned(dataset: Dataset) -> Iterator[Picture]:
    return (picture for picture in of_dataset(dataset) if picture.caption and not picture.clip)


def _run(name: str, pictures: Iterator[Picture], feature: str, options: Options, subject: Subject) -> Outcome:
    model, feature_of = subject.model, features.load(feature, subject)
    area = max((h * w for _, h, w in model.sizes), default=0) * model.vision.patch**2
    if not area:
        raise TaskError(f"{subject.path} was trained without pictures: it draws none.")
    sampling = options.sampling.replace(room=model.longest_medium + 8)
    truth, drawn = Moments(), Moments()
    documents, made = list[Document](), list[Continuation]()
    chunks = iter(lambda: list(itertools.islice(pictures, options.batch)), [])
    for number, part in enumerate(progress(chunks, label=name)):
        prompts = [_prompt(picture, subject, options) for picture in part]
        # each part draws with noise of its own, since rows are numbered within a call
        found = model.go_on(prompts, sampling.replace(seed=options.seed + number))
        for picture, continuation in zip(part, found, strict=True):
            truth.add(feature_of(fitted(picture.frames(), area, model.vision.patch)))
            frames = _drawing(continuation)
            if frames is not None:
                drawn.add(feature_of(frames))
        documents += prompts
        made += found
    if drawn.count < 2:
        raise TaskError(f"{name}: of {len(documents)} captions the model drew {drawn.count} pictures; two are needed.")
    scores = {"frechet": round(frechet_distance(truth, drawn), 4), "drawn": round(drawn.count / len(documents), 4)}
    described = Described(
        name=name,
        title="Text → image, as a set",
        about="How far the pictures that the model draws are from those that the captions belong to, taken together.",
        figure="frechet",
        metrics={"frechet": f"Frechet distance, features: {feature}", "drawn": "captions of which a picture was made"},
        numbers=frozenset({"frechet"}),
    )
    return Outcome(
        described=described,
        scores={**scores, "count": len(documents)},
        documents=tuple(documents),
        made=tuple(made),
        judgements=tuple(Judgement(right=_drawing(m) is not None, truth="", shares={}) for m in made),
    )


def _prompt(picture: Picture, subject: Subject, options: Options) -> Document:
    ids = np.array(subject.text.encode(picture.caption), np.int32)
    return Document(key=picture.key, segments=(Text(ids=ids, role="user" if options.chat else ""),))


def _drawing(continuation: Continuation) -> np.ndarray | None:
    """The first picture made, uint8 `[1, H, W, 3]`."""
    return next((part.frames[:1] for part in continuation.made if part.frames is not None), None)
