"""The automaton of Emu3's layout: which ids may come next, as static tables on the device."""

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.core.document import KINDS, Image, Video
from mmgpt.tokens.grammars.grammar import GrammarError

if TYPE_CHECKING:
    from mmgpt.tokens.grammars.emu3 import Emu3

# Fields of an automaton state.
PHASE, PLACE, T, H, W, SLOT = range(6)
# Phases.
IN_TEXT, IN_SIZE, IN_CODES, ENDED, BEFORE = range(5)


class Emu3Automaton:
    """States `[B, 6] int32`: phase, slot in the medium, T, H, W, and progress in the size string.

    The sizes that may be opened form a trie of size strings, walked by tables; T is 0 for an image.
    """

    def __init__(self, grammar: "Emu3", sizes: tuple[tuple[int, int, int], ...]):
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
        """Room for each symbol (0-9, *, IMG) at each node, so that medium and EOS fit; and for the shortest medium.

        A medium fits where it does with every place blank.
        """
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
        frames = max(size[0], 1)
        painted = 0 if self.grammar.blank >= 0 else frames * size[1] * size[2]
        shape = np.array([[frames, size[1], size[2], C, painted]])
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
                state = self._after_code(state, token)
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

    def _after_code(self, state: list[int], token: int) -> list[int]:
        g = self.grammar
        if self._expected(state) == -g.eoi:
            return [IN_TEXT, 0, 0, 0, 0, 0]
        taken = len(g.vocabulary.codebooks) if token == g.blank else 1
        return [state[PHASE], state[PLACE] + taken, *state[T:]]

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
        # A place may paint only while the rest of its medium still fits, blank.
        paints = (room_B > self._least_after(state_BK) + C - 1)[:, None] | (column == g.blank)
        begins = (state_BK[:, PHASE] == IN_CODES) & (kind == 0) & (g.blank >= 0)
        mask = jnp.where(begins[:, None], mask & paints, mask)
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

    def _least_after(self, state_BK: jax.Array) -> jax.Array:
        """Ids from this place to the end of its medium, all of its places blank."""
        C = len(self.grammar.vocabulary.codebooks)
        row, least_row = state_BK[:, W] * C + 1, state_BK[:, W] + 1
        frame, least_frame = state_BK[:, H] * row + 1, state_BK[:, H] * least_row + 1
        inside = state_BK[:, PLACE] % frame
        before = state_BK[:, PLACE] // frame * least_frame + inside // row * least_row + inside % row // C
        return jnp.maximum(state_BK[:, T], 1) * least_frame + 1 - before

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
        taken = jnp.where(id_B == g.blank, C, 1)  # a blank stands for a whole place
        from_codes = jnp.where(ends, in_text, state_BK.at[:, PLACE].add(taken))
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
