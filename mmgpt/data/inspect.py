"""A look into record datasets: documents as plain values, and a page of them with their pictures and tokens."""

import base64
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from mmgpt.core.document import Document, Image, Segment, Text, Video
from mmgpt.data.figures import by_kind_svg, histogram_svg
from mmgpt.data.laid_out import Piece, pieces
from mmgpt.data.media import MediaError, check_video, decode_image, decode_video, encode_gif, encode_png, fit, resize
from mmgpt.data.pages import page
from mmgpt.data.record import Dataset, RecordError
from mmgpt.data.statistics import statistics
from mmgpt.tokens.grammars.grammar import Grammar, GrammarError

__all__ = ["Shown", "described", "documents_html", "page_html", "statistics"]

_THUMBNAIL_AREA = 256 * 256
_CLIP_FRAMES = 24
_CLIP_FPS = 8.0
_PIECES = 1500
"""Pieces of a document that are shown: stories of a hundred pictures stay readable."""
_SEGMENTS, _CHARACTERS = 256, 1000
"""Segments of a document, and characters of each, that the page shows: a book would make it too large to open."""
_GRIDS = 12
_IMAGE_NAMES = {b"\xff\xd8": "JPEG", b"\x89P": "PNG", b"RI": "WebP", b"GI": "GIF"}  # by their first two bytes


def described(document: Document) -> dict[str, Any]:
    """A document as JSON values, raw or tokenised; of media and arrays only what they are, never their contents.

    `role`, `time` and `loss` appear where they are not the usual "", None and 1.
    """
    segments = [_described_segment(segment) for segment in document.segments]
    return {"key": document.key, "meta": document.meta, "segments": segments}


def _described_segment(segment: Segment) -> dict[str, Any]:
    shown: dict[str, Any] = {"kind": type(segment).__name__.lower()}
    if isinstance(segment, Text) and segment.text is not None:
        shown["text"] = segment.text
    held = [_described_medium(segment)] if isinstance(vars(segment).get("data"), bytes) else []
    held += [f"{name} {list(a.shape)}" for name, a in vars(segment).items() if isinstance(a, np.ndarray)]
    usual = {"role": "", "time": None, "loss": 1.0, "fps": None}
    shown |= {"content": ", ".join(held)} if held else {}
    return shown | {name: vars(segment)[name] for name, value in usual.items() if vars(segment).get(name) != value}


def _described_medium(segment: Segment) -> str:
    data: bytes = vars(segment)["data"]
    try:
        if isinstance(segment, Video):
            frames, height, width = check_video(data)
            return f"MP4 {width}x{height}, {frames} frames, {len(data)} bytes"
        height, width, _ = decode_image(data).shape
        return f"{_IMAGE_NAMES[data[:2]]} {width}x{height}, {len(data)} bytes"
    except MediaError as e:
        return f"{e.reason}, {len(data)} bytes"


# --- the page


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """How a page shows tokenised documents; without its part, what would be shown is named.

    `text` turns ids into a string, `pixels` codes [N, H, W, C] into uint8 [N, H, W, 3], `clip` those of a clip (by
    default `pixels` does), and `grammar` lays out the tokens and measures lengths.
    """

    grammar: Grammar | None = None
    text: Callable[[list[int]], str] | None = None
    pixels: Callable[[np.ndarray], np.ndarray] | None = None
    clip: Callable[[np.ndarray], np.ndarray] | None = None


def documents_html(
    dataset: Dataset,
    n: int,
    *,
    text: Callable[[list[int]], str] | None = None,
    pixels: Callable[[np.ndarray], np.ndarray] | None = None,
) -> str:
    """A page of one dataset; see `page_html`."""
    return page_html(dataset.name, {dataset.name: dataset}, n, Shown(text=text, pixels=pixels))


def page_html(
    title: str, datasets: Mapping[str, Dataset], n: int, shown: Shown, found: Mapping[str, Any] | None = None
) -> str:
    """A page of `n` documents of each dataset, spread evenly over it, with statistics; it loads nothing.

    `found` are the statistics by name, where they are known already.
    """
    found = found or {name: statistics(dataset, shown.grammar) for name, dataset in datasets.items()}
    everything = sum(each["lengths"].get("sum", 0) for each in found.values())
    units = {each["length_unit"] for each in found.values()}
    sums = {name: each["length_sums"] for name, each in found.items()}
    return page(
        "inspect.html.jinja",
        title=title,
        grammar=shown.grammar.name if shown.grammar else "",
        overview=Markup(by_kind_svg(sums, units.pop(), title)) if len(units) == 1 < len(found) else "",
        sections=[_section(name, dataset, n, shown, found[name], everything) for name, dataset in datasets.items()],
    )


