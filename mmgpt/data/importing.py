"""Importing raw data: a source's documents, every medium decoded once, into a record dataset with a list of rejects."""

import collections
import dataclasses
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from mmgpt.core.document import Document, Image, Text, Video
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
    with Writer(out, name=name or out.name, shard_documents=shard_documents, overwrite=overwrite, meta=meta) as writer:

        def reject(key: str, reason: str, place: str) -> None:
            reasons[reason.partition(":")[0]] += 1
            writer.reject(key, reason, place)

        seen: set[str] = set()
        checked = _checked(source.documents(path, reject), threads or min(8, os.cpu_count() or 1))
        for document, problem in progress(checked, label=f"import {printable(out.name)}"):
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


def _checked(documents: Iterable[Found], threads: int) -> Iterator[tuple[Found, str | None]]:
    """Each document with the reason why it is not accepted, or None; in order, a few decoded ahead."""
    waiting: collections.deque[tuple[Found, Future[str | None]]] = collections.deque()
    with ThreadPoolExecutor(threads, "import") as pool:
        for document in documents:
            waiting.append((document, pool.submit(check, document)))
            if len(waiting) > 4 * threads:
                found, problem = waiting.popleft()
                yield found, problem.result()
        for found, problem in waiting:
            yield found, problem.result()


def check(document: Document) -> str | None:
    """Why a raw document is not accepted, or None: every medium is decoded once in full."""
    for i, segment in enumerate(document.segments):
        try:
            if isinstance(segment, Image):
                decode_image(segment.data or b"")
            elif isinstance(segment, Video):
                check_video(segment.data or b"")
            elif not isinstance(segment, Text) or segment.text is None:
                return f"wrong type: segment {i} is not raw text, image or video"
        except MediaError as e:
            return f"{e} (segment {i}, {type(segment).__name__.lower()})"
    return None
