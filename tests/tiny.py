"""The smallest things that still are the real ones: a text tokenizer, grammars, documents, datasets, a run."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from mmgpt.core import config
from mmgpt.core.document import Document, Image, Segment, Text, Video
from mmgpt.core.stream import Batch, Stream, packed_causal
from mmgpt.data.images import ImageRows, Pictures
from mmgpt.data.loader import PackedRows
from mmgpt.data.mixture import Source
from mmgpt.data.pack import assemble
from mmgpt.data.record import Writer
from mmgpt.models.decoder import Decoder
from mmgpt.models.patch_vq import PatchVQ
from mmgpt.objectives.autoencode import Autoencode
from mmgpt.objectives.next_token import NextToken
from mmgpt.tokens.grammars.emu3 import Emu3
from mmgpt.tokens.text import TextTokenizer
from mmgpt.train.optimizer import Optimizer
from mmgpt.train.run import Run, Tokens

SENTENCES = ("a red circle left of a blue square", "two green stars below a small cross", "what colour is the ring?")
BOOKS = (4, 8)


@functools.cache
def text() -> TextTokenizer:
    return TextTokenizer.train(SENTENCES * 4, 320)


@functools.cache
def grammar(codebooks: tuple[int, ...] = BOOKS) -> Emu3:
    return Emu3.Config().build(text(), codebooks)


def grid(rng: np.random.Generator, shape: tuple[int, ...], codebooks: tuple[int, ...] = BOOKS) -> np.ndarray:
    return np.stack([rng.integers(0, size, shape) for size in codebooks], axis=-1).astype(np.int32)


def documents(count: int, seed: int, codebooks: tuple[int, ...] = BOOKS) -> list[Document]:
    """Captions with a 2 x 3 picture, some with a clip of two frames, whose text depends on the picture's codes."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        codes = grid(rng, (2, 3), codebooks)
        words = f"{SENTENCES[i % 3]} {int(codes[0, 0, 0])}"
        segments: list[Segment] = [Text(ids=np.array(text().encode(words), np.int32)), Image(codes=codes)]
        if i % 4 == 0:
            segments.append(Video(codes=grid(rng, (2, 2, 2), codebooks)))
        found.append(Document(key=f"{seed}-{i}", segments=tuple(segments)))
    return found


def batch(rows: int, length: int, seed: int = 0, codebooks: tuple[int, ...] = BOOKS) -> Batch:
    """Packed rows of documents, the last of them with padding."""
    tokens = [grammar(codebooks).encode(d) for d in documents(4 * rows, seed, codebooks)]
    made: list[dict[str, np.ndarray]] = []
    for _ in range(rows):
        row, used = [], 0
        while tokens and used + len(tokens[0].ids) <= length:
            row.append(tokens.pop(0))
            used += len(row[-1].ids)
        made.append(assemble(row, length, grammar(codebooks).pad))
    arrays = {name: np.stack([row[name] for row in made]) for name in made[0]}
    visibility = packed_causal(arrays.pop("document"))
    return Batch(
        streams={"tokens": Stream(**arrays)}, visibility={"tokens": visibility}, row_id=np.arange(rows, dtype=np.int64)
    )


def decoder(**changes: Any) -> Decoder.Config:
    """Two layers of grouped heads, sizes that divide over eight devices."""
    base = Decoder.Config(layers=2, embed=16, mlp=32, heads=4, kv_heads=2, head_dim=8, scan=False)
    return base.fit(grammar().vocabulary).replace(**changes)


def write(directory: Path, found: list[Document]) -> str:
    with Writer(directory, name=directory.name, shard_documents=100) as writer:
        for document in found:
            writer.write(document)
    return str(directory)


def tokens(folder: Path) -> Tokens:
    """A text tokenizer's file and the config of an image tokenizer, which is all that a grammar asks of it."""
    (folder / "text.model").write_bytes(text().model)
    pictures = ImageRows.Config(sources=(Pictures.Config(path="none"),), height=8, width=8, batch_rows=8)
    model = PatchVQ.Config(patch=4, structure=BOOKS[1], colour=BOOKS[0], width=8, dim=4)
    vision = Run(model=model, objective=Autoencode.Config(), data=pictures)
    (folder / "vision").mkdir()
    (folder / "vision" / "config.json").write_text(config.to_json(vision))
    return Tokens(text=str(folder / "text.model"), vision=str(folder / "vision"))


def run(folder: Path, **changes: Any) -> Run:
    """A run over two small tokenised datasets that are written to the folder."""
    sources = tuple(
        Source.Config(path=write(folder / name, documents(60, seed)), swap=0.5) for seed, name in enumerate(("left", "right"))
    )
    base = Run(
        model=decoder(vocab=0, dropout=0.1),
        objective=NextToken.Config(),
        data=PackedRows.Config(sources=sources, row_length=64, batch_rows=8, held_out=0.2),
        tokens=tokens(folder),
        optimizer=Optimizer.Config(learning_rate=1e-2, warmup=3),
        steps=12,
        log_every=1,
        evaluate_every=6,
        save_every=2,
        held_out_batches=1,
        samples=0,
    )
    return base.replace(**changes)
