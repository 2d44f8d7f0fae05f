"""Scores of captions against several references: BLEU, ROUGE-L and CIDEr, by pycocoevalcap's scorers.

METEOR and SPICE are programs in Java and stay out. The words are those of `metrics.words`.
"""

import contextlib
import importlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

from mmgpt.core.errors import UserError
from mmgpt.evaluate.metrics.words import words


class MetricError(UserError, ValueError):
    """A metric that cannot be computed; the message says what to do."""


METRICS = {
    "cider": "CIDEr: agreement with the references, weighted by how telling a phrase is; 1 is 100 in papers",
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
}


def require() -> None:
    """MetricError where pycocoevalcap is not installed."""
    for name in ("bleu.bleu", "cider.cider", "rouge.rouge"):
        _scorer(name)


def _scorer(name: str) -> Any:
    try:
        return importlib.import_module(f"pycocoevalcap.{name}")
    except ImportError as e:
        raise MetricError(f"caption metrics need pycocoevalcap ({e}): pip install 'mmgpt[eval]'.") from e


def caption_scores(
    made: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[dict[str, float], dict[str, float]]:
    """The METRICS over all captions, and CIDEr by key. Both mappings have the same keys.

    CIDEr weighs phrases by how many keys have them, so that it depends on the whole set: of one key alone it is 0.
    """
    if not made or made.keys() != references.keys():
        raise MetricError(f"caption scores need references for each caption; {len(made)} and {len(references)} given.")
    results = {key: [" ".join(words(text))] for key, text in made.items()}
    truths = {key: [" ".join(words(text)) for text in texts] for key, texts in references.items()}
    empty = [key for key, texts in truths.items() if not any(texts)]
    if empty:
        raise MetricError(f"{empty[0]!r} has no reference that holds a word; mend the annotations.")
    bleu, cider, rouge = (_scorer(name) for name in ("bleu.bleu", "cider.cider", "rouge.rouge"))
    with contextlib.redirect_stdout(io.StringIO()):  # the scorers print
        bleus, _ = bleu.Bleu(4).compute_score(truths, results, verbose=0)
        ciders, each = cider.Cider().compute_score(truths, results)
        rouges, _ = rouge.Rouge().compute_score(truths, results)
    scores = {"cider": float(ciders), **{f"bleu_{n}": float(b) for n, b in enumerate(bleus, 1)}}
    return {**scores, "rouge_l": float(rouges)}, dict(zip(truths, map(float, each), strict=True))
