"""Documents whose pictures are rows of codes: what the grammars of Emu3's kind share, each adding its own layout.

    document  BOS segment* EOS
    picture   BOI [size IMG] codes with ends of rows and frames EOI

Sizes are in places of the code grid, written as text. A place is one id per codebook, in order; where the image
tokenizer knows blank places, a blank one is its first id alone. Roles lay nothing out: words of a chat are text
segments of the data, or come from `prompt`.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from mmgpt.core.document import KINDS, MARKS, Action, Document, Image, Segment, Text, Video
from mmgpt.core.stream import ACTION, IMAGE, TEXT, VIDEO
from mmgpt.tokens.grammars.grammar import PRETRAINING, GrammarConfig, GrammarError, Tokens, Weights
from mmgpt.tokens.grammars.id_space import id_space
from mmgpt.tokens.grammars.laid import Around, Laid, frame, joined, template
from mmgpt.tokens.grammars.layout import Layout
from mmgpt.tokens.grammars.marks import Marks
from mmgpt.tokens.grammars.raster_automaton import RasterAutomaton, Size
from mmgpt.tokens.grammars.reading import IN_ACTIONS, IN_CODES, IN_SIZE, read
from mmgpt.tokens.grammars.templates import SPEAKERS, Part, Template, filled
from mmgpt.tokens.text import TextTokenizer

MAX_SIDE = 999
"""Largest number in a size: three digits. Emu3 draws up to 1024 x 1024 pixels, 128 places a side of a square."""


class RasterConfig(GrammarConfig):
    """Loss weights. With `blanks` a blank place is one id, where the image tokenizer knows blank places."""

    weights: Weights = PRETRAINING
    blanks: bool = True


class Raster:
    """A grammar whose layout, controls and words are class attributes of its subclass.

    `tokens` names each control and the special that it is in the published text tokenizer, and `codes` how many visual
    codes were published (see `id_space`). `grid` is the one size of all frames, for a layout without size strings.
    """

    name: ClassVar[str]
    layout: ClassVar[Layout]
    tokens: ClassVar[Mapping[str, str]]
    codes: ClassVar[int]
    template: ClassVar[Template]
    marks: ClassVar[Marks] = Marks({})
    overhead = 2

    def __init__(
        self,
        config: RasterConfig,
        text: TextTokenizer,
        codebooks: tuple[int, ...],
        blanks: bool,
        *,
        actions: int = 0,
        grid: tuple[int, int] | None = None,
    ):
        self.text, self.weights, self.grid = text, config.weights, grid
        self.vocabulary = id_space(self.name, text, self.tokens, codebooks, codes=self.codes, actions=actions)
        control = self.vocabulary.controls
        self.published = any(token in text.specials for token in self.tokens.values())
        self.bos, self.eos, self.pad = control["BOS"], control["EOS"], control["PAD"]
        self.boi, self.eoi = control["BOI"], control["EOI"]
        # Controls that this grammar does without are -1, which no id is.
        self.img, self.eol, self.eof = (control.get(name, -1) for name in ("IMG", "EOL", "EOF"))
        self.boa, self.eoa, self.last = (control.get(name, -1) for name in ("BOA", "EOA", "EOV"))
        self.mark_ids = [control[name] for name in self.marks.controls.values()]
        self.reserved = np.array(sorted({*text.specials.values(), *control.values()}), np.int64)
        self._text_ids = np.ones(self.vocabulary.text, bool)
        self._text_ids[self.reserved[self.reserved < self.vocabulary.text]] = False
        self.digits = () if grid else tuple(text.symbol(d) for d in "0123456789")
        self.star = -1 if grid else text.symbol("*")
        self.symbols = (*self.digits, self.star)
        self.blank = self.vocabulary.visual_start if blanks and config.blanks else -1
        starts, ends = self.vocabulary.codebook_starts, (self.eol, self.eof, self.eoi)
        self.first = np.array([*starts, *ends], np.int64)
        """First id of each kind of slot (see `Layout.kind`); `stop` is one more than its last."""
        sizes = [*codebooks, 1, 1, 1]
        self.stop = self.first + np.array(sizes, np.int64)
        self.least_clip = 0 if self.layout.size == "sides" else 1
        """Frames that a picture must have more of to be a clip, where it is laid out with a number of frames."""
        self._automata: dict[tuple[Size, ...], RasterAutomaton] = {}

    # Lengths and ids.

    def segment_lengths(self, kind: np.ndarray, shape: np.ndarray) -> np.ndarray:
        T, H, W, C, painted = (shape[:, i].astype(np.int64) for i in range(5))
        lays = self.layout
        codes = painted * (C - 1) + T * H * W if self.blank >= 0 else T * H * W * C
        rows = {"each": H, "between": H - 1, "never": 0 * H}[lays.eol]
        body = codes + T * (rows + lays.eof)
        image = body + self._head(T, H, W, clip=False) + 1
        clip = body + self._head(T, H, W, clip=True) + 1
        if not lays.clips:
            clip = body + T * (self._head(T, H, W, clip=False) + 1)
        marked = np.isin(shape[:, 1], [1 + MARKS.index(role) for role in self.marks.roles])
        text = shape[:, 0].astype(np.int64) + marked
        known = {Text: text, Image: image, Video: clip} | ({Action: shape[:, 0] + 2} if self.boa >= 0 else {})
        which = [kind == KINDS.index(k) for k in known]
        if not np.logical_or.reduce(which).all():
            what = ", ".join(k.__name__.lower() for k in known)
            raise GrammarError(f"the {self.name} grammar lays out {what}; the data holds another kind of segment.")
        return np.select(which, list(known.values())).astype(np.int64)

    def _head(self, T: np.ndarray, H: np.ndarray, W: np.ndarray, *, clip: bool) -> np.ndarray:
        """Ids before the codes of a picture."""

        def digits(n: np.ndarray) -> np.ndarray:
            return 1 + (n >= 10) + (n >= 100)

        if self.grid:
            return 1 + 0 * T
        sides = 3 + digits(H) + digits(W)  # BOI, *, IMG
        return sides + digits(T) + 1 if clip or self.layout.size == "frames" else sides

    def encode(self, document: Document, *, end: bool = True) -> Tokens:
        parts = [self._control(self.bos)]
        open_marks = 0
        for segment in document.segments:
            if isinstance(segment, Text) and segment.role in self.marks.controls:
                open_marks = int(self.marks.after[self.marks.roles.index(segment.role), open_marks])
            elif not isinstance(segment, Text) and self.marks.in_block[open_marks]:
                open_marks = -1
            if open_marks < 0:
                raise GrammarError(
                    f"document {document.key!r}: a {type(segment).__name__} of role {segment.role!r} may not stand "
                    "here: end the block that is open, and begin it before its end."
                )
            parts += self._segment(segment, document.key)
        if end and self.marks.in_block[open_marks]:
            raise GrammarError(f"document {document.key!r}: a block is still open at its end; mark where it ends.")
        if end:
            last = document.segments[-1] if document.segments else Text()
            parts.append(self._control(self.eos, last))
        return joined(parts)

    def places(self, ids: np.ndarray) -> np.ndarray:
        place = np.zeros((len(ids), 2), np.int32)
        C = len(self.vocabulary.codebooks)
        for first, slot, H, W in read(self, ids).spans:
            inside = slot[np.asarray(ids[first : first + len(slot)]) != self.eoi]
            place[first : first + len(inside)] = self.layout.place(np, inside, H, W, C)
        return place

    def _control(self, token: int, segment: Segment | None = None) -> Laid:
        weight = self.weights.text * (1.0 if segment is None else self._loss(segment))
        return Laid(np.array([token], np.int32), None, TEXT, weight)

    def _loss(self, segment: Segment) -> float:
        return segment.loss * (self.weights.prompt if segment.role == "user" else 1.0)

    def _segment(self, segment: Segment, key: str) -> list[Laid]:
        loss = self._loss(segment)
        if isinstance(segment, Text) and segment.ids is not None:
            ids = self._text(np.asarray(segment.ids, np.int32), key)
            if segment.role in self.marks.controls:
                mark = self.vocabulary.control(self.marks.controls[segment.role])
                ids = np.concatenate([np.array([mark], np.int32), ids])
            return [Laid(ids, None, TEXT, self.weights.text * loss)]
        if isinstance(segment, Action) and segment.codes is not None and self.boa >= 0:
            codes = np.asarray(segment.codes)
            if codes.size and (codes.min() < 0 or codes.max() >= self.vocabulary.actions):
                raise GrammarError(
                    f"document {key!r}: an action code is outside the {self.vocabulary.actions} of the grammar."
                )
            ids = np.array([self.boa, *np.asarray(self.vocabulary.action_ids)[codes], self.eoa], np.int32)
            return [Laid(ids, None, ACTION, self.weights.actions * loss)]
        if isinstance(segment, Image | Video) and segment.codes is not None:
            return self._medium(segment, np.asarray(segment.codes), key, loss)
        raise GrammarError(
            f"document {key!r}: the {self.name} grammar lays out tokenised text and pictures"
            f"{' and action codes' if self.boa >= 0 else ''}, found a {type(segment).__name__} that is raw or of "
            "another kind; run `mmgpt tokenize` first."
        )

    def _text(self, ids: np.ndarray, key: str) -> np.ndarray:
        if len(ids) and (ids.min() < 0 or ids.max() >= self.vocabulary.text or not self._text_ids[ids].all()):
            raise GrammarError(
                f"document {key!r}: a text id is outside the text tokenizer's {self.vocabulary.text}, or a control id."
            )
        return ids

    def _medium(self, segment: Image | Video, codes: np.ndarray, key: str, loss: float) -> list[Laid]:
        """A picture with its places and weights; a clip as its frames where the layout knows no clips."""
        clip = isinstance(segment, Video)
        modality = VIDEO if clip else IMAGE
        grids = list(codes[:, None]) if clip and not self.layout.clips else [codes if clip else codes[None]]
        parts: list[Laid] = []
        for grid in grids:
            self._check(grid, key)
            head = self._header(len(grid), *grid.shape[1:3], clip=clip)
            ids, place, weight = self._grid(grid, head, (self.eoi,))
            parts.append(Laid(ids, place, modality, weight if loss == 1.0 else weight * np.float32(loss)))
        return parts

    def _check(self, codes: np.ndarray, key: str) -> None:
        T, H, W, C = codes.shape
        books = self.vocabulary.codebooks
        if C != len(books) or min(T, H, W) < 1 or max(T, H, W) > MAX_SIDE:
            raise GrammarError(
                f"document {key!r}: a code grid of {T}x{H}x{W} places with {C} codes each does not fit the grammar's "
                f"{len(books)} codebooks and sides up to {MAX_SIDE}; sides are at least 1."
            )
        self._check_grid(H, W, f"document {key!r}: ")
        if codes.min() < 0 or any(codes[..., c].max() >= books[c] for c in range(C)):
            raise GrammarError(f"document {key!r}: a code is outside its codebook of {books}; tokenise again.")
        if self.blank >= 0 and codes[codes[..., 0] == 0].any():
            raise GrammarError(f"document {key!r}: a blank place (first code 0) has other codes; tokenise again.")

    def _check_grid(self, H: int, W: int, where: str = "") -> None:
        if self.grid and self.grid != (H, W):
            raise GrammarError(
                f"{where}the {self.name} grammar lays out frames of {self.grid[0]}x{self.grid[1]} places, found "
                f"{H}x{W}; bring pictures to one size, or set the grammar's height and width."
            )

    def _header(self, T: int, H: int, W: int, *, clip: bool) -> tuple[int, ...]:
        if self.grid:
            return (self.boi,)
        sides = (T, H, W) if self.layout.size == "frames" or (clip and self.layout.clips) else (H, W)
        return self.boi, *self._size(*sides), self.img

    def _size(self, *sides: int) -> list[int]:
        ids: list[int] = []
        for i, side in enumerate(sides):
            ids += [self.star] * (i > 0) + [self.digits[int(d)] for d in str(side)]
        return ids

    def _grid(
        self, codes_THWC: np.ndarray, head: tuple[int, ...], tail: tuple[int, ...], *, whole: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, places and weights of frames with what stands around them.

        With `whole` the frames are all that the clip has.
        """
        last = self.last if self.grid and whole else -1
        around = Around(tuple(self.first.tolist()), head, tail, last, self.weights.vision, self.weights.layout)
        ids, place, weight, visual = template(self.layout, around, *codes_THWC.shape)
        ids, codes = ids.copy(), codes_THWC + np.array(self.vocabulary.codebook_starts, np.int32)
        if self.blank >= 0:
            codes[..., 1:][codes_THWC[..., 0] == 0] = -1
        ids[visual] = codes.ravel()
        if self.blank < 0 or codes_THWC.shape[-1] == 1:
            return ids, place, weight
        kept = ids >= 0
        return ids[kept], place[kept], weight[kept]

    # Prompts.

    def open_image(self, height: int, width: int) -> np.ndarray:
        if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
            raise GrammarError(f"an image of {height}x{width} places does not fit: sides go from 1 to {MAX_SIDE}.")
        self._check_grid(height, width)
        return np.array(self._header(1, height, width, clip=False), np.int32)

    def open_video(self, codes_THWC: np.ndarray, frames: int) -> np.ndarray:
        T, H, W, _ = codes_THWC.shape
        if T:
            self._check(codes_THWC, "prompt")
        if not max(T, 1) <= frames <= MAX_SIDE:
            raise GrammarError(f"a clip of {frames} frames does not fit the grammar: it has {max(T, 1)} to {MAX_SIDE}.")
        if not self.layout.clips:
            given = [part.ids for grid in codes_THWC for part in self._medium(Image(), grid, "prompt", 1.0)]
            return np.concatenate([*given, *([self.open_image(H, W)] if T < frames else [])]).astype(np.int32)
        self._check_grid(H, W)
        head = self._header(frames, H, W, clip=True)
        return self._grid(codes_THWC, head, (), whole=T == frames)[0] if T else np.array(head, np.int32)

    def prompt(self, document: Document, *, task: str = "") -> np.ndarray:
        """See `Grammar.prompt`. Models over a tokenizer of their own have read no template: their layout is plain."""
        if not self.published or not any(segment.role in SPEAKERS for segment in document.segments):
            return self.encode(document, end=False).ids
        return self._lay(filled(self.template, document, task))

    def negative(self, document: Document, *, task: str = "", text: str = "") -> np.ndarray:
        return self._lay([text])

    def _lay(self, parts: list[Part]) -> np.ndarray:
        """Ids of words and segments after BOS; words next to each other are tokenised as one text."""
        found: list[np.ndarray] = [np.array([self.bos])]
        words = ""
        for part in [*parts, None]:
            if isinstance(part, str):
                words += part
                continue
            marked = isinstance(part, Text) and part.role in self.marks.controls
            if (part is None or marked or not isinstance(part, Text)) and words:
                found.append(self._text(np.array(self.text.encode(words), np.int32), "prompt"))
                words = ""
            if isinstance(part, Text):
                if marked:
                    found.append(np.array([self.vocabulary.control(self.marks.controls[part.role])]))
                words += part.text if part.text is not None else self.text.decode([] if part.ids is None else part.ids)
            elif part is not None:
                found += [laid.ids for laid in self._segment(part, "prompt")]
        return np.concatenate(found).astype(np.int32)

    # Back from ids.

    def is_text(self, ids: np.ndarray) -> np.ndarray:
        """Which ids are text: those that the text tokenizer gives."""
        inside = (ids >= 0) & (ids < self.vocabulary.text)
        return inside & self._text_ids[np.where(inside, ids, 0)]

    def action_codes(self, ids: np.ndarray) -> np.ndarray:
        """Action codes of ids; -1 for an id that is none."""
        known = self.vocabulary.action_ids
        codes = (ids - known.start) * known.step
        return np.where((codes >= 0) & (codes < len(known)), codes, -1)

    def sides(self, size: list[int]) -> tuple[int, int, int] | None:
        """Frames (0 where a size names none), height and width of a size's ids; None where it is no size."""
        return self.sides_of(self.text_size(size))

    def sides_of(self, size: str) -> tuple[int, int, int] | None:
        """See `sides`."""
        parts = size.split("*")
        if not all(p and p[0] != "0" and len(p) <= len(str(MAX_SIDE)) for p in parts):
            return None
        numbers = [int(p) for p in parts]
        if len(numbers) == 3 and self.layout.clips:
            return numbers[0], numbers[1], numbers[2]
        return (0, numbers[0], numbers[1]) if len(numbers) == 2 and self.layout.size == "sides" else None

    def text_size(self, ids: list[int]) -> str:
        """The characters of a size's ids."""
        symbols = {self.star: "*"} | {d: str(i) for i, d in enumerate(self.digits)}
        return "".join(symbols[int(i)] for i in ids)

    def codes_of(self, ids: np.ndarray, slot: np.ndarray, frames: int, H: int, W: int) -> np.ndarray:
        """Code grid `[T, H, W, C]` of a whole picture's ids and their slots."""
        C = len(self.vocabulary.codebooks)
        kind, _ = frame(self.layout, H, W, C)
        filled_slots = np.zeros((frames, len(kind)), np.int64)
        filled_slots.ravel()[slot] = ids
        places = filled_slots[:, kind < C].reshape(frames, H, W, C)
        return np.maximum(places - np.array(self.vocabulary.codebook_starts), 0).astype(np.int32)

    def parse(self, ids: np.ndarray) -> Document:
        found = read(self, ids)
        if found.phase in (IN_SIZE, IN_CODES, IN_ACTIONS):
            raise GrammarError(f"the medium that opens at position {found.begun} does not end.")
        return Document(key="", segments=tuple(found.segments))

    def automaton(self, sizes: tuple[Size, ...] = ()) -> RasterAutomaton:
        if sizes not in self._automata:
            self._automata[sizes] = RasterAutomaton(self, sizes)
        return self._automata[sizes]
