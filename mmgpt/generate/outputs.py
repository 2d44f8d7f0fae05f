"""What a model made, as files: PNG, MP4 and GIF, and a page that shows all of it."""

import html
import sys
from collections.abc import Sequence
from pathlib import Path

from mmgpt.core.log import console, write_atomic
from mmgpt.data.media import encode_gif, encode_mp4, encode_png
from mmgpt.generate.model import Continuation, Part

FPS = 4.0
"""Frames a second of a clip, where nothing else is asked for."""

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


def save(out: Path | str, made: Sequence[Continuation], title: str = "", *, fps: float = FPS) -> list[Path]:
    """Writes media as files and a page of everything into `out`; returns the files of what was made.

    An image is a PNG; a clip is an MP4 and a GIF.
    """
    out, files, sections = Path(out), [], []
    for number, continuation in enumerate(made):
        shown = [_shown(out, f"prompt-{i}", part, "given", fps) for i, part in enumerate(continuation.prompt)]
        for i, part in enumerate(continuation.made):
            shown.append(_shown(out, name := f"{number:03d}-{i}", part, "made", fps))
            files += [out / file for file in _names(name, part)]
        if not continuation.finished:
            shown.append(f"<p>{_UNFINISHED}</p>")
        sections.append(f"<section>{''.join(shown)}</section>")
    page = _PAGE.format(title=html.escape(title or "mmgpt generate"), body="\n".join(sections))
    write_atomic(out / "index.html", page)
    return files


def write(out: Path, made: Sequence[Continuation], title: str, fps: float) -> None:
    """As `save`, and tells on standard output what was made: texts, and where media lie."""
    save(out, made, title, fps=fps)
    for number, continuation in enumerate(made):
        for i, part in enumerate(continuation.made):
            tell(part, [out / name for name in _names(f"{number:03d}-{i}", part)])
        if not continuation.finished:
            console.print(_UNFINISHED)
    console.print(f"wrote {out / 'index.html'}")


def tell(part: Part, files: Sequence[Path]) -> None:
    """One line on standard output: a text, or the files of a medium."""
    sys.stdout.write(_plain(f"[{', '.join(map(str, files))}]" if part.frames is not None else part.text) + "\n")


def _plain(text: str) -> str:
    """Text without what a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _names(name: str, part: Part) -> list[str]:
    if part.frames is None:
        return []
    return [f"{name}.gif", f"{name}.mp4"] if part.clip else [f"{name}.png"]


def _shown(out: Path, name: str, part: Part, side: str, fps: float) -> str:
    if part.frames is None:
        return f'<p class="{side}">{html.escape(part.text)}</p>'
    files = _names(name, part)
    if part.clip:
        write_atomic(out / files[0], encode_gif(part.frames, fps))
        write_atomic(out / files[1], encode_mp4(part.frames, fps))
        link = f' <a href="{html.escape(files[1])}">MP4</a>'
    else:
        write_atomic(out / files[0], encode_png(part.frames[0]))
        link = ""
    return f'<img class="{side}" alt="" src="{html.escape(files[0])}">{link}'
