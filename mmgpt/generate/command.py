"""`mmgpt generate`: text and pictures from a model, on the console and as files."""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmgpt.core.log import check_writable
from mmgpt.generate import outputs
from mmgpt.generate.chat import STDIN, Chat, converse
from mmgpt.generate.decode import PromptError
from mmgpt.generate.model import Model, Order
from mmgpt.generate.outline import AREA, Outline
from mmgpt.generate.prompts import Piece, document_of, outlined, read_image, read_pieces, read_text, read_video
from mmgpt.generate.sampler import Sampler, Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Said:
    """What the prompt holds: examples, a clip, images and a text, in this order, or a file with all of it."""

    prompt: str = ""
    """text; it follows the media."""
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """picture file that the prompt shows; give it again for more of them."""
    video: Path | None = None
    """MP4 file that the prompt shows."""
    shot: tyro.conf.UseAppendAction[tuple[tuple[Path, str], ...]] = ()
    """an example, a picture file and its text, that stands before all else; give it again for more of them."""
    segments: Path | None = None
    """JSON list of {"text": ...}, {"image": FILE}, {"video": FILE}, the whole prompt in its order."""
    chat: Path | None = None
    """such a list of turns with a "role", user or assistant; each turn of the user without an answer is answered. "-"
    reads turns from standard input, one a line."""

    def pieces(self) -> list[Piece]:
        """The prompt's pieces in order."""
        listed = self.segments or self.chat
        others = self.prompt or self.image or self.video or self.shot or (self.segments and self.chat)
        if listed is not None and others:
            raise PromptError("--segments and --chat are the whole prompt: give one of them, without other parts.")
        if self.chat == STDIN:
            return []
        if listed is not None:
            return read_pieces(listed)
        found = [piece for path, text in self.shot for piece in (read_image(path), read_text(text, where="--shot"))]
        found += [] if self.video is None else [read_video(self.video)]
        found += [read_image(path) for path in self.image]
        return found + ([read_text(self.prompt)] if self.prompt else [])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be made of it, by default whatever the model chooses."""

    add_frames: int = 0
    """frames to add to the video, which must then be the whole prompt."""
    size: str = ""
    """draw at once, H*W places of the code grid, or H*Wpx in pixels; by default the model chooses what and when."""
    frames: int = 0
    """draw a clip of so many frames, of --size or of the largest size that the model knows."""
    task: str = ""
    """word for the task in a published model's template, such as t2i, x2i, story."""
    negative: str = ""
    """text that guidance pushes away from."""
    count: int = 1
    """how many to make."""
    room: int = 0
    """new tokens at most; 0 takes what a training row has left."""
    fps: float = outputs.FPS
    """frames a second of clips."""

    def check(self) -> None:
        """PromptError on numbers that cannot be."""
        if self.count < 1:
            raise PromptError(f"--count is {self.count}: ask for at least one.")
        if not 0 < self.fps <= 1000:
            raise PromptError(f"--fps is {self.fps}; give frames a second, up to 1000.")
        for name, value in (("--add-frames", self.add_frames), ("--frames", self.frames)):
            if value < 0:
                raise PromptError(f"{name} is {value}; give how many frames, or 0.")
        if self.add_frames and self.frames:
            raise PromptError("--frames draws a clip and --add-frames goes on with one; give one of them.")

    def order(self, outline: Outline, said: list[Piece]) -> Order:
        """The same in places of the model's code grid."""
        if self.add_frames and (len(said) != 1 or not said[0].clip):
            raise PromptError("--add-frames goes on with a video: give --video alone, without --image and --prompt.")
        sides = _sides(outline, self.size) if self.size else None
        if self.frames and sides is None:
            clips = [(H, W) for T, H, W in outline.sizes if T] or [(H, W) for _, H, W in outline.sizes]
            if not clips:
                raise PromptError("--frames: this run was trained without pictures; give a text prompt alone.")
            sides = max(clips, key=lambda sides: sides[0] * sides[1])
        return Order(
            size=sides,
            frames=-(-self.frames // outline.temporal),
            add_frames=-(-self.add_frames // outline.temporal),
            task=self.task,
            negative=read_text(self.negative, where="--negative").text,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """How ids are chosen."""

    guidance: float = 1.0
    """classifier-free guidance of visual codes, away from the negative prompt; 1 turns it off."""
    image_guidance: float = 1.0
    """guidance towards the prompt's pictures, in a third branch; 1 turns it off."""
    temperature: float = 1.0
    """of visual codes; 0 takes the likeliest."""
    text_temperature: float = 0.0
    """of text; 0 takes the likeliest."""
    top_k: int = 0
    """visual codes that are sampled from; 0 takes all."""
    top_p: float = 1.0
    """smallest set of visual codes with this probability that is sampled from."""
    text_top_k: int = 0
    """text pieces that are sampled from; 0 takes all."""
    text_top_p: float = 1.0
    """smallest set of text pieces with this probability that is sampled from."""
    stop: str = ""
    """text piece that ends an answer."""
    jacobi: int = 0
    """tokens that one pass drafts and verifies, which draws the same in fewer passes; 0 takes one a pass."""
    seed: int = 0
    """of sampling; another one makes others."""

    def sampling(self, outline: Outline) -> Sampling:
        """The same with the stop piece's id; PromptError or ConfigError on what cannot be."""
        if not 0 <= self.seed < 2**31:
            raise PromptError(f"--seed is {self.seed}; it goes from 0 to {2**31 - 1}.")
        return Sampling(
            guidance=self.guidance,
            image_guidance=self.image_guidance,
            text=Sampler(temperature=self.text_temperature, top_k=self.text_top_k, top_p=self.text_top_p),
            image=Sampler(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p),
            seed=self.seed,
            stop=outline.text.symbol(self.stop) if self.stop else -1,
            jacobi=self.jacobi,
        )


FLAT = tyro.conf.arg(name="")
"""The fields are flags of the command itself."""


def generate(
    run: tyro.conf.Positional[Path],
    said: Annotated[Said, FLAT] = Said(),
    wanted: Annotated[Wanted, FLAT] = Wanted(),
    how: Annotated[How, FLAT] = How(),
    out: Path = Path("generated"),
    area: int = AREA,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> None:
    """Goes on from a prompt of examples, a clip, images and a text, in this order, each if given.

    Args:
        run: run folder of a decoder, or a Hugging Face folder.
        said: the prompt.
        wanted: what to make of it.
        how: how ids are chosen.
        out: folder for pictures (PNG), clips (MP4, GIF) and index.html.
        area: pixels of a picture, for a model that was trained elsewhere.
        dtype: numbers that the model computes in; by default its own.
    """
    wanted.check()
    if said.chat is not None and wanted.count > 1:
        raise PromptError(f"--count is {wanted.count}: a conversation has one answer to each turn.")
    pieces = said.pieces()
    outline = Outline.read(run, area=area)
    order = wanted.order(outline, pieces)
    if pieces:  # before anything is loaded; the clip's or picture's own codes are at least as long
        outline.room(outlined(outline, pieces), order, wanted.room)
    sampling = how.sampling(outline)
    check_writable(out / "index.html")
    model = Model.open(run, batch=wanted.count, clips=True, dtype=dtype, area=area)
    if said.chat is not None:
        chat = Chat(model, sampling.replace(room=wanted.room or 512), order)
        converse(chat, pieces, out, wanted.fps, live=said.chat == STDIN)
        return
    document = document_of(model, *pieces)
    sampling = sampling.replace(room=model.outline.room(document, order, wanted.room))
    made = model.go_on([document] * wanted.count, sampling, order=order)
    outputs.write(out, made, said.prompt or "mmgpt generate", wanted.fps)


def _sides(outline: Outline, size: str) -> tuple[int, int]:
    """Height and width in places."""
    found = re.fullmatch(r"([1-9]\d{0,4})[*x×]([1-9]\d{0,4})(px)?", size)
    if found is None:
        raise PromptError(f"--size is {size!r}; give H*W places of the code grid, as 64*64, or pixels, as 512*512px.")
    height, width = int(found[1]), int(found[2])
    if found[3]:
        if height % outline.patch or width % outline.patch:
            raise PromptError(f"--size is {size}; sides in pixels are multiples of {outline.patch} for this model.")
        height, width = height // outline.patch, width // outline.patch
    outline.grammar.open_image(height, width)  # GrammarError where it cannot be written
    return height, width
