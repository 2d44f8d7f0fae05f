"""Emu3's and Emu3.5's text tokenizer: Qwen's byte pairs by rank, in a file as tiktoken writes it.

Facts from the released `tokenization_emu3.py` of both: lines of a base64 token and its rank; text in NFC, digits one by
one; after the 151,643 ranks come 211 specials.
"""

import base64
import binascii
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

import tiktoken

from mmgpt.tokens.text import TextError, TextTokenizer

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What a text is cut into before pairs are merged: contractions, words, single digits, punctuation, white space."""

SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{i}|>" for i in range(205)),
    *("<|image token|>", "<|image start|>", "<|image end|>"),
)
"""The specials in the order of their ids; after them come the visual codes."""

PUBLISHED_RANKS = 151_643
"""Ranks in the file that Emu3 and Emu3.5 publish."""


class BytePairs(TextTokenizer):
    """Byte pairs by rank: every text has ids, and comes back as its NFC."""

    def __init__(self, ranks: Mapping[bytes, int]):
        """`ranks` numbers the tokens from 0 without a gap, all 256 single bytes among them."""
        self.ranks = dict(ranks)
        self.specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
        self._encoding = tiktoken.Encoding("emu3", pat_str=SPLIT, mergeable_ranks=self.ranks, special_tokens={})

    @classmethod
    def read(cls, file: Path) -> "BytePairs":
        """Reads a `.tiktoken` file; TextError when lines are damaged, ranks miss, or it is another model's."""
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(file.read_bytes().splitlines(), 1):
            if not line:
                continue
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as e:
                raise TextError(
                    f"{file}: line {number} is {line[:40]!r}, expected a base64 token and its rank; the file is cut "
                    "off or no vocabulary of byte pairs. Fetch it again."
                ) from e
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing or sorted(ranks.values()) != list(range(len(ranks))):
            what = (
                f"misses {len(missing)} of the 256 single bytes" if missing else "does not number its tokens from 0 on"
            )
            raise TextError(f"{file}: the vocabulary of {len(ranks)} tokens {what}; it is damaged. Fetch it again.")
        if file.stem == "emu3" and len(ranks) != PUBLISHED_RANKS:
            raise TextError(
                f"{file}: {len(ranks)} tokens, where Emu3's vocabulary has {PUBLISHED_RANKS}; the file is cut off or "
                "of another model. Fetch it again, or give a vocabulary of your own another name."
            )
        return cls(ranks)

    def text(self) -> str:
        """The lines of the vocabulary's file."""
        return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in self.ranks.items())

    @property
    def size(self) -> int:
        return len(self.ranks)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; `decode` gives it back as its NFC."""
        return self._encoding.encode_ordinary(unicodedata.normalize("NFC", text))

    def decode(self, ids: Iterable[int]) -> str:
        known = [int(i) for i in ids if int(i) < self.size]
        return self._encoding.decode_bytes(known).decode("utf-8", errors="replace")

    def symbol(self, character: str) -> int:
        found = self.ranks.get(character.encode())
        if found is None:
            raise TextError(f"the vocabulary has no token {character!r}; a size is written with {character!r}.")
        return found
