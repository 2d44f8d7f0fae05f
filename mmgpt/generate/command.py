"""`mmgpt generate`: text and pictures from a run, on the console and as files."""

import html
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import tyro

from mmgpt.core.document import Document, Video
from mmgpt.core.errors import UserError
from mmgpt.core.log import console, write_atomic
from mmgpt.data.media import MediaError, decode_image, decode_video, encode_gif, encode_png
from mmgpt.generate.decode import Sampling
from mmgpt.generate.model import Continuation, Model, Part, document_of, token_run
from mmgpt.generate.sampler import Sampler

Decoded = TypeVar("Decoded")

FPS = 4.0
"""Frames a second of a GIF."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>mmgpt generate</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; }}
section {{ border-top: 1px solid #8886; padding: .5rem 0; }}
img {{ min-width: 144px; image-rendering: pixelated; }} .given {{ opacity: .65; }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


_UNFINISHED = "The room ended inside a picture or clip: give more --room, a shorter prompt or fewer --add-frames."


class GenerateError(UserError, ValueError):
    """A prompt that cannot be used; the message says what to do."""


def generate(
    run: tyro.conf.Positional[Path],
    prompt: str = "",
    image: Path | None = None,
    video: Path | None = None,
    add_frames: int = 0,
    out: Path = Path("generated"),
    count: int = 1,
    room: int = 0,
    guidance: float = 1.0,
    temperature: float = 1.0,
    text_temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Goes on from a prompt of a clip, an image and a text, in this order, each if given.

    Args:
        run: run folder of a decoder.
        prompt: text; it follows the media.
        image: picture file that the prompt opens with.
        video: MP4 file that the prompt opens with.
        add_frames: frames to add to the video, which must then be the whole prompt.
        out: folder for pictures (PNG), clips (GIF) and index.html.
        count: how many to make.
        room: new tokens at most; 0 takes what a training row has left.
        guidance: classifier-free guidance of visual codes, away from the model without the prompt; 1 turns it off.
        temperature: of visual codes; 0 takes the likeliest.
        text_temperature: of text; 0 takes the likeliest.
        top_k: visual codes that are sampled from; 0 takes all.
        top_p: smallest set of visual codes with this probability that is sampled from.
        seed: of sampling; another one makes others.
    """
    if count < 1:
        raise GenerateError(f"--count is {count}: ask for at least one.")
    if not 0 <= seed < 2**31:
        raise GenerateError(f"--seed is {seed}; it goes from 0 to {2**31 - 1}.")
    if prompt.encode(errors="replace") != prompt.encode(errors="surrogatepass"):
        raise GenerateError("--prompt is not UTF-8; write it in a UTF-8 terminal.")
    if add_frames < 0:
        raise GenerateError(f"--add-frames is {add_frames}; give how many frames to add, or 0.")
    if add_frames and (video is None or image is not None or prompt):
        raise GenerateError("--add-frames goes on with a video: give --video alone, without --image and --prompt.")
    clip = None if video is None else _decoded(video, decode_video)[0]
    pictures = [] if image is None else [_decoded(image, decode_image)]
    model = Model.open(run, batch=count, clips=True)
    document = document_of(model, clip=clip, pictures=pictures, text=prompt)
    sampling = Sampling(
        room=_room(model, document, room, add_frames),
        guidance=guidance,
        text=Sampler(temperature=text_temperature),
        image=Sampler(temperature=temperature, top_k=top_k, top_p=top_p),
        seed=seed,
    )
    made = model.go_on([document] * count, sampling, add_frames)
    write(out, made, prompt or "mmgpt generate")
    console.print(f"wrote {out / 'index.html'}")


def _decoded(path: Path, decode: Callable[[bytes], Decoded]) -> Decoded:
    if not path.is_file():
        raise GenerateError(f"{path}: no such file.")
    try:
        return decode(path.read_bytes())
    except MediaError as e:
        raise GenerateError(f"{path}: {e}") from e


def _room(model: Model, document: Document, asked: int, add_frames: int) -> int:
    """New tokens at most: as many as a training row has left, since the model knows no longer documents."""
    _, data = token_run(model.generator.opened.built.run)
    used = len(model.grammar.encode(document, end=False).ids)
    free = data.row_length - used
    if add_frames:
        blank = np.zeros_like(_frames(document)[:1])  # the shortest frame that there can be
        header, one = (len(model.grammar.open_video(blank[:n], len(blank))) for n in (0, 1))
        most = (free - 1) // (one - header)  # an id ends the clip
        if add_frames > most:
            raise GenerateError(
                f"--add-frames is {add_frames}; after the clip's {used} tokens a row of the run, {data.row_length} "
                f"long, has room for {most} at most. Ask for fewer, or give a shorter clip."
            )
    if free < 2:
        raise GenerateError(
            f"the prompt takes {used} tokens and the run was trained on rows of {data.row_length}: nothing is left to "
            "generate. Give a shorter prompt."
        )
    if asked < 0:
        raise GenerateError(f"--room is {asked}; give the new tokens at most, or 0 for all that a row has left.")
    return min(asked, free) if asked else free


def _frames(document: Document) -> np.ndarray:
    """Codes of the frames of the clip that a prompt is."""
    clip = document.segments[-1]
    assert isinstance(clip, Video) and clip.codes is not None
    return clip.codes


def write(out: Path, made: list[Continuation], title: str) -> None:
    """Writes media as files and a page of everything into `out`, and texts to standard output."""
    sections = []
    for number, continuation in enumerate(made):
        shown = [_shown(out, f"prompt-{i}", part, "given") for i, part in enumerate(continuation.prompt)]
        for i, part in enumerate(continuation.made):
            shown.append(_shown(out, f"{number:03d}-{i}", part, "made"))
            where = f"[{out / _file(f'{number:03d}-{i}', part)}]" if part.frames is not None else part.text
            sys.stdout.write(_plain(where) + "\n")
        if not continuation.finished:
            shown.append(f"<p>{_UNFINISHED}</p>")
            console.print(_UNFINISHED)
        sections.append(f"<section>{''.join(shown)}</section>")
    write_atomic(out / "index.html", _PAGE.format(title=html.escape(title), body="\n".join(sections)))


def _plain(text: str) -> str:
    """Text without what a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _file(name: str, part: Part) -> str:
    return f"{name}.{'gif' if part.clip else 'png'}"


def _shown(out: Path, name: str, part: Part, side: str) -> str:
    if part.frames is None:
        return f'<p class="{side}">{html.escape(part.text)}</p>'
    data = encode_gif(part.frames, FPS) if part.clip else encode_png(part.frames[0])
    write_atomic(out / _file(name, part), data)
    return f'<img class="{side}" alt="" src="{html.escape(_file(name, part))}">'
