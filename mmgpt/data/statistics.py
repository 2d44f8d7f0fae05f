"""What a dataset holds in numbers: lengths of documents, segments by kind, code grids, rejects; from its index."""

import collections
import json
from typing import Any

import numpy as np

from mmgpt.core.document import KINDS, Document, Image, Text, Video
from mmgpt.data.lengths import CHUNK
from mmgpt.data.record import Dataset
from mmgpt.tokens.grammars.grammar import Grammar

BARS = 16
"""Bars of a histogram at most, where the lengths are of one order."""
_MEDIA = (KINDS.index(Image), KINDS.index(Video))


def statistics(dataset: Dataset, grammar: Grammar | None = None) -> dict[str, Any]:
    """Counts and sizes as JSON values, from the manifest and the index alone (no record is read but the first).

    `text_lengths` are characters when raw, ids when tokenised; `grids` counts code grids "TxHxWxC". `lengths` are of
    documents: tokens under the grammar, else ids and codes, and characters when raw; `length_sums` is their sum by
    kind of segment, and `histogram` counts documents and lengths between edges, each but the last with its lower one.
    """
    index, shards = dataset.index, dataset.manifest["shards"]
    kinds = {kind.__name__.lower(): int(np.sum(index.kind == i)) for i, kind in enumerate(KINDS)}
    texts = index.shape[index.kind == KINDS.index(Text), 0]
    media = index.shape[np.isin(index.kind, _MEDIA), :4]
    shapes, counts = np.unique(media, axis=0, return_counts=True)
    grids = {"x".join(map(str, s)): int(n) for s, n in zip(shapes.tolist(), counts, strict=True) if any(s)}
    size = sum(shard["bytes"] for shard in shards)
    unit, lengths, sums = measured(dataset, grammar)
    return {
        "name": dataset.name,
        "form": "tokenised" if tokenised(dataset) else "raw",
        "documents": len(dataset),
        "segments": {kind: n for kind, n in kinds.items() if n},
        "length_unit": unit,
        "lengths": _spread(lengths),
        "length_sums": sums,
        "histogram": histogram(lengths, edges(lengths)),
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


def tokenised(dataset: Dataset) -> bool:
    """Whether the dataset holds ids and codes, by its first document."""
    document = dataset[0] if len(dataset) else Document(key="", segments=())
    held = [vars(s).get("ids") if isinstance(s, Text) else vars(s).get("codes") for s in document.segments]
    return any(h is not None for h in held)


def measured(dataset: Dataset, grammar: Grammar | None) -> tuple[str, np.ndarray, dict[str, int]]:
    """The unit, the length of every document int64 [N], and their sum by kind of segment; see `statistics`."""
    index, found = dataset.index, tokenised(dataset)
    by_grammar = grammar is not None and found
    overhead = grammar.overhead if grammar is not None and found else 0
    lengths, sums = np.empty(len(dataset), np.int64), np.zeros(len(KINDS), np.int64)
    for first in range(0, len(dataset), CHUNK):
        offset = np.asarray(index.offset[first : first + CHUNK + 1])
        segments = slice(int(offset[0]), int(offset[-1]))
        kind, shape = np.asarray(index.kind[segments]), np.asarray(index.shape[segments])
        sizes = np.asarray(grammar.segment_lengths(kind, shape)) if grammar and found else _sizes(kind, shape)
        total = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
        lengths[first : first + CHUNK] = overhead + np.diff(total[offset - offset[0]])
        sums += np.bincount(kind, sizes, len(KINDS)).astype(np.int64)
    by_kind = {kind.__name__.lower(): int(n) for kind, n in zip(KINDS, sums, strict=True) if n}
    by_kind |= {"begin and end": overhead * len(dataset)} if overhead else {}
    return "tokens" if by_grammar else "ids and codes" if found else "characters", lengths, by_kind


def _sizes(kind: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Ids and codes, or characters, of segments; raw media have none."""
    return np.where(np.isin(kind, _MEDIA), shape[:, :4].astype(np.int64).prod(axis=1), shape[:, 0])


def edges(lengths: np.ndarray) -> list[int]:
    """Edges of a histogram's bars: round numbers, or powers of two where lengths are of several orders."""
    if not len(lengths):
        return [0, 1]
    low, middle, high = int(lengths.min()), float(np.median(lengths)), int(lengths.max())
    if high > 8 * max(8.0, middle):
        return [
            *([0] if low == 0 else []),
            *(1 << i for i in range(max(0, low.bit_length() - 1), high.bit_length() + 1)),
        ]
    steps = (m * 10**e for e in range(19) for m in (1, 2, 5))
    step = next(s for s in steps if high // s - low // s < BARS)
    return [i * step for i in range(low // step, high // step + 2)]


def histogram(lengths: np.ndarray, bounds: list[int]) -> dict[str, list[int]]:
    """Documents between edges, and the sum of their lengths."""
    bar = np.searchsorted(bounds, lengths, "right") - 1
    return {
        "edges": bounds,
        "documents": np.bincount(bar, minlength=len(bounds) - 1).tolist(),
        "lengths": np.bincount(bar, lengths, len(bounds) - 1).astype(np.int64).tolist(),
    }


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
