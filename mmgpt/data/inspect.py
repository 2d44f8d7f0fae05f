"""A look into a record dataset: statistics as plain values, and a page that shows documents with their pictures."""

import base64
import collections
import html
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from mmgpt.core.document import KINDS, Document, Image, Segment, Text, Video
from mmgpt.data.media import MediaError, check_video, decode_image, decode_video, encode_gif, encode_png, fit, resize
from mmgpt.data.record import Dataset, RecordError

_THUMBNAIL_AREA = 256 * 256
_CLIP_FRAMES = 24
_CLIP_FPS = 8.0
_IMAGE_NAMES = {b"\xff\xd8": "JPEG", b"\x89P": "PNG", b"RI": "WebP", b"GI": "GIF"}  # by their first two bytes
_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 60em; color: #222; }}
article {{ border-top: 1px solid #ccc; padding: .8em 0; }} h2 {{ font-size: 1em; margin: 0; }}
img {{ display: block; margin: .4em 0; max-width: 100%; }} small {{ color: #777; }} p {{ margin: .3em 0; }}
pre {{ background: #f6f6f6; padding: .6em; white-space: pre-wrap; }}
</style></head><body><h1>{title}</h1><pre>{summary}</pre>
{articles}
</body></html>
"""


def statistics(dataset: Dataset) -> dict[str, Any]:
    """Counts and sizes as JSON values, from the manifest and the index alone (no record is read but the first).

    `lengths` of texts are characters when raw, ids when tokenised; `grids` counts code grids "TxHxWxC".
    """
    index, shards = dataset.index, dataset.manifest["shards"]
    kinds = {kind.__name__.lower(): int(np.sum(index.kind == i)) for i, kind in enumerate(KINDS)}
    texts = index.shape[index.kind == KINDS.index(Text), 0]
    media = index.shape[(index.kind == KINDS.index(Image)) | (index.kind == KINDS.index(Video)), :4]
    shapes, counts = np.unique(media, axis=0, return_counts=True)
    grids = {"x".join(map(str, s)): int(n) for s, n in zip(shapes.tolist(), counts, strict=True) if any(s)}
    size = sum(shard["bytes"] for shard in shards)
    return {
        "name": dataset.name,
        "form": "tokenised" if len(dataset) and _tokenised(dataset[0]) else "raw",
        "documents": len(dataset),
        "segments": {kind: n for kind, n in kinds.items() if n},
        "text_lengths": _spread(texts),
        "segments_per_document": _spread(np.diff(index.offset)),
        "grids": grids,
        "codes": int(media.astype(np.int64).prod(axis=1).sum()),
        "shards": len(shards),
        "bytes": size,
        "bytes_per_document": round(size / max(1, len(dataset)), 1),
        "rejected": dataset.manifest["rejected"],
        "rejected_for": _reject_reasons(dataset),
    }


def _tokenised(document: Document) -> bool:
    held = [vars(s).get("ids") if isinstance(s, Text) else vars(s).get("codes") for s in document.segments]
    return any(h is not None for h in held)


def _spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    low, middle, high = np.percentile(values, (5, 50, 95)).round(1).tolist()
    return {
        "sum": int(values.sum(dtype=np.int64)),
        "mean": round(float(values.mean()), 2),
        "min": int(values.min()),
        "p5": low,
        "p50": middle,
        "p95": high,
        "max": int(values.max()),
    }


def _reject_reasons(dataset: Dataset) -> dict[str, int]:
    path = dataset.directory / "rejects.jsonl"
    reasons: collections.Counter[str] = collections.Counter()
    if path.is_file():
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                reasons[json.loads(line)["reason"].partition(":")[0]] += 1
    return dict(reasons.most_common())


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


def documents_html(
    dataset: Dataset,
    n: int,
    *,
    text: Callable[[list[int]], str] | None = None,
    pixels: Callable[[np.ndarray], np.ndarray] | None = None,
) -> str:
    """A page of `n` documents spread evenly over the dataset; all text is escaped and the page loads nothing.

    For tokenised data, `text` turns ids into a string and `pixels` turns codes [N, H, W, C] into uint8 [N, H, W, 3];
    without them the numbers are named.
    """
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(n, len(dataset))).astype(int)) if len(dataset) else []
    articles = []
    for i in chosen:
        try:
            document = dataset[int(i)]
        except RecordError as e:
            articles.append(f"<article><h2>{i}</h2><p>{html.escape(str(e))}</p></article>")
            continue
        body = "\n".join(_segment_html(s, text, pixels) for s in document.segments)
        meta = html.escape(", ".join(f"{k}: {v}" for k, v in document.meta.items()))
        articles.append(f"<article><h2>{i}: {html.escape(document.key)}</h2><small>{meta}</small>\n{body}</article>")
    summary = html.escape(json.dumps(statistics(dataset), indent=2))
    return _PAGE.format(title=html.escape(dataset.name), summary=summary, articles="\n".join(articles))


def _segment_html(
    segment: Segment, text: Callable[[list[int]], str] | None, pixels: Callable[[np.ndarray], np.ndarray] | None
) -> str:
    notes = [segment.role] if segment.role else []
    notes += [f"{segment.time:g} s"] if segment.time is not None else []
    notes += [f"loss {segment.loss:g}"] if segment.loss != 1.0 else []
    note = f" <small>{html.escape(', '.join(notes))}</small>" if notes else ""
    return f"<div>{_content_html(segment, text, pixels)}{note}</div>"


def _content_html(
    segment: Segment, text: Callable[[list[int]], str] | None, pixels: Callable[[np.ndarray], np.ndarray] | None
) -> str:
    try:
        match segment:
            case Text(text=str() as words):
                return f"<p>{html.escape(words)}</p>"
            case Text(ids=np.ndarray() as ids):
                return f"<p>{html.escape(text(ids.tolist()) if text else f'{len(ids)} ids')}</p>"
            case Image(data=bytes() as data):
                return _picture(decode_image(data)[None], 1.0)
            case Image(codes=np.ndarray() as codes) if pixels:
                return _picture(pixels(codes[None]), 1.0)
            case Video(data=bytes() as data):
                return _picture(*decode_video(data, fps=_CLIP_FPS, max_frames=_CLIP_FRAMES))
            case Video(codes=np.ndarray() as codes) if pixels:
                return _picture(pixels(codes[:_CLIP_FRAMES]), segment.fps or _CLIP_FPS)
    except MediaError as e:
        return f"<p>{html.escape(str(e))}</p>"
    held = {k: v.shape for k, v in vars(segment).items() if isinstance(v, np.ndarray)}
    return f"<p>{type(segment).__name__} {html.escape(', '.join(f'{k} {list(s)}' for k, s in held.items()))}</p>"


def _picture(frames: np.ndarray, fps: float) -> str:
    height, width = fit(*frames.shape[1:3], area=_THUMBNAIL_AREA, multiple=1)
    frames = np.stack([resize(f, height, width) for f in frames])
    kind, data = ("png", encode_png(frames[0])) if len(frames) == 1 else ("gif", encode_gif(frames, fps))
    alt = f"{height}x{width}" if len(frames) == 1 else f"{len(frames)} frames of {height}x{width}"
    return f'<img alt="{alt}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
