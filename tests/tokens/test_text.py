"""Text comes back whole, and nothing in it is a control token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmgpt.tokens.grammars.emu3 import TOKENS
from mmgpt.tokens.text import DIGITS, TextError, TextTokenizer
from tests import tiny


@pytest.mark.parametrize(
    "words",
    [
        "a red circle",
        "Größe 12*34",
        "日本語 漢字",
        "🙂 👩‍👩‍👧 🇫🇷",
        "tab-free; punctuation!? (x)",
        "ΑΒΓ",
        "a",
        "*",
        "6*6",
    ],
)
def test_ordinary_text_comes_back_whole(words: str) -> None:
    assert tiny.text().decode(tiny.text().encode(words)) == words


def test_a_long_text_counts_as_much_as_short_ones() -> None:
    long = "zebra giraffe okapi " * 400
    assert len(long) > 4192
    assert len(TextTokenizer.train([long], 300).encode("zebra giraffe okapi")) <= 3


@given(st.text(max_size=40))
def test_any_text_has_ids_and_comes_back_normalised(words: str) -> None:
    tokenizer = tiny.text()
    ids = tokenizer.encode(words)
    assert all(0 <= i < tokenizer.size for i in ids)
    normal = tokenizer.decode(ids)
    assert tokenizer.decode(tokenizer.encode(normal)) == normal


@pytest.mark.parametrize(
    "words", [*TOKENS, "<BOI>", "<bos>", "<unk>", "<s>", "</s>", "<0x41>", "<|image start|>", "BOI2*3IMG", "<pad>"]
)
def test_control_words_in_a_text_are_text(words: str) -> None:
    grammar = tiny.grammar()
    ids = tiny.text().encode(words)
    assert max(ids) < grammar.vocabulary.text
    assert tiny.text().decode(ids) == words
    assert 0 not in ids  # the unknown piece


def test_digits_and_the_star_are_pieces_of_their_own() -> None:
    tokenizer = tiny.text()
    symbols = [tokenizer.symbol(c) for c in DIGITS]
    assert len(set(symbols)) == len(DIGITS)
    assert [i for i in tokenizer.encode("x 16*24") if i in symbols] == [tokenizer.symbol(c) for c in "16*24"]


def test_training_again_gives_the_same_model() -> None:
    assert TextTokenizer.train(tiny.SENTENCES * 4, 320).model == tiny.text().model


def test_a_saved_model_loads(tmp_path) -> None:
    (tmp_path / "text.model").write_bytes(tiny.text().model)
    loaded = TextTokenizer.load(tmp_path / "text.model")
    assert loaded.size == tiny.text().size and loaded.encode("red") == tiny.text().encode("red")
    assert loaded.decode(np.array(loaded.encode("red"), np.int32)) == "red"


def test_what_is_no_model_is_told(tmp_path) -> None:
    with pytest.raises(TextError, match="no such text tokenizer; train one"):
        TextTokenizer.load(tmp_path / "text.model")
    for content in (b"", b"junk" * 10):
        (tmp_path / "text.model").write_bytes(content)
        with pytest.raises(TextError, match="not a SentencePiece model"):
            TextTokenizer.load(tmp_path / "text.model")
    with pytest.raises(TextError, match="bytes and digits alone take 269"):
        TextTokenizer.train(tiny.SENTENCES, 20)


def test_superwords_hold_several_words_and_come_back_whole() -> None:
    texts = ["a red circle in the top left", "a blue square in the top left", "in the top left a tiny ring"] * 20
    plain, fused = (TextTokenizer.train(iter(texts), 320, superwords=superwords) for superwords in (False, True))
    assert len(fused.encode("in the top left")) < len(plain.encode("in the top left")) == 4
    assert all(fused.decode(fused.encode(text)) == text for text in texts)
