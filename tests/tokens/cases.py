"""Every grammar small, over a tokenizer of its own and over a published one, with one codebook and with blanks."""

import dataclasses
import functools

import numpy as np
from hypothesis import strategies as st

from mmgpt.core.document import Action, Document, Image, Segment, Text, Video
from mmgpt.tokens import grammars
from mmgpt.tokens.grammars.lwm import LWM
from mmgpt.tokens.grammars.raster import Raster
from mmgpt.tokens.grammars.univla_video import UniVLAVideo
from mmgpt.tokens.text import TextTokenizer
from mmgpt.tokens.text.byte_pairs import BytePairs
from tests import tiny

ACTIONS = 7


@dataclasses.dataclass(frozen=True)
class Case:
    grammar: str
    codebooks: tuple[int, ...] = (5,)
    blanks: bool = False
    published: bool = False
    grid: tuple[int, int] = (2, 3)

    def __str__(self) -> str:
        words = ["blanks"] * self.blanks + ["published"] * self.published
        return " ".join([self.grammar, f"{len(self.codebooks)} books", *words])

    @property
    def sizes(self) -> tuple[tuple[int, int, int], ...]:
        if self.grammar == "lwm":
            return (0, *self.grid), (3, *self.grid), (5, *self.grid)
        return (0, 2, 3), (0, 2, 10), (0, 12, 1), (2, 2, 2), (11, 1, 1)


CASES = (
    Case("emu3"),
    Case("emu3", (4, 8)),
    Case("emu3", (4, 8), blanks=True),
    Case("emu3", published=True),
    Case("emu3_5", published=True),
    Case("emu3_5", (4, 8), blanks=True),
    Case("univla_video", published=True),
    Case("univla_video", (4, 8), blanks=True),
    Case("lwm"),
    Case("lwm", (4, 8), blanks=True),
)
assert {case.grammar for case in CASES} == set(grammars.names())  # a new grammar joins these tests


@functools.cache
def single_bytes() -> BytePairs:
    """Emu3's tokenizer before any pair was merged."""
    return BytePairs({bytes([i]): i for i in range(256)})


def text(case: Case) -> TextTokenizer:
    return single_bytes() if case.published else tiny.text()


@functools.cache
def build(case: Case) -> Raster:
    config = grammars.config(case.grammar)
    if isinstance(config, LWM.Config):
        config = config.replace(height=case.grid[0], width=case.grid[1])
    if isinstance(config, UniVLAVideo.Config):
        config = config.replace(actions=ACTIONS)
    made = config.build(text(case), case.codebooks, blanks=case.blanks)
    assert isinstance(made, Raster)
    return made


def grid(case: Case, rng: np.random.Generator, *shape: int) -> np.ndarray:
    return tiny.grid(rng, shape, case.codebooks, case.blanks)


def draw_document(case: Case, rng: np.random.Generator, kinds: list[type[Segment]]) -> Document:
    """A tokenised document of segments of these kinds, with marks where the grammar knows them."""
    g = build(case)
    segments: list[Segment] = []
    open_marks = 0
    for kind in kinds:
        role = ""
        usable = [(m, int(g.marks.after[m, open_marks])) for m in range(len(g.marks.roles))]
        usable = [(m, after) for m, after in usable if after >= 0]
        if usable and rng.random() < 0.6:
            mark, open_marks = usable[rng.integers(len(usable))]
            role = g.marks.roles[mark]
        if role or g.marks.in_block[open_marks] or kind is Text:
            ids = rng.choice(np.flatnonzero(g.is_text(np.arange(g.vocabulary.text))), rng.integers(0, 6))
            segments.append(Text(ids=ids.astype(np.int32), role=role))
        elif kind is Action:
            if g.boa >= 0:
                segments.append(Action(codes=rng.integers(0, ACTIONS, rng.integers(0, 5)).astype(np.int32)))
        else:
            H, W = case.grid if g.grid else rng.choice([1, 2, 3, 4, 9, 10, 12], 2)
            if kind is Image:
                segments.append(Image(codes=grid(case, rng, H, W)))
            else:
                segments.append(Video(codes=grid(case, rng, rng.integers(1, 12), H, W)))
    if g.marks.in_block[open_marks]:
        end = next(r for m, r in enumerate(g.marks.roles) if 0 <= g.marks.after[m, open_marks] < 2)
        segments.append(Text(ids=np.zeros(0, np.int32), role=end))
    return Document(key="", segments=tuple(segments))


def documents(case: Case) -> st.SearchStrategy[Document]:
    """Any document of the case; ids and codes by a seed, which shrinks as well as drawing each."""
    kinds = st.lists(st.sampled_from([Text, Image, Video, Action]), max_size=5)
    return st.builds(lambda seed, k: draw_document(case, np.random.default_rng(seed), k), st.integers(0, 999), kinds)


def canonical(case: Case, document: Document) -> Document:
    """What comes back: adjacent texts merged, empty ones gone, bare media, pictures as the grammar tells them apart."""
    g = build(case)
    segments: list[Segment] = []
    for segment in document.segments:
        if isinstance(segment, Text):
            role = segment.role if segment.role in g.marks.controls else ""
            last = segments[-1] if segments else None
            if isinstance(last, Text) and not role:
                segments[-1] = Text(ids=np.concatenate([last.ids, segment.ids]), role=last.role)
            elif len(segment.ids) or role:
                segments.append(Text(ids=segment.ids, role=role))
        elif isinstance(segment, Video) and g.name == "emu3_5":
            segments += [Image(codes=codes) for codes in segment.codes]
        elif isinstance(segment, Video) and g.name in ("univla_video", "lwm") and len(segment.codes) == 1:
            segments.append(Image(codes=segment.codes[0]))
        else:
            segments.append(dataclasses.replace(segment, role="", loss=1.0))
    return Document(key="", segments=tuple(segments))
