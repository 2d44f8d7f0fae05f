"""Ids over the published tokenizer are those of the released strings, tokenised as the released tokenizer does."""

import numpy as np
import pytest
import tiktoken
from tokenizers import AddedToken

from mmgpt.core.document import Action, Document, Image, Segment, Text, Video
from mmgpt.tokens import grammars
from mmgpt.tokens.grammars.grammar import Grammar, GrammarError
from mmgpt.tokens.grammars.univla_video import UniVLAVideo
from mmgpt.tokens.text.byte_pairs import SPECIALS, SPLIT
from mmgpt.tokens.text.hugging_face import HuggingFace
from tests import tiny
from tests.tokens.vocabularies import byte_pairs, trained

CODES, ACTIONS = 12, 100
VISUAL = [f"<|visual token {i:06d}|>" for i in range(CODES)]
BOS, EOS, BOI, IMG, EOI = "<|extra_203|>", "<|extra_204|>", "<|image start|>", "<|image token|>", "<|image end|>"
EOL, EOF, BSS, ESS = "<|extra_200|>", "<|extra_201|>", "<|extra_100|>", "<|extra_101|>"
HELLO = "You are a helpful assistant"


def published(string: str) -> list[int]:
    """Ids of a string with control names in it, as `tokenization_emu3.py` gives them: controls allowed anywhere."""
    ranks = byte_pairs().ranks
    specials = {name: len(ranks) + i for i, name in enumerate([*SPECIALS, *VISUAL])}
    return tiktoken.Encoding("emu3", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=specials).encode(
        string, allowed_special="all"
    )


def build(name: str) -> Grammar:
    config = grammars.config(name)
    if isinstance(config, UniVLAVideo.Config):
        config = config.replace(actions=ACTIONS)
    return config.build(byte_pairs(), (CODES,))


def text(words: str, role: str = "") -> Text:
    return Text(ids=np.array(byte_pairs().encode(words), np.int32), role=role)


CODES_HW = np.arange(6, dtype=np.int32).reshape(2, 3)
IMAGE = Image(codes=CODES_HW[..., None], role="user")
VIDEO = Video(codes=np.stack([CODES_HW, CODES_HW + 6])[..., None])
ROWS = ["".join(VISUAL[i] for i in row) for row in CODES_HW]
EMU3_IMAGE = f"{BOI}2*3{IMG}{ROWS[0]}{EOL}{ROWS[1]}{EOL}{EOF}{EOI}"
EMU35_IMAGE = f"{BOI}2*3{IMG}{ROWS[0]}{EOL}{ROWS[1]}{EOI}"
UNIVLA_IMAGE = f"{BOI}1*2*3{IMG}{''.join(ROWS)}{EOF}{EOI}"
LATER = "".join(VISUAL[6:])


def document(*segments: Segment) -> Document:
    return Document(key="", segments=segments)


def test_pictures_are_the_released_strings() -> None:
    for name, image in (("emu3", EMU3_IMAGE), ("emu3_5", EMU35_IMAGE), ("univla_video", UNIVLA_IMAGE)):
        made = build(name).encode(document(text("a red ring"), IMAGE, text("!")))
        assert made.ids.tolist() == published(f"{BOS}a red ring{image}!{EOS}")
    clip = build("univla_video").encode(document(VIDEO)).ids.tolist()
    assert clip == published(f"{BOS}{BOI}2*2*3{IMG}{''.join(ROWS)}{EOF}{LATER}{EOF}{EOI}{EOS}")


def test_actions_are_the_last_text_ids_backwards() -> None:
    grammar = build("univla_video").encode(document(Action(codes=np.array([0, 5, ACTIONS - 1], np.int32))))
    last = byte_pairs().size - 1
    boa, eoa = published("<|extra_198|><|extra_199|>")
    assert grammar.ids.tolist()[1:-1] == [boa, last, last - 5, last - (ACTIONS - 1), eoa]


