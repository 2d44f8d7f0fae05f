"""SentencePiece models, trained here or by others."""

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from mmgpt.tokens.text import DIGITS, TextError, TextTokenizer


class SentencePiece(TextTokenizer):
    """A SentencePiece model. One trained here has no specials; Llama's has `<s>` and `</s>`."""

    def __init__(self, model: bytes):
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model)
        self.model = model
        names = {self._processor.IdToPiece(i): i for i in range(self.size) if self._processor.IsControl(i)}
        self.specials = names

    @classmethod
    def read(cls, file: Path) -> "SentencePiece":
        """Reads a `.model` file; TextError when it is no SentencePiece model."""
        try:
            return cls(file.read_bytes())
        except RuntimeError as e:
            raise TextError(f"{file}: not a SentencePiece model; train one with `mmgpt tokenize text`.") from e

    @classmethod
    def train(cls, texts: Iterable[str], size: int, superwords: bool = False) -> "SentencePiece":
        """A byte-pair model of `size` pieces with byte fallback, so that every text has ids and comes back whole.

        `superwords` lets a piece hold several words, such as "in the top left" (arXiv 2503.13423): shorter rows.
        """
        least = 256 + len(DIGITS) + 2
        if size < least:
            raise TextError(f"a text tokenizer of {size} pieces: bytes and digits alone take {least}; give more.")
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
        found = self._processor.PieceToId(character)
        if found == self._processor.unk_id():
            raise TextError(f"the text tokenizer has no piece {character!r}; train it with `mmgpt tokenize text`.")
        return found
