"""Which ids a grammar uses: those of a published tokenizer, or the parts one after another."""

from collections.abc import Mapping

from mmgpt.tokens.grammars.grammar import GrammarError
from mmgpt.tokens.text import TextTokenizer
from mmgpt.tokens.vocabulary import Vocabulary

FIRST_CODE = "<|visual token 000000|>"
"""The first visual code, where a text tokenizer lists them among its specials."""
_CODE = FIRST_CODE.split("0")[0]


def id_space(
    name: str,
    text: TextTokenizer,
    tokens: Mapping[str, str],
    codebooks: tuple[int, ...],
    *,
    codes: int,
    actions: int = 0,
) -> Vocabulary:
    """The ids of a grammar's controls and codes over a text tokenizer.

    `tokens` names for each control the special that it is in the published tokenizer, "" where it is none there; a
    tokenizer with these specials gives their ids, and its visual codes start where they did when the model was
    published, which had `codes` of them. Over any other tokenizer the controls follow the text. GrammarError when a
    tokenizer has some of the specials but not all, or the codes are too many.
    """
    specials = text.specials
    after = max([text.size, *(i + 1 for i in specials.values())])
    wanted = [token for token in tokens.values() if token]
    missing = [token for token in wanted if token not in specials]
    if len(missing) == len(wanted):
        return Vocabulary.own(text=text.size, controls=tuple(tokens), codebooks=codebooks, actions=actions, start=after)
    if missing:
        raise GrammarError(
            f"the {name} grammar needs specials that this text tokenizer lacks: {', '.join(missing)}. Give the "
            "tokenizer that the model was published with, or train your own with `mmgpt tokenize text`."
        )
    ids = {control: specials[token] for control, token in tokens.items() if token}
    for control in (control for control, token in tokens.items() if not token):
        ids[control], after = after, after + 1
    room = min(codes, sum(token.startswith(_CODE) for token in specials) or codes)
    if sum(codebooks) > room:
        raise GrammarError(
            f"the image tokenizer has {sum(codebooks)} visual codes, where the {name} grammar over its published text "
            f"tokenizer has ids for {room}. Give the image tokenizer or the grammar that belongs to the other."
        )
    if actions > text.size:
        raise GrammarError(f"{actions} action codes do not fit the text tokenizer's {text.size} ids; give fewer.")
    return Vocabulary(
        text=text.size,
        controls=ids,
        codebooks=codebooks,
        visual_start=specials.get(FIRST_CODE, after),
        actions=actions,
        actions_in_text=actions > 0,
    )
