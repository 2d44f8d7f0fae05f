"""A trained run ready to use: documents go in as prompts; what the model makes of them comes out as text and pixels."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmgpt.core.config import ConfigError
from mmgpt.core.document import KINDS, Document, Image, Segment, Text, Video
from mmgpt.data.loader import PackedRows
from mmgpt.data.media import fit, resize
from mmgpt.data.record import Dataset
from mmgpt.generate.decode import Generator, Prompt, Sampling
from mmgpt.tokenize.vision import VisionTokenizer
from mmgpt.tokens.grammars.grammar import Grammar, GrammarError
from mmgpt.tokens.text import TextTokenizer
from mmgpt.train.run import Opened, Run, Tokens, open_run

Size = tuple[int, int, int]
"""T, H and W of a medium in places; T is 0 for an image."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A segment as people see it: `text`, or `frames [T, H, W, 3] uint8` of an image (T = 1) or a clip.

    The first `given` frames of a clip were in the prompt; the model made the rest.
    """

    text: str = ""
    frames: np.ndarray | None = None
    clip: bool = False
    given: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """A prompt and what the model made of it, which is nothing unless `finished`: the room may end inside a medium."""

    prompt: tuple[Part, ...]
    made: tuple[Part, ...]
    finished: bool


def token_run(run: Run) -> tuple[Tokens, PackedRows.Config]:
    """The parts of a run's config that only a run over tokens has; ConfigError for another."""
    if run.tokens is None or not isinstance(run.data, PackedRows.Config):
        raise ConfigError("this run does not model tokens: text and pictures come from a run trained on packed rows.")
    return run.tokens, run.data


def media_sizes(data: PackedRows.Config) -> tuple[Size, ...]:
    """Sizes of all media in the datasets that a run is trained on, sorted: the ones that its model may open."""
    found: set[Size] = set()
    for source in data.sources:
        index = Dataset(Path(source.path)).index
        for kind, is_clip in ((Image, False), (Video, True)):
            shapes = np.asarray(index.shape)[np.asarray(index.kind) == KINDS.index(kind)]
            found |= {(int(T) if is_clip else 0, int(H), int(W)) for T, H, W in np.unique(shapes[:, :3], axis=0)}
    return tuple(sorted(found))


