"""Words as the Java program gives them: a table that it made, and the program itself where there is Java."""

import importlib.util
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from mmgpt.evaluate.metrics.words import words

PUNCTUATION = "'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;"
"""What COCO drops, as its own script lists it."""

TABLE = {
    "A man's dog can't jump; it cannot (really)!": "a man 's dog ca n't jump it can not -lrb- really -rrb-",
    'The sign says "STOP" at 12:30, in the U.S. today.': "the sign says stop at 12:30 in the u.s. today",
    "black-and-white cat and/or dog": "black-and-white cat and/or dog",
    "I'm gonna pay $5.50 for 50% off #1 items & more...": "i 'm gon na pay $ 5.50 for 50 % off # 1 items & more",
    "Mr. Smith sits. The dog's at 5 p.m. in St. Louis": "mr. smith sits the dog 's at 5 p.m. in st. louis",
    "two-way street -- 1/2 mile, 1,000 people?": "two-way street 1/2 mile 1,000 people",
    "it's 5 o'clock; they'd we've he'll you're": "it 's 5 o'clock they 'd we 've he 'll you 're",
    "a 'quoted' word and the boys' toys": "a quoted word and the boys toys",
    "wanna lemme gimme gotta": "wan na lem me gim me got ta",
    "A fine café — naïve…": "a fine café naïve",
    "3rd base 20's '90s 70s": "3rd base 20 's '90s 70s",
    "cat,dog;bird:fish": "cat dog bird fish",
    "end of line!!!": "end of line !!!",
    "No. 5 vs. 6, I said no.": "no. 5 vs. 6 i said no",
    "[bracket] {brace} <tag> *star*": "-lsb- bracket -rsb- -lcb- brace -rcb- <tag> * star *",
    "Vitamin A. near 5th Ave.": "vitamin a. near 5th ave.",
    "rock 'n' roll, y'all": "rock 'n' roll y' all",
    "": "",
}


@pytest.mark.parametrize("caption", TABLE)
def test_words_are_those_of_the_java_program(caption: str):
    assert " ".join(words(caption)) == TABLE[caption]


@pytest.mark.skipif(
    shutil.which("java") is None, reason="no Java here: the table above stands for Stanford's PTBTokenizer"
)
def test_the_java_program_agrees(tmp_path: Path):
    """On captions made at random of what captions are made of."""
    package = importlib.util.find_spec("pycocoevalcap.tokenizer")
    assert package is not None and package.submodule_search_locations is not None
    jar = next(Path(package.submodule_search_locations[0]).glob("stanford-corenlp-*.jar"))
    rng = random.Random(0)
    nouns = "dog cat man's kids' women's t-shirt skateboard iPhone U.S. flag Macy's St. Louis it's don't cannot"
    marks = [", ", " ", " ", " ", " and ", "; ", ": ", " - ", " -- ", " & ", " (", ") ", ' "', '" ', "! ", "? ", ". "]
    numbers = "5 1,000 12:30 1/2 50% $5 #1 3rd 20's 1950s 10:10 a.m. 4x4 w/"
    captions = list(TABLE)[:-1]
    for _ in range(400):
        parts = [rng.choice(("a", "The", "two", "white"))]
        for _ in range(rng.randint(2, 9)):
            parts += [rng.choice(marks), rng.choice((nouns if rng.random() < 0.8 else numbers).split())]
        captions.append(" ".join("".join(parts).split()) + rng.choice(("", ".", " .", "!")))
    file = tmp_path / "captions.txt"
    file.write_text("\n".join(captions))
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", file]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    theirs = [[word for word in line.split() if word not in PUNCTUATION.split()] for line in lines[: len(captions)]]
    differing = [(c, t, words(c)) for c, t in zip(captions, theirs, strict=True) if words(c) != t]
    assert len(differing) <= 0.005 * len(captions), differing[:20]
