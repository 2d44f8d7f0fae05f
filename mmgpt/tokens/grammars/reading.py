"""Ids read back: the segments that they lay out, and where in the grammar they end."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from mmgpt.core.document import Action, Image, Segment, Text, Video
from mmgpt.tokens.grammars.grammar import GrammarError

if TYPE_CHECKING:
    from mmgpt.tokens.grammars.raster import Raster

IN_TEXT, IN_SIZE, IN_CODES, IN_ACTIONS, ENDED, BEFORE = range(6)
"""Where ids end: before the first one, in text, in a size, in a picture, among actions, after EOS."""

OPEN = -1
"""Frames of a clip whose end is not known yet."""


@dataclasses.dataclass
class Reading:
    """What ids lay out: whole segments, then `phase` and what is begun there.

    In a size `size` holds its ids; in a picture `place` counts slots and `frames, H, W` are its size; `open` says which
    marks are open; `spans` are the first id, the slots, H and W of each picture.
    """

    segments: list[Segment] = dataclasses.field(default_factory=list)
    phase: int = BEFORE
    place: int = 0
    frames: int = 0
    H: int = 0
    W: int = 0
    open: int = 0
    size: list[int] = dataclasses.field(default_factory=list)
    begun: int = 0
    spans: list[tuple[int, np.ndarray, int, int]] = dataclasses.field(default_factory=list)


def read(grammar: "Raster", ids: np.ndarray) -> Reading:
    """Reads ids that begin a document; GrammarError at the first one that does not fit."""
    return _Reader(grammar, np.asarray(ids, np.int64)).read()


class _Reader:
    """One pass over ids: from each id that is not text to the next."""

    def __init__(self, grammar: "Raster", ids: np.ndarray):
        self.g, self.ids, self.out = grammar, ids, Reading()
        self.text: list[np.ndarray] = []
        self.role = ""

    def fail(self, at: int) -> GrammarError:
        return GrammarError(f"position {at}: id {self.ids[at]} may not stand here; the ids before it parse.")

    def read(self) -> Reading:
        g, ids, out = self.g, self.ids, self.out
        if not len(ids):
            return out
        if ids[0] != g.bos:
            raise self.fail(0)
        out.phase = IN_TEXT
        stops = np.flatnonzero(~g.is_text(ids))
        at = 1
        while at < len(ids) and out.phase == IN_TEXT:
            stop = int(stops[np.searchsorted(stops, at)]) if at <= stops[-1] else len(ids)
            if stop > at:
                self.text.append(ids[at:stop])
            at = stop if stop == len(ids) else self.control(stop)
        self.flush()
        return out

    def flush(self, role: str = "") -> None:
        """Ends the text before; the next one has this role."""
        if self.text or self.role:
            ids = np.concatenate([np.zeros(0, np.int64), *self.text]).astype(np.int32)
            self.out.segments.append(Text(ids=ids, role=self.role))
        self.text, self.role = [], role

    def control(self, at: int) -> int:
        """Reads what begins with a control id in text; where to go on."""
        g, out, token = self.g, self.out, int(self.ids[at])
        marks = g.marks
        if token in g.mark_ids:
            mark = g.mark_ids.index(token)
            after = int(marks.after[mark, out.open])
            if after < 0:
                raise self.fail(at)
            out.open = after
            self.flush(marks.roles[mark])
            return at + 1
        if token < 0 or marks.in_block[out.open] or token not in (g.boi, g.boa, g.eos):
            raise self.fail(at)
        self.flush()
        out.begun = at
        if token == g.boi:
            return self.medium(at + 1)
        if token == g.boa:
            return self.actions(at + 1)
        out.phase = ENDED
        padding = np.flatnonzero(self.ids[at + 1 :] != g.pad)
        if len(padding):
            raise self.fail(at + 1 + int(padding[0]))
        return len(self.ids)

    def actions(self, at: int) -> int:
        g, ids = self.g, self.ids
        ends = np.flatnonzero(ids[at:] == g.eoa)
        stop = at + int(ends[0]) if len(ends) else len(ids)
        codes = g.action_codes(ids[at:stop])
        wrong = np.flatnonzero(codes < 0)
        if len(wrong):
            raise self.fail(at + int(wrong[0]))
        if not len(ends):
            self.out.phase = IN_ACTIONS
            return stop
        self.out.segments.append(Action(codes=codes.astype(np.int32)))
        return stop + 1

    def medium(self, at: int) -> int:
        """Reads a picture from what follows BOI."""
        g, ids, out = self.g, self.ids, self.out
        if g.grid is not None:
            return self.codes(at, OPEN, *g.grid, clip=True)
        img = at
        while img < len(ids) and ids[img] in g.symbols:
            img += 1
        size = ids[at:img].tolist()
        if img == len(ids):
            out.phase, out.size = IN_SIZE, size
            return img
        sides = g.sides(size)
        if ids[img] != g.img or sides is None:
            raise self.fail(img)
        frames, H, W = sides
        return self.codes(img + 1, max(frames, 1), H, W, clip=frames > 0)

    def codes(self, at: int, frames: int, H: int, W: int, *, clip: bool) -> int:
        g, ids, out = self.g, self.ids, self.out
        C, layout = len(g.vocabulary.codebooks), g.layout
        frame = layout.frame(H, W, C)
        body = ids[at : at + frames * frame + 1] if frames != OPEN else ids[at : at + self._until_last(at)]
        taken = np.where(body == g.blank, C, 1)  # a blank id stands for a whole place
        slot = np.cumsum(taken) - taken
        if frames != OPEN:  # blanks make a picture shorter: EOI stands where its places are used up
            end = int(np.searchsorted(slot, frames * frame)) + 1
            body, taken, slot = body[:end], taken[:end], slot[:end]
        kind = layout.kind(np, slot, frames, H, W, C)
        fits = (body >= g.first[kind]) & (body < g.stop[kind])
        if frames == OPEN:
            closing = (body == g.last) & (kind == C + 1)
            fits |= closing
            if closing.any():
                end = int(np.argmax(closing))
                frames = int(slot[end]) // frame + 1
                fits[end + 1 :] = body[end + 1 :] == g.eoi
                slot[end + 1 :] = frames * frame
        if not fits.all():
            raise self.fail(at + int(np.argmin(fits)))
        out.spans.append((at, slot, H, W))
        done = bool(len(body)) and frames != OPEN and int(slot[-1]) == frames * frame
        if not done:
            place = int(slot[-1] + taken[-1]) if len(body) else 0
            out.phase, out.place, out.frames, out.H, out.W = IN_CODES, place, frames, H, W
            return at + len(body)
        codes = g.codes_of(body[:-1], slot[:-1], frames, H, W)
        out.segments.append(Video(codes=codes) if clip and frames > g.least_clip else Image(codes=codes[0]))
        return at + len(body)

    def _until_last(self, at: int) -> int:
        """Ids of an open clip, with what follows the id that ends its last frame."""
        ends = np.flatnonzero(self.ids[at:] == self.g.last)
        return int(ends[0]) + 2 if len(ends) else len(self.ids) - at