def test_marks_are_the_released_controls() -> None:
    empty = np.zeros(0, np.int32)
    segments = (
        text("make it", ""),
        Text(ids=empty, role="answer"),
        text("plan", "global_cot"),
        Text(ids=empty, role="/global_cot"),
        text("first", "image_cot"),
        Text(ids=empty, role="/image_cot"),
        IMAGE,
        text("2 s", "time"),
        Text(ids=empty, role="/answer"),
    )
    thoughts = "<|extra_60|>plan<|extra_61|><|extra_50|>first<|extra_51|>"
    wanted = f"{BOS}make it{BSS}{thoughts}{EMU35_IMAGE}<|extra_202|>2 s{ESS}{EOS}"
    assert build("emu3_5").encode(document(*segments)).ids.tolist() == published(wanted)


def test_emu3s_chat_is_the_released_template() -> None:
    """`processing_emu3.py`: "You are a helpful assistant. USER: {image_prompt}{text_prompt}. ASSISTANT:"."""
    grammar = build("emu3")
    asked = document(IMAGE, text("What is it?", "user"))
    assert grammar.prompt(asked).tolist() == published(f"{BOS}{HELLO}. USER: {EMU3_IMAGE}What is it?. ASSISTANT:")
    raw = document(IMAGE, Text(text="What is it?", role="user"))
    assert grammar.prompt(raw).tolist() == grammar.prompt(asked).tolist()
    plain = document(text("a portrait of young girl."))
    opened = [*grammar.prompt(plain), *grammar.open_image(90, 90)]
    assert opened == published(f"{BOS}a portrait of young girl.{BOI}90*90{IMG}")
    assert grammar.negative(plain, text="lowres, blurry.").tolist() == published(f"{BOS}lowres, blurry.")
    assert grammar.negative(asked).tolist() == published(BOS)


def test_turns_follow_each_other() -> None:
    said = (text("Hi", "user"), text("Hello you.", "assistant"), text("Draw", "user"))
    assert build("emu3").prompt(document(*said)).tolist() == published(
        f"{BOS}{HELLO}. USER: Hi. ASSISTANT:Hello you. USER: Draw. ASSISTANT:"
    )
    assert build("emu3_5").prompt(document(*said), task="story").tolist() == published(
        f"{BOS}{HELLO} for story task. USER: Hi ASSISTANT: {BSS}Hello you.{ESS} USER: Draw ASSISTANT: {BSS}"
    )
    begun = build("emu3_5").prompt(document(*said[:2])).tolist()
    assert begun == published(f"{BOS}{HELLO}. USER: Hi ASSISTANT: {BSS}Hello you.")


def test_emu35s_prompts_are_the_released_templates() -> None:
    """`configs/config.py` and `example_config_x2i.py`: template and unconditional prompt, with and without pictures."""
    grammar = build("emu3_5")
    drawn = document(text("a cat", "user"))
    assert grammar.prompt(drawn, task="t2i").tolist() == published(
        f"{BOS}{HELLO} for t2i task. USER: a cat ASSISTANT: {BSS}"
    )
    assert grammar.negative(drawn, task="t2i").tolist() == published(f"{BOS}{HELLO}. USER:  ASSISTANT: {BSS}")
    for first in (True, False):  # x2i has the pictures before the question, the other tasks after it
        parts = [IMAGE, IMAGE, text("swap", "user")]
        changed = document(*(parts if first else reversed(parts)))
        asked = f"{EMU35_IMAGE * 2}swap" if first else f"swap{EMU35_IMAGE * 2}"
        assert grammar.prompt(changed, task="x2i").tolist() == published(
            f"{BOS}{HELLO} for x2i task. USER: {asked} ASSISTANT: {BSS}"
        )
        frame = f"{BOS}{HELLO}. USER: {{}}{EMU35_IMAGE * 2} ASSISTANT: {BSS}"
        assert grammar.negative(changed, task="x2i").tolist() == published(frame.format(""))
        assert grammar.negative(changed, task="x2i", text="ugly").tolist() == published(frame.format("ugly"))
    bare = document(text("a cat"), Image(codes=IMAGE.codes))
    assert grammar.prompt(bare).tolist() == published(f"{BOS}a cat{EMU35_IMAGE}")
    assert grammar.negative(bare, text="ugly").tolist() == published(f"{BOS}ugly{EMU35_IMAGE}")


