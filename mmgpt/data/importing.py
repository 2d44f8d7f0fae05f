"""Importing raw data: a source's documents, every medium decoded once, into a record dataset with a list of rejects."""

import collections
import dataclasses
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mmgpt.core.document import Action, Document, Image, Segment, Text, Video
from mmgpt.core.log import console, printable, progress
from mmgpt.data import sources
from mmgpt.data.media import MediaError, check_video, decode_image
from mmgpt.data.record import RecordError, Writer
from mmgpt.data.sources import Found, SourceError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import did: documents written, rejects by reason, and where the rejects are listed."""

    directory: Path
    documents: int
    rejected: dict[str, int]
    rejects_path: Path


def import_dataset(
    format: str,
    path: Path,
    out: Path,
    name: str = "",
    *,
    overwrite: bool = False,
    shard_documents: int = 4096,
    threads: int | None = None,
) -> Imported:
    """Reads raw data of a format at `path` into a record dataset at `out`, named after `out` unless `name` is given.

    What is not accepted goes to rejects.jsonl and never stops the import. Raises SourceError for an unknown format,
    a missing path and when nothing is accepted; DatasetError if `out` cannot be written or already holds a dataset.
    """
    path, out = Path(path), Path(out)
    source = sources.load(format)
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder. Give the raw data that {format!r} reads.")
    if out.resolve().is_relative_to(path.resolve()):
        raise SourceError(f"{out}: lies inside the raw data {path}. Choose a folder outside.")
    reasons: collections.Counter[str] = collections.Counter()
    meta = {"format": format, "form": "raw"}
    name = name or Path(os.path.abspath(out)).name
    with Writer(out, name=name, shard_documents=shard_documents, overwrite=overwrite, meta=meta) as writer:

        def reject(key: str, reason: str, place: str) -> None:
            reasons[reason.partition(":")[0]] += 1
            writer.reject(key, reason, place)

        seen: set[str] = set()
        noted = list[_Reject]()
        found = source.documents(path, lambda *line: noted.append(line))
        checked = _checked(found, noted, threads or min(8, os.cpu_count() or 1))
        try:
            for document, problem, rejects in progress(checked, label=f"import {printable(out.name)}"):
                for line in rejects:
                    reject(*line)
                if problem is None and document.key in seen:
                    problem = "duplicate key: an earlier document has it"
                try:
                    if problem is None:
                        writer.write(_plain(document))
                        seen.add(document.key)
                except RecordError as e:
                    problem = f"cannot be written: {e.what}"
                if problem is not None:
                    reject(document.key, problem, document.place)
        finally:  # also where the source ends with an error: what it rejected may tell why
            for line in noted:
                reject(*line)
        if not writer.documents:
            raise SourceError(_nothing(format, path, reasons, writer.rejects_path))
        done = Imported(
            directory=out, documents=writer.documents, rejected=dict(reasons), rejects_path=writer.rejects_path
        )
    if done.rejected:
        listed = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common(5))
        console.print(f"rejected {sum(reasons.values())}: {printable(listed)}; see {printable(str(done.rejects_path))}")
    return done


def _nothing(format: str, path: Path, reasons: collections.Counter[str], rejects: Path) -> str:
    if not reasons:
        return f"{path}: holds nothing that the format {format!r} reads. It reads: {sources.described(format)}"
    (reason, count), *_ = reasons.most_common(1)
    total = sum(reasons.values())
    return (
        f"{path}: nothing was accepted, {total} rejected, most often {reason!r} ({count}). Each is named in {rejects}."
    )


def _plain(document: Found) -> Document:
    return Document(key=document.key, segments=document.segments, meta=document.meta)


_Reject = tuple[str, str, str]
"""Key, reason and place of what is not accepted."""
_Checked = tuple[Found, str | None, list[_Reject]]
"""A document, why it is not accepted or None, and what was rejected before it and left out of it."""


def _checked(documents: Iterable[Found], noted: list[_Reject], threads: int) -> Iterator[_Checked]:
    """Each document as it is accepted; in order, a few decoded ahead.

    What the source notes as rejected comes with the document that follows it; after the last document it stays noted.
    """
    waiting: collections.deque[Future[_Checked]] = collections.deque()
    with ThreadPoolExecutor(threads, "import") as pool:
        for document in documents:
            waiting.append(pool.submit(_accept, document, noted.copy()))
            noted.clear()
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        for accepted in waiting:
            yield accepted.result()


def _accept(document: Found, rejects: list[_Reject]) -> _Checked:
    if not document.partial:
        return document, check(document), rejects
    kept: list[Segment] = []
    for i, segment in enumerate(document.segments):
        problem = _fault(segment, i)
        if problem is None:
            kept.append(segment)
        else:
            rejects.append((f"{document.key}/{i}", problem, document.place))
    whole = any(isinstance(s, Text) for s in kept) and any(isinstance(s, Image) for s in kept)
    document = dataclasses.replace(document, segments=tuple(kept))
    return document, None if whole else NOTHING_LEFT, rejects


NOTHING_LEFT = "no image and text left"
"""Why a document is refused that lost all its images, or all its texts."""
MAX_ACTION_STEPS = 1 << 16
MAX_ACTION_SIZE = 1 << 20


def check(document: Document) -> str | None:
    """Why a raw document is not accepted, or None: every medium is decoded once in full."""
    faults = (_fault(segment, i) for i, segment in enumerate(document.segments))
    return next((fault for fault in faults if fault), None)


def _fault(segment: Segment, i: int) -> str | None:
    try:
        match segment:
            case Image():
                decode_image(segment.data or b"")
            case Video():
                check_video(segment.data or b"")
            case Action(values=np.ndarray() as values):
                return _action_fault(values, i)
            case Text(text=str()):
                pass
            case _:
                return f"wrong type: segment {i} is not raw text, image, video or actions"
    except MediaError as e:
        return f"{e} (segment {i}, {type(segment).__name__.lower()})"
    return None


def _action_fault(values: np.ndarray, i: int) -> str | None:
    if values.ndim != 2 or not values.size or len(values) > MAX_ACTION_STEPS or values.size > MAX_ACTION_SIZE:
        expected = f"steps and dimensions, at most {MAX_ACTION_STEPS} and {MAX_ACTION_SIZE} numbers in all"
        return f"wrong shape: actions {list(values.shape)} (segment {i}), expected {expected}"
    if not np.isfinite(values).all():
        return f"not finite: actions (segment {i}) hold NaN or infinity"
    return None
