"""A laid-out document as a page shows it: ids with their words, their kind and their loss weight, long runs folded."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from mmgpt.core.stream import ACTION, IMAGE, VIDEO
from mmgpt.tokens.grammars.grammar import Grammar, Tokens

SHOWN = {"text": 160, "code": 10, "action": 24}
"""Ids of a run that are shown before the rest is folded."""
WORDS = {
    "BOS": "document begins",
    "EOS": "document ends",
    "PAD": "padding",
    "BOI": "medium begins",
    "EOI": "medium ends",
    "IMG": "codes begin",
    "EOL": "row ends",
    "EOF": "frame ends",
    "EOV": "clip ends",
    "BOA": "actions begin",
    "EOA": "actions end",
    "TMS": "time",
    "BSS": "answer begins",
    "ESS": "answer ends",
    "BOG": "thought of the answer begins",
    "EOG": "thought of the answer ends",
    "BOC": "thought of the next picture begins",
    "EOC": "thought of the next picture ends",
}
"""Controls of the grammars in words; one that is not here is shown by its name."""
_INSIDE = ("EOL", "EOF")
"""Controls between the codes of a medium, which fold with them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """One id, or `folded` of them: `kind` is text, size, code, action or control, `weight` the loss weight."""

    kind: str
    label: str
    id: int = -1
    weight: float = 0.0
    about: str = ""
    folded: int = 0


def pieces(grammar: Grammar, tokens: Tokens) -> Iterator[Piece]:
    """The ids of a document in order; each is shown, or counted in a folded piece."""
    kinds = _kinds(grammar, tokens)
    names = {i: name for name, i in grammar.vocabulary.controls.items()}
    inside = np.isin(tokens.ids, [i for i, name in names.items() if name in _INSIDE]) & (kinds == "control")
    run = np.where(inside, "code", kinds)
    starts = np.flatnonzero(np.concatenate(([True], run[1:] != run[:-1]))).tolist() if len(run) else []
    for first, stop in zip(starts, [*starts[1:], len(run)], strict=True):
        most = SHOWN.get(str(run[first]), stop - first)
        shown = most if stop - first > most + 2 else stop - first  # to fold one or two ids saves nothing
        for at in range(first, first + shown):
            yield _piece(grammar, tokens, names, at, first, str(kinds[at]))
        rest = slice(first + shown, stop)
        if rest.start < stop:
            yield _folded(str(run[first]), kinds[rest], tokens.weight[rest])


def _kinds(grammar: Grammar, tokens: Tokens) -> np.ndarray:
    vocabulary, ids, media = grammar.vocabulary, tokens.ids, np.isin(tokens.modality, (IMAGE, VIDEO))
    code = (ids >= vocabulary.visual_start) & (ids < vocabulary.visual_start + sum(vocabulary.codebooks)) & media
    control = np.isin(ids, list(vocabulary.controls.values()))
    return np.select(
        [code, control, tokens.modality == ACTION, media], ["code", "control", "action", "size"], default="text"
    )


def _piece(grammar: Grammar, tokens: Tokens, names: dict[int, str], at: int, first: int, kind: str) -> Piece:
    token, about = int(tokens.ids[at]), ""
    match kind:
        case "control":
            label, about = WORDS.get(names[token], names[token]), names[token]
        case "code":
            label = str(token)
            starts = grammar.vocabulary.codebook_starts
            book = int(np.searchsorted(starts, token, "right")) - 1
            row, column = tokens.place[at].tolist()
            about = f"code {token - starts[book]} of codebook {book + 1}, row {row}, column {column}"
        case "action":
            label = str(token)
        case _:
            label = _words(grammar, tokens.ids[max(first, at - 1) : at + 1].tolist())
    return Piece(kind=kind, label=label, id=token, weight=float(tokens.weight[at]), about=about)


def _words(grammar: Grammar, ids: list[int]) -> str:
    """What the last id adds to the text of those before it, spaces too; an id of part of a character says so little."""
    before, whole = grammar.text.decode(ids[:-1]), grammar.text.decode(ids)
    return whole[len(before) :] if whole.startswith(before) else grammar.text.decode(ids[-1:])


def _folded(kind: str, kinds: np.ndarray, weight: np.ndarray) -> Piece:
    counts = {"code": int((kinds == "code").sum())} if kind == "code" else {kind: len(kinds)}
    counts |= {"row or frame end": int((kinds == "control").sum())} if kind == "code" else {}
    nouns = {"text": "text id"}
    told = [f"{n:,} {nouns.get(k, k)}{'' if n == 1 else 's'}" for k, n in counts.items() if n]
    label = f"… {', '.join(told)}".replace("row or frame ends", "ends of rows and frames")
    return Piece(kind=kind, label=label, weight=float(weight.max()), folded=len(kinds))
