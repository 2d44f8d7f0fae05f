"""A model ready to use: documents go in as prompts; what it makes of them comes out as text and pixels."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmgpt.core.config import ConfigError
from mmgpt.core.document import Document, Image, Segment, Text, Video
from mmgpt.generate.decode import Generator, Prompt
from mmgpt.generate.outline import AREA, Order, Outline, Size, laid, media_sizes, token_run
from mmgpt.generate.prompts import Pieces, document_of
from mmgpt.generate.sampler import Sampler, Sampling
from mmgpt.interop.open import DType, open_folder
from mmgpt.tokenize.vision import VisionTokenizer
from mmgpt.tokens.grammars.grammar import Grammar, GrammarError
from mmgpt.tokens.text import TextTokenizer
from mmgpt.train.run import Opened

__all__ = ["Continuation", "Model", "Order", "Part", "Size", "document_of", "media_sizes", "token_run"]


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
    """A prompt and what the model made of it, which is nothing unless `finished`: the room may end inside a medium.

    `segments` are what was made as codes and ids, with which a document may go on.
    """

    prompt: tuple[Part, ...]
    made: tuple[Part, ...]
    finished: bool
    segments: tuple[Segment, ...] = ()

    @property
    def text(self) -> str:
        """All text that was made."""
        return " ".join(part.text.strip() for part in self.made if part.frames is None).strip()

    @property
    def media(self) -> tuple[np.ndarray, ...]:
        """Frames `[T, H, W, 3] uint8` of each medium that was made, T = 1 of an image."""
        return tuple(part.frames for part in self.made if part.frames is not None)


class Model:
    """An opened model with its tokenizers. `sizes` are the media sizes it may open, `batch` prompts go at a time."""

    def __init__(
        self,
        opened: Opened,
        text: TextTokenizer,
        vision: VisionTokenizer,
        sizes: Sequence[Size],
        batch: int = 32,
    ):
        _, data = token_run(opened.built.run)
        self.generator = Generator(opened, sizes, batch, context=data.row_length)
        self.grammar: Grammar = self.generator.grammar
        self.text, self.vision, self.sizes = text, vision, tuple(sizes)
        self.outline = Outline(
            grammar=self.grammar,
            text=text,
            codebooks=vision.codebooks,
            patch=vision.patch,
            temporal=vision.temporal,
            sizes=self.sizes,
            area=max((H * W for _, H, W in self.sizes), default=0) * vision.patch**2,
            context=data.row_length,
        )

    @classmethod
    def open(
        cls, folder: Path | str, batch: int = 32, *, clips: bool = False, dtype: DType | None = None, area: int = AREA
    ) -> "Model":
        """A run folder's newest checkpoint, or a Hugging Face folder, with the tokenizers that it names.

        `clips` lets the model open clips, not only images. `area` is that of pictures where the model does not tell.
        ConfigError, CheckpointError, DatasetError, FolderError and TextError say what is missing.
        """
        outline = Outline.read(Path(folder), area=area)
        opened = open_folder(Path(folder), dtype=dtype, part=None)
        tokens, _ = token_run(opened.built.run)
        vision = VisionTokenizer.load(Path(tokens.vision))
        sizes = [size for size in outline.sizes if clips or size[0] == 0]
        return cls(opened, outline.text, vision, sizes, batch)

    @property
    def longest_medium(self) -> int:
        """Tokens of the longest medium that the model may open, none of its places blank; 0 if it opens none."""
        return self.outline.longest(self.sizes)

    def generate(
        self,
        *pieces: Pieces,
        count: int = 1,
        order: Order | None = None,
        room: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        text_temperature: float = 0.0,
        **sampling: Any,
    ) -> list[Continuation]:
        """`count` continuations of a prompt of texts, pictures uint8 `[H, W, 3]` and clips `[T, H, W, 3]` in order.

        `order` asks for a picture or clip of a given size. `sampling` are other fields of `Sampling`: guidance,
        image_guidance, seed, stop, jacobi. PromptError says what cannot be used.
        """
        order = order or Order()
        document = document_of(self, *pieces)
        asked = Sampling(
            room=self.outline.room(document, order, room),
            text=Sampler(temperature=text_temperature),
            image=Sampler(temperature=temperature, top_k=top_k, top_p=top_p),
            **sampling,
        )
        return self.go_on([document] * count, asked, order=order)

    def go_on(
        self, documents: Sequence[Document], sampling: Sampling, add_frames: int = 0, *, order: Order | None = None
    ) -> list[Continuation]:
        """Goes on from tokenised documents; with `add_frames` each must end in a clip, which gains that many frames."""
        order = order or Order(add_frames=add_frames)
        heads, prompts = zip(*[self._prompt(document, order, sampling) for document in documents], strict=True)
        made = self.generator.generate(prompts, sampling)
        segments: list[Sequence[Segment]] = []
        finished: list[bool] = []
        for document, head, ids in zip(documents, heads, made, strict=True):
            try:
                new = self._new(head, ids)
                finished.append(True)
            except GrammarError:  # the room ended inside a medium
                new = ()
                finished.append(False)
            segments += [document.segments, new]
        parts = self.shown(segments)
        return [
            Continuation(prompt=prompt, made=_marked(prompt, new, order), finished=done, segments=tuple(codes))
            for prompt, new, done, codes in zip(parts[0::2], parts[1::2], finished, segments[1::2], strict=True)
        ]

    def _prompt(self, document: Document, order: Order, sampling: Sampling) -> tuple[np.ndarray, Prompt]:
        """Ids before what is made, and the prompt that opens it, with its branches of guidance."""
        grammar = self.grammar
        head, opening = laid(grammar, document, order, len(self.vision.codebooks))
        bare = dataclasses.replace(document, segments=())
        media = dataclasses.replace(
            document, segments=tuple(s for s in document.segments if isinstance(s, Image | Video))
        )
        if sampling.branches < 3:
            whole = grammar.negative(document, task=order.task, text=order.negative)
            return head, Prompt(ids=_joined(head, opening), negative=_joined(whole, opening))
        nothing = grammar.negative(bare, task=order.task, text=order.negative)
        pictures = grammar.negative(media, task=order.task)
        if len(pictures) == len(grammar.negative(bare, task=order.task)):  # the published branch shows no pictures
            pictures = grammar.encode(media, end=False).ids
        return head, Prompt(
            ids=_joined(head, opening), negative=_joined(nothing, opening), image_only=_joined(pictures, opening)
        )

    def _new(self, head: np.ndarray, ids: np.ndarray) -> tuple[Segment, ...]:
        """Segments behind the prompt; GrammarError where the last one does not end."""
        before, after = self.grammar.parse(head).segments, self.grammar.parse(ids).segments
        new = list(after[len(before) :])
        last = before[-1] if before else None
        if isinstance(last, Text) and last.ids is not None:
            grown = after[len(before) - 1]
            assert isinstance(grown, Text) and grown.ids is not None
            rest = grown.ids[len(last.ids) :]
            new = [Text(ids=rest), *new] if len(rest) else new
        return tuple(new)

    def shown(self, documents: Sequence[Sequence[Segment]]) -> list[tuple[Part, ...]]:
        """Tokenised segments as text and pixels; all pictures of one size are decoded together."""
        by_size: dict[tuple[int, ...], list[np.ndarray]] = defaultdict(list)
        for segment in (segment for document in documents for segment in document):
            if isinstance(segment, Image | Video):
                by_size[self._group(segment)].append(_grids(segment))
        taken = {group: iter(self._pixels(grids, group[0])) for group, grids in by_size.items()}

        def part(segment: Segment) -> Part:
            if isinstance(segment, Image | Video):
                return Part(frames=next(taken[self._group(segment)]), clip=isinstance(segment, Video))
            ids = segment.ids if isinstance(segment, Text) and segment.ids is not None else []
            return Part(text=self.text.decode(ids))

        return [tuple(part(segment) for segment in document) for document in documents]

    def _group(self, segment: Image | Video) -> tuple[int, ...]:
        """Media that are decoded together: frames of one size, or whole clips where frames are bound in time."""
        bound = isinstance(segment, Video) and self.vision.temporal > 1
        return (int(bound), *_grids(segment).shape[1:])

    def _pixels(self, grids: list[np.ndarray], bound: int) -> list[np.ndarray]:
        if bound:
            return [self.vision.decode_clip(grid) for grid in grids]
        return np.split(self.vision.decode(np.concatenate(grids)), np.cumsum([len(g) for g in grids])[:-1])


def _joined(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts).astype(np.int32)


def _grids(segment: Image | Video) -> np.ndarray:
    """Code grids `[T, H, W, C]` of a medium; ConfigError where it holds none."""
    if segment.codes is None:
        raise ConfigError("a medium of this document is not tokenised; run `mmgpt tokenize data` first.")
    return segment.codes if isinstance(segment, Video) else segment.codes[None]


def _marked(prompt: tuple[Part, ...], made: tuple[Part, ...], order: Order) -> tuple[Part, ...]:
    """The output with its first clip marked as given as far as the prompt showed it."""
    if not order.add_frames or not made or not made[0].clip:
        return made
    given = prompt[-1].frames
    return (dataclasses.replace(made[0], given=0 if given is None else len(given)), *made[1:])
