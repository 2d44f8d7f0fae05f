"""Emu3's layout: media as `BOI size IMG rows EOF EOI` with a token after every row (arXiv 2409.18869).

    image     BOI H*W IMG (row EOL) x H EOF EOI
    video     BOI T*H*W IMG ((row EOL) x H EOF) x T EOI

Emu3 itself is the case of one codebook and no blanks. Its images and its chat are those of the released
`processing_emu3.py`; how it lays videos out is not public: the size string is UniVLA's, the rows are the image's.
"""

from mmgpt.tokens.grammars.layout import Layout
from mmgpt.tokens.grammars.raster import Raster, RasterConfig
from mmgpt.tokens.grammars.templates import Template
from mmgpt.tokens.text import TextTokenizer

TOKENS = {
    "BOS": "<|extra_203|>",
    "EOS": "<|extra_204|>",
    "PAD": "<|endoftext|>",
    "BOI": "<|image start|>",
    "EOI": "<|image end|>",
    "IMG": "<|image token|>",
    "EOL": "<|extra_200|>",
    "EOF": "<|extra_201|>",
}
"""Controls, and what they are called in the published tokenizer."""


class Emu3(Raster):
    class Config(RasterConfig):
        """Emu3's pretraining by default; see `Weights` for the other stages."""

        def build(self, text: TextTokenizer, codebooks: tuple[int, ...], *, blanks: bool = False) -> "Emu3":
            return Emu3(self, text, codebooks, blanks)

    name = "emu3"
    layout = Layout(eol="each", eof=True, size="sides")
    tokens = TOKENS
    codes = 32_768
    template = Template(assistant=". ASSISTANT:")
