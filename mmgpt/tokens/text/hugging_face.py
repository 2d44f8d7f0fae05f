"""Tokenizers in the `tokenizer.json` of Hugging Face's `tokenizers`."""

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from mmgpt.tokens.text import TextError, TextTokenizer

_BRACKETS = {"<": ">", "[": "]", "{": "}"}


def _is_control(token: dict) -> bool:
    """Whether an added token is a control: marked as special, or named in brackets, as `<think>` is."""
    content = token["content"]
    return token["special"] or (len(content) > 2 and _BRACKETS.get(content[0]) == content[-1])


class HuggingFace(TextTokenizer):
    """A `tokenizer.json`. Its added tokens that are controls are `specials`; other added tokens are text."""

    def __init__(self, description: str):
        """`description` is the file's text. KeyError, TypeError or ValueError when it is not one."""
        whole = json.loads(description)
        added = whole["added_tokens"]
        for token in added:
            token["special"] = _is_control(token)
        whole |= {"truncation": None, "padding": None}
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(whole))
        except Exception as e:  # the library raises bare Exception
            raise ValueError(str(e)) from e
        self._tokenizer.encode_special_tokens = True  # a special's name in a text is text
        self.description = description
        self.specials = {token["content"]: int(token["id"]) for token in added if token["special"]}
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._names = {i: name for name, i in self.specials.items()}
        unknown = whole["model"].get("unk_token")  # a unigram model gives its number instead
        self._unknown = whole["model"].get("unk_id") if unknown is None else vocabulary.get(unknown)
        self._size = 1 + max(i for name, i in vocabulary.items() if name not in self.specials)

    @classmethod
    def read(cls, file: Path) -> "HuggingFace":
        """Reads a `tokenizer.json`; TextError when it is damaged or no tokenizer."""
        try:
            return cls(file.read_text(encoding="utf-8"))
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise TextError(
                f"{file}: not a tokenizer of Hugging Face's `tokenizers` ({e}); the file is cut off or something else. "
                "Fetch it again."
            ) from e

    @property
    def size(self) -> int:
        return self._size

    def encode(self, text: str) -> list[int]:
        """Ids of a text; `decode` gives it back in the normal form of the tokenizer's file."""
        found = self._tokenizer.encode(text, add_special_tokens=False)
        for token, (start, stop) in zip(found.ids, found.offsets, strict=True):
            name = self._names.get(token)
            if name is None or (token == self._unknown and name not in text[start:stop]):
                continue  # text, or characters that the model does not know
            # A unigram model holds its specials as pieces: cut the name in two.
            if stop - start < 2:
                raise TextError(f"the text tokenizer has the control token {name!r} for {text[start:stop]!r}.")
            middle = (start + stop) // 2
            return self.encode(text[:middle]) + self.encode(text[middle:])
        return found.ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def symbol(self, character: str) -> int:
        found = self._tokenizer.token_to_id(character)
        if found is None or found in self._names:
            raise TextError(f"the text tokenizer has no token {character!r}; a size is written with {character!r}.")
        return found
