"""Text tokenizers: text to ids and back, whatever family the file belongs to.

No text ever becomes a control id: a control token's name in a user's text is split into the pieces of ordinary text.
"""

import abc
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmgpt.core.errors import UserError

if TYPE_CHECKING:
    from mmgpt.tokens.text.sentence_piece import SentencePiece

DIGITS = "0123456789*"
"""Symbols that are always pieces of their own, since grammars write sizes such as 6*6 with them."""


_PROBE = "A red circle is above the blue square. 0123456789 äöü 你好"


class TextError(UserError, ValueError):
    """A text tokenizer that cannot be trained or loaded; the message says what to do."""


class TextTokenizer(abc.ABC):
    """Ids below `size` are text; `specials` are the control tokens that the tokenizer was published with, by name.

    A special may have an id below `size`; `encode` gives it for no text.
    """

    specials: Mapping[str, int]

    @staticmethod
    def load(path: Path) -> "TextTokenizer":
        """The tokenizer of a file or of the folder that holds it; TextError when there is none or it is damaged.

        `.tiktoken` is a list of byte pairs by rank as Emu3 publishes it, `.json` a tokenizer of Hugging Face's
        `tokenizers`, and any other file a SentencePiece model.
        """
        from mmgpt.tokens.text.byte_pairs import BytePairs
        from mmgpt.tokens.text.hugging_face import HuggingFace
        from mmgpt.tokens.text.sentence_piece import SentencePiece

        file = _file_in(path) if path.is_dir() else path
        if not file.is_file():
            raise TextError(f"{file}: no such text tokenizer; train one with `mmgpt tokenize text`.")
        families: dict[str, type[BytePairs | HuggingFace]] = {".tiktoken": BytePairs, ".json": HuggingFace}
        return families.get(file.suffix, SentencePiece).read(file)

    @staticmethod
    def train(texts: Iterable[str], size: int, superwords: bool = False) -> "SentencePiece":
        """A SentencePiece model of our own, see `SentencePiece.train`."""
        from mmgpt.tokens.text.sentence_piece import SentencePiece

        return SentencePiece.train(texts, size, superwords)

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """One more than the largest id of a text."""

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, none of them a control id; `decode` gives it back in the tokenizer's normal form."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; control ids say nothing."""

    def fingerprint(self) -> str:
        """What the ids of a text depend on, as a hash of those of a fixed one."""
        return hashlib.sha256(np.asarray(self.encode(_PROBE), np.int32).tobytes()).hexdigest()

    @abc.abstractmethod
    def symbol(self, character: str) -> int:
        """The id of one of DIGITS; TextError when the tokenizer has none."""


def _file_in(folder: Path) -> Path:
    """The tokenizer file of a folder as model hubs lay it out."""
    for pattern in ("*.tiktoken", "tokenizer.json", "*.model"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise TextError(
                f"{folder}: {len(found)} text tokenizers ({', '.join(f.name for f in found)}); name one of the files."
            )
        if found:
            return found[0]
    raise TextError(f"{folder}: no text tokenizer in it; a folder holds a .tiktoken, tokenizer.json or .model file.")
