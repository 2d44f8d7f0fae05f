"""What is known of a model from its configs alone: its grammar, its tokenizers' sizes, the media it may open.

Prompts are checked against it before any array is made.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmgpt.core.config import ConfigError
from mmgpt.core.document import KINDS, Document, Image, Segment, Text, Video
from mmgpt.data.loader import PackedRows
from mmgpt.data.media import fit
from mmgpt.data.record import Dataset
from mmgpt.generate.decode import PromptError
from mmgpt.interop.hf_config import is_hugging_face
from mmgpt.interop.open import Source
from mmgpt.models import VisionConfig
from mmgpt.tokens.grammars.grammar import Grammar
from mmgpt.tokens.text import TextTokenizer
from mmgpt.train.run import Run, Tokens, load_run

Size = tuple[int, int, int]
"""T, H and W of a medium in places; T is 0 for an image."""

AREA = 512 * 512
"""Pixels of a picture for a model that was trained elsewhere, which does not tell."""


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """What is asked for beside the prompt.

    `size`: a picture of this height and width in places, at once; with `frames` a clip of so many places in time.
    `add_frames` places in time are added to the clip that the prompt ends with. `task` is the word of the task in
    the template of a published model, `negative` a text that guidance pushes away from.
    """

    size: tuple[int, int] | None = None
    frames: int = 0
    add_frames: int = 0
    task: str = ""
    negative: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outline:
    """A model over tokens by its configs. `area` is that of the largest picture it knows, in pixels; 0 without any."""

    grammar: Grammar
    text: TextTokenizer
    codebooks: tuple[int, ...]
    patch: int
    temporal: int
    sizes: tuple[Size, ...]
    area: int
    context: int

    @classmethod
    def read(cls, folder: Path, *, area: int = AREA) -> "Outline":
        """Of a run folder or a Hugging Face folder; ConfigError, FolderError and TextError say what is missing."""
        run = _config(folder, "text")
        tokens, data = token_run(run)
        if not tokens.vision:
            raise ConfigError(f"{folder}: no image tokenizer is known for this model; put one beside it.")
        vision = _config(Path(tokens.vision), "vision").model
        if not isinstance(vision, VisionConfig):
            raise ConfigError(f"{tokens.vision}: that run trains no image tokenizer; name one that does.")
        sizes = media_sizes(data)
        if not data.sources:
            if area < vision.patch**2:
                raise PromptError(f"--area is {area}; a picture has {vision.patch**2} pixels or more for this model.")
            side = int(area**0.5) // vision.patch
            sizes = ((0, side, side),)
        return cls(
            grammar=tokens.build(),
            text=TextTokenizer.load(Path(tokens.text)),
            codebooks=vision.codebooks,
            patch=vision.patch,
            temporal=vision.temporal,
            sizes=sizes,
            area=max((H * W for _, H, W in sizes), default=0) * vision.patch**2,
            context=data.row_length,
        )

    def pixels(self, height: int, width: int) -> tuple[int, int]:
        """The size that a picture of this size is brought to; PromptError where the model knows no pictures."""
        if not self.area:
            raise PromptError("this run was trained without pictures; give a text prompt alone.")
        return fit(height, width, area=self.area, multiple=self.patch)

    def blank(self, shape: tuple[int, ...], role: str, *, clip: bool) -> Segment:
        """What lays out as frames `[T, H, W, 3]` do that are brought to their size, or as the shortest of them."""
        height, width = self.pixels(shape[1], shape[2])
        places = (-(-shape[0] // self.temporal), height // self.patch, width // self.patch)
        codes = np.zeros((*places, len(self.codebooks)), np.int32)
        return Video(codes=codes, role=role) if clip else Image(codes=codes[0], role=role)

    def words(self, text: str, role: str = "") -> Text:
        """A text as a segment."""
        return Text(ids=np.array(self.text.encode(text), np.int32), role=role)

    def room(self, document: Document, order: Order, asked: int = 0) -> int:
        """New tokens at most: what the longest document that the model knows has left, `asked` if that is fewer.

        PromptError where nothing is left, or less than what is asked for takes. A forced picture takes its own room.
        """
        if order.add_frames:
            self._check_frames(document, order)
        head, opening = laid(self.grammar, document, order, len(self.codebooks))
        used = len(head) + len(opening)
        free = self.context - used
        if free < 2:
            raise PromptError(
                f"the prompt takes {used} tokens and the model was trained on rows of {self.context}: nothing is left "
                "to generate. Give a shorter prompt, or smaller pictures."
            )
        if asked < 0:
            raise PromptError(f"--room is {asked}; give the new tokens at most, or 0 for all that a row has left.")
        if order.size is not None:
            shortest, longest = self._medium_room(order, len(opening))
            if shortest > free:
                raise PromptError(
                    f"a medium of {order.size[0]}*{order.size[1]} places takes {shortest} tokens, and after the prompt "
                    f"a row of {self.context} has {free} left. Give a smaller --size or a shorter prompt."
                )
            if 0 < asked < shortest:
                raise PromptError(f"--room is {asked}, and a medium of that --size takes {shortest} tokens; give more.")
            return min(asked or longest, free)
        most = max(2048, 2 * self.longest(self.sizes))
        return min(asked or most, free)

    def _medium_room(self, order: Order, opened: int) -> tuple[int, int]:
        """Tokens from the first code of a forced medium to the document's end, blank and painted."""
        assert order.size is not None
        size = (order.frames, *order.size)
        return self.longest([size], painted=False) - opened + 1, self.longest([size]) - opened + 1

    def longest(self, sizes: Sequence[Size], *, painted: bool = True) -> int:
        """Tokens of the longest medium of these sizes, none of its places blank or all of them; 0 of none."""
        kinds = [KINDS.index(Video if T else Image) for T, _, _ in sizes]
        C = len(self.codebooks)
        shapes = [(max(T, 1), H, W, C, max(T, 1) * H * W * painted) for T, H, W in sizes]
        lengths = self.grammar.segment_lengths(np.array(kinds, np.uint8), np.array(shapes, np.int32).reshape(-1, 5))
        return int(lengths.max(initial=0))

    def _check_frames(self, document: Document, order: Order) -> None:
        """PromptError where so many frames do not fit behind the clip, even blank."""
        T, H, W, _ = clip_at_end(document).shape
        head, clip = laid(self.grammar, document, dataclasses.replace(order, add_frames=1), len(self.codebooks))
        one = self.longest([(2, H, W)], painted=False) - self.longest([(1, H, W)], painted=False)
        most = max((self.context - len(head) - len(clip) - 1) // one, 0)  # an id ends the clip
        if order.add_frames > most:
            raise PromptError(
                f"--add-frames is {order.add_frames * self.temporal}; after the clip's {T * self.temporal} frames a "
                f"row of the run, {self.context} long, has room for {most * self.temporal} at most. Ask for fewer, or "
                "give a shorter clip."
            )


def clip_at_end(document: Document) -> np.ndarray:
    """Codes of the clip that a document ends with; ConfigError for another."""
    last = document.segments[-1] if document.segments else None
    if not isinstance(last, Video) or last.codes is None:
        raise ConfigError(f"document {document.key!r} does not end in a tokenised clip: there are no frames to add to.")
    return last.codes


def laid(grammar: Grammar, document: Document, order: Order, codes: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the prompt, and ids that open what is asked for behind it."""
    if order.add_frames:
        clip = clip_at_end(document)
        before = dataclasses.replace(document, segments=document.segments[:-1])
        return grammar.prompt(before, task=order.task), grammar.open_video(clip, len(clip) + order.add_frames)
    head = grammar.prompt(document, task=order.task)
    if order.size is None:
        return head, np.zeros(0, np.int32)
    if order.frames:
        return head, grammar.open_video(np.zeros((0, *order.size, codes), np.int32), order.frames)
    return head, grammar.open_image(*order.size)


def _config(folder: Path, part: str) -> Run:
    """The config of a run folder, or the one that a Hugging Face folder stands for."""
    if not is_hugging_face(folder):
        return load_run(folder)
    source = Source(folder)
    return source.run("text" if part == "text" else "vision")
