"""Rows of single pictures from raw datasets, for training an image tokenizer: images, and one frame of each clip.

Which picture a row holds is a pure function of (seed, row): sources take turns in a fixed pattern by weight, and
each source is permuted anew in every epoch.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmgpt.core import config
from mmgpt.core.document import KINDS, Image, Video
from mmgpt.core.stream import Batch, Stream
from mmgpt.data.loader import REJECTS, RowsConfig
from mmgpt.data.media import decode_image, decode_video, resize
from mmgpt.data.reading import Cache, LoaderError, Rejects, read_ahead
from mmgpt.data.record import Dataset
from mmgpt.data.shuffle import is_held_out, key, permuted, uniform
from mmgpt.tokens.grammars.grammar import Grammar

PATTERN = 1000
"""Rows in which the sources' turns repeat; weights are rounded to shares of 1 / PATTERN."""


class Pictures:
    """The images and clips of one raw dataset, numbered in document order."""

    class Config(config.Config):
        path: str
        weight: float = 1.0  # share of rows, relative to the other sources

    def __init__(self, config: Config, held_out: float) -> None:
        """`held_out`: share of documents kept from training. `training` and `held_out` are int64 segment numbers."""
        if not config.weight > 0:
            raise LoaderError(
                f"source {config.path}: weight is {config.weight}; it must be above 0, or drop the source."
            )
        self.config, self.dataset = config, Dataset(Path(config.path))
        self.name, index = self.dataset.name, self.dataset.index
        self._first = np.asarray(index.offset)
        pictures = np.flatnonzero(np.isin(index.kind, (KINDS.index(Image), KINDS.index(Video))))
        if np.asarray(index.shape)[pictures].any():
            raise LoaderError(
                f"source {self.name} ({config.path}): holds codes, expected pixels. Name the raw dataset."
            )
        away = is_held_out(self.name, self.document(pictures), held_out)
        self.training, self.held_out = pictures[~away], pictures[away]
        if not len(self.training):
            raise LoaderError(f"source {self.name} ({config.path}): no picture to train on, found {len(pictures)}.")

    def document(self, segment: np.ndarray) -> np.ndarray:
        """The documents that hold some segments, int64."""
        return np.searchsorted(self._first, segment, side="right") - 1

    def frames(self, segment: int, height: int, width: int) -> np.ndarray:
        """One picture, or all frames of one clip: the largest centred part of the aspect asked for, at that size.

        uint8 [T, height, width, 3]. Raises ValueError if it cannot be read or decoded.
        """
        document = int(self.document(np.asarray(segment)))
        found = self.dataset[document].segments[segment - int(self._first[document])]
        if isinstance(found, Image) and found.data is not None:
            frames = decode_image(found.data)[None]
        elif isinstance(found, Video) and found.data is not None:
            frames, _ = decode_video(found.data)
        else:
            raise ValueError("the segment holds no encoded medium.")
        return np.stack([resize(centred(frame, height, width), height, width) for frame in frames])


