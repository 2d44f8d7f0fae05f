"""Texts of documents: what is no text, and long ones cut where a reader would pause."""

import re

from mmgpt.core.document import Text
from mmgpt.data.files import FileError

MAX_PIECE = 8000
_ENDS = (
    re.compile(r"\n(?:[ \t\r]*\n)+"),  # of paragraphs,
    re.compile(r"\n"),  # of lines,
    re.compile(r"[.!?][\"'”’)\]]*(?=\s)|[。！？][”’」』）]*"),  # of sentences,
    re.compile(r"(?=\s)"),  # of words: the blank goes with the next word, as it does in most vocabularies
)


def checked(text: str) -> str:
    """`text` if it is one. Raises FileError "empty text", "not UTF-8", or "not a text" for a NUL."""
    if not text.strip():
        raise FileError("empty text")
    if (nul := text.find("\0")) >= 0:
        raise FileError("not a text", f"NUL at character {nul}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise FileError("not UTF-8", f"lone surrogate at character {e.start}") from e
    return text


def segments(text: str, role: str = "", at_most: int = MAX_PIECE) -> tuple[Text, ...]:
    """The text as segments of at most `at_most` characters, cut between paragraphs, else lines, sentences, words.

    Joined they are the text. Rows of a batch are filled with whole segments, so a long text needs several.
    """
    pieces = []
    start = 0
    while len(text) - start > at_most:
        end = start + _cut(text[start : start + at_most])
        pieces.append(Text(text=text[start:end], role=role))
        start = end
    return (*pieces, Text(text=text[start:], role=role))


def _cut(window: str) -> int:
    """Where to cut, in the second half, lest pieces be small; at the end of the window where there is no pause."""
    for pattern in _ENDS:
        found = 0
        for match in pattern.finditer(window, len(window) // 2):
            found = match.end()
        if found:
            return found
    return len(window)
