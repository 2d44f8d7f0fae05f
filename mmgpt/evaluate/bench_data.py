"""`mmgpt bench data`: fill and speed of pack plans, loading beside Grain's own packers, resume, image decoding."""

import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import simplejpeg

from mmgpt.core.config import ConfigError
from mmgpt.core.document import Document, Image, Segment, Text
from mmgpt.core.log import check_writable, console, progress, show, table, write_json
from mmgpt.data import pack
from mmgpt.data.lengths import Lengths
from mmgpt.data.loader import PackedRows
from mmgpt.data.media import decode_image, encode_jpeg
from mmgpt.data.mixture import Source
from mmgpt.data.record import Dataset, Writer, decode, shard_name, write_manifest, write_shard
from mmgpt.tokens import grammars
from mmgpt.tokens.grammars.grammar import Grammar
from mmgpt.tokens.text import TextTokenizer

ROW_LENGTHS = (8192, 32_768, 131_072)
WORDS = ["a red circle left of a blue square", "two green stars below a small cross", "0123456789*"]
PLANNED_TOKENS = 1 << 30
MIX = {"text": 0.35, "images of 32x32": 0.35, "images of 64x64": 0.15, "interleaved": 0.15}
"""Shares of tokens. Texts are lognormal (median 500, sigma 1.2), captions too (50 and 80, 0.6), both in Emu3's layout;
an interleaved document has 2 to 7 images of 32x32 and a text (median 600, sigma 0.8)."""


def bench_data(
    planned_tokens: int = PLANNED_TOKENS,
    records: int = 4000,
    documents: int = 10_000_000,
    turns: int = 3,
    billion: bool = False,
    json: Path | None = None,
) -> None:
    """Measures packing, loading, resuming and image decoding on made-up data of realistic sizes.

    Args:
        planned_tokens: tokens of each plan whose fill is measured, at rows of 8,192, 32,768 and 131,072.
        records: records of 2.7k tokens on average that are loaded, by us and by Grain's packers in turns.
        documents: of the data set whose training is resumed.
        turns: of each measurement that is compared; the figures are medians.
        billion: plan a billion documents instead, to disk, and tell the memory that takes (19 GB on disk, minutes).
        json: write the figures.
    """
    if min(planned_tokens // ROW_LENGTHS[-1], records // 100, documents, turns) < 1:
        raise ConfigError("--planned-tokens must be a row at least, --records 100, --documents and --turns 1.")
    check_writable(json)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="mmgpt-bench-") as folder:
        if billion:
            figures = _billion(Path(folder))
        else:
            for row_length in ROW_LENGTHS:
                figures |= _planning(row_length, planned_tokens)
            figures |= _loading(Path(folder), records, turns)
            figures |= _resume(Path(folder), documents)
            figures |= _decoding(turns)
    show(table("mmgpt bench data", {name: {"value": round(value, 5)} for name, value in figures.items()}))
    if json is not None:
        write_json(json, figures)


# --- plans


def _drawn(rng: np.random.Generator, name: str, count: int, most: int) -> np.ndarray:
    """Lengths of so many documents of one kind of MIX."""

    def words(median: float, sigma: float, low: int, high: int) -> np.ndarray:
        return np.clip(rng.lognormal(np.log(median), sigma, count), low, high).astype(np.int64)

    if name == "text":
        return words(500, 1.2, 24, most)
    if name.startswith("images"):
        side = int(name.rpartition("x")[2])
        return side * (side + 1) + 8 + (words(50, 0.6, 8, 400) if side == 32 else words(80, 0.6, 8, 600))
    return np.minimum(rng.integers(2, 8, count) * (32 * 33 + 8) + words(600, 0.8, 40, 6000), most)


def _source(name: str, full: np.ndarray, row_length: int, weight: float) -> Source:
    full, yes = full.astype(np.int32), np.ones(len(full), bool)
    lengths = Lengths(full=full, no_text=full, swappable=yes, droppable=yes, overhead=2)
    swap = 0.0 if name == "text" else 0.5
    return Source(Source.Config(path=name, weight=weight, swap=swap), name, lengths, row_length, held_out=0.001)


