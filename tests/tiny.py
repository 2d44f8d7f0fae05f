"""The smallest things that still are the real ones: a text tokenizer, grammars, documents, datasets, a run."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.core import config
from mmgpt.core.document import Document, Image, Segment, Text, Video
from mmgpt.core.stream import Batch
from mmgpt.data.images import ImageRows, Pictures
from mmgpt.data.loader import PackedRows
from mmgpt.data.mixture import Source
from mmgpt.data.record import Writer
from mmgpt.data.row import assemble, stacked
from mmgpt.models.decoder import Decoder
from mmgpt.models.gain_shape_vq import GainShapeVQ
from mmgpt.objectives.autoencode import Autoencode
from mmgpt.objectives.next_token import NextToken
from mmgpt.tokens.grammars.emu3 import Emu3
from mmgpt.tokens.text import TextTokenizer
from mmgpt.train.optimizer import Optimizer
from mmgpt.train.run import Run, Tokens
from mmgpt.train.state import State, Structure, initial

SENTENCES = ("a red circle left of a blue square", "two green stars below a small cross", "what colour is the ring?")
BOOKS = (4, 8)


@functools.cache
def text() -> TextTokenizer:
    return TextTokenizer.train(SENTENCES * 4, 320)


@functools.cache
def grammar(codebooks: tuple[int, ...] = BOOKS, blanks: bool = False) -> Emu3:
    return Emu3.Config().build(text(), codebooks, blanks=blanks)


def grid(
    rng: np.random.Generator, shape: tuple[int, ...], codebooks: tuple[int, ...] = BOOKS, blanks: bool = True
) -> np.ndarray:
    codes = np.stack([rng.integers(0, size, shape) for size in codebooks], axis=-1).astype(np.int32)
    return codes * (codes[..., :1] > 0) if blanks else codes


def documents(count: int, seed: int, codebooks: tuple[int, ...] = BOOKS) -> list[Document]:
    """Captions with a 2 x 3 picture, some with a clip of two frames, whose text depends on the picture's codes."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        codes = grid(rng, (2, 3), codebooks)
        words = f"{' '.join(SENTENCES[i % 3].split()[-2:])} {int(codes[0, 0, 0])}"
        segments: list[Segment] = [Text(ids=np.array(text().encode(words), np.int32)), Image(codes=codes)]
        if i % 4 == 0:
            segments.append(Video(codes=grid(rng, (2, 1, 2), codebooks)))
        found.append(Document(key=f"{seed}-{i}", segments=tuple(segments)))
    return found


def batch(
    rows: int, length: int, seed: int = 0, codebooks: tuple[int, ...] = BOOKS, *, documents_a_row: int = 4
) -> Batch:
    """Packed rows of documents, the last of them with padding."""
    tokens = [grammar(codebooks).encode(d) for d in documents(documents_a_row * rows, seed, codebooks)]
    made: list[dict[str, np.ndarray]] = []
    for _ in range(rows):
        row, used = [], 0
        while tokens and used + len(tokens[0].ids) <= length:
            row.append(tokens.pop(0))
            used += len(row[-1].ids)
        assert row, "a document is longer than a row"
        made.append(assemble(row, length, grammar(codebooks).pad))
    return stacked(made)


def drawn(abstract: Any, seed: int = 0) -> Any:
    """Arrays of a state's shapes, laid out as it says: gains and variances of one, the rest small and random.

    By numpy, since compiling the real initialisers costs ten times what the tests of a tiny model do.
    """
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        gain = path[-1].key in ("scale", "variance")
        value = np.ones(leaf.shape) if gain else 0.2 * rng.standard_normal(leaf.shape)
        return jax.device_put(value.astype(leaf.dtype), jax.NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec))

    return jax.tree.map_with_path(draw, abstract)


def state(structure: Structure, optimizer: Optimizer, *, ema: bool = False) -> State:
    """A state at step 0 with `drawn` parameters."""
    whole = jax.eval_shape(lambda: initial(structure, optimizer, ema))
    made: State = {name: drawn(whole[name]) for name in ("params", "variables")}
    optimizer_state = jax.jit(optimizer.init)(made["params"])
    made |= {"optimizer": optimizer_state, "step": jnp.zeros((), jnp.int32)}
    return made | ({"ema": jax.tree.map(jnp.copy, made["params"])} if ema else {})


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
    model = GainShapeVQ.Config(patch=4, stride=4, masks=BOOKS[1] - 1, colours=BOOKS[0] - 1)
    vision = Run(model=model, objective=Autoencode.Config(), data=pictures)
    (folder / "vision").mkdir()
    (folder / "vision" / "config.json").write_text(config.to_json(vision))
    return Tokens(text=str(folder / "text.model"), vision=str(folder / "vision"))


def run(folder: Path, **changes: Any) -> Run:
    """A run over two small tokenised datasets that are written to the folder."""
    names = {"left": documents(60, 0), "right": documents(60, 1)}
    sources = tuple(Source.Config(path=write(folder / name, found), swap=0.5) for name, found in names.items())
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
