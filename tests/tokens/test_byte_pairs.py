"""Emu3's byte pairs: the ids of tiktoken's and of Qwen's tokenizer, and nothing in a text is a control token."""

import unicodedata
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from mmgpt.tokens.text import DIGITS, TextError, TextTokenizer
from mmgpt.tokens.text.byte_pairs import SPECIALS, SPLIT, BytePairs
from tests.tokens.vocabularies import SENTENCES, byte_pairs, trained

scripts = st.sampled_from(["ascii", "Latin", "Greek", "Cyrillic", "Han", "Arabic", "Devanagari", "Hangul", "emoji"])
RANGES = {
    "ascii": (0x09, 0x7E),
    "Latin": (0xC0, 0x24F),
    "Greek": (0x370, 0x3FF),
    "Cyrillic": (0x400, 0x4FF),
    "Han": (0x4E00, 0x4FFF),
    "Arabic": (0x600, 0x6FF),
    "Devanagari": (0x900, 0x97F),
    "Hangul": (0x1100, 0x11FF),  # single letters, which NFC composes
    "emoji": (0x1F300, 0x1F5FF),
}


@st.composite
def texts(draw: st.DrawFn) -> str:
    """Words of several scripts, pieces of sentences and controls' names between white space."""
    parts = draw(st.lists(scripts | st.sampled_from(SENTENCES) | st.sampled_from(SPECIALS), max_size=4))
    found = []
    for part in parts:
        characters = (
            st.characters(min_codepoint=RANGES[part][0], max_codepoint=RANGES[part][1]) if part in RANGES else None
        )
        found.append(part if characters is None else draw(st.text(characters, max_size=12)))
    return draw(st.sampled_from(["", " ", "\n", "  ", " \r\n\t"])).join(found)


@given(texts() | st.text(max_size=30))
def test_a_text_comes_back_as_its_nfc(words: str) -> None:
    tokenizer = byte_pairs()
    ids = tokenizer.encode(words)
    assert all(0 <= i < tokenizer.size for i in ids)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", words)


@given(texts())
def test_ids_are_those_of_the_merges(words: str) -> None:
    """`tokenizers` applies the same merges in its own way."""
    assert byte_pairs().encode(words) == trained().encode(words).ids


def test_ids_are_those_of_qwen2s_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference has no CPU build here")
    trained().model.save(str(tmp_path))
    qwen = transformers.Qwen2Tokenizer(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    for words in [*SENTENCES, "  ".join(SENTENCES), "12 345\n\n\n6", "don't I'LL"]:
        assert byte_pairs().encode(words) == qwen.encode(words, add_special_tokens=False)


@pytest.mark.parametrize("name", [*SPECIALS[:4], *SPECIALS[-5:]])
def test_a_controls_name_in_a_text_is_text(name: str) -> None:
    tokenizer = byte_pairs()
    ids = tokenizer.encode(f"a{name} b")
    assert max(ids) < tokenizer.size and tokenizer.decode(ids) == f"a{name} b"
    published = tiktoken.Encoding(
        "emu3", pat_str=SPLIT, mergeable_ranks=byte_pairs().ranks, special_tokens=dict(tokenizer.specials)
    )
    assert max(published.encode(f"a{name} b", allowed_special="all")) >= tokenizer.size


def test_digits_are_single_and_a_size_is_written_with_its_symbols() -> None:
    tokenizer = byte_pairs()
    assert tokenizer.encode("128*96") == [tokenizer.symbol(c) for c in "128*96"]
    assert len({tokenizer.symbol(c) for c in DIGITS}) == len(DIGITS)
    with pytest.raises(TextError, match="no token 'é'"):
        tokenizer.symbol("é")


def test_controls_say_nothing_when_decoded() -> None:
    tokenizer = byte_pairs()
    assert (
        tokenizer.decode([*tokenizer.encode("red"), tokenizer.specials["<|endoftext|>"], *tokenizer.encode(" ring")])
        == "red ring"
    )


def test_specials_follow_the_ranks_in_the_published_order() -> None:
    """The ids of the released `special_tokens_map`, counted from the last rank."""
    specials, n = byte_pairs().specials, byte_pairs().size
    assert len(specials) == 211 and specials["<|endoftext|>"] == n
    published = {"<|extra_0|>": 151646, "<|extra_200|>": 151846, "<|extra_204|>": 151850, "<|image token|>": 151851}
    published |= {"<|image start|>": 151852, "<|image end|>": 151853}
    assert {name: specials[name] - n + 151643 for name in published} == published


def test_a_vocabulary_file_loads_alone_and_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "small.tiktoken").write_text(byte_pairs().text())
    for path in (tmp_path / "small.tiktoken", tmp_path):
        loaded = TextTokenizer.load(path)
        assert isinstance(loaded, BytePairs) and loaded.ranks == byte_pairs().ranks
    (tmp_path / "other.tiktoken").write_text(byte_pairs().text())
    with pytest.raises(TextError, match=r"2 text tokenizers \(other.tiktoken, small.tiktoken\)"):
        TextTokenizer.load(tmp_path)


def test_a_damaged_vocabulary_is_told(tmp_path: Path) -> None:
    whole = byte_pairs().text()
    lines = whole.splitlines(keepends=True)
    for content, message in (
        ("", "misses 256 of the 256 single bytes"),
        (whole[: whole.index(" 500\n")], "line 501 .*the file is cut off"),
        (whole[: whole.index(" 500\n") + 2], "does not number its tokens"),
        ("".join(lines[:200]), "misses 56 of the 256 single bytes"),
        ("".join(lines[:300] + lines[301:]), "does not number its tokens"),
        (whole.replace(" 300\n", " 301\n"), "does not number its tokens"),
        ("junk\n" * 10, "line 1 is b'junk'"),
        ("!!!! 0\n", "line 1 is .*expected a base64 token"),
        (whole.replace(" 300\n", " x\n"), "line 301 .*expected a base64 token and its rank"),
    ):
        (tmp_path / "small.tiktoken").write_text(content)
        with pytest.raises(TextError, match=f"small.tiktoken: .*{message}"):
            TextTokenizer.load(tmp_path / "small.tiktoken")
    (tmp_path / "small.tiktoken").write_bytes(bytes(range(256)) * 9)
    with pytest.raises(TextError, match=r"small.tiktoken: line 1 .*no vocabulary of byte pairs"):
        TextTokenizer.load(tmp_path / "small.tiktoken")


def test_emu3s_own_file_must_be_whole(tmp_path: Path) -> None:
    (tmp_path / "emu3.tiktoken").write_text(byte_pairs().text())  # as if cut at the end of a line
    with pytest.raises(TextError, match=f"{byte_pairs().size} tokens, where Emu3's vocabulary has 151643"):
        TextTokenizer.load(tmp_path)
