"""One id space: text ids, control ids, visual codebooks, action codes, then padding rows."""

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Where each id stands. `codebooks` are the visual codebooks in the order in which a place lists its codes.

    `text` ids are below that number, `controls` maps names to ids, the codebooks follow each other from
    `visual_start` on. The `actions` codes come after them, or are the last text ids backwards (`actions_in_text`).
    """

    text: int
    controls: Mapping[str, int]
    codebooks: tuple[int, ...]
    visual_start: int
    actions: int = 0
    actions_in_text: bool = False

    @classmethod
    def own(
        cls, *, text: int, controls: Sequence[str], codebooks: tuple[int, ...], actions: int = 0, start: int = -1
    ) -> "Vocabulary":
        """The parts one after another, the controls from `start` on (-1: right after the text)."""
        start = text if start < 0 else start
        ids = {name: start + i for i, name in enumerate(controls)}
        return cls(text=text, controls=ids, codebooks=codebooks, visual_start=start + len(ids), actions=actions)

    def control(self, name: str) -> int:
        """The id of a control token."""
        return self.controls[name]

    @property
    def codebook_starts(self) -> tuple[int, ...]:
        """First id of each codebook."""
        starts = [self.visual_start]
        for size in self.codebooks[:-1]:
            starts.append(starts[-1] + size)
        return tuple(starts)

    @property
    def action_ids(self) -> range:
        """The id of each action code."""
        if self.actions_in_text:
            return range(self.text - 1, self.text - 1 - self.actions, -1)
        start = self.visual_start + sum(self.codebooks)
        return range(start, start + self.actions)

    @property
    def used(self) -> int:
        """Number of ids in use."""
        ends = [self.visual_start + sum(self.codebooks), *(i + 1 for i in self.controls.values())]
        return max(*ends, self.text, max(self.action_ids, default=-1) + 1)

    def padded(self, multiple: int = 128) -> int:
        """Rows of the embedding: `used` rounded up, so that it divides over devices and fills tiles."""
        return -(-self.used // multiple) * multiple
