"""What stands around the codes of a picture: where each id of a medium is, as arithmetic on its slot.

A medium is its frames in order, a frame its rows, a row its places, a place one id per codebook; controls end rows and
frames. Every id has a slot, counted from 0 after the medium's head. The methods take numbers or arrays, NumPy's or
JAX's (`xp`), so that the host that lays media out and the device that guides generation cannot differ.
"""

import dataclasses
from types import ModuleType
from typing import Any, Literal

Number = Any
"""An integer or an integer array, NumPy's or JAX's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Controls around the codes of C codebooks.

    `eol` stands after each row, between the rows of a frame, or never; `eof` after each frame. `size` says what stands
    before the codes: H*W for an image and T*H*W for a clip ("sides"), T*H*W for both, an image having one frame
    ("frames"), or nothing, as all frames have one size and the id after the last frame differs ("fixed"). Without
    `clips` a clip is laid out as its frames, an image each.
    """

    eol: Literal["each", "between", "never"]
    eof: bool
    size: Literal["sides", "frames", "fixed"]
    clips: bool = True

    def row(self, W: Number, C: int) -> Number:
        """Slots of a row; the last one has one less where EOL stands between rows."""
        return W * C + (self.eol != "never")

    def frame(self, H: Number, W: Number, C: int) -> Number:
        """Slots of a frame."""
        return H * self.row(W, C) - (self.eol == "between") + self.eof

    def kind(self, xp: ModuleType, slot: Number, frames: Number, H: Number, W: Number, C: int) -> Number:
        """What stands in a slot: codebook 0 to C - 1, or EOL at C, EOF at C + 1, EOI at C + 2."""
        row, frame = self.row(W, C), self.frame(H, W, C)
        inside = slot % frame
        column = inside % row
        kind = xp.where(column == W * C, C, column % C)
        if self.eol == "never":
            kind = column % C
        if self.eof:
            kind = xp.where(inside == frame - 1, C + 1, kind)
        return xp.where(slot == frame * frames, C + 2, kind)

    def place(self, xp: ModuleType, slot: Number, H: Number, W: Number, C: int) -> Number:
        """Row and column of a slot in its frame, from 1, `[..., 2]`; the end of a row is a column of its own."""
        row = self.row(W, C)
        inside = slot % self.frame(H, W, C)
        return xp.stack([inside // row + 1, inside % row // C + 1], axis=-1)

    def least_after(self, slot: Number, frames: Number, H: Number, W: Number, C: int) -> Number:
        """Ids from this slot to the end of a medium whose further places are all blank, with EOI."""
        row, inside = self.row(W, C), slot % self.frame(H, W, C)
        least_row, least_frame = self.row(W, 1), self.frame(H, W, 1)
        before = slot // self.frame(H, W, C) * least_frame + inside // row * least_row + inside % row // C
        return frames * least_frame + 1 - before
