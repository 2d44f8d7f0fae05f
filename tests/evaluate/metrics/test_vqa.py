"""The rule of VQA v2: its normalisation as published, and its accuracy against brute force."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmgpt.evaluate.metrics.vqa import CONTRACTIONS, PUNCTUATION, normalised, vqa_accuracy, without_punctuation

NORMALISED = {
    "Two": "2",
    "none": "0",
    "The dog": "dog",
    "a man and an apple": "man and apple",
    "yes.": "yes",
    "1.5": "1.5",
    "U.S.A.": "USA".lower(),
    "3,000": "3000",
    "red, white": "red white",
    "red,white": "red white",
    "half-time": "half time",
    "half -time": "half time",
    "dont": "don't",
    "shouldnt've": "shouldn't've",
    "somebody'd": "somebodyd",
    "y'all'dve": "y'all'd've",
    "  Yes\n": "yes",
    "no\tway": "no way",
    "what?": "what",
    "it's": "it's",
    "ten   eleven": "10 eleven",
    "a": "",
    "1,5 and-so": "15 andso",
    "Im": "im",
    "10:30": "10:30",
}
"""Answers as the official program normalises them."""

OFFICIAL = """
aint ain't arent aren't cant can't couldve could've couldnt couldn't couldn'tve couldn't've couldnt've couldn't've
didnt didn't doesnt doesn't dont don't hadnt hadn't hadnt've hadn't've hadn'tve hadn't've hasnt hasn't havent haven't
hed he'd hed've he'd've he'dve he'd've hes he's howd how'd howll how'll hows how's isnt isn't itd it'd itd've it'd've
it'dve it'd've itll it'll maam ma'am mightnt mightn't mightnt've mightn't've mightn'tve mightn't've mightve might've
mustnt mustn't mustve must've neednt needn't notve not've oclock o'clock oughtnt oughtn't ow's'at 'ow's'at 'ows'at
'ow's'at 'ow'sat 'ow's'at shant shan't shed've she'd've she'dve she'd've shouldve should've shouldnt shouldn't
shouldnt've shouldn't've shouldn'tve shouldn't've somebody'd somebodyd somebodyd've somebody'd've somebody'dve
somebody'd've somebodyll somebody'll somebodys somebody's someoned someone'd someoned've someone'd've someone'dve
someone'd've someonell someone'll someones someone's somethingd something'd somethingd've something'd've something'dve
something'd've somethingll something'll thats that's thered there'd thered've there'd've there'dve there'd've therere
there're theres there's theyd they'd theyd've they'd've they'dve they'd've theyll they'll theyre they're theyve they've
twas 'twas wasnt wasn't wed've we'd've we'dve we'd've weve we've werent weren't whatll what'll whatre what're whats
what's whatve what've whens when's whered where'd wheres where's whereve where've whod who'd whod've who'd've who'dve
who'd've wholl who'll whos who's whove who've whyll why'll whyre why're whys why's wont won't wouldve would've wouldnt
wouldn't wouldnt've wouldn't've wouldn'tve wouldn't've yall y'all yall'll y'all'll y'allll y'all'll yall'd've y'all'd've
y'alld've y'all'd've y'all'dve y'all'd've youd you'd youd've you'd've you'dve you'd've youll you'll youre you're youve
you've
"""
"""Each contraction as it is found, and as the official program writes it."""


@pytest.mark.parametrize("answer", NORMALISED)
def test_answers_are_normalised_as_published(answer: str):
    assert normalised(answer) == NORMALISED[answer]


def test_contractions_are_the_published_ones():
    found, written = OFFICIAL.split()[::2], OFFICIAL.split()[1::2]
    assert dict(zip(found, written, strict=True)) == CONTRACTIONS


def brute(answer: str, answers: list[str]) -> float:
    """The rule said another way: for each person, how many of all the others said the same, a third each."""

    def marks(text: str) -> str:
        kept = []
        for character in text:
            if character not in PUNCTUATION:
                kept.append(character)
            elif not re.search("[0-9],[0-9]", text) and not re.search(
                re.escape(character) + " | " + re.escape(character), text
            ):
                kept.append(" ")
        out = ""
        for i, character in enumerate(kept):
            after = kept[i + 1] if i + 1 < len(kept) else ""
            out += character if character != "." or after.isdigit() else ""
        return out

    numbers = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    said = []
    for word in marks(answer.replace("\n", " ").replace("\t", " ").strip()).lower().split():
        word = "0" if word == "none" else str(numbers.index(word)) if word in numbers else word
        if word not in ("a", "an", "the"):
            said.append(CONTRACTIONS.get(word, word))
    people = answers if len(set(answers)) == 1 else [marks(a) for a in answers]
    total = 0.0
    for left_out in range(len(people)):
        others = people[:left_out] + people[left_out + 1 :]
        total += min(sum(other == " ".join(said) for other in others) / 3, 1)
    return total / len(people)


ANSWER = st.sampled_from(["yes", "no", "2", "two", "a dog", "dog.", "red-white", "red, white", "1,000", "it's", "its"])


@given(answer=ANSWER | st.text("abe 1,.-'!\n", max_size=8), answers=st.lists(ANSWER, min_size=1, max_size=10))
def test_accuracy_is_that_of_brute_force(answer: str, answers: list[str]):
    assert vqa_accuracy(answer, answers) == pytest.approx(brute(answer, answers), abs=1e-12)


@pytest.mark.parametrize(("count", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_accuracy_by_how_many_of_ten_agree(count: int, accuracy: float):
    """The table that the challenge gives."""
    assert vqa_accuracy("Yes!", ["yes"] * count + ["no"] * (10 - count)) == pytest.approx(accuracy)


def test_no_answers_are_no_accuracy_and_at_most_32_stops_go():
    assert vqa_accuracy("yes", []) == 0.0
    assert without_punctuation("a." * 40) == "a" * 32 + "a." * 8
