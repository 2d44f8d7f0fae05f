"""What a grammar is: the one object that knows control tokens and layout."""

import abc
import dataclasses
from typing import Protocol

import jax
import numpy as np

from mmgpt.core import config
from mmgpt.core.document import Document
from mmgpt.core.errors import UserError
from mmgpt.tokens.text import TextTokenizer
from mmgpt.tokens.vocabulary import Vocabulary


class GrammarError(UserError, ValueError):
    """Ids that do not parse, or a document that a grammar cannot lay out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """A document laid out: `ids, modality [N] int32`; `weight [N] float32` is the loss weight of predicting each id.

    `place [N, 2] int32` is the row and column of an id in its picture, from 1; (0, 0) outside pictures.
    """

    ids: np.ndarray
    place: np.ndarray
    modality: np.ndarray
    weight: np.ndarray


class Weights(config.Config):
    """Loss weights of text, visual codes, the layout around them, and actions; each times its segment's `loss`.

    Layout is the ends of rows, frames and media and the size before the codes; `prompt` multiplies every weight in a
    segment of the role "user".
    """

    text: float = 1.0
    vision: float = 0.5
    layout: float = 0.5
    actions: float = 1.0
    prompt: float = 1.0


PRETRAINING = Weights()
"""Emu3's and Emu3.5's pretraining, and the second stage of Emu3.5's fine-tuning: 1 for text, 0.5 for vision."""
EVEN = Weights(vision=1.0, layout=1.0)
"""The first stage of Emu3.5's fine-tuning; LWM."""
RELEASED_SFT = Weights(text=0.0, vision=1.0, layout=0.0, actions=0.0)
"""Emu3's released fine-tuning: visual codes alone, as `apply_loss_on_only_vision` masks the labels."""
VISION_ONLY = Weights(text=0.0, vision=1.0, layout=1.0, actions=0.0)
"""Quality fine-tuning of Emu3, and UniVLA's world model: pictures with their layout, no text."""
ANSWERS = Weights(vision=0.0, layout=0.0, prompt=0.0)
"""Emu3's chat: text of the answers."""
ACTIONS_ONLY = Weights(text=0.0, vision=0.0, layout=0.0)
"""UniVLA's policy."""


class GrammarConfig(config.Config, abc.ABC):
    """Config of a grammar."""

    @abc.abstractmethod
    def build(self, text: TextTokenizer, codebooks: tuple[int, ...], *, blanks: bool = False) -> "Grammar":
        """The grammar over a text tokenizer's ids and visual codebooks; GrammarError when they do not fit.

        With `blanks` a place whose first code is 0 holds nothing: that code alone is laid out.
        """


class Automaton(Protocol):
    """The grammar as static tables on the device. A state is a small int32 vector per row."""

    pad: int

    def start(self, ids: np.ndarray) -> np.ndarray:
        """The state `[K]` after a prompt; GrammarError when the prompt does not parse."""
        ...

    def allowed(self, state_BK: jax.Array, room_B: jax.Array) -> jax.Array:
        """`[B, V] bool`: the ids that may come next and still let the document end within `room` tokens."""
        ...

    def advance(self, state_BK: jax.Array, id_B: jax.Array) -> jax.Array:
        """The state after one more id."""
        ...

    def place(self, state_BK: jax.Array) -> jax.Array:
        """`[B, 2] int32`: the place of the next id."""
        ...

    def ended(self, state_BK: jax.Array) -> jax.Array:
        """`[B] bool`: whether the document is over."""
        ...

    def visual(self, state_BK: jax.Array) -> jax.Array:
        """`[B] bool`: whether the next id is a visual code, where guidance and the image sampler act."""
        ...


class Grammar(Protocol):
    """Layout of documents: encodes them, weighs their loss, parses ids back, and guides the decoder."""

    name: str
    text: TextTokenizer
    vocabulary: Vocabulary
    pad: int
    overhead: int

    def segment_lengths(self, kind: np.ndarray, shape: np.ndarray) -> np.ndarray:
        """Tokens of each segment `[S] int64` from its kind `[S]` and shape `[S, 5]` (see the record's index)."""
        ...

    def encode(self, document: Document, *, end: bool = True) -> Tokens:
        """Lays a tokenised document out; with `end=False` it stays open, as a prompt that generation goes on from."""
        ...

    def open_image(self, height: int, width: int) -> np.ndarray:
        """Ids that open an image of this size in places: what follows is its first code."""
        ...

    def open_video(self, codes_THWC: np.ndarray, frames: int) -> np.ndarray:
        """Ids of a video of `frames` frames of which the first T are given: a prompt to be continued."""
        ...

    def prompt(self, document: Document, *, task: str = "") -> np.ndarray:
        """The document as an open prompt, in the template that the published model was trained with.

        The template holds turns of the roles "user" and "assistant"; where no segment has one, the layout is plain.
        """
        ...

    def negative(self, document: Document, *, task: str = "", text: str = "") -> np.ndarray:
        """The branch that guidance pushes away from when it goes on from `prompt`; `text` is a negative prompt."""
        ...

    def places(self, ids: np.ndarray) -> np.ndarray:
        """The places `[N, 2]` of ids that begin a document."""
        ...

    def parse(self, ids: np.ndarray) -> Document:
        """The document that these ids lay out; GrammarError says at which position they stop making sense."""
        ...

    def automaton(self, sizes: tuple[tuple[int, int, int], ...] = ()) -> Automaton:
        """The automaton of allowed next ids; `sizes` (T, H, W) are the media it may open, T = 0 for an image."""
        ...