def _planning(row_length: int, tokens: int) -> dict[str, float]:
    rng, sources = np.random.default_rng(0), []
    for name, share in MIX.items():
        mean = _drawn(rng, name, 10_000, row_length).mean()
        sources.append(_source(name, _drawn(rng, name, int(tokens * share / mean), row_length), row_length, share))
    begin = time.process_time()
    plan = pack.plan(sources, seed=0, row_length=row_length, rows=tokens // row_length)
    seconds = time.process_time() - begin
    return {
        f"fill at {row_length} (%)": 100 * plan.summary()["fill"],
        f"plan at {row_length} (M documents/s/core)": len(plan.draws) / seconds / 1e6,
    }


def _billion(folder: Path, documents: int = 10**9) -> dict[str, float]:
    """Plans an epoch of a billion documents to disk. Their lengths are 4 bytes each, as a mapped index gives them."""
    rng, row_length, full = np.random.default_rng(0), ROW_LENGTHS[0], np.empty(documents, np.int32)
    for first in progress(range(0, documents, 10**7), label="lengths"):
        part = full[first : first + 10**7]
        part[:] = np.clip(np.exp(rng.standard_normal(len(part), np.float32) * 0.8 + 6.2), 24, row_length)
    yes = np.broadcast_to(np.True_, documents)
    lengths = Lengths(full=full, no_text=full, swappable=yes, droppable=yes, overhead=2)
    source = Source(Source.Config(path="all", max_epochs=1), "all", lengths, row_length, held_out=0.001)
    begin = time.process_time()
    rows = int(source.tokens // row_length * 0.999)
    plan = pack.plan([source], seed=0, row_length=row_length, rows=rows, directory=folder / "plan")
    seconds = time.process_time() - begin
    return {
        "documents": float(len(plan.draws)),
        "fill (%)": 100 * plan.summary()["fill"],
        "plan (M documents/s/core)": len(plan.draws) / seconds / 1e6,
        "peak memory (GB)": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


# --- loading


def _grammar() -> Grammar:
    return grammars.config("emu3").build(TextTokenizer.train(WORDS * 20, 300), (32_768,))


def _documents(count: int) -> Iterator[Document]:
    """Records of 2.7k tokens on average: texts, pictures with captions, and interleaved documents."""
    rng = np.random.default_rng(0)

    def text(median: float) -> Text:
        return Text(
            ids=rng.integers(3, 250, int(np.clip(rng.lognormal(np.log(median), 0.8), 8, 6000))).astype(np.int32)
        )

    def image(side: int) -> Image:
        return Image(codes=rng.integers(0, 32_768, (side, side, 1)).astype(np.int32))

    for number in range(count):
        segments: tuple[Segment, ...] = (text(1000),)
        kind = rng.random()
        if kind < 0.4:
            segments = (text(80), image(32))
        elif kind < 0.6:
            segments = (text(80), image(64))
        elif kind < 0.8:
            segments = tuple(s for _ in range(rng.integers(2, 6)) for s in (text(200), image(32)))
        yield Document(key=str(number), segments=segments)


def _loading(folder: Path, records: int, turns: int, row_length: int = 8192) -> dict[str, float]:
    """Tokens a second of one core, from ArrayRecord to batches: ours, and Grain's first-fit and best-fit packers."""
    grammar = _grammar()
    with Writer(folder / "records", name="records") as writer:
        for document in progress(_documents(records), total=records, label="records"):
            writer.write(document)
    dataset = Dataset(folder / "records")
    lengths = Lengths.measure(grammar, dataset.index).full
    rows = int(lengths[lengths <= row_length].sum() * 0.97) // row_length // 8 * 8
    config = PackedRows.Config(
        sources=(Source.Config(path=str(folder / "records")),),
        row_length=row_length,
        batch_rows=8,
        held_out=0.0,
        cache_bytes=0,
        threads=1,
    )
    loader = config.build(grammar, seed=0, rows=rows, folder=None)
    assert loader.plan is not None  # made before the clock starts

    def ours() -> int:
        return sum(int((b.visibility["tokens"].key_island >= 0).sum()) for b in loader.batches(0))

    runs: dict[str, Callable[[], int]] = {"mmgpt": ours}
    for name, packer in {
        "Grain first fit": grain.experimental.FirstFitPackIterDataset,
        "Grain best fit": grain.experimental.BestFitPackIterDataset,
    }.items():
        runs[name] = lambda packer=packer: _grains(packer, dataset, grammar, row_length, lengths)
    speed: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            begin = time.process_time()
            tokens = run()
            speed[name].append(tokens / (time.process_time() - begin) / 1e6)
    median = {name: float(np.median(values)) for name, values in speed.items()}
    figures = {"record (mean tokens)": float(lengths.mean())}
    figures |= {f"loading, {name} (M tokens/s/core)": value for name, value in median.items()}
    peer = max(value for name, value in median.items() if name != "mmgpt")
    return figures | {"loading over the faster of Grain's": median["mmgpt"] / peer}


def _grains(packer: Any, dataset: Dataset, grammar: Grammar, row_length: int, lengths: np.ndarray) -> int:
    """The same records by one of Grain's packers; features, bins and batches as its users have them."""
    shapes = dict.fromkeys(("ids", "target", "weight", "modality", "place"), row_length)

    def features(number: int) -> dict[str, np.ndarray]:
        tokens = grammar.encode(decode(dataset.raw(number)))
        return {
            "ids": tokens.ids,
            "target": np.append(tokens.ids[1:], np.int32(0)),
            "weight": np.append(tokens.weight[1:], np.float32(0)),
            "modality": tokens.modality,
            "place": tokens.place,
        }

    fitting = np.flatnonzero(lengths <= row_length).tolist()
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=64)
    source = grain.MapDataset.source(fitting).shuffle(seed=0).map(features).to_iter_dataset(ahead)
    packed = packer(source, length_struct=shapes, num_packing_bins=64).batch(8, drop_remainder=True)
    return sum(int((batch["ids_segment_ids"] > 0).sum()) for batch in packed)


# --- resume and decoding


def _resume(folder: Path, documents: int, shard_documents: int = 1 << 14) -> dict[str, float]:
    """Seconds to the first batch of a run that goes on in the middle of a data set of so many documents.

    The manifest names one shard file again and again: the index, the plan and the readers are as large as they are for
    so many documents, and only the disk is spared.
    """
    grammar = _grammar()
    (folder / "many").mkdir()
    info = write_shard(folder / "many" / shard_name(0), _documents(shard_documents))
    write_manifest(folder / "many", "many", [info] * -(-documents // shard_documents), 0)
    config = PackedRows.Config(
        sources=(Source.Config(path=str(folder / "many")),), row_length=8192, batch_rows=8, threads=1, prefetch=1
    )
    rows, seconds = documents * 2000 // 8192 // 8 * 8, []  # most of an epoch
    for _ in range(2):
        begin = time.perf_counter()
        loader = config.build(grammar, seed=0, rows=rows, folder=folder / "run")
        loader.held_out_batches("many", 1)
        list(loader.batches(rows - 8))
        seconds.append(time.perf_counter() - begin)
    return {"first batch with the plan to make (s)": seconds[0], "first batch of a resumed run (s)": seconds[1]}


def _decoding(turns: int, pictures: int = 64) -> dict[str, float]:
    """Speed of decoding JPEG pictures of 512 x 512 beside simplejpeg alone."""
    rng = np.random.default_rng(0)
    smooth = [np.kron(rng.integers(0, 256, (32, 32, 3)), np.ones((16, 16, 1))) for _ in range(pictures)]
    files = [encode_jpeg((image + rng.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)) for image in smooth]
    ways: dict[str, Callable[[bytes], np.ndarray]] = {
        "ours": decode_image,
        "bare": lambda data: simplejpeg.decode_jpeg(data, "RGB"),
    }
    speed: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3 * turns):
        for name, way in ways.items():
            begin = time.process_time()
            for data in files:
                way(data)
            speed[name].append(pictures / (time.process_time() - begin))
    ours, bare = (float(np.median(speed[name])) for name in ways)
    console.print(f"decoding: {ours:.0f} pictures a second on a core")
    return {"image decoding over bare simplejpeg (%)": 100 * ours / bare}