def _section(
    name: str, dataset: Dataset, n: int, shown: Shown, found: dict[str, Any], everything: int
) -> dict[str, Any]:
    empty = dict.fromkeys(("sum", "mean", "min", "p5", "p50", "p95", "max"), 0)
    grids = dict(sorted(found["grids"].items(), key=lambda grid: -grid[1]))
    few = dict(itertools.islice(grids.items(), _GRIDS))
    if len(grids) > len(few):
        few[f"{len(grids) - len(few)} more"] = sum(grids.values()) - sum(few.values())
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(n, len(dataset))).astype(int)) if len(dataset) else []
    return {
        "name": name,
        "found": found | {"lengths": found["lengths"] or empty},
        "share": found["lengths"].get("sum", 0) / max(1, everything),
        "chart": Markup(histogram_svg(found, name)),
        "segments": _counted(found["segments"]),
        "sums": _counted(found["length_sums"]),
        "grids": _counted(few),
        "rejects": _counted(found["rejected_for"]),
        "documents": [_document(dataset, int(i), shown) for i in chosen],
    }


def _counted(counts: Mapping[str, int]) -> list[dict[str, Any]]:
    everything = max(1, sum(counts.values()))
    return [{"name": name, "count": count, "share": count / everything} for name, count in counts.items()]


def _document(dataset: Dataset, i: int, shown: Shown) -> dict[str, Any]:
    view: dict[str, Any] = {"number": i, "key": "", "meta": "", "fault": "", "segments": [], "pieces": []}
    try:
        document = dataset[i]
    except RecordError as e:
        return view | {"fault": str(e)}
    view["key"], view["meta"] = document.key, ", ".join(f"{k}: {v}" for k, v in document.meta.items())
    view["segments"] = [
        _content(segment, shown) | {"note": _note(segment)} for segment in document.segments[:_SEGMENTS]
    ]
    for part in view["segments"]:
        if part["text"] is not None and (left := len(part["text"]) - _CHARACTERS) > 0:
            part["text"] = f"{part['text'][:_CHARACTERS]} … {left:,} characters more"
    if (left := len(document.segments) - _SEGMENTS) > 0:
        view["segments"].append({"text": f"… {left:,} segments more", "note": ""})
    if shown.grammar is None or not any(_is_tokenised(segment) for segment in document.segments):
        return view
    try:
        laid = pieces(shown.grammar, shown.grammar.encode(document))
    except GrammarError as e:
        return view | {"fault": str(e)}
    view["pieces"] = list(itertools.islice(laid, _PIECES))
    if left := sum(piece.folded or 1 for piece in laid):
        view["pieces"].append(Piece(kind="control", label=f"… {left:,} ids more", folded=left))
    return view


def _is_tokenised(segment: Segment) -> bool:
    return vars(segment).get("ids") is not None or vars(segment).get("codes") is not None


def _note(segment: Segment) -> str:
    notes = [segment.role] if segment.role else []
    notes += [f"{segment.time:g} s"] if segment.time is not None else []
    notes += [f"loss {segment.loss:g}"] if segment.loss != 1.0 else []
    return ", ".join(notes)


def _content(segment: Segment, shown: Shown) -> dict[str, Any]:
    """A segment as words, or as a picture to show."""
    clip = shown.clip or shown.pixels
    try:
        match segment:
            case Text(text=str() as words):
                return {"text": words}
            case Text(ids=np.ndarray() as ids):
                return {"text": shown.text(ids.tolist()) if shown.text else f"{len(ids)} ids"}
            case Image(data=bytes() as data):
                return _picture(decode_image(data)[None], 1.0)
            case Image(codes=np.ndarray() as codes) if shown.pixels:
                return _picture(shown.pixels(codes[None]), 1.0)
            case Video(data=bytes() as data):
                return _picture(*decode_video(data, fps=_CLIP_FPS, max_frames=_CLIP_FRAMES))
            case Video(codes=np.ndarray() as codes) if clip:
                return _picture(clip(codes[:_CLIP_FRAMES]), segment.fps or _CLIP_FPS)
    except MediaError as e:
        return {"text": str(e)}
    held = {k: v.shape for k, v in vars(segment).items() if isinstance(v, np.ndarray)}
    return {"text": f"{type(segment).__name__} {', '.join(f'{k} {list(s)}' for k, s in held.items())}"}


def _picture(frames: np.ndarray, fps: float) -> dict[str, Any]:
    height, width = fit(*frames.shape[1:3], area=_THUMBNAIL_AREA, multiple=1)
    frames = np.stack([resize(f, height, width) for f in frames])
    kind, data = ("png", encode_png(frames[0])) if len(frames) == 1 else ("gif", encode_gif(frames, fps))
    alt = f"{height}x{width}" if len(frames) == 1 else f"{len(frames)} frames of {height}x{width}"
    return {"text": None, "alt": alt, "src": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}
