"""Text tokenizers: SentencePiece."""

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from mmgpt.core.errors import UserError

DIGITS = "0123456789*"
"""Symbols that are always pieces of their own, since grammars write sizes such as 6*6 with them."""


class TextError(UserError, ValueError):
    """A text tokenizer that cannot be trained or loaded; the message says what to do."""


class TextTokenizer:
    """A SentencePiece model. It has no control tokens: whatever a text holds, it becomes text ids."""

    def __init__(self, model: bytes):
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model)
        self.model = model

    @classmethod
    def load(cls, path: Path) -> "TextTokenizer":
        """Reads a `.model` file; TextError when it is missing or no SentencePiece model."""
        if not path.is_file():
            raise TextError(f"{path}: no such text tokenizer; train one with `mmgpt tokenize text`.")
        try:
            return cls(path.read_bytes())
        except RuntimeError as e:
            raise TextError(f"{path}: not a SentencePiece model; train one with `mmgpt tokenize text`.") from e

    @classmethod
    def train(cls, texts: Iterable[str], size: int, superwords: bool = False) -> "TextTokenizer":
        """A byte-pair model of `size` pieces with byte fallback, so that every text has ids and comes back whole.

        `superwords` lets a piece hold several words, such as "in the top left" (arXiv 2503.13423): shorter rows.
        """
        out = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=iter(texts),
                model_writer=out,
                vocab_size=size,
                hard_vocab_limit=False,
                model_type="bpe",
                byte_fallback=True,
                split_digits=True,
                split_by_whitespace=not superwords,
                max_sentence_length=1 << 24,  # bytes: longer texts would be left out in silence, by default from 4,192
                user_defined_symbols=list(DIGITS),
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                num_threads=1,  # the result must not depend on the machine
                minloglevel=2,
            )
        except RuntimeError as e:
            raise TextError(
                f"training a text tokenizer of {size} pieces failed: {e}; give another size or more text."
            ) from e
        return cls(out.getvalue())

    @property
    def size(self) -> int:
        return self._processor.GetPieceSize()

    def encode(self, text: str) -> list[int]:
        """Ids of a text; `decode` gives it back normalised (NFKC, runs of spaces merged, ends trimmed)."""
        return self._processor.EncodeAsIds(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.DecodeIds([int(i) for i in ids])

    def symbol(self, character: str) -> int:
        """The id of one of DIGITS; TextError when the model was trained without it."""
        found = self._processor.PieceToId(character)
        if found == self._processor.unk_id():
            raise TextError(f"the text tokenizer has no piece {character!r}; train it with `mmgpt tokenize text`.")
        return found
