"""`mmgpt generate`: text and pictures from a model, on the console and as files."""

import re
from pathlib import Path
from typing import Literal

import tyro

from mmgpt.generate import outputs
from mmgpt.generate.chat import STDIN, Chat, converse
from mmgpt.generate.decode import PromptError
from mmgpt.generate.model import Model, Order
from mmgpt.generate.outline import AREA, Outline
from mmgpt.generate.prompts import Piece, document_of, outlined, read_image, read_pieces, read_text, read_video
from mmgpt.generate.sampler import Sampler, Sampling


def generate(
    run: tyro.conf.Positional[Path],
    prompt: str = "",
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = (),
    video: Path | None = None,
    shot: tyro.conf.UseAppendAction[tuple[tuple[Path, str], ...]] = (),
    segments: Path | None = None,
    chat: Path | None = None,
    add_frames: int = 0,
    size: str = "",
    frames: int = 0,
    task: str = "",
    negative: str = "",
    out: Path = Path("generated"),
    count: int = 1,
    room: int = 0,
    guidance: float = 1.0,
    image_guidance: float = 1.0,
    temperature: float = 1.0,
    text_temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    text_top_k: int = 0,
    text_top_p: float = 1.0,
    stop: str = "",
    jacobi: int = 0,
    fps: float = outputs.FPS,
    area: int = AREA,
    dtype: Literal["float32", "bfloat16"] | None = None,
    seed: int = 0,
) -> None:
    """Goes on from a prompt of examples, a clip, images and a text, in this order, each if given.

    Args:
        run: run folder of a decoder, or a Hugging Face folder.
        prompt: text; it follows the media.
        image: picture file that the prompt shows; give it again for more of them.
        video: MP4 file that the prompt shows.
        shot: an example, a picture file and its text, that stands before all else; give it again for more of them.
        segments: JSON list of {"text": ...}, {"image": FILE}, {"video": FILE}, the whole prompt in its order.
        chat: such a list of turns with a "role", user or assistant; each turn of the user without an answer is
            answered. "-" reads turns from standard input, one a line.
        add_frames: frames to add to the video, which must then be the whole prompt.
        size: draw at once, H*W places of the code grid, or H*Wpx in pixels; by default the model chooses what and when.
        frames: draw a clip of so many frames, of --size or of the largest size that the model knows.
        task: word for the task in a published model's template, such as t2i, x2i, story.
        negative: text that guidance pushes away from.
        out: folder for pictures (PNG), clips (MP4, GIF) and index.html.
        count: how many to make.
        room: new tokens at most; 0 takes what a training row has left.
        guidance: classifier-free guidance of visual codes, away from the negative prompt; 1 turns it off.
        image_guidance: guidance towards the prompt's pictures, in a third branch; 1 turns it off.
        temperature: of visual codes; 0 takes the likeliest.
        text_temperature: of text; 0 takes the likeliest.
        top_k: visual codes that are sampled from; 0 takes all.
        top_p: smallest set of visual codes with this probability that is sampled from.
        text_top_k: text pieces that are sampled from; 0 takes all.
        text_top_p: smallest set of text pieces with this probability that is sampled from.
        stop: text piece that ends an answer.
        jacobi: tokens that one pass drafts and verifies, which draws the same in fewer passes; 0 takes one a pass.
        fps: frames a second of clips.
        area: pixels of a picture, for a model that was trained elsewhere.
        dtype: numbers that the model computes in; by default its own.
        seed: of sampling; another one makes others.
    """
    _check(count, seed, add_frames, frames, fps, chat)
    said = _pieces(prompt, image, video, shot, segments, chat)
    outline = Outline.read(run, area=area)
    order = _order(outline, size, frames, add_frames, task, negative, said)
    if said:  # before anything is loaded; the clip's or picture's own codes are at least as long
        outline.room(outlined(outline, said), order, room)
    sampling = Sampling(
        guidance=guidance,
        image_guidance=image_guidance,
        text=Sampler(temperature=text_temperature, top_k=text_top_k, top_p=text_top_p),
        image=Sampler(temperature=temperature, top_k=top_k, top_p=top_p),
        seed=seed,
        stop=outline.text.symbol(stop) if stop else -1,
        jacobi=jacobi,
    )
    model = Model.open(run, batch=count, clips=True, dtype=dtype, area=area)
    if chat is not None:
        converse(Chat(model, sampling.replace(room=room or 512), order), said, out, fps, live=chat == STDIN)
        return
    document = document_of(model, *said)
    sampling = sampling.replace(room=model.outline.room(document, order, room))
    made = model.go_on([document] * count, sampling, order=order)
    outputs.write(out, made, prompt or "mmgpt generate", fps)


def _check(count: int, seed: int, add_frames: int, frames: int, fps: float, chat: Path | None) -> None:
    if count < 1:
        raise PromptError(f"--count is {count}: ask for at least one.")
    if chat is not None and count > 1:
        raise PromptError(f"--count is {count}: a conversation has one answer to each turn.")
    if not 0 <= seed < 2**31:
        raise PromptError(f"--seed is {seed}; it goes from 0 to {2**31 - 1}.")
    if not 0 < fps <= 1000:
        raise PromptError(f"--fps is {fps}; give frames a second, up to 1000.")
    for name, value in (("--add-frames", add_frames), ("--frames", frames)):
        if value < 0:
            raise PromptError(f"{name} is {value}; give how many frames, or 0.")
    if add_frames and frames:
        raise PromptError("--frames draws a clip and --add-frames goes on with one; give one of them.")


def _pieces(
    prompt: str,
    image: tuple[Path, ...],
    video: Path | None,
    shot: tuple[tuple[Path, str], ...],
    segments: Path | None,
    chat: Path | None,
) -> list[Piece]:
    """The prompt's pieces in order."""
    listed = segments or chat
    if listed is not None and (prompt or image or video or shot or (segments and chat)):
        raise PromptError("--segments and --chat are the whole prompt: give one of them, without other parts.")
    if listed == STDIN:
        return []
    if listed is not None:
        return read_pieces(listed)
    found = [piece for path, text in shot for piece in (read_image(path), read_text(text, where="--shot"))]
    found += [] if video is None else [read_video(video)]
    found += [read_image(path) for path in image]
    return found + ([read_text(prompt)] if prompt else [])


def _order(
    outline: Outline, size: str, frames: int, add_frames: int, task: str, negative: str, said: list[Piece]
) -> Order:
    if add_frames and (len(said) != 1 or not said[0].clip):
        raise PromptError("--add-frames goes on with a video: give --video alone, without --image and --prompt.")
    sides = _sides(outline, size) if size else None
    if frames and sides is None:
        clips = [(H, W) for T, H, W in outline.sizes if T] or [(H, W) for _, H, W in outline.sizes]
        if not clips:
            raise PromptError("--frames: this run was trained without pictures; give a text prompt alone.")
        sides = max(clips, key=lambda sides: sides[0] * sides[1])
    return Order(
        size=sides,
        frames=-(-frames // outline.temporal),
        add_frames=-(-add_frames // outline.temporal),
        task=task,
        negative=read_text(negative, where="--negative").text,
    )


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
