"""One id space: text ids, then control ids, then the visual codebooks, then padding rows."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Sizes of the parts. `codebooks` are the visual codebooks in the order in which a place lists its codes."""

    text: int
    controls: tuple[str, ...]
    codebooks: tuple[int, ...]

    def control(self, name: str) -> int:
        """The id of a control token."""
        return self.text + self.controls.index(name)

    @property
    def visual_start(self) -> int:
        return self.text + len(self.controls)

    @property
    def codebook_starts(self) -> tuple[int, ...]:
        """First id of each codebook."""
        starts = [self.visual_start]
        for size in self.codebooks[:-1]:
            starts.append(starts[-1] + size)
        return tuple(starts)

    @property
    def used(self) -> int:
        """Number of ids in use."""
        return self.visual_start + sum(self.codebooks)

    def padded(self, multiple: int = 128) -> int:
        """Rows of the embedding: `used` rounded up, so that it divides over devices and fills tiles."""
        return -(-self.used // multiple) * multiple
