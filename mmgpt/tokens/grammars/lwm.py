"""LWM's layout: frames of one size, one after another, and nothing that says how many (arXiv 2402.08268).

    picture   <vision> frame (EOF frame) x (T - 1) EOV </vision>

From the released `lwm/data.py`, `vision_chat.py` and `vision_generation.py`: 256 codes a frame, 16 x 16. An image is a
picture of one frame, so a clip of one frame comes back as an image, and how long a clip grows is up to the sizes that
the automaton may open. Released LWM spells `<vision>` as several text ids and keeps codes, EOF and EOV in a table of
their own; here each control is one id in the one space, so that no text can be mistaken for it. Its loss is the mean
of text's and vision's means, which no weight of single ids can say: EVEN is next to it.
"""

from mmgpt.tokens.grammars.layout import Layout
from mmgpt.tokens.grammars.raster import Raster, RasterConfig
from mmgpt.tokens.grammars.templates import Template
from mmgpt.tokens.text import TextTokenizer

TOKENS = {"BOS": "<s>", "EOS": "</s>", "PAD": "", "BOI": "", "EOI": "", "EOF": "", "EOV": ""}
"""Controls, and what they are called in Llama's tokenizer."""


class LWM(Raster):
    class Config(RasterConfig):
        """`height` and `width` of every frame, in places."""

        height: int = 16
        width: int = 16

        def build(self, text: TextTokenizer, codebooks: tuple[int, ...], *, blanks: bool = False) -> "LWM":
            return LWM(self, text, codebooks, blanks, grid=(self.height, self.width))

    name = "lwm"
    layout = Layout(eol="never", eof=True, size="fixed")
    tokens = TOKENS
    codes = 8192
    template = Template(before_media="\n", asks={"image": "Generate an image of ", "video": "Generate a video of "})
