"""The offline tokenisation job: a dataset of raw documents becomes a dataset of ids and code grids.

One input shard becomes one output shard, written under a temporary name and renamed, then a done marker beside it
with its hash, its rejects and the settings. A job that was killed anywhere goes on when it is run again, with the
same output; several processes may each take a share of the shards.
"""

import collections
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmgpt.core.document import Action, Document, Image, Segment, Text, Video
from mmgpt.core.errors import UserError
from mmgpt.core.log import progress, write_atomic, write_json
from mmgpt.data.media import decode_image, decode_video, fit, resize
from mmgpt.data.mixture import counter_hash
from mmgpt.data.record import (
    Dataset,
    DatasetError,
    RecordError,
    ShardInfo,
    read_shard_info,
    write_manifest,
    write_shard,
)

WINDOW_PIXELS = 1 << 25
"""Pixels that are decoded before they are encoded in batches: 100 MB of RGB, and few batches that are not full."""
WINDOW_DOCUMENTS = 1024


class JobError(UserError, RuntimeError):
    """A tokenisation job that cannot go on; the message says what was found and what to do."""


class TextTokenizer(Protocol):
    """Text to ids."""

    @property
    def size(self) -> int: ...
    def encode(self, text: str, /) -> list[int]: ...
    def fingerprint(self) -> str: ...


