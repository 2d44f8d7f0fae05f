"""The automaton of pictures as rows of codes: which ids may come next, on the device.

A state is `[7] int32`: phase, slot in the picture, its frames, height and width, progress in the size string, and which
marks are open. What may come next is one interval of ids per row (text, a codebook, actions) and a few single ids:
no table has a row of the vocabulary's length.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.core.document import KINDS, Image, Video
from mmgpt.tokens.grammars.grammar import GrammarError
from mmgpt.tokens.grammars.reading import BEFORE, ENDED, IN_ACTIONS, IN_CODES, IN_SIZE, IN_TEXT, OPEN, read
from mmgpt.tokens.grammars.sizes import END, Ends, Sizes

if TYPE_CHECKING:
    from mmgpt.tokens.grammars.raster import Raster

Size = tuple[int, int, int]
"""Frames, height and width in places; 0 frames for an image."""

PHASE, SLOT, FRAMES, H, W, NODE, MARKS = range(7)
"""Fields of a state."""


class RasterAutomaton:
    """Guides generation so that whatever the logits, the ids parse. `sizes` are the pictures that it may open."""

    def __init__(self, grammar: "Raster", sizes: tuple[Size, ...]):
        g = self.grammar = grammar
        self.pad = g.pad
        self.C = len(g.vocabulary.codebooks)
        strings, lengths = self._strings(sizes)
        self.sizes = Sizes(strings, lengths)
        self.ends = Ends({frames for frames, _, _ in strings.values()} if g.grid else set())
        shortest = min(lengths.values(), default=self.sizes.shortest)
        self._shortest = shortest if g.grid else self.sizes.shortest
        controls = {g.bos, g.eos, g.pad, g.boi, g.eoi, g.img, g.eol, g.eof, g.last, g.boa, g.eoa, *g.mark_ids} - {-1}
        below = g.reserved[g.reserved < g.vocabulary.text].tolist()
        symbols = [] if g.grid else [*g.symbols]
        self._singles = np.array(sorted(controls | set(below) | set(symbols)), np.int32)
        """Ids that the intervals do not decide: controls, size symbols, and specials among the text ids."""
        self._forbidden = np.isin(self._singles, sorted(controls | set(below)))

    def _strings(self, sizes: tuple[Size, ...]) -> tuple[dict[str, tuple[int, int, int]], dict[str, int]]:
        """Size strings (or one name per number of frames) with the frames, height and width they say, and lengths."""
        g, strings, lengths = self.grammar, dict[str, tuple[int, int, int]](), dict[str, int]()
        for T, height, width in sizes:
            clip = T > 0 and g.layout.clips
            frames = T if clip else 1
            if g.grid:
                g.open_image(height, width)  # GrammarError for another size
                string = str(frames)
            else:
                numbers = (frames, height, width) if clip or g.layout.size == "frames" else (height, width)
                string = "*".join(str(n) for n in numbers)
            if g.sides_of(string) is None and not g.grid:
                raise GrammarError(f"the {g.name} grammar cannot write the size {T}x{height}x{width}; give another.")
            painted = 0 if g.blank >= 0 else frames * height * width
            shape = np.array([[frames, height, width, self.C, painted]])
            strings[string] = (frames, height, width)
            lengths[string] = int(g.segment_lengths(np.array([KINDS.index(Video if clip else Image)]), shape)[0])
        return strings, lengths

    # Host side: any size is legal in a prompt.

    def start(self, ids: np.ndarray) -> np.ndarray:
        found = read(self.grammar, ids)
        node = 0
        if found.phase == IN_SIZE:
            string = self.grammar.text_size(found.size)
            node = self.sizes.node(string)
            if node < 0 or not self._known():
                known = ", ".join(s for s in self._known()) or "none"
                raise GrammarError(f"position {len(ids) - 1}: the size {string!r} begins none that may open: {known}.")
        return np.array([found.phase, found.place, found.frames, found.H, found.W, node, found.open], np.int32)

    def _known(self) -> list[str]:
        sizes = self.sizes.done[self.sizes.done[:, 0] > 0].tolist()
        frames_first = self.grammar.layout.size == "frames"
        return ["*".join(map(str, size if frames_first or size[0] > 1 else size[1:])) for size in sizes]

    # Device side.

    def allowed(self, state_BK: jax.Array, room_B: jax.Array) -> jax.Array:
        g = self.grammar
        low, high = self._interval(state_BK, room_B)
        column = jnp.arange(g.vocabulary.used)[None, :]
        mask = (column >= low[:, None]) & (column < high[:, None])
        singles = jnp.asarray(self._singles)
        inside = (singles[None, :] >= low[:, None]) & (singles[None, :] < high[:, None])
        permits = {int(i): inside[:, n] for n, i in enumerate(self._singles) if not self._forbidden[n]}
        permits |= self._controls(state_BK, room_B, permits)
        never = jnp.zeros_like(room_B, dtype=bool)
        chosen = jnp.stack([permits.get(int(i), never) for i in self._singles], axis=1)
        return mask.at[:, singles].set(chosen)

    def _interval(self, state_BK: jax.Array, room_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First and one more than last id of the text, the codebook or the actions that may come next."""
        g, phase = self.grammar, state_BK[:, PHASE]
        kind = self._kind(state_BK)
        low, high = jnp.asarray(g.first, jnp.int32)[kind], jnp.asarray(g.stop, jnp.int32)[kind]
        if g.blank >= 0:  # a place may be painted only while the rest of its picture still fits, blank
            paints = room_B > self._least_after(state_BK) + self.C - 1
            only_blank = (kind == 0) & ~paints
            low, high = jnp.where(only_blank, g.blank, low), jnp.where(only_blank, g.blank + 1, high)
        visual = (phase == IN_CODES) & (kind < self.C)
        low, high = jnp.where(visual, low, 0), jnp.where(visual, high, 0)
        text = (phase == IN_TEXT) & (room_B > self._end(state_BK))
        high = jnp.where(text, g.vocabulary.text, high)
        actions = g.vocabulary.action_ids
        if len(actions):
            acts = (phase == IN_ACTIONS) & (room_B > 2)  # EOA and EOS follow
            low = jnp.where(acts, min(actions), low)
            high = jnp.where(acts, max(actions) + 1, high)
        return low, high

    def _controls(self, state_BK: jax.Array, room_B: jax.Array, symbols: dict[int, jax.Array]) -> dict[int, jax.Array]:
        """Whether each control and size symbol may come next."""
        g, phase = self.grammar, state_BK[:, PHASE]
        marks = state_BK[:, MARKS]
        free = (phase == IN_TEXT) & ~jnp.asarray(g.marks.in_block)[marks]
        found = {
            g.bos: phase == BEFORE,
            g.eos: free,
            g.pad: phase == ENDED,
            g.boi: free & (room_B > self._shortest),
            g.boa: free & (room_B > 2),  # BOA, EOA, EOS
            g.eoa: phase == IN_ACTIONS,
        }
        for mark, (token, role) in enumerate(zip(g.mark_ids, g.marks.roles, strict=True)):
            after = jnp.asarray(g.marks.after[mark])[marks]
            fits = (room_B > jnp.asarray(g.marks.end)[after]) | (role.startswith("/") & (marks >= 2))
            found[token] = (phase == IN_TEXT) & (after >= 0) & fits
        kind = jnp.where(phase == IN_CODES, self._kind(state_BK), -1)
        for token, which in zip((g.eol, g.eof, g.eoi), range(self.C, self.C + 3), strict=True):
            found[token] = kind == which
        if g.grid:
            more, ends = self._goes_on(state_BK, room_B)
            found |= {g.eof: found[g.eof] & more, g.last: found[g.eof] & ends}
        else:
            need = jnp.asarray(self.sizes.need)[state_BK[:, NODE]]
            # A prompt may have begun a size that does not fit any more: then the shortest is finished.
            fits = need <= jnp.maximum(room_B[:, None], need.min(axis=1, keepdims=True))
            in_size = phase == IN_SIZE
            found |= {token: symbols[token] | (in_size & fits[:, n]) for n, token in enumerate(g.symbols)}
            found[g.img] = in_size & fits[:, END]
        return found

    def _goes_on(self, state_BK: jax.Array, room_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """At the end of a frame of a clip without a size: whether more frames may follow, and whether it may end."""
        g = self.grammar
        frames = state_BK[:, SLOT] // self._frame(state_BK) + 1
        known = len(self.ends.planned) - 1
        at = jnp.minimum(frames, known)
        after = jnp.asarray(self.ends.planned)[jnp.minimum(at + 1, known)]
        least = g.layout.frame(state_BK[:, H], state_BK[:, W], 1 if g.blank >= 0 else self.C)
        # EOF, the frames with their ends, EOI, EOS
        more = (
            (frames < known)
            & (after > frames)
            & jnp.asarray(self.ends.may_end)[after]
            & (room_B >= 1 + (after - frames) * least + 2)
        )
        return more, jnp.asarray(self.ends.may_end)[at] | ~more

    def _end(self, state_BK: jax.Array) -> jax.Array:
        """Ids that a document in text needs to end."""
        return jnp.asarray(self.grammar.marks.end)[state_BK[:, MARKS]]

    def _frame(self, state_BK: jax.Array) -> jax.Array:
        return jnp.maximum(self.grammar.layout.frame(state_BK[:, H], state_BK[:, W], self.C), 1)

    def _kind(self, state_BK: jax.Array) -> jax.Array:
        """See `Layout.kind`; any kind outside pictures."""
        H_B, W_B = jnp.maximum(state_BK[:, H], 1), jnp.maximum(state_BK[:, W], 1)
        return self.grammar.layout.kind(jnp, state_BK[:, SLOT], state_BK[:, FRAMES], H_B, W_B, self.C)

    def _least_after(self, state_BK: jax.Array) -> jax.Array:
        """Ids from this slot to the end of the picture, all of its places blank."""
        frames, H_B, W_B = state_BK[:, FRAMES], jnp.maximum(state_BK[:, H], 1), jnp.maximum(state_BK[:, W], 1)
        if self.grammar.grid:
            known = len(self.ends.planned) - 1
            begun = state_BK[:, SLOT] // self._frame(state_BK) + 1
            planned = jnp.maximum(begun, jnp.asarray(self.ends.planned)[jnp.minimum(begun, known)])
            frames = jnp.where(frames == OPEN, planned, frames)
        return self.grammar.layout.least_after(state_BK[:, SLOT], frames, H_B, W_B, self.C)

    def advance(self, state_BK: jax.Array, id_B: jax.Array) -> jax.Array:
        phase = state_BK[:, PHASE][:, None]
        after = jnp.where(phase == BEFORE, state_BK.at[:, PHASE].set(IN_TEXT), state_BK)
        after = jnp.where(phase == IN_TEXT, self._from_text(state_BK, id_B), after)
        if not self.grammar.grid:
            after = jnp.where(phase == IN_SIZE, self._from_size(state_BK, id_B), after)
        after = jnp.where(phase == IN_CODES, self._from_codes(state_BK, id_B), after)
        back = (phase == IN_ACTIONS) & (id_B == self.grammar.eoa)[:, None]
        return jnp.where(back, self._in_text(state_BK), after)

    def _in_text(self, state_BK: jax.Array) -> jax.Array:
        """Text again; what is open stays open."""
        blank = jnp.zeros_like(state_BK).at[:, PHASE].set(IN_TEXT)
        return blank.at[:, MARKS].set(state_BK[:, MARKS])

    def _from_text(self, state_BK: jax.Array, id_B: jax.Array) -> jax.Array:
        g = self.grammar
        marks = state_BK[:, MARKS]
        for mark, token in enumerate(g.mark_ids):
            marks = jnp.where(id_B == token, jnp.asarray(g.marks.after[mark])[state_BK[:, MARKS]], marks)
        phase = jnp.full_like(id_B, IN_TEXT)
        phase = jnp.where(id_B == g.eos, ENDED, phase)
        phase = jnp.where(id_B == g.boa, IN_ACTIONS, phase)
        phase = jnp.where(id_B == g.boi, IN_CODES if g.grid else IN_SIZE, phase)
        after = jnp.zeros_like(state_BK).at[:, PHASE].set(phase).at[:, MARKS].set(marks)
        if g.grid:
            opened = after.at[:, FRAMES].set(OPEN).at[:, H].set(g.grid[0]).at[:, W].set(g.grid[1])
            after = jnp.where((id_B == g.boi)[:, None], opened, after)
        return after

    def _from_size(self, state_BK: jax.Array, id_B: jax.Array) -> jax.Array:
        g, node = self.grammar, state_BK[:, NODE]
        symbol = jnp.argmax(id_B[:, None] == jnp.asarray(g.symbols)[None, :], axis=1)
        further = state_BK.at[:, NODE].set(jnp.asarray(self.sizes.child)[node, symbol])
        opened = state_BK.at[:, PHASE].set(IN_CODES).at[:, NODE].set(0)
        opened = opened.at[:, FRAMES : W + 1].set(jnp.asarray(self.sizes.done)[node])
        return jnp.where((id_B == g.img)[:, None], opened, further)

    def _from_codes(self, state_BK: jax.Array, id_B: jax.Array) -> jax.Array:
        g = self.grammar
        after = state_BK.at[:, SLOT].add(jnp.where(id_B == g.blank, self.C, 1))  # a blank stands for a whole place
        if g.grid:
            frames = state_BK[:, SLOT] // self._frame(state_BK) + 1
            after = after.at[:, FRAMES].set(jnp.where(id_B == g.last, frames, state_BK[:, FRAMES]))
        ends = (self._kind(state_BK) == self.C + 2)[:, None]
        return jnp.where(ends, self._in_text(state_BK), after)

    def place(self, state_BK: jax.Array) -> jax.Array:
        H_B, W_B = jnp.maximum(state_BK[:, H], 1), jnp.maximum(state_BK[:, W], 1)
        place = self.grammar.layout.place(jnp, state_BK[:, SLOT], H_B, W_B, self.C)
        inside = (state_BK[:, PHASE] == IN_CODES) & (self._kind(state_BK) < self.C + 2)
        return jnp.where(inside[:, None], place, 0)

    def ended(self, state_BK: jax.Array) -> jax.Array:
        return state_BK[:, PHASE] == ENDED

    def visual(self, state_BK: jax.Array) -> jax.Array:
        return (state_BK[:, PHASE] == IN_CODES) & (self._kind(state_BK) < self.C)
