"""Caption scores: extremes, words of the papers computed by hand, and silence."""

import math
import sys
from collections import Counter

import numpy as np
import pytest

from mmgpt.evaluate.metrics import captions
from mmgpt.evaluate.metrics.captions import METRICS, MetricError, caption_scores
from mmgpt.evaluate.metrics.words import words

TRUTH = {
    "a": ["A red circle on the left.", "there is a red circle at the left side"],
    "b": ["Two blue squares", "a pair of blue squares in the middle"],
    "c": ["a green cross above a ring"],
}
MADE = {"a": "a red circle on the right", "b": "two blue squares!", "c": "a dog"}


def test_the_references_themselves_score_highest_and_other_words_nothing():
    same, each = caption_scores({key: texts[0] for key, texts in TRUTH.items()}, TRUTH)
    assert same.keys() == METRICS.keys() and all(same[f"bleu_{n}"] > 0.999 for n in range(1, 5))
    assert same["rouge_l"] == pytest.approx(1.0) and each.keys() == TRUTH.keys()
    other, _ = caption_scores(dict.fromkeys(TRUTH, "nothing"), TRUTH)
    assert all(value < 1e-6 for value in other.values())


def test_a_caption_differing_in_case_and_punctuation_scores_the_same():
    plain, _ = caption_scores(MADE, TRUTH)
    changed, _ = caption_scores({key: text.upper() + " ." for key, text in MADE.items()}, TRUTH)
    assert plain == pytest.approx(changed)


def cider_d(made: dict[str, str], truth: dict[str, list[str]], sigma: float = 6.0) -> float:
    """CIDEr-D as its paper has it (arXiv 1411.5726, section 5), from nothing."""

    def grams(text: str, n: int) -> Counter:
        found = words(text)
        return Counter(tuple(found[i : i + n]) for i in range(len(found) - n + 1))

    total = []
    for key in made:
        by_n = []
        for n in range(1, 5):
            frequency = Counter(g for texts in truth.values() for g in {g for t in texts for g in grams(t, n)})

            def weighted(text: str, n: int = n, frequency: Counter = frequency) -> dict:
                log = math.log(len(truth))
                return {g: c * (log - math.log(max(1.0, frequency[g]))) for g, c in grams(text, n).items()}

            mine, values = weighted(made[key]), []
            for text in truth[key]:
                theirs = weighted(text)
                dot = sum(min(mine.get(g, 0.0), w) * w for g, w in theirs.items())
                size = math.sqrt(sum(w * w for w in mine.values())) * math.sqrt(sum(w * w for w in theirs.values()))
                gap = sum(grams(made[key], 2).values()) - sum(grams(text, 2).values())
                values.append((dot / size if size else 0.0) * math.exp(-(gap**2) / (2 * sigma**2)))
            by_n.append(np.mean(values))
        total.append(10.0 * np.mean(by_n))
    return float(np.mean(total))


def test_cider_is_that_of_the_paper():
    scores, each = caption_scores(MADE, TRUTH)
    assert scores["cider"] == pytest.approx(cider_d(MADE, TRUTH), rel=1e-6)
    assert scores["cider"] == pytest.approx(np.mean(list(each.values())))


def test_bleu_1_is_clipped_precision_with_brevity():
    scores, _ = caption_scores(MADE, TRUTH)
    # 5 of 6 words, 3 of 3, 1 of 2; lengths 11 against the nearest references' 6 + 3 + 6
    assert scores["bleu_1"] == pytest.approx(9 / 11 * math.exp(1 - 15 / 11), rel=1e-6)


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]):
    caption_scores(MADE, TRUTH)
    assert capsys.readouterr() == ("", "")


def test_a_missing_package_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(MetricError, match=r"pip install 'mmgpt\[eval\]'"):
        captions.require()
    with pytest.raises(MetricError, match="mmgpt"):
        caption_scores(MADE, TRUTH)


@pytest.mark.parametrize(
    ("made", "truth", "told"),
    [({}, {}, "references"), ({"a": "x"}, {"b": ["x"]}, "references"), ({"a": "x"}, {"a": ["."]}, "no reference")],
)
def test_what_cannot_be_scored_is_an_error(made: dict, truth: dict, told: str):
    with pytest.raises(MetricError, match=told):
        caption_scores(made, truth)
