"""One packed row: laid-out documents one after another, each predicting inside itself alone."""

from collections.abc import Iterable

import numpy as np

from mmgpt.core.errors import UserError
from mmgpt.tokens.grammars.grammar import Tokens


class RowError(UserError, ValueError):
    """Documents that do not make a row."""


def assemble(documents: Iterable[Tokens | int], row_length: int, pad: int) -> dict[str, np.ndarray]:
    """One row of T = `row_length` tokens: `ids target modality document` int32 [T], `position` int32 [T, 5],
    `weight` float32 [T].

    `target[t]` is the next id of the same document and `weight[t]` that id's loss weight, 0 on a document's last
    token. `position` is the number in the document, then the row and column in the picture of the id and of the next
    id. An integer in place of a document leaves a gap of that many tokens. Gaps and the rest of the row are padding:
    id `pad`, weight 0, document -1.
    """
    row = {
        "ids": np.full(row_length, pad, np.int32),
        "target": np.full(row_length, pad, np.int32),
        "modality": np.zeros(row_length, np.int32),
        "position": np.zeros((row_length, 5), np.int32),
        "document": np.full(row_length, -1, np.int32),
        "weight": np.zeros(row_length, np.float32),
    }
    at = 0
    for number, tokens in enumerate(documents):
        end = at + (tokens if isinstance(tokens, int) else len(tokens.ids))
        if end > row_length:
            raise RowError(
                f"document {number} ends at token {end} of a row of {row_length}: the plan's lengths are wrong."
            )
        if not isinstance(tokens, int) and end > at:
            row["ids"][at:end] = tokens.ids
            row["target"][at : end - 1] = tokens.ids[1:]
            row["weight"][at : end - 1] = tokens.weight[1:]
            row["modality"][at:end] = tokens.modality
            row["position"][at:end, 0] = np.arange(end - at)
            row["position"][at:end, 1:3] = tokens.place
            row["position"][at : end - 1, 3:] = tokens.place[1:]
            row["document"][at:end] = number
        at = end
    return row
