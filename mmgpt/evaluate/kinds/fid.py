"""Frechet distance between pictures and what the model draws from their captions, a picture for each.

Captions and pictures come from a raw dataset, or from COCO's captions and a folder. It is FID where FEATURE is a
function of yours that computes Inception's features; with another feature it is a distance of that feature alone.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence

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
from mmgpt.generate.outline import Order

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
    size = subject.image_size
    area, order = size[0] * size[1] * model.vision.patch**2, Order(size=size)
    truth, drawn = Moments(), Moments()
    documents, made = list[Document](), list[Continuation]()
    chunks = iter(lambda: list(itertools.islice(pictures, options.batch)), [])
    for number, part in enumerate(progress(chunks, label=name)):
        prompts = [_prompt(picture, subject, options) for picture in part]
        room = min(model.outline.room(prompt, order) for prompt in prompts)
        # each part draws with noise of its own, since rows are numbered within a call
        sampling = options.sampling.replace(room=room, seed=options.seed + number)
        found = model.go_on(prompts, sampling, order=order)
        _add(truth, feature_of, [fitted(picture.frames(), area, model.vision.patch) for picture in part])
        _add(drawn, feature_of, [continuation.media[0] for continuation in found])
        documents += prompts
        made += found
    if drawn.count < 2:
        raise TaskError(f"{name}: found {drawn.count} captioned pictures; two are needed for a distance of sets.")
    scores = {"frechet": round(frechet_distance(truth, drawn), 4)}
    described = Described(
        name=name,
        title="Text → image, as a set",
        about="How far the pictures that the model draws are from those that the captions belong to, taken together.",
        figure="frechet",
        metrics={"frechet": f"Frechet distance, features: {feature}"},
        numbers=frozenset({"frechet"}),
    )
    return Outcome(
        described=described,
        scores={**scores, "count": len(documents)},
        documents=tuple(documents),
        made=tuple(made),
        judgements=tuple(Judgement(right=True, truth="", shares={}) for _ in made),
    )


def _add(moments: Moments, feature_of: features.Feature, pictures: Sequence[np.ndarray]) -> None:
    """Takes in pictures `[1, H, W, 3]`, those of one size together."""
    by_size: dict[tuple[int, ...], list[np.ndarray]] = defaultdict(list)
    for picture in pictures:
        by_size[picture.shape].append(picture)
    for group in by_size.values():
        moments.add(feature_of(np.concatenate(group)))


def _prompt(picture: Picture, subject: Subject, options: Options) -> Document:
    ids = np.array(subject.text.encode(picture.caption), np.int32)
    return Document(key=picture.key, segments=(Text(ids=ids, role="user" if options.chat else ""),))