def centred(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The largest centred part of `image [H, W, 3]` with the aspect of height x width."""
    rows = min(image.shape[0], max(1, round(image.shape[1] * height / width)))
    columns = min(image.shape[1], max(1, round(image.shape[0] * width / height)))
    top, left = (image.shape[0] - rows) // 2, (image.shape[1] - columns) // 2
    return image[top : top + rows, left : left + columns]


class Turns:
    """Which source a row is drawn from, and how often that source was drawn before: random access by row."""

    def __init__(self, weights: list[float]) -> None:
        shares = np.asarray(weights) / np.sum(weights) * PATTERN
        counts = np.floor(shares).astype(np.int64)
        counts[np.argsort(counts - shares, kind="stable")[: PATTERN - counts.sum()]] += 1
        if counts.min() < 1:
            raise LoaderError(
                f"weights {weights}: the smallest share is under 1/{PATTERN}; raise it or drop the source."
            )
        source = np.repeat(np.arange(len(counts)), counts)
        due = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
        self._counts, self._source = counts, source[np.lexsort((source, due))]
        self._before = np.zeros(PATTERN, np.int64)
        for number in range(len(counts)):
            mine = self._source == number
            self._before[mine] = np.arange(mine.sum())

    def __getitem__(self, row: int) -> tuple[int, int]:
        cycle, place = divmod(row, PATTERN)
        source = int(self._source[place])
        return source, cycle * int(self._counts[source]) + int(self._before[place])


class ImageRows:
    """Pictures of one size; the same interface as packed rows."""

    class Config(RowsConfig):
        sources: tuple[Pictures.Config, ...]
        height: int  # pixels
        width: int
        held_out: float = 0.02  # share of each source's documents that is kept from training
        cache_bytes: int = 256 << 20  # decoded pictures that are kept in memory
        threads: int = 2
        prefetch: int = 8  # batches
        workers: int = 0  # processes that load; 0 loads in this one
        max_rejected: float = 0.1  # share of samples that may fail to load before the run ends

        def build(self, grammar: Grammar | None, *, seed: int, rows: int, folder: Path | None) -> "ImageRows":
            """The loader of the first `rows` rows; the grammar is not used. Raises LoaderError, DatasetError."""
            self.check()
            return ImageRows(self, seed=seed, rows=rows, folder=folder)

    def __init__(self, config: Config, *, seed: int, rows: int, folder: Path | None) -> None:
        if not config.sources:
            raise LoaderError("image rows need at least one source, found none. Name one in `sources`.")
        self.batch_rows, self._config, self._seed, self._rows = config.batch_rows, config, seed, rows
        self._pictures = [Pictures(source, config.held_out) for source in config.sources]
        if len(set(self.sources)) < len(self._pictures):
            raise LoaderError(f"sources {', '.join(self.sources)}: two datasets have one name; name one otherwise.")
        self._turns = Turns([source.weight for source in config.sources])
        self._rejects = Rejects(None if folder is None else folder / REJECTS, config.max_rejected)
        self._cache = Cache(config.cache_bytes)

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(pictures.name for pictures in self._pictures)

    def batches(self, start_row: int, shard: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Batches with the stream "pixels": `feats [B, H, W, 3]` in -1..1, `weight [B, 1]`, 0 where decoding failed.

        See `Rows.batches`.
        """
        arrays = read_ahead(
            self._row,
            rows=self._rows,
            batch_rows=self.batch_rows,
            start_row=start_row,
            shard=shard,
            threads=self._config.threads,
            prefetch=self._config.prefetch,
            workers=self._config.workers,
        )
        return map(_batch, arrays)

    def held_out_batches(self, name: str, count: int) -> list[Batch]:
        """Up to `count` batches of one source's held-out pictures, always the same; the last is filled up."""
        if name not in self.sources:
            raise LoaderError(f"no source {name!r}; there is {', '.join(self.sources)}.")
        number = self.sources.index(name)
        segments = self._pictures[number].held_out[: count * self.batch_rows].tolist()
        if not segments:
            raise LoaderError(f"source {name} has no held-out picture: held_out is {self._config.held_out}; raise it.")
        family = key("held-out frame", name)
        rows = [self._picture(number, segment, row, family) for row, segment in enumerate(segments)]
        rows += [self._blank(-1)] * (-len(rows) % self.batch_rows)
        parts = [rows[i : i + self.batch_rows] for i in range(0, len(rows), self.batch_rows)]
        return [_batch({key: np.stack([row[key] for row in part]) for key in part[0]}) for part in parts]

    def summary(self) -> dict[str, Any]:
        """Pictures by source, epochs, what failed at load; plain values."""
        turns = np.bincount([self._turns[row][0] for row in range(PATTERN)], minlength=len(self._pictures)) / PATTERN
        sources = {
            p.name: {
                "pictures": len(p.training),
                "share": float(share),
                "epochs": self._rows * float(share) / len(p.training),
            }
            for p, share in zip(self._pictures, turns, strict=True)
        }
        held_out = {pictures.name: len(pictures.held_out) for pictures in self._pictures}
        return {"rows": self._rows, "sources": sources, "held_out": held_out, "rejected_at_load": len(self._rejects)}

    def grow(self, rows: int) -> None:
        """See `Rows.grow`."""
        self._rows = rows

    def close(self) -> None:
        """Lets go of what is kept in memory; the loader is not used again."""
        self._cache = Cache(0)

    def _row(self, row: int) -> dict[str, np.ndarray]:
        source, drawn = self._turns[row]
        pictures = self._pictures[source]
        epoch, place = divmod(drawn, len(pictures.training))
        order = key(self._seed, "order", pictures.name, epoch)
        segment = pictures.training[permuted(order, len(pictures.training), np.asarray([place]))[0]]
        return self._picture(source, int(segment), row, key(self._seed, "frame", pictures.name))

    def _picture(self, source: int, segment: int, row: int, family: int) -> dict[str, np.ndarray]:
        """A row: the picture, or the frame of a clip that the draws of `family` choose."""
        pictures, size = self._pictures[source], (self._config.height, self._config.width)
        try:
            frames: np.ndarray = self._cache.get(
                (source, segment), lambda: pictures.frames(segment, *size), lambda frames: frames.nbytes
            )
        except ValueError as e:  # MediaError, RecordError
            document = int(pictures.document(np.asarray(segment)))
            place = f"{pictures.config.path}, document {document}, segment {segment}"
            self._rejects.add(f"{pictures.name}:{document}", str(e), place)
            return self._blank(row)
        self._rejects.passed()
        which = uniform(family, np.asarray([row]))[0]
        return self._blank(row) | {
            "feats": frames[int(which * len(frames))].astype(np.float32) / 127.5 - 1,
            "weight": np.ones(1, np.float32),
        }

    def _blank(self, row: int) -> dict[str, np.ndarray]:
        return {
            "feats": np.zeros((self._config.height, self._config.width, 3), np.float32),
            "weight": np.zeros(1, np.float32),
            "row": np.asarray(row, np.int64),
        }


def _batch(arrays: dict[str, np.ndarray]) -> Batch:
    stream = Stream(feats=arrays["feats"], weight=arrays["weight"], kind="pixels")
    return Batch(streams={"pixels": stream}, visibility={}, row_id=arrays["row"])