class ImageTokenizer(Protocol):
    """Pictures and clips to code grids and back.

    `codebooks`: the sizes of the C codebooks; `patch`: pixels a side of a place; `temporal`: frames of a clip that
    share its codes.
    """

    @property
    def codebooks(self) -> tuple[int, ...]: ...
    @property
    def patch(self) -> int: ...
    @property
    def temporal(self) -> int: ...

    def encode(self, images: np.ndarray, /) -> np.ndarray:
        """uint8 [B, H, W, 3] to int32 [B, H / patch, W / patch, C]."""
        ...

    def decode(self, codes: np.ndarray, /) -> np.ndarray:
        """int32 [B, h, w, C] to uint8 [B, h * patch, w * patch, 3]."""
        ...

    def encode_clip(self, frames: np.ndarray, /) -> np.ndarray:
        """uint8 [T, H, W, 3] to int32 [t, H / patch, W / patch, C], t = T / temporal rounded up."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenised:
    """What a job did: shards written now and in all, documents, rejects; `complete`: the dataset can be read."""

    directory: Path
    written: int
    shards: int
    documents: int
    rejected: int
    complete: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Medium:
    """Pixels to encode, `frames` uint8 [T, h, w, 3], and a clip's frames per second."""

    frames: np.ndarray
    fps: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Work:
    """Turns raw documents into tokenised ones, pictures of one size together."""

    text: TextTokenizer
    image: ImageTokenizer
    area: int
    fps: float | None
    batch: int

    def settings(self, dataset: Dataset) -> dict[str, Any]:
        """All that the output depends on; of the tokenizers, what they make of a fixed probe."""
        side = 4 * self.image.patch
        noise = (counter_hash(0, np.arange(side * side * 3)) >> np.uint64(56)).astype(np.uint8)
        codes = self._codes(noise.reshape(1, side, side, 3))
        return {
            "area": self.area,
            "fps": self.fps,
            "text_size": self.text.size,
            "text_probe": self.text.fingerprint(),
            "codebooks": list(self.image.codebooks),
            "patch": self.image.patch,
            "temporal": self.image.temporal,
            "image_probe": hashlib.sha256(codes.tobytes()).hexdigest(),
            "source": [shard["sha256"] for shard in dataset.manifest["shards"]],
        }

    def documents(self, dataset: Dataset, numbers: range, rejects: list[dict[str, str]]) -> Iterator[Document]:
        """The tokenised documents of a shard in order; those that fail are added to `rejects`."""
        window: list[tuple[Document, dict[int, _Medium]]] = []
        pixels = 0
        for number in numbers:
            key = str(number)
            try:
                document = dataset[number]
                key = document.key
                media = {i: medium for i, s in enumerate(document.segments) if (medium := self._medium(s)) is not None}
            except ValueError as e:  # RecordError, MediaError, and what has no tokenizer
                rejects.append({"key": key, "reason": str(e), "place": f"{dataset.name}, document {number}"})
                continue
            window.append((document, media))
            pixels += sum(medium.frames.size // 3 for medium in media.values())
            if pixels >= WINDOW_PIXELS or len(window) >= WINDOW_DOCUMENTS:
                yield from self._encoded(window)
                window, pixels = [], 0
        yield from self._encoded(window)

    def _medium(self, segment: Segment) -> _Medium | None:
        """What the image tokenizer must encode; None for what needs none."""
        fps = None
        match segment:
            case Image(data=bytes() as data):
                frames = decode_image(data)[None]
            case Video(data=bytes() as data):
                frames, fps = decode_video(data, fps=self.fps)
            case Text() | Image(codes=np.ndarray()) | Video(codes=np.ndarray()) | Action(codes=np.ndarray()):
                return None
            case _:
                raise ValueError(f"there is no tokenizer for {type(segment).__name__.lower()} segments.")
        height, width = fit(*frames.shape[1:3], area=self.area, multiple=self.image.patch)
        return _Medium(frames=np.stack([resize(frame, height, width) for frame in frames]), fps=fps)

    def _encoded(self, window: list[tuple[Document, dict[int, _Medium]]]) -> Iterator[Document]:
        by_size: dict[tuple[int, ...], list[tuple[int, int]]] = collections.defaultdict(list)
        for number, (_, media) in enumerate(window):
            for i, medium in media.items():
                by_size[medium.frames.shape[1:]].append((number, i))
        segments = [list(document.segments) for document, _ in window]
        for places in by_size.values():
            media = [window[number][1][i] for number, i in places]
            grids = self._grids(media)
            for (number, i), medium, codes in zip(places, media, grids, strict=True):
                segments[number][i] = _tokenised(segments[number][i], medium, codes)
        for (document, _), found in zip(window, segments, strict=True):
            yield dataclasses.replace(document, segments=tuple(map(self._text, found)))

    def _grids(self, media: list[_Medium]) -> list[np.ndarray]:
        """The codes of media of one size: clips alone where frames share codes, all else frame by frame together."""
        grids = [np.empty(0, np.int32)] * len(media)
        clips = [i for i, medium in enumerate(media) if medium.fps is not None and self.image.temporal > 1]
        for i in clips:
            grids[i] = np.asarray(self.image.encode_clip(media[i].frames), np.int32)
        rest = [i for i in range(len(media)) if i not in clips]
        if rest:
            codes = self._codes(np.concatenate([media[i].frames for i in rest]))
            for i, part in zip(
                rest, np.split(codes, np.cumsum([len(media[i].frames) for i in rest])[:-1]), strict=True
            ):
                grids[i] = part
        return grids

    def _codes(self, frames: np.ndarray) -> np.ndarray:
        """Code grids int32 [N, h, w, C] of pictures of one size, always by full batches: one compiled shape."""
        filled = np.concatenate([frames, np.zeros((-len(frames) % self.batch, *frames.shape[1:]), np.uint8)])
        parts = [self.image.encode(filled[i : i + self.batch]) for i in range(0, len(filled), self.batch)]
        return np.concatenate([np.asarray(part, np.int32) for part in parts])[: len(frames)]

    def _text(self, segment: Segment) -> Segment:
        if isinstance(segment, Text) and segment.text is not None:
            return dataclasses.replace(segment, text=None, ids=np.asarray(self.text.encode(segment.text), np.int32))
        return segment


def _tokenised(segment: Segment, medium: _Medium, codes: np.ndarray) -> Segment:
    if isinstance(segment, Video):
        return dataclasses.replace(segment, data=None, codes=codes, fps=medium.fps)
    return dataclasses.replace(segment, data=None, codes=codes[0])  # pyright: ignore[reportCallIssue]


def tokenize_dataset(
    source: Path,
    out: Path,
    *,
    text: TextTokenizer,
    image: ImageTokenizer,
    area: int,
    fps: float | None = None,
    batch: int = 32,
    share: tuple[int, int] = (0, 1),
) -> Tokenised:
    """Tokenises the raw dataset at `source` into `out`; run again after a stop, it goes on where it was.

    Media keep their aspect at no more than `area` pixels a frame; clips are read at `fps`; `batch` pictures are
    encoded at once. Where `temporal` frames share codes, a clip's last group is filled up with its last frame, so that
    nothing is lost; `fps` in the output stays the rate of frames. With `share` (i, n) this process does every n-th
    shard, and whichever ends last writes the manifest. What fails goes to rejects.jsonl. Raises DatasetError, and
    JobError if `out` was made otherwise.
    """
    if area < image.patch**2:
        raise JobError(f"area {area} holds no patch of {image.patch}x{image.patch} pixels; raise the area.")
    if fps is not None and not 0.0 < fps < math.inf:
        raise JobError(f"clips cannot be read at {fps} frames a second; give a number above 0.")
    if batch < 1:
        raise JobError(f"the batch is {batch} pictures; it must be at least 1.")
    if not 0 <= share[0] < share[1]:
        raise JobError(f"share {share[0]} of {share[1]} does not exist; shares are 0 to n - 1 of n.")
    dataset = Dataset(source)
    work = _Work(text=text, image=image, area=area, fps=fps, batch=batch)
    settings = work.settings(dataset)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    if out.resolve() == source.resolve():
        raise JobError(f"{out}: is the source itself. Name another folder for the output.")
    out.mkdir(parents=True, exist_ok=True)
    shards = dataset.manifest["shards"]
    starts = np.cumsum([0, *(shard["documents"] for shard in shards)]).tolist()
    written = 0
    mine = range(share[0], len(shards), share[1])
    for number in progress(mine, label=f"tokenise {dataset.name}"):
        path = out / shards[number]["file"]
        if _finished(path, digest) is None:
            rejects: list[dict[str, str]] = []
            numbers = range(starts[number], starts[number + 1])
            info = write_shard(path, work.documents(dataset, numbers, rejects))
            write_json(_marker(path), {"settings": digest, "sha256": info.sha256, "rejects": rejects})
            written += 1
    return _complete(dataset, out, digest, settings, written)


def _marker(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.done")


def _finished(shard: Path, settings: str) -> dict[str, Any] | None:
    """The marker of a shard that is done and whole, None if it must be written."""
    try:
        marker = json.loads(_marker(shard).read_bytes())
        found, sha256 = marker["settings"], marker["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if found != settings:
        raise JobError(
            f"{shard}: was made by other settings, tokenizers or from other data than this job's. "
            "Remove the folder, or name another one for the output."
        )
    if not shard.is_file():
        return None
    with open(shard, "rb") as file:
        return marker if hashlib.file_digest(file, "sha256").hexdigest() == sha256 else None


def _complete(dataset: Dataset, out: Path, digest: str, settings: dict[str, Any], written: int) -> Tokenised:
    """Writes rejects and manifest once every shard is done."""
    paths = [out / shard["file"] for shard in dataset.manifest["shards"]]
    markers = [marker for path in paths if (marker := _finished(path, digest)) is not None]
    rejects = [reject for marker in markers for reject in marker["rejects"]]
    complete, documents = len(markers) == len(paths), 0
    if complete:
        infos = [_info(path) for path in paths]
        documents = sum(info.documents for info in infos)
        write_atomic(out / "rejects.jsonl", "".join(json.dumps(reject) + "\n" for reject in rejects))
        write_manifest(out, dataset.name, infos, len(rejects), {"form": "tokenised", "settings": settings})
    return Tokenised(
        directory=out,
        written=written,
        shards=len(paths),
        documents=documents,
        rejected=len(rejects),
        complete=complete,
    )


def _info(path: Path) -> ShardInfo:
    try:
        return read_shard_info(path)
    except (DatasetError, RecordError) as e:
        raise JobError(f"{path}: a finished shard cannot be read ({e}). Delete it and run the job again.") from e
