"""Pictures during training: reconstructions of an image tokenizer, drawings of a model over tokens."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from mmgpt.core.config import ConfigError
from mmgpt.core.document import Document, Image, Text
from mmgpt.core.log import Metrics, console, printable
from mmgpt.data.images import ImageRows, Pictures
from mmgpt.data.loader import PackedRows
from mmgpt.data.record import Dataset
from mmgpt.data.shuffle import is_held_out
from mmgpt.generate.model import Model, media_sizes, token_run
from mmgpt.generate.sampler import Sampler, Sampling
from mmgpt.tokenize.vision import VisionTokenizer
from mmgpt.tokens.text import TextTokenizer
from mmgpt.train.run import Opened, Run, for_inference

Hook = Callable[[Opened, Metrics], None]

GAP = 2
"""White pixels between pictures of a grid."""
LOOK = 2000
"""Documents that are looked through for prompts."""


def sample_hook(run: Run) -> Hook | None:
    """What the training loop calls after each evaluation, or None where the run has nothing to show.

    All that the samples need is checked here; ConfigError, DatasetError and TextError say what is missing. Later
    nothing about a sample can end the run.
    """
    if run.samples <= 0:
        return None
    if isinstance(run.data, ImageRows.Config):
        return _safely(_Reconstructions(run.data, run.samples))
    if run.tokens is not None and isinstance(run.data, PackedRows.Config):
        drawings = _Drawings(run)
        return _safely(drawings) if drawings.documents else None
    return None


def _safely(hook: Hook) -> Hook:
    def safe(opened: Opened, metrics: Metrics) -> None:
        try:
            opened = for_inference(opened)
            with jax.set_mesh(opened.built.mesh):
                hook(opened, metrics)
        except Exception as e:  # hours of training are worth more than a picture
            console.print(f"no samples at step {opened.step}: {printable(f'{type(e).__name__}: {e}')}", style="red")

    return safe


class _Reconstructions:
    """Held-out pictures above what the tokenizer makes of them."""

    def __init__(self, data: ImageRows.Config, count: int):
        sources = [Pictures(source, data.held_out) for source in data.sources]
        each = -(-count // len(sources))
        pictures: list[np.ndarray] = []
        for source in sources:
            segments = source.held_out if len(source.held_out) else source.training
            pictures += itertools.islice(_readable(source, segments, data), each)
        self.pictures = np.stack(pictures[:count])

    def __call__(self, opened: Opened, metrics: Metrics) -> None:
        tokenizer = VisionTokenizer(opened, batch=len(self.pictures))
        made = tokenizer.decode(tokenizer.encode(self.pictures))
        metrics.image(opened.step, "reconstructions", grid([list(self.pictures), list(made)]))


def _readable(source: Pictures, segments: np.ndarray, data: ImageRows.Config) -> Iterator[np.ndarray]:
    """The first frames of those segments that can be read; training lists the others as rejects."""
    for segment in segments:
        try:
            yield source.frames(int(segment), data.height, data.width)[0]
        except ValueError:  # RecordError, MediaError
            continue


class _Drawings:
    """Held-out texts of the first source and what the model draws from them."""

    def __init__(self, run: Run):
        tokens, data = token_run(run)
        self.text = TextTokenizer.load(Path(tokens.text))
        self.vision_run = Path(tokens.vision)
        if not any((self.vision_run / "checkpoints").glob("*")):
            raise ConfigError(
                f"{self.vision_run}: no checkpoint of an image tokenizer to draw with; train it, or set samples=0."
            )
        self.sizes = tuple(size for size in media_sizes(data) if size[0] == 0)
        self.documents = held_out_texts(run, run.samples) if self.sizes else []
        self.model: Model | None = None

    def __call__(self, opened: Opened, metrics: Metrics) -> None:
        if self.model is None:  # now, since loading starts JAX, which a run does in its own way
            vision = VisionTokenizer.load(self.vision_run)
            self.model = Model(opened, self.text, vision, self.sizes, batch=len(self.documents))
        self.model.generator.opened = opened  # the same generator each time: it is compiled once
        sampling = Sampling(room=self.model.longest_medium + 8, image=Sampler(temperature=0.0))
        texts, pictures = [], []
        for continuation in self.model.go_on(self.documents, sampling):
            found = [part.frames[-1] for part in continuation.made if part.frames is not None]
            said = " ".join(part.text for part in continuation.made if part.frames is None)
            texts.append(" ".join(part.text for part in continuation.prompt) + (f"  [goes on: {said}]" if said else ""))
            pictures.append(found[0] if found else None)
        metrics.text(
            opened.step,
            "drawings",
            "\n".join(f"{i + 1}. {' '.join(text.split())}" for i, text in enumerate(texts)) + "\n",
        )
        size = next((picture.shape for picture in pictures if picture is not None), None)
        if size is not None:
            blank = np.full(size, 255, np.uint8)
            shown = [blank if p is None or p.shape != size else p for p in pictures]
            metrics.image(opened.step, "drawings", grid([shown]))


def held_out_texts(run: Run, count: int) -> list[Document]:
    """The texts before the first image in held-out documents of the first source: prompts to draw from."""
    _, data = token_run(run)
    return list(itertools.islice(_texts(data), count))


def _texts(data: PackedRows.Config) -> Iterator[Document]:
    dataset = Dataset(Path(data.sources[0].path))
    numbers = np.flatnonzero(is_held_out(dataset.name, np.arange(len(dataset)), data.held_out))[:LOOK]
    for number in numbers:
        document = dataset[int(number)]
        kinds = [type(segment) for segment in document.segments]
        if Image in kinds and kinds.index(Image) > 0 and set(kinds[: kinds.index(Image)]) == {Text}:
            yield Document(key=document.key, segments=document.segments[: kinds.index(Image)])


def grid(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Pictures uint8 `[H, W, 3]` of one size laid out in rows, white between them."""
    padded = [[np.pad(p, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for p in row] for row in rows]
    return np.concatenate([np.concatenate(row, axis=1) for row in padded], axis=0)[:-GAP, :-GAP]
