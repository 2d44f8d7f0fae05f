"""What the tokenisation job asks of tokenizers, and the ones of a job, loaded from their files."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmgpt.core.errors import UserError
from mmgpt.tokens import actions as robots
from mmgpt.tokens import text as texts


class JobError(UserError, RuntimeError):
    """A tokenisation job that cannot go on; the message says what was found and what to do."""


class TextTokenizer(Protocol):
    """Text to ids, from several threads at once."""

    @property
    def size(self) -> int: ...
    def encode(self, text: str, /) -> list[int]: ...
    def fingerprint(self) -> str: ...


class ImageTokenizer(Protocol):
    """Pictures and clips to code grids and back.

    `codebooks`: the sizes of the C codebooks; `patch`: pixels a side of a place; `temporal`: frames of a clip that
    share its codes. A picture's codes do not depend on the pictures beside it.
    """

    @property
    def codebooks(self) -> tuple[int, ...]: ...
    @property
    def patch(self) -> int: ...
    @property
    def temporal(self) -> int: ...

    def encode(self, images: np.ndarray, /) -> np.ndarray:
        """uint8 [B, H, W, 3] to int32 [B, H / patch, W / patch, C], B of any size."""
        ...

    def decode(self, codes: np.ndarray, /) -> np.ndarray:
        """int32 [B, h, w, C] to uint8 [B, h * patch, w * patch, 3]."""
        ...

    def encode_clip(self, frames: np.ndarray, /) -> np.ndarray:
        """uint8 [T, H, W, 3] to int32 [t, H / patch, W / patch, C], t = T / temporal rounded up."""
        ...


class ActionTokenizer(Protocol):
    """Robot actions to ids."""

    def encode(self, values: np.ndarray, /) -> np.ndarray:
        """float32 [T, A] to int32 [N]; ValueError for actions that it was not fitted to."""
        ...

    def fingerprint(self) -> str: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizers:
    """The tokenizers of a job; without one for actions, documents that hold raw actions are rejected."""

    text: TextTokenizer
    image: ImageTokenizer
    actions: ActionTokenizer | None = None

    @classmethod
    def load(cls, text: Path, vision: Path, actions: Path | None, batch: int) -> "Tokenizers":
        """Opens the files; `batch` pictures are encoded at once."""
        from mmgpt.tokenize.vision import VisionTokenizer

        if batch < 1:
            raise JobError(f"the batch is {batch} pictures; it must be at least 1.")
        return cls(
            text=texts.TextTokenizer.load(text),
            image=VisionTokenizer.load(vision, batch),
            actions=None if actions is None else robots.load(actions),
        )

    def settings(self) -> dict[str, Any]:
        """What tells these tokenizers from others: their sizes, and what they make of a fixed probe."""
        side = 4 * self.image.patch
        noise = np.frombuffer(hashlib.shake_256(b"probe").digest(side * side * 3), np.uint8)
        codes = np.asarray(self.image.encode(noise.reshape(1, side, side, 3)), np.int32)
        return {
            "text_size": self.text.size,
            "text_probe": self.text.fingerprint(),
            "codebooks": list(self.image.codebooks),
            "patch": self.image.patch,
            "temporal": self.image.temporal,
            "image_probe": hashlib.sha256(codes.tobytes()).hexdigest(),
            "actions": None if self.actions is None else self.actions.fingerprint(),
        }