class Model:
    """An opened run with its tokenizers. `sizes` are the media sizes it may open, `batch` prompts go at a time."""

    def __init__(
        self,
        opened: Opened,
        text: TextTokenizer,
        vision: VisionTokenizer,
        sizes: Sequence[Size],
        batch: int = 32,
    ):
        self.generator = Generator(opened, sizes, batch)
        self.grammar: Grammar = self.generator.grammar
        self.text, self.vision, self.sizes = text, vision, tuple(sizes)

    @classmethod
    def open(cls, run_dir: Path, batch: int = 32, *, clips: bool = False) -> "Model":
        """A run folder's newest checkpoint and its tokenizers; `clips` lets the model open clips, not only images.

        ConfigError, CheckpointError, DatasetError and TextError say what is missing.
        """
        opened = open_run(run_dir)
        tokens, data = token_run(opened.built.run)
        sizes = [size for size in media_sizes(data) if clips or size[0] == 0]
        vision = VisionTokenizer.load(Path(tokens.vision))
        return cls(opened, TextTokenizer.load(Path(tokens.text)), vision, sizes, batch)

    @property
    def longest_medium(self) -> int:
        """Tokens of the longest medium that the model may open, none of its places blank; 0 if it opens none."""
        C = len(self.grammar.vocabulary.codebooks)
        kinds = [KINDS.index(Video if T else Image) for T, _, _ in self.sizes]
        shapes = [(max(T, 1), H, W, C, max(T, 1) * H * W) for T, H, W in self.sizes]
        lengths = self.grammar.segment_lengths(np.array(kinds, np.uint8), np.array(shapes, np.int32).reshape(-1, 5))
        return int(lengths.max(initial=0))

    def go_on(self, documents: Sequence[Document], sampling: Sampling, add_frames: int = 0) -> list[Continuation]:
        """Goes on from tokenised documents; with `add_frames` each must end in a clip, which gains that many frames."""
        prompts, starts = zip(*[self._prompt(document, add_frames) for document in documents], strict=True)
        made = self.generator.generate([Prompt(ids=ids) for ids in prompts], sampling)
        opening = self.grammar.encode(Document(key="", segments=()), end=False).ids
        segments: list[Sequence[Segment]] = []
        finished: list[bool] = []
        for document, ids, start in zip(documents, made, starts, strict=True):
            try:
                new: Sequence[Segment] = self.grammar.parse(np.concatenate([opening, ids[start:]])).segments
                finished.append(True)
            except GrammarError:  # the room ended inside a medium
                new = ()
                finished.append(False)
            segments += [document.segments, new]
        parts = self.shown(segments)
        return [
            Continuation(prompt=prompt, made=_marked(prompt, new, add_frames), finished=done)
            for prompt, new, done in zip(parts[0::2], parts[1::2], finished, strict=True)
        ]

    def _prompt(self, document: Document, add_frames: int) -> tuple[np.ndarray, int]:
        """Ids to go on from, and where among them the output begins: before a clip that is to be continued."""
        if not add_frames:
            ids = self.grammar.encode(document, end=False).ids
            return ids, len(ids)
        *before, last = document.segments
        if not isinstance(last, Video) or last.codes is None:
            raise ConfigError(
                f"document {document.key!r} does not end in a tokenised clip: there are no frames to add to."
            )
        head = self.grammar.encode(dataclasses.replace(document, segments=tuple(before)), end=False).ids
        clip = self.grammar.open_video(last.codes, len(last.codes) + add_frames)
        return np.concatenate([head, clip]), len(head)

    def shown(self, documents: Sequence[Sequence[Segment]]) -> list[tuple[Part, ...]]:
        """Tokenised segments as text and pixels; all pictures of one size are decoded together."""
        by_size: dict[tuple[int, ...], list[np.ndarray]] = defaultdict(list)
        for segment in (segment for document in documents for segment in document):
            if isinstance(segment, Image | Video):
                codes = _grids(segment)
                by_size[codes.shape[1:]].append(codes)
        pixels = {size: self._pixels(grids) for size, grids in by_size.items()}
        taken = {size: iter(parts) for size, parts in pixels.items()}

        def part(segment: Segment) -> Part:
            if isinstance(segment, Image | Video):
                frames = next(taken[_grids(segment).shape[1:]])
                return Part(frames=frames, clip=isinstance(segment, Video))
            ids = segment.ids if isinstance(segment, Text) and segment.ids is not None else []
            return Part(text=self.text.decode(ids))

        return [tuple(part(segment) for segment in document) for document in documents]

    def _pixels(self, grids: list[np.ndarray]) -> list[np.ndarray]:
        return np.split(self.vision.decode(np.concatenate(grids)), np.cumsum([len(g) for g in grids])[:-1])


def document_of(
    model: Model, *, clip: np.ndarray | None = None, pictures: Sequence[np.ndarray] = (), text: str = ""
) -> Document:
    """A prompt of a clip uint8 `[T, H, W, 3]`, pictures uint8 `[H, W, 3]` and a text, in this order, each if given.

    Pictures are brought to the largest size that the model knows. ConfigError where it knows none.
    """
    patch = model.vision.patch
    area = max((h * w for _, h, w in model.sizes), default=0) * patch**2
    segments: list[Segment] = []
    for frames, kind in [(clip, Video), *((picture[None], Image) for picture in pictures)]:
        if frames is None:
            continue
        if not area:
            raise ConfigError("this run was trained without pictures; give a text prompt alone.")
        height, width = fit(*frames.shape[1:3], area=area, multiple=patch)
        codes = model.vision.encode(np.stack([resize(frame, height, width) for frame in frames]))
        segments.append(Video(codes=codes) if kind is Video else Image(codes=codes[0]))
    if text:
        segments.append(Text(ids=np.array(model.text.encode(text), np.int32)))
    return Document(key="prompt", segments=tuple(segments))


def _grids(segment: Image | Video) -> np.ndarray:
    """Code grids `[T, H, W, C]` of a medium; ConfigError where it holds none."""
    if segment.codes is None:
        raise ConfigError("a medium of this document is not tokenised; run `mmgpt tokenize data` first.")
    return segment.codes if isinstance(segment, Video) else segment.codes[None]


def _marked(prompt: tuple[Part, ...], made: tuple[Part, ...], add_frames: int) -> tuple[Part, ...]:
    """The output with its first clip marked as given as far as the prompt showed it."""
    if not add_frames or not made:
        return made
    given = prompt[-1].frames
    return (dataclasses.replace(made[0], given=0 if given is None else len(given)), *made[1:])
