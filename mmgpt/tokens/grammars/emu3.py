"""Emu3's layout: text, and media as `BOI size IMG rows EOF EOI` with a token after every row (arXiv 2409.18869).

    document  BOS segment* EOS
    image     BOI H*W IMG (row EOL) x H EOF EOI
    video     BOI T*H*W IMG ((row EOL) x H EOF) x T EOI

Sizes are in places of the code grid, written as text. A place is one id per codebook, in order; where the image
tokenizer knows blank places, a blank one is its first id alone. Emu3 itself is the case of one codebook and no blanks;
a video's size string is UniVLA's.
"""

import functools

import numpy as np

from mmgpt.core.document import KINDS, Document, Image, Segment, Text, Video
from mmgpt.core.stream import IMAGE, TEXT, VIDEO
from mmgpt.tokens.grammars.emu3_automaton import Emu3Automaton
from mmgpt.tokens.grammars.grammar import GrammarConfig, GrammarError, Tokens
from mmgpt.tokens.text import TextTokenizer
from mmgpt.tokens.vocabulary import Vocabulary

CONTROLS = ("BOS", "EOS", "PAD", "BOI", "EOI", "IMG", "EOL", "EOF")
MAX_SIDE = 99
"""Largest number in a size, in places: two digits."""


class Emu3:
    class Config(GrammarConfig):
        """Loss weights of text and vision (Emu3's pretraining: 1 and 0.5); layout tokens count as vision.

        With `blanks` a blank place is one id, where the image tokenizer knows blank places.
        """

        text_weight: float = 1.0
        vision_weight: float = 0.5
        blanks: bool = True

        def build(self, text: TextTokenizer, codebooks: tuple[int, ...], *, blanks: bool = False) -> "Emu3":
            return Emu3(self, text, codebooks, blanks and self.blanks)

    name = "emu3"
    overhead = 2

    def __init__(self, c: "Emu3.Config", text: TextTokenizer, codebooks: tuple[int, ...], blanks: bool):
        self.text = text
        self.vocabulary = Vocabulary(text=text.size, controls=CONTROLS, codebooks=codebooks)
        self.weights = (c.text_weight, c.vision_weight)
        control = self.vocabulary.control
        self.bos, self.eos, self.pad = control("BOS"), control("EOS"), control("PAD")
        self.boi, self.eoi, self.img = control("BOI"), control("EOI"), control("IMG")
        self.eol, self.eof = control("EOL"), control("EOF")
        self.digits = tuple(text.symbol(d) for d in "0123456789")
        self.star = text.symbol("*")
        self.blank = self.vocabulary.visual_start if blanks else -1

    def segment_lengths(self, kind: np.ndarray, shape: np.ndarray) -> np.ndarray:
        T, H, W, C, painted = (shape[:, i].astype(np.int64) for i in range(5))

        def digits(n: np.ndarray) -> np.ndarray:
            return 1 + (n >= 10)

        codes = painted * (C - 1) + T * H * W if self.blank >= 0 else T * H * W * C
        image = 4 + digits(H) + digits(W) + codes + T * H + T
        video = image + digits(T) + 1
        known = [kind == KINDS.index(k) for k in (Text, Image, Video)]
        if not np.all(known[0] | known[1] | known[2]):
            raise GrammarError(
                "the emu3 grammar lays out text, images and videos; the data holds another kind of segment."
            )
        return np.select(known, [shape[:, 0].astype(np.int64), image, video])

    def encode(self, document: Document, *, end: bool = True) -> Tokens:
        parts = [self._control(self.bos)]
        for segment in document.segments:
            parts.append(self._segment(segment, document.key))
        if end:
            last_loss = document.segments[-1].loss if document.segments else 1.0
            ids, modality, weight = self._control(self.eos)
            parts.append((ids, modality, weight * last_loss))
        ids, modality, weight = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        ids = ids.astype(np.int32)
        place = self.places(ids)
        return Tokens(ids=ids, place=place, modality=modality.astype(np.int32), weight=weight.astype(np.float32))

    def places(self, ids: np.ndarray) -> np.ndarray:
        place = np.zeros((len(ids), 2), np.int32)
        for img in np.flatnonzero(ids == self.img):
            boi = int(np.flatnonzero(ids[:img] == self.boi)[-1])
            sides = [int(side) for side in self.text_size(ids[boi + 1 : img].tolist()).split("*")]
            frames, H, W = sides if len(sides) == 3 else [1, *sides]
            grid = np.tile(_frame_places(H, W, len(self.vocabulary.codebooks)), (frames, 1))
            slot = self._slots(ids[img + 1 :])
            slot = slot[slot < len(grid)]
            place[img + 1 : img + 1 + len(slot)] = grid[slot]
        return place

    def _slots(self, ids: np.ndarray) -> np.ndarray:
        """Where each id of a medium stands when every place lists all its codes: a blank takes up a whole place."""
        taken = np.where(ids == self.blank, len(self.vocabulary.codebooks), 1)
        return np.cumsum(taken) - taken

    def open_image(self, height: int, width: int) -> np.ndarray:
        """Ids that open an image of this size in places: what follows is its first code."""
        return np.array([self.boi, *self._size(height, width), self.img], np.int32)

    def prompt(self, document: Document, *, task: str = "") -> np.ndarray:
        return self.encode(document, end=False).ids

    def negative(self, document: Document, *, task: str = "", text: str = "") -> np.ndarray:
        return np.array([self.bos, *self.text.encode(text)], np.int32)

    def open_video(self, codes_THWC: np.ndarray, frames: int) -> np.ndarray:
        """Ids of a video of `frames` frames of which the first T are given: a prompt to be continued."""
        T, H, W, _ = codes_THWC.shape
        if T:
            self._check(codes_THWC, "prompt")
        if not T <= frames <= MAX_SIDE:
            raise GrammarError(f"a clip of {frames} frames does not fit the grammar: it has {T} to {MAX_SIDE}.")
        header = [self.boi, *self._size(frames, H, W), self.img]
        return np.concatenate([np.array(header, np.int32), *[self._frame(codes_THWC[t]) for t in range(T)]]).astype(
            np.int32
        )

    def _control(self, token: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.array([token]), np.array([TEXT]), np.array([self.weights[0]])

    def _segment(self, segment: Segment, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if isinstance(segment, Text) and segment.ids is not None:
            ids = np.asarray(segment.ids, np.int32)
            if ids.size and (ids.min() < 0 or ids.max() >= self.vocabulary.text):
                raise GrammarError(
                    f"document {key!r}: a text id is outside the text tokenizer's {self.vocabulary.text}."
                )
            modality, weight = TEXT, self.weights[0]
        elif isinstance(segment, Image) and segment.codes is not None:
            codes = np.asarray(segment.codes)
            H, W = self._check(codes[None], key)
            ids = np.concatenate([[self.boi], self._size(H, W), [self.img], self._frame(codes), [self.eoi]])
            modality, weight = IMAGE, self.weights[1]
        elif isinstance(segment, Video) and segment.codes is not None:
            codes = np.asarray(segment.codes)
            self._check(codes, key)
            ids = np.concatenate([self.open_video(codes, codes.shape[0]), [self.eoi]])
            modality, weight = VIDEO, self.weights[1]
        else:
            raise GrammarError(
                f"document {key!r}: the emu3 grammar lays out tokenised text, images and videos, "
                f"found a {type(segment).__name__} that is raw or of another kind; run `mmgpt tokenize` first."
            )
        return ids, np.full(ids.size, modality), np.full(ids.size, weight * segment.loss)

    def _check(self, codes: np.ndarray, key: str) -> tuple[int, int]:
        T, H, W, C = codes.shape
        books = self.vocabulary.codebooks
        if C != len(books) or min(T, H, W) < 1 or max(T, H, W) > MAX_SIDE:
            raise GrammarError(
                f"document {key!r}: a code grid of {T}x{H}x{W} places with {C} codes each does not fit the grammar's "
                f"{len(books)} codebooks and sides up to {MAX_SIDE}; sides are at least 1."
            )
        if codes.min() < 0 or any(codes[..., c].max() >= books[c] for c in range(C)):
            raise GrammarError(f"document {key!r}: a code is outside its codebook of {books}; tokenise again.")
        if self.blank >= 0 and codes[codes[..., 0] == 0].any():
            raise GrammarError(f"document {key!r}: a blank place (first code 0) has other codes; tokenise again.")
        return H, W

    def _size(self, *sides: int) -> list[int]:
        ids: list[int] = []
        for i, side in enumerate(sides):
            ids += [self.star] * (i > 0) + [self.digits[int(d)] for d in str(side)]
        return ids

    def _frame(self, codes_HWC: np.ndarray) -> np.ndarray:
        H = codes_HWC.shape[0]
        ids = codes_HWC + np.array(self.vocabulary.codebook_starts)
        if self.blank >= 0:
            ids[..., 1:][codes_HWC[..., 0] == 0] = -1
        frame = np.append(np.concatenate([ids.reshape(H, -1), np.full((H, 1), self.eol)], axis=1), self.eof)
        return frame[frame >= 0]

    def parse(self, ids: np.ndarray) -> Document:
        machine = self.automaton()
        machine.start(np.asarray(ids))  # raises with the position of the first id that does not fit
        segments: list[Segment] = []
        text: list[int] = []
        values, at = [int(i) for i in ids], 1
        while at < len(values) and values[at] != self.eos:
            if values[at] != self.boi:
                text.append(values[at])
                at += 1
                continue
            if text:
                segments.append(Text(ids=np.array(text, np.int32)))
                text = []
            end = values.index(self.eoi, at) if self.eoi in values[at:] else None
            if end is None:
                raise GrammarError(f"the medium that opens at position {at} does not end.")
            segments.append(self._parse_medium(values[at + 1 : end]))
            at = end + 1
        if text:
            segments.append(Text(ids=np.array(text, np.int32)))
        return Document(key="", segments=tuple(segments))

    def _parse_medium(self, ids: list[int]) -> Segment:
        img = ids.index(self.img)
        sides = [int(part) for part in self.text_size(ids[:img]).split("*")]
        T, H, W = sides if len(sides) == 3 else [1, *sides]
        C = len(self.vocabulary.codebooks)
        body = np.array(ids[img + 1 :], np.int32)
        frames = np.zeros((T, H * (W * C + 1) + 1), np.int32)
        frames.ravel()[self._slots(body)] = body
        places = frames[:, :-1].reshape(T, H, -1)[..., :-1].reshape(T, H, W, C)
        codes = np.maximum(places - np.array(self.vocabulary.codebook_starts, np.int32), 0)
        return Video(codes=codes) if len(sides) == 3 else Image(codes=codes[0])

    def text_size(self, ids: list[int]) -> str:
        """The characters of a size's ids."""
        symbols = {self.star: "*"} | {d: str(i) for i, d in enumerate(self.digits)}
        return "".join(symbols[i] for i in ids)

    def automaton(self, sizes: tuple[tuple[int, int, int], ...] = ()) -> "Emu3Automaton":
        return Emu3Automaton(self, sizes)


@functools.lru_cache(maxsize=1024)
def _frame_places(H: int, W: int, C: int) -> np.ndarray:
    """Row and column of each slot of a frame, `[H * (W * C + 1) + 1, 2]`: a row's end is a column of its own."""
    column = np.append(np.repeat(np.arange(1, W + 1), C), W + 1)
    grid = np.stack([np.repeat(np.arange(1, H + 1), W * C + 1), np.tile(column, H)], axis=1)
    return np.append(grid, [[H + 1, 1]], axis=0).astype(np.int32)
