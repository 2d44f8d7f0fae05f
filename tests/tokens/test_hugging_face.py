"""Tokenizers of Hugging Face: the ids of `transformers`, and nothing in a text is a control token."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mmgpt.tokens.text import DIGITS, TextError, TextTokenizer
from mmgpt.tokens.text.hugging_face import HuggingFace
from tests.tokens.test_byte_pairs import texts
from tests.tokens.vocabularies import SENTENCES, trained

CONTROLS = ["<s>", "</s>", "<|image start|>", "<|extra_203|>"]


def llama() -> Tokenizer:
    """Pieces with byte fallback, whose first are controls, and a template that begins a text with one."""
    letters = [chr(i) for i in range(33, 127)] + ["▁", "é", "日", "本"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, "re", "red", "▁red"]
    merges = [("r", "e"), ("re", "d"), ("▁", "red")]
    model = models.BPE(
        {p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    return tokenizer


def unigram() -> Tokenizer:
    """A unigram model, whose vocabulary holds the names of its controls."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((chr(i), -3.0) for i in range(33, 127)), ("▁", -2.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def qwen() -> Tokenizer:
    """Byte pairs with controls after them, one of them not marked as special, and a run of spaces as text."""
    tokenizer = Tokenizer.from_str(trained().to_str())
    tokenizer.add_special_tokens(CONTROLS)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("        ", special=False)])
    return tokenizer


every = pytest.mark.parametrize("make", [llama, unigram, qwen])


@every
@given(
    words=texts()
    | st.text(max_size=20)
    | st.lists(st.sampled_from([*CONTROLS, "<think>", "<unk>", "a", " "])).map("".join)
)
def test_no_text_holds_a_control(make: Callable[[], Tokenizer], words: str) -> None:
    tokenizer = HuggingFace(make().to_str())
    ids = tokenizer.encode(words)
    unknown = {0} if make is unigram else set()  # what it says for a character that it does not know
    assert not set(ids) & (set(tokenizer.specials.values()) - unknown)
    assert all(0 <= i < tokenizer.size for i in ids)


@given(words=texts())
def test_a_text_of_byte_pairs_comes_back(words: str) -> None:
    tokenizer = HuggingFace(qwen().to_str())
    assert tokenizer.decode(tokenizer.encode(words)) == trained().normalizer.normalize_str(words)


@pytest.mark.parametrize("words", [*SENTENCES[:3], "red <s> ring </s>", "日本 red", "<unk><s>", "a\n b"])
def test_a_text_of_pieces_comes_back(words: str) -> None:
    tokenizer = HuggingFace(llama().to_str())
    assert tokenizer.decode(tokenizer.encode(words)) == words


@every
def test_ids_are_those_of_transformers(make: Callable[[], Tokenizer]) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference has no CPU build here")
    ours = HuggingFace(make().to_str())
    made = make()
    made.no_truncation()
    made.no_padding()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=made, split_special_tokens=True)
    plain = [s for s in SENTENCES if make is not unigram or s.isascii()]
    for words in [*plain, "  ".join(plain), "12*3", "a        b", "red red"]:
        assert ours.encode(words) == theirs.encode(words, add_special_tokens=False)


def test_specials_are_the_controls_and_size_counts_text() -> None:
    tokenizer = HuggingFace(qwen().to_str())
    n = trained().get_vocab_size()
    assert tokenizer.specials == {name: n + i for i, name in enumerate([*CONTROLS, "<think>"])}
    assert tokenizer.size == n + 6 and n + 5 in tokenizer.encode("a        b")
    pieces = HuggingFace(llama().to_str())
    assert pieces.specials == {"<unk>": 0, "<s>": 1, "</s>": 2} and pieces.size == 360
    for made in (tokenizer, pieces):
        symbols = [made.symbol(c) for c in DIGITS]
        assert len(set(symbols)) == len(DIGITS) and made.decode(symbols) == DIGITS
    with pytest.raises(TextError, match="no token '<s>'"):
        pieces.symbol("<s>")


def test_a_file_loads_alone_and_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(qwen().to_str())
    for path in (tmp_path / "tokenizer.json", tmp_path):
        loaded = TextTokenizer.load(path)
        assert isinstance(loaded, HuggingFace) and loaded.encode("red ring") == trained().encode("red ring").ids


def test_what_is_no_tokenizer_is_told(tmp_path: Path) -> None:
    whole = qwen().to_str()
    other = json.dumps({"added_tokens": [], "model": {"type": "Nonsense"}})
    for content in ("", whole[: len(whole) // 2], "[]", "3", "{}", '{"added_tokens": [], "model": null}', other, '"x"'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(TextError, match=r"tokenizer.json: not a tokenizer .*Fetch it again"):
            TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe" * 20)
    with pytest.raises(TextError, match=r"tokenizer.json: not a tokenizer"):
        TextTokenizer.load(tmp_path)
