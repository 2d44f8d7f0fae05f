"""Emu3's layout: text, and media as `BOI size IMG rows EOF EOI` with a token after every row (arXiv 2409.18869).

    document  BOS segment* EOS
    image     BOI H*W IMG (row EOL) x H EOF EOI
    video     BOI T*H*W IMG ((row EOL) x H EOF) x T EOI

Sizes are in places of the code grid, written as text. A place is one id per codebook, in order. Emu3 itself is the
case of one codebook; a video's size string is UniVLA's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.core.document import KINDS, Document, Image, Segment, Text, Video
from mmgpt.core.stream import IMAGE, TEXT, VIDEO
from mmgpt.tokens.grammars.grammar import GrammarConfig, GrammarError, Tokens
from mmgpt.tokens.text import TextTokenizer
from mmgpt.tokens.vocabulary import Vocabulary

CONTROLS = ("BOS", "EOS", "PAD", "BOI", "EOI", "IMG", "EOL", "EOF")
MAX_SIDE = 99
"""Largest number in a size, in places: two digits."""


class Emu3:
    class Config(GrammarConfig):
        """Loss weights of text and vision (Emu3's pretraining: 1 and 0.5); layout tokens count as vision."""

        text_weight: float = 1.0
        vision_weight: float = 0.5

        def build(self, text: TextTokenizer, codebooks: tuple[int, ...]) -> "Emu3":
            return Emu3(self, text, codebooks)

    overhead = 2

    def __init__(self, c: "Emu3.Config", text: TextTokenizer, codebooks: tuple[int, ...]):
        self.text = text
        self.vocabulary = Vocabulary(text=text.size, controls=CONTROLS, codebooks=codebooks)
        self.weights = (c.text_weight, c.vision_weight)
        control = self.vocabulary.control
        self.bos, self.eos, self.pad = control("BOS"), control("EOS"), control("PAD")
        self.boi, self.eoi, self.img = control("BOI"), control("EOI"), control("IMG")
        self.eol, self.eof = control("EOL"), control("EOF")
        self.digits = tuple(text.symbol(d) for d in "0123456789")
        self.star = text.symbol("*")

    def segment_lengths(self, kind: np.ndarray, shape: np.ndarray) -> np.ndarray:
        T, H, W, C = (shape[:, i].astype(np.int64) for i in range(4))

        def digits(n: np.ndarray) -> np.ndarray:
            return 1 + (n >= 10)

        rows = T * H * (W * C + 1) + T
        image = 4 + digits(H) + digits(W) + rows
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
            room = place[img + 1 : img + 1 + len(grid)]
            room[:] = grid[: len(room)]
        return place

    def open_video(self, codes_THWC: np.ndarray, frames: int) -> np.ndarray:
        """Ids of a video of `frames` frames of which the first T are given: a prompt to be continued."""
        T, H, W, _ = codes_THWC.shape
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
        return H, W

    def _size(self, *sides: int) -> list[int]:
        ids: list[int] = []
        for i, side in enumerate(sides):
            ids += [self.star] * (i > 0) + [self.digits[int(d)] for d in str(side)]
        return ids

    def _frame(self, codes_HWC: np.ndarray) -> np.ndarray:
        H = codes_HWC.shape[0]
        ids = (codes_HWC + np.array(self.vocabulary.codebook_starts)).reshape(H, -1)
        return np.append(np.concatenate([ids, np.full((H, 1), self.eol)], axis=1).ravel(), self.eof)

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
        body = np.array([i for i in ids[img + 1 :] if i not in (self.eol, self.eof)], np.int32)
        codes = body.reshape(T, H, W, C) - np.array(self.vocabulary.codebook_starts, np.int32)
        return Video(codes=codes) if len(sides) == 3 else Image(codes=codes[0])

    def text_size(self, ids: list[int]) -> str:
        """The characters of a size's ids."""
        symbols = {self.star: "*"} | {d: str(i) for i, d in enumerate(self.digits)}
        return "".join(symbols[i] for i in ids)

    def automaton(self, sizes: tuple[tuple[int, int, int], ...] = ()) -> "Emu3Automaton":
        return Emu3Automaton(self, sizes)


@functools.lru_cache(maxsize=1024)
def _frame_places(H: int, W: int, C: int) -> np.ndarray:
    """Row and column of each id of a frame, `[H * (W * C + 1) + 1, 2]`: a row's end is a column of its own."""
    column = np.append(np.repeat(np.arange(1, W + 1), C), W + 1)
    grid = np.stack([np.repeat(np.arange(1, H + 1), W * C + 1), np.tile(column, H)], axis=1)
    return np.append(grid, [[H + 1, 1]], axis=0).astype(np.int32)


# Fields of an automaton state.
PHASE, PLACE, T, H, W, SLOT = range(6)
# Phases.
IN_TEXT, IN_SIZE, IN_CODES, ENDED, BEFORE = range(5)


class Emu3Automaton:
    """States `[B, 6] int32`: phase, place in the medium, T, H, W, and progress in the size string.

    The sizes that may be opened form a trie of size strings, walked by tables; T is 0 for an image.
    """

    def __init__(self, grammar: Emu3, sizes: tuple[tuple[int, int, int], ...]):
        self.grammar = grammar
        self.pad = grammar.pad
        g, used = grammar, grammar.vocabulary.used
        visual = np.zeros((len(g.vocabulary.codebooks), used), bool)
        for c, (first, size) in enumerate(zip(g.vocabulary.codebook_starts, g.vocabulary.codebooks, strict=True)):
            visual[c, first : first + size] = True
        self._visual = visual
        text = np.zeros(used, bool)
        text[: g.vocabulary.text] = True
        self._text = text
        self._sizes = ", ".join("*".join(str(n) for n in (size if size[0] else size[1:])) for size in sizes)
        self._build_trie(sizes)

    def _build_trie(self, sizes: tuple[tuple[int, int, int], ...]) -> None:
        """Node tables over the size strings: next node by symbol (0-9, *), and the size a node completes."""
        symbols = 11
        children: list[list[int]] = [[0] * symbols]
        done: list[tuple[int, int, int] | None] = [None]
        for size in sizes:
            node = 0
            numbers = size[1:] if size[0] == 0 else size
            for character in "*".join(str(n) for n in numbers):
                symbol = 10 if character == "*" else int(character)
                if children[node][symbol] == 0:
                    children.append([0] * symbols)
                    done.append(None)
                    children[node][symbol] = len(children) - 1
                node = children[node][symbol]
            done[node] = size
        self._children = np.array(children, np.int32)
        self._done = np.array([d or (-1, 0, 0) for d in done], np.int32)
        self._symbol_ids = np.array([*self.grammar.digits, self.grammar.star], np.int32)
        self._need, self._shortest = self._needs()

    def _needs(self) -> tuple[np.ndarray, int]:
        """Room for each symbol (0-9, *, IMG) at each node, so that medium and EOS fit; and for the shortest medium."""
        never = 1 << 30
        lengths = [never if d[0] < 0 else self._medium_length((int(d[0]), int(d[1]), int(d[2]))) for d in self._done]
        need = np.full((len(lengths), 12), never, np.int32)
        least = [never] * len(lengths)  # of the media whose sizes go through a node

        def walk(node: int, depth: int) -> None:
            least[node] = lengths[node]
            need[node, 11] = min(never, lengths[node] - depth)
            for symbol in np.flatnonzero(self._children[node]):
                child = int(self._children[node, symbol])
                walk(child, depth + 1)
                need[node, symbol] = least[child] - depth
                least[node] = min(least[node], least[child])

        walk(0, 0)
        return need, least[0]

    def _medium_length(self, size: tuple[int, int, int]) -> int:
        C = len(self.grammar.vocabulary.codebooks)
        kind = KINDS.index(Image if size[0] == 0 else Video)
        shape = np.array([[max(size[0], 1), size[1], size[2], C]])
        return int(self.grammar.segment_lengths(np.array([kind]), shape)[0])

    # Host side: any size is legal in a prompt or a parsed document.

    def start(self, ids: np.ndarray) -> np.ndarray:
        g = self.grammar
        state = [BEFORE, 0, 0, 0, 0, 0]
        size: list[int] = []
        for position, token in enumerate(int(i) for i in ids):
            phase = state[PHASE]
            fits = False
            if phase == BEFORE:
                fits = token == g.bos
                state = [IN_TEXT, 0, 0, 0, 0, 0]
            elif phase == IN_TEXT:
                fits = 0 <= token < g.vocabulary.text or token in (g.boi, g.eos)
                if token == g.boi:
                    state, size = [IN_SIZE, 0, 0, 0, 0, 0], []
                elif token == g.eos:
                    state = [ENDED, 0, 0, 0, 0, 0]
            elif phase == IN_SIZE:
                if token == g.img:
                    sides = self._sides(size)
                    fits = sides is not None
                    state = [IN_CODES, 0, *(sides or (0, 1, 1)), 0]
                else:
                    fits = token in self._symbol_ids
                    size.append(token)
                    state[SLOT] = self._walk(state[SLOT], token) if fits else -1
            elif phase == IN_CODES:
                column = self._expected(state)
                known = 0 <= token < g.vocabulary.used
                fits = known and (bool(self._visual[column, token]) if column >= 0 else token == -column)
                state = self._after_code(state)
            elif phase == ENDED:
                fits = token == g.pad
            if not fits:
                raise GrammarError(f"position {position}: id {token} may not stand here; the ids before it parse.")
        if state[PHASE] == IN_SIZE and state[SLOT] < 0 and len(self._done) > 1:
            raise GrammarError(
                f"position {len(ids) - 1}: the size {g.text_size(size)!r} begins none that may open: {self._sizes}."
            )
        return np.array(state, np.int32)

    def _walk(self, node: int, token: int) -> int:
        """The trie's node after one more symbol; -1 where no size goes on like this."""
        child = int(self._children[node, np.flatnonzero(self._symbol_ids == token)[0]]) if node >= 0 else 0
        return child or -1

    def _sides(self, size: list[int]) -> tuple[int, int, int] | None:
        parts = self.grammar.text_size(size).split("*")
        if len(parts) not in (2, 3) or not all(p and p[0] != "0" and len(p) <= 2 for p in parts):
            return None
        numbers = [int(p) for p in parts]
        return (numbers[0], numbers[1], numbers[2]) if len(numbers) == 3 else (0, numbers[0], numbers[1])

    def _expected(self, state: list[int]) -> int:
        """The codebook of the next id, or minus the control id that must come."""
        g, C = self.grammar, len(self.grammar.vocabulary.codebooks)
        row, frame = state[W] * C + 1, state[H] * (state[W] * C + 1) + 1
        if state[PLACE] == frame * max(state[T], 1):
            return -g.eoi
        inside = state[PLACE] % frame
        if inside == frame - 1:
            return -g.eof
        return -g.eol if inside % row == row - 1 else (inside % row) % C

    def _after_code(self, state: list[int]) -> list[int]:
        if self._expected(state) == -self.grammar.eoi:
            return [IN_TEXT, 0, 0, 0, 0, 0]
        return [state[PHASE], state[PLACE] + 1, *state[T:]]

    # Device side.

    @functools.cached_property
    def _next_tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Allowed ids by row: codebooks first, then EOL, EOF, EOI, text, PAD; and the ids of size symbols and IMG."""
        g, used = self.grammar, self.grammar.vocabulary.used
        C = len(g.vocabulary.codebooks)
        classes = np.zeros((C + 5, used), bool)
        classes[:C] = self._visual
        for row, token in enumerate((g.eol, g.eof, g.eoi)):
            classes[C + row, token] = True
        classes[C + 3] = self._text
        classes[C + 4, g.pad] = True
        return classes, np.append(self._symbol_ids, g.img)

    def allowed(self, state_BK: jax.Array, room_B: jax.Array) -> jax.Array:
        g, C = self.grammar, len(self.grammar.vocabulary.codebooks)
        classes, symbols = (jnp.asarray(table) for table in self._next_tables)
        kind = jnp.where(state_BK[:, PHASE] == IN_TEXT, C + 3, self._device_class(state_BK))
        kind = jnp.where(state_BK[:, PHASE] == ENDED, C + 4, kind)
        fits = jnp.asarray(self._need)[state_BK[:, SLOT]] <= room_B[:, None]
        in_size = jnp.zeros_like(classes[kind]).at[:, symbols].set(fits)
        mask = jnp.where((state_BK[:, PHASE] == IN_SIZE)[:, None], in_size, classes[kind])
        in_text = (state_BK[:, PHASE] == IN_TEXT)[:, None]
        column = jnp.arange(g.vocabulary.used)[None, :]
        # A medium must fit together with EOS; the last token of a document is EOS.
        mask = jnp.where(in_text & (column == g.boi), (room_B > self._shortest)[:, None], mask)
        mask = mask | (in_text & (column == g.eos))
        return jnp.where(in_text & (room_B <= 1)[:, None], column == g.eos, mask)

    def _device_class(self, state_BK: jax.Array) -> jax.Array:
        C = len(self.grammar.vocabulary.codebooks)
        place, width = state_BK[:, PLACE], state_BK[:, W] * C + 1
        frame = state_BK[:, H] * width + 1
        inside = place % frame
        column = inside % width
        kind = jnp.where(column == width - 1, C, column % C)
        kind = jnp.where(inside == frame - 1, C + 1, kind)
        return jnp.where(place == frame * jnp.maximum(state_BK[:, T], 1), C + 2, kind)

    def advance(self, state_BK: jax.Array, id_B: jax.Array) -> jax.Array:
        g, C = self.grammar, len(self.grammar.vocabulary.codebooks)
        zero = jnp.zeros_like(state_BK)
        in_text = zero.at[:, PHASE].set(IN_TEXT)
        phase = state_BK[:, PHASE][:, None]
        token = id_B[:, None]
        from_text = jnp.where(token == g.boi, zero.at[:, PHASE].set(IN_SIZE), in_text)
        from_text = jnp.where(token == g.eos, zero.at[:, PHASE].set(ENDED), from_text)
        symbol = jnp.argmax(id_B[:, None] == jnp.asarray(self._symbol_ids)[None, :], axis=1)
        child = jnp.asarray(self._children)[state_BK[:, SLOT], symbol]
        size = jnp.asarray(self._done)[state_BK[:, SLOT]]
        opened = zero.at[:, PHASE].set(IN_CODES).at[:, T : W + 1].set(size)
        from_size = jnp.where(token == g.img, opened, state_BK.at[:, SLOT].set(child))
        ends = (self._device_class(state_BK) == C + 2)[:, None]
        from_codes = jnp.where(ends, in_text, state_BK.at[:, PLACE].add(1))
        after = jnp.where(phase == IN_TEXT, from_text, state_BK)
        after = jnp.where(phase == IN_SIZE, from_size, after)
        return jnp.where(phase == IN_CODES, from_codes, after)

    def place(self, state_BK: jax.Array) -> jax.Array:
        C = len(self.grammar.vocabulary.codebooks)
        width, height = state_BK[:, W] * C + 1, state_BK[:, H]
        inside = state_BK[:, PLACE] % (height * width + 1)
        place = jnp.stack([inside // width + 1, (inside % width) // C + 1], axis=1)
        over = state_BK[:, PLACE] == (height * width + 1) * jnp.maximum(state_BK[:, T], 1)
        return jnp.where(((state_BK[:, PHASE] == IN_CODES) & ~over)[:, None], place, 0)

    def ended(self, state_BK: jax.Array) -> jax.Array:
        return state_BK[:, PHASE] == ENDED

    def visual(self, state_BK: jax.Array) -> jax.Array:
        C = len(self.grammar.vocabulary.codebooks)
        return (state_BK[:, PHASE] == IN_CODES) & (self._device_class(state_BK) < C)