def lwm() -> tuple[Grammar, HuggingFace]:
    made = type(trained()).from_str(trained().to_str())
    made.add_special_tokens(["<s>", "</s>"])
    tokenizer = HuggingFace(made.to_str())
    config = grammars.config("lwm")
    return config.replace(height=2, width=3).build(tokenizer, (CODES,)), tokenizer


def test_lwms_prompts_are_the_released_templates() -> None:
    """`vision_chat.py` and `vision_generation.py`; the picture's controls are ids of our own."""
    grammar, tokenizer = lwm()
    control = grammar.vocabulary.control
    assert control("BOS") == tokenizer.specials["<s>"] and control("EOS") == tokenizer.specials["</s>"]
    assert min(control(c) for c in ("PAD", "BOI", "EOI", "EOF", "EOV")) > max(tokenizer.specials.values())
    frame = [grammar.vocabulary.visual_start + i for i in range(6)]
    picture = [control("BOI"), *frame, control("EOV"), control("EOI")]
    words = tokenizer.encode
    asked = grammar.prompt(document(text("What is it?", "user"), IMAGE)).tolist()
    assert asked == [control("BOS"), *words(f"{HELLO}. USER: What is it?\n"), *picture, *words(" ASSISTANT:")]
    for task in ("image", "video"):
        drawn = grammar.prompt(document(text("a cat", "user")), task=task).tolist()
        article = {"image": "an image", "video": "a video"}[task]
        assert drawn == [control("BOS"), *words(f"{HELLO}. USER: Generate {article} of a cat ASSISTANT: ")]
    unconditional = [*grammar.negative(document()), *grammar.open_image(2, 3)]
    assert unconditional == [control("BOS"), control("BOI")]


def test_a_model_over_its_own_tokenizer_has_read_no_template() -> None:
    words = np.array(tiny.text().encode("what colour"), np.int32)
    asked = document(Text(ids=words, role="user"))
    for name in grammars.names():
        grammar = grammars.config(name).build(tiny.text(), (CODES,))
        assert grammar.prompt(asked, task="t2i").tolist() == [grammar.vocabulary.control("BOS"), *words]
        assert grammar.negative(asked).tolist() == [grammar.vocabulary.control("BOS")]


def test_what_does_not_fit_together_is_told() -> None:
    with pytest.raises(GrammarError, match=r"200000 visual codes, where the emu3 grammar .* has ids for 32768"):
        grammars.config("emu3").build(byte_pairs(), (100_000, 100_000))
    lacking = type(trained()).from_str(trained().to_str())
    lacking.add_special_tokens([name for name in SPECIALS if name != "<|extra_60|>"])
    with pytest.raises(GrammarError, match=r"emu3_5 grammar needs specials .* lacks: <\|extra_60\|>\. Give"):
        grammars.config("emu3_5").build(HuggingFace(lacking.to_str()), (CODES,))
    listing = type(trained()).from_str(trained().to_str())
    listing.add_special_tokens([*SPECIALS, "<image>", *VISUAL])
    with pytest.raises(GrammarError, match=f"13 visual codes, .* has ids for {CODES}"):
        grammars.config("emu3").build(HuggingFace(listing.to_str()), (CODES + 1,))
    fits = grammars.config("emu3").build(HuggingFace(listing.to_str()), (CODES,))
    assert fits.vocabulary.visual_start == trained().get_vocab_size() + len(SPECIALS) + 1
    with pytest.raises(GrammarError, match=r"2048 action codes do not fit"):
        grammars.config("univla_video").build(byte_pairs(), (CODES,))


def test_over_another_tokenizer_the_controls_follow_all_of_its_ids() -> None:
    other = type(trained()).from_str(trained().to_str())
    other.add_special_tokens([AddedToken("<begin>", special=True)])
    vocabulary = grammars.config("emu3").build(HuggingFace(other.to_str()), (CODES,)).vocabulary
    assert vocabulary.text == trained().get_vocab_size()
    assert list(vocabulary.controls.values()) == list(range(vocabulary.text + 1, vocabulary.visual_start))
