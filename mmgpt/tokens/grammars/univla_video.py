"""UniVLA's layout of Emu3's ids: frames without ends of rows, and robot actions as tokens (arXiv 2506.19850).

    picture   BOI T*H*W IMG (frame EOF) x T EOI
    actions   BOA code* EOA

From the released data set and evaluation of baaivision/UniVLA: an image is a picture of one frame, `1*H*W`, as the
frames of its interleaved form are; so a clip of one frame comes back as an image. A frame's camera views are images
one after the other. Over the published tokenizer action code c is the text id 151642 - c, the rarest first, which
means an action only between BOA and EOA; over another tokenizer the codes follow the visual ones.
"""

from mmgpt.tokens.grammars.emu3 import TOKENS
from mmgpt.tokens.grammars.layout import Layout
from mmgpt.tokens.grammars.raster import Raster, RasterConfig
from mmgpt.tokens.grammars.templates import Template
from mmgpt.tokens.text import TextTokenizer


class UniVLAVideo(Raster):
    class Config(RasterConfig):
        """`actions` codes of the action tokenizer; FAST's has 1024 or 2048."""

        actions: int = 2048

        def build(self, text: TextTokenizer, codebooks: tuple[int, ...], *, blanks: bool = False) -> "UniVLAVideo":
            return UniVLAVideo(self, text, codebooks, blanks, actions=self.actions)

    name = "univla_video"
    layout = Layout(eol="never", eof=True, size="frames")
    tokens = {name: token for name, token in TOKENS.items() if name != "EOL"} | {
        "BOA": "<|extra_198|>",
        "EOA": "<|extra_199|>",
    }
    codes = 32_768
    template = Template(assistant=". ASSISTANT:")
