"""From raw documents to tokenised ones: media are decoded in threads, a window ahead of what is being encoded.

A window is some documents of one shard. Neither windows nor threads change what comes out: only how fast, and with
how much memory. That is three windows of pixels (one encoded, one waiting, one filled) and what the threads hold.
"""

import collections
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from mmgpt.core.document import Action, Document, Image, Segment, Text, Video
from mmgpt.data.media import decode_image, decode_video, fit, resize
from mmgpt.data.record import Dataset
from mmgpt.tokenize.tokenizers import Tokenizers

WINDOW_PIXELS = 1 << 25
"""Pixels that are decoded before they are encoded in batches: 100 MB of RGB, and few batches that are not full."""
WINDOW_DOCUMENTS = 1024

T = TypeVar("T")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Medium:
    """Pixels to encode, `frames` uint8 [T, h, w, 3], and a clip's frames per second; `cut` where it had more frames."""

    frames: np.ndarray
    fps: float | None
    cut: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """The documents `numbers` of a dataset; `place` says which of the job's shards they are."""

    dataset: Dataset
    numbers: range
    place: tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """Some documents of a shard: text and actions as ids, media decoded, by segment; and lines of those that failed."""

    shard: Shard
    documents: list[tuple[Document, dict[int, Medium]]] = dataclasses.field(default_factory=list)
    rejects: list[dict[str, str]] = dataclasses.field(default_factory=list)

    @property
    def seen(self) -> int:
        return len(self.documents) + len(self.rejects)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Turns raw documents into tokenised ones: frames of at most `area` pixels, clips at `fps`, cut after `frames`."""

    tokenizers: Tokenizers
    area: int
    fps: float | None = None
    frames: int = 256
    threads: int = 0
    """Threads that decode; 0 for one per CPU, at most 16."""

    def windows(self, shards: Iterable[Shard]) -> Iterator[Window]:
        """The shards in order, each as one window or more; the next window is made while the caller has the last."""
        with contextlib.closing(self._windows(shards)) as windows:
            yield from _ahead(windows)

    def _windows(self, shards: Iterable[Shard]) -> Generator[Window, None, None]:
        threads = self.threads or min(16, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads, "decode") as pool:
            for shard in shards:
                window, pixels = Window(shard=shard), 0
                for read in _in_order(pool, functools.partial(self._read, shard), shard.numbers, 2 * threads):
                    if isinstance(read, dict):
                        window.rejects.append(read)
                    else:
                        window.documents.append(read)
                        pixels += sum(medium.frames.size // 3 for medium in read[1].values())
                    if pixels >= WINDOW_PIXELS or window.seen >= WINDOW_DOCUMENTS:
                        yield window
                        window, pixels = Window(shard=shard), 0
                if window.seen or not shard.numbers:
                    yield window

    def _read(self, shard: Shard, number: int) -> tuple[Document, dict[int, Medium]] | dict[str, str]:
        """A document as in a window, or the line that rejects it."""
        key = str(number)
        try:
            document = shard.dataset[number]
            key = document.key
            media = {i: medium for i, s in enumerate(document.segments) if (medium := self._medium(s)) is not None}
            if cut := [str(i) for i, medium in media.items() if medium.cut]:
                told = f"segment {', '.join(cut)} after {self.frames} frames"
                document = dataclasses.replace(document, meta={**document.meta, "cut": told})
            return dataclasses.replace(document, segments=tuple(map(self._ids, document.segments))), media
        except ValueError as e:  # RecordError, MediaError, and what a tokenizer does not take
            return {"key": key, "reason": str(e), "place": f"{shard.dataset.name}, document {number}"}
        except Exception as e:
            e.add_note(f"{shard.dataset.directory}, document {number}")
            raise

    def _medium(self, segment: Segment) -> Medium | None:
        """What the image tokenizer must encode; None for what needs none."""
        match segment:
            case Image(data=bytes() as data):
                picture = decode_image(data)
                return Medium(frames=resize(picture, *self._size(*picture.shape[:2]))[None], fps=None)
            case Video(data=bytes() as data):
                frames, fps = decode_video(data, fps=self.fps, max_frames=self.frames + 1, size=self._size)
                return Medium(frames=frames[: self.frames], fps=fps, cut=len(frames) > self.frames)
        return None

    def _ids(self, segment: Segment) -> Segment:
        """The segment with text and actions as ids; ValueError for what has no tokenizer."""
        match segment:
            case Text(text=str() as text):
                return dataclasses.replace(
                    segment, text=None, ids=np.asarray(self.tokenizers.text.encode(text), np.int32)
                )
            case Action(values=np.ndarray() as values) if self.tokenizers.actions is not None:
                codes = np.asarray(self.tokenizers.actions.encode(values), np.int32)
                return dataclasses.replace(segment, values=None, codes=codes)
            case Text() | Image(data=bytes()) | Video(data=bytes()):
                return segment
            case Image(codes=np.ndarray()) | Video(codes=np.ndarray()) | Action(codes=np.ndarray()):
                return segment
        raise ValueError(f"there is no tokenizer for {type(segment).__name__.lower()} segments.")

    def _size(self, height: int, width: int) -> tuple[int, int]:
        return fit(height, width, area=self.area, multiple=self.tokenizers.image.patch)

    def encoded(self, window: Window) -> Iterator[Document]:
        """The tokenised documents of a window, in order; pictures of one size are encoded together."""
        by_size: dict[tuple[int, ...], list[tuple[int, int]]] = collections.defaultdict(list)
        for number, (_, media) in enumerate(window.documents):
            for i, medium in media.items():
                by_size[medium.frames.shape[1:]].append((number, i))
        segments = [list(document.segments) for document, _ in window.documents]
        for places in by_size.values():
            media = [window.documents[number][1][i] for number, i in places]
            grids = self._grids(media)
            for (number, i), medium, codes in zip(places, media, grids, strict=True):
                segments[number][i] = _tokenised(segments[number][i], medium, codes)
        for (document, _), found in zip(window.documents, segments, strict=True):
            yield dataclasses.replace(document, segments=tuple(found))

    def _grids(self, media: list[Medium]) -> list[np.ndarray]:
        """The codes of media of one size: clips alone where frames share codes, all else frame by frame together."""
        image = self.tokenizers.image
        grids = [np.empty(0, np.int32)] * len(media)
        clips = [i for i, medium in enumerate(media) if medium.fps is not None and image.temporal > 1]
        for i in clips:
            grids[i] = np.asarray(image.encode_clip(media[i].frames), np.int32)
        rest = [i for i in range(len(media)) if i not in clips]
        if rest:
            codes = np.asarray(image.encode(np.concatenate([media[i].frames for i in rest])), np.int32)
            ends = np.cumsum([len(media[i].frames) for i in rest])[:-1]
            for i, part in zip(rest, np.split(codes, ends), strict=True):
                grids[i] = part
        return grids


def _tokenised(segment: Segment, medium: Medium, codes: np.ndarray) -> Segment:
    if isinstance(segment, Video):
        return dataclasses.replace(segment, data=None, codes=codes, fps=medium.fps)
    return dataclasses.replace(segment, data=None, codes=codes[0])  # pyright: ignore[reportCallIssue]


def _in_order(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], most: int) -> Iterator[R]:
    """The function's values in the order of the items, worked out in the pool; at most `most` are under way."""
    waiting: collections.deque[Future[R]] = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each made in a thread of its own while the caller has the one before."""
    with ThreadPoolExecutor(1, "ahead") as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
