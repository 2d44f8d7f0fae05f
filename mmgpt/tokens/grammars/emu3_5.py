"""Emu3.5's layout: an end of row between rows only, no end of frame; controls around answers and thoughts.

    image     BOI H*W IMG row (EOL row) x (H - 1) EOI
    answer    BSS segment* ESS
    thought   BOG text EOG for the whole answer, BOC text EOC for the next picture
    time      TMS text

From the released `input_utils.py`, `generation_utils.py` and configs (arXiv 2510.26583). Each control is a mark in the
document (see MARKS): a text of this role follows it. What the released code leaves open is decided so: thoughts hold
text alone and end before the document does, an answer need not, and the text of a time is the data's. A clip is laid
out as its frames, an image each, as the paper's keyframes are: so it comes back as images.
"""

import dataclasses

import numpy as np

from mmgpt.core.document import Document, Text
from mmgpt.tokens.grammars.emu3 import TOKENS
from mmgpt.tokens.grammars.layout import Layout
from mmgpt.tokens.grammars.marks import Marks
from mmgpt.tokens.grammars.raster import Raster, RasterConfig
from mmgpt.tokens.grammars.templates import SPEAKERS, Template, filled
from mmgpt.tokens.text import TextTokenizer


class Emu35(Raster):
    class Config(RasterConfig):
        """Emu3.5's pretraining by default; see `Weights` for the other stages."""

        def build(self, text: TextTokenizer, codebooks: tuple[int, ...], *, blanks: bool = False) -> "Emu35":
            return Emu35(self, text, codebooks, blanks)

    name = "emu3_5"
    layout = Layout(eol="between", eof=False, size="sides", clips=False)
    tokens = {name: token for name, token in TOKENS.items() if name != "EOF"} | {
        "TMS": "<|extra_202|>",
        "BSS": "<|extra_100|>",
        "ESS": "<|extra_101|>",
        "BOG": "<|extra_60|>",
        "EOG": "<|extra_61|>",
        "BOC": "<|extra_50|>",
        "EOC": "<|extra_51|>",
    }
    codes = 131_072
    marks = Marks(
        {
            "answer": "BSS",
            "/answer": "ESS",
            "global_cot": "BOG",
            "/global_cot": "EOG",
            "image_cot": "BOC",
            "/image_cot": "EOC",
            "time": "TMS",
        }
    )
    template = Template(
        opening="You are a helpful assistant{task}.", task=" for {task} task", assistant=" ASSISTANT: ", marked=True
    )

    def negative(self, document: Document, *, task: str = "", text: str = "") -> np.ndarray:
        """The same frame and pictures without the task's name and without text, but for a negative one."""
        silent = [
            dataclasses.replace(s, ids=np.zeros(0, np.int32), text=None) if isinstance(s, Text) else s
            for s in document.segments
        ]
        chat = self.published and any(s.role in SPEAKERS for s in document.segments)
        if text:
            silent = [Text(text=text, role="user" if chat else ""), *silent]
        bare = dataclasses.replace(document, segments=tuple(silent))
        return self._lay(filled(self.template, bare) if chat else list(bare.segments))
