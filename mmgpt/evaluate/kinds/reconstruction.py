"""What an image tokenizer keeps of pictures: PSNR, SSIM, the Frechet distance, and how much of its codebooks it uses.

Pictures come from a raw dataset or a folder of files. For a model over tokens its own tokenizer is meant.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator

import jax
import numpy as np

from mmgpt.core.document import Document
from mmgpt.core.log import progress
from mmgpt.evaluate.kinds import Job, one_path
from mmgpt.evaluate.metrics import features
from mmgpt.evaluate.metrics.frechet import Moments, frechet_distance
from mmgpt.evaluate.pictures import Picture, fitted, of_path
from mmgpt.evaluate.subject import Options, Subject
from mmgpt.evaluate.tasks import Described, Judgement, Outcome, TaskError
from mmgpt.generate.model import Continuation, Part
from mmgpt.nn.image_metrics import SIDE, psnr, ssim

USAGE = "DATASET_OR_FOLDER[,FEATURE]"
KEPT = 24
"""Pictures that are shown in the report."""
_psnr = jax.jit(functools.partial(psnr, span=255.0))
_ssim = jax.jit(functools.partial(ssim, span=255.0))


class Codes:
    """Which codes of each codebook occur, and how often."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self._counts = [np.zeros(size, np.int64) for size in sizes]

    def add(self, codes: np.ndarray) -> None:
        """Takes in code grids `[..., C]`."""
        for number, counts in enumerate(self._counts):
            counts += np.bincount(codes[..., number].ravel(), minlength=len(counts))

    def scores(self) -> dict[str, float]:
        """`codes_used` is the share of codes that occur, `code_perplexity` how many would do if used alike."""
        found: dict[str, float] = {}
        for number, counts in enumerate(self._counts):
            share = counts[counts > 0] / max(1, counts.sum())
            name = f"/{number}" if len(self._counts) > 1 else ""
            found[f"codes_used{name}"] = float((counts > 0).mean())
            found[f"code_perplexity{name}"] = float(np.exp(-(share * np.log(share)).sum()))
        return found


def prepare(arguments: list[str], options: Options, subject: Subject) -> Job:
    """FEATURE is that of the Frechet distance between pictures and their reconstructions (`metrics.features`)."""
    if len(arguments) > 2:
        raise TaskError(f"reconstruction={','.join(arguments)}: expected reconstruction={USAGE}.")
    path = one_path(arguments[0], "dataset or folder of pictures")
    feature = arguments[1] if len(arguments) == 2 else "pixels"
    features.require(feature)
    of_path(path)
    name = f"reconstruction-{path.name}"
    return lambda: _run(name, itertools.islice(of_path(path), options.limit), feature, options, subject)


def batches(
    pictures: Iterator[Picture], area: int, multiple: int, size: int
) -> Iterator[tuple[list[str], np.ndarray, bool]]:
    """Keys and frames uint8 `[N, H, W, 3]`, `size` or so of one shape at a time; a clip alone, as its own frames."""
    waiting: dict[tuple[int, ...], list[tuple[str, np.ndarray]]] = defaultdict(list)
    for picture in pictures:
        frames = fitted(picture.frames(), area, multiple)
        if picture.clip:
            yield [picture.key], frames, True
            continue
        group = waiting[frames.shape[1:]]
        group.append((picture.key, frames[0]))
        if len(group) == size:
            del waiting[frames.shape[1:]]
            yield [key for key, _ in group], np.stack([frame for _, frame in group]), False
    for group in waiting.values():
        yield [key for key, _ in group], np.stack([frame for _, frame in group]), False


def _run(name: str, pictures: Iterator[Picture], feature: str, options: Options, subject: Subject) -> Outcome:
    vision, feature_of = subject.vision, features.load(feature, subject)
    codes_seen, originals, remade = Codes(vision.codebooks), Moments(), Moments()
    psnrs: list[float] = []
    ssims: list[float] = []
    documents, made, judgements = list[Document](), list[Continuation](), list[Judgement]()
    found = batches(pictures, options.area, vision.patch, options.batch)
    for keys, frames, clip in progress(found, label=name):
        codes, again = _remade(subject, frames, clip)
        codes_seen.add(codes)
        pair = frames.astype(np.float32), again.astype(np.float32)
        psnrs += np.asarray(_psnr(*pair), np.float64).tolist()
        if min(frames.shape[1:3]) >= SIDE:  # a smaller picture holds no window
            ssims += np.asarray(_ssim(*pair), np.float64).tolist()
        originals.add(feature_of(frames))
        remade.add(feature_of(again))
        for i, key in enumerate(keys[: max(0, KEPT - len(documents))]):
            shown = (frames, again) if clip else (frames[i : i + 1], again[i : i + 1])
            documents.append(Document(key=key, segments=()))
            prompt, answer = (Part(frames=part, clip=clip) for part in shown)
            made.append(Continuation(prompt=(prompt,), made=(answer,), finished=True))
            value = psnrs[i - len(keys)] if not clip else float(np.mean(psnrs[-len(frames) :]))
            judgements.append(Judgement(right=True, truth=f"PSNR {value:.1f} dB", shares={}))
    if not psnrs:
        raise TaskError(f"{name}: there is no picture.")
    scores = {"psnr": float(np.mean(psnrs))} | ({"ssim": float(np.mean(ssims))} if ssims else {}) | codes_seen.scores()
    if originals.count > 1:
        scores["frechet"] = frechet_distance(originals, remade)
    return Outcome(
        described=_described(name, feature, scores),
        scores={**{key: round(value, 4) for key, value in scores.items()}, "count": len(psnrs)},
        documents=tuple(documents),
        made=tuple(made),
        judgements=tuple(judgements),
    )


def _remade(subject: Subject, frames: np.ndarray, clip: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes of frames and what is decoded from them."""
    vision = subject.vision
    if clip:
        codes = vision.encode_clip(frames)
        return codes, vision.decode_clip(codes)[: len(frames)]
    codes = vision.encode(frames)
    return codes, vision.decode(codes)


def _described(name: str, feature: str, scores: dict[str, float]) -> Described:
    words = {
        "psnr": "PSNR in dB, the mean over pictures",
        "ssim": "SSIM",
        "frechet": f"Frechet distance of originals and reconstructions, features: {feature}",
        "codes_used": "codes that occur",
        "code_perplexity": "codes that would do, if all were used alike",
    }
    return Described(
        name=name,
        title="Image → codes → image",
        about="Pictures, and what the image tokenizer makes of their codes again.",
        figure="psnr",
        metrics={metric: words[metric.partition("/")[0]] for metric in scores},
        numbers=frozenset({"psnr", "ssim", "frechet", "code_perplexity"}),
    )
