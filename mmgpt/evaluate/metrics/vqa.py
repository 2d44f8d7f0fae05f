"""The accuracy of visual question answering, by the rule of the VQA v2 challenge (arXiv 1612.00837, its vqaEval).

The answer is normalised; the accuracy is the mean, over leaving out one person at a time, of min(1, how many of the
others gave it / 3). People's answers are taken as published but for punctuation, which goes where they disagree.
"""

import re
from collections.abc import Sequence

PUNCTUATION = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
ARTICLES = ("a", "an", "the")
_WITH_APOSTROPHE = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've "
    "you'll you're you've"
)


def _contractions() -> dict[str, str]:
    """A contraction that lacks one of its apostrophes -> as it should be. One entry takes an apostrophe away."""
    found = {"somebody'd": "somebodyd"}
    for word in _WITH_APOSTROPHE.split():
        for place in (i for i, character in enumerate(word) if character == "'"):
            found[word[:place] + word[place + 1 :]] = word
    return found


CONTRACTIONS = _contractions()
_FULL_STOP = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_MOST_STOPS = 32
"""Full stops that go at most: the official program hands a flag over as this count, and stays as it is."""


def without_punctuation(text: str) -> str:
    """A mark beside a space, or any where a number has a comma, goes; others become a space; full stops go."""
    number = _COMMA_IN_NUMBER.search(text) is not None
    made = text
    for mark in PUNCTUATION:
        alone = f"{mark} " in text or f" {mark}" in text
        made = made.replace(mark, "" if alone or number else " ")
    return _FULL_STOP.sub("", made, count=_MOST_STOPS)


def plain_words(text: str) -> str:
    """Lower case, numbers up to ten as digits, no articles, apostrophes put in."""
    found = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in found if word not in ARTICLES)


def normalised(answer: str) -> str:
    """A model's answer in the form that is compared."""
    return plain_words(without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()))


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """Accuracy in 0..1 of a model's answer given what people answered; no answers give 0."""
    given = normalised(answer)
    truths = list(answers) if len(set(answers)) < 2 else [without_punctuation(a) for a in answers]
    same = sum(truth == given for truth in truths)
    if not truths:
        return 0.0
    others = [same - (truth == given) for truth in truths]
    return sum(min(1.0, count / 3) for count in others) / len(truths)
