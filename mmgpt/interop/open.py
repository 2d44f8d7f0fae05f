"""Opens what was trained, here or elsewhere: a run folder or a Hugging Face folder."""

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mmgpt.core.config import ConfigError
from mmgpt.core.log import console, printable
from mmgpt.data.images import ImageRows
from mmgpt.data.loader import PackedRows
from mmgpt.interop import hf_config
from mmgpt.interop.hf_config import Described, is_hugging_face
from mmgpt.interop.load import check, load
from mmgpt.interop.names import LAYOUTS, Entry, Layout, decoder_entries
from mmgpt.interop.safetensors_folder import AGAIN, FolderError, SafetensorsFolder
from mmgpt.interop.vision_names import movq_entries
from mmgpt.models import ModelConfig, VisionConfig
from mmgpt.objectives.next_token import NextToken
from mmgpt.objectives.vq_gan import VqGan
from mmgpt.tokens import grammars
from mmgpt.tokens.grammars.grammar import Grammar
from mmgpt.tokens.text import TextTokenizer
from mmgpt.train import state as states
from mmgpt.train.run import Opened, Run, Tokens, build, load_run, open_run, without_training_parts

Part = Literal["text", "vision"]
DType = Literal["float32", "bfloat16"]
GRAMMARS = {"emu3": "emu3", "emu3_5": "emu3_5"}
"""Families whose layout of documents we know."""


def open_folder(path: Path, *, dtype: DType | None = None, part: Part | None = None) -> Opened:
    """A model ready for inference. Of a folder that holds two, the decoder, or the `part` that is asked for.

    `dtype` "bfloat16" holds the parameters so, at half the memory, and computes in it. Every error of a file or of a
    config comes before a device is touched.
    """
    if not is_hugging_face(path):
        _check_part(path, part)
        opened = open_run(path)
        if dtype is not None:
            run = opened.built.run
            built = dataclasses.replace(opened.built, run=run.replace(model=_computing_in(run.model, dtype)))
            params = jax.tree.map(lambda leaf: leaf.astype(dtype), opened.params)
            opened = Opened(without_training_parts(built), opened.step, params, opened.variables)
        return opened
    source = Source(path)
    part = part or ("text" if source.described.model is not None else "vision")
    return source.open(part, source.run(part, dtype=dtype), dtype)


def _computing_in(model: ModelConfig, dtype: str) -> Any:
    """The config of the same model that computes in another number format; ConfigError where it has no choice."""
    if "dtype" not in vars(model):
        raise ConfigError(f"{type(model).__qualname__} computes in float32 alone; open it without a dtype.")
    changes: dict[str, Any] = {"dtype": dtype}
    return model.replace(**changes)


def _check_part(path: Path, part: Part | None) -> None:
    """ConfigError when a run is of the other kind."""
    is_vision = isinstance(load_run(path).model, VisionConfig)
    if part is not None and is_vision != (part == "vision"):
        wanted = "an image tokenizer" if part == "vision" else "a decoder"
        raise ConfigError(f"{path}: expected {wanted}, that run trains another kind of model; name one that does.")


class Source:
    """A Hugging Face folder whose config and headers are read and fit each other."""

    def __init__(self, folder: Path):
        """ConfigError or FolderError tells all that does not fit."""
        self.folder = folder
        self.files = SafetensorsFolder(folder)
        if not self.files.tensors:
            raise FolderError(f"{folder}: its .safetensors hold no tensor. {AGAIN}")
        self.described = hf_config.read(folder / "config.json", self.files.tensors)
        self.layout = layout_of(self.described, self.files.tensors)
        parts = {p: entries(self.described, LAYOUTS[self.layout], p) for p in ("text", "vision") if self.holds(p)}
        self.kept = self._kept({entry.hf_name for part in parts.values() for entry in part})
        self.parts: dict[str, list[Entry]] = parts
        check([entry for part in parts.values() for entry in part] + self.kept, self.files)

    def holds(self, part: Part) -> bool:
        """Whether the folder has this part of a model."""
        return (self.described.model if part == "text" else self.described.vision) is not None

    def _kept(self, known: set[str]) -> list[Entry]:
        """Tensors that we do not compute with and write back as they are."""

        def keep(name: str) -> bool:
            tied = self.described.model is not None and self.described.model.tied and name == "lm_head.weight"
            foreign = self.described.family == "chameleon" and name.startswith("model.vqmodel.")
            return tied or foreign or name.endswith("rotary_emb.inv_freq")

        names = sorted(name for name in self.files.tensors if name not in known and keep(name))
        return [Entry(hf_name=n, hf_shape=self.files.tensors[n].shape, path=None) for n in names]

    def run(self, part: Part, *, text: Path | None = None, vision: Path | None = None, dtype: str | None = None) -> Run:
        """The config of a run that goes on from here: no data, and the tokenizers in the folder.

        `text` and `vision` name where the tokenizers will lie.
        """
        if not self.holds(part):
            raise ConfigError(f"{self.folder} holds no {part} model; its config.json describes another.")
        if part == "vision":
            assert self.described.vision is not None
            side = 32 * self.described.vision.patch
            data = ImageRows.Config(sources=(), height=side, width=side, batch_rows=8)
            vision_model = self.described.vision if dtype is None else _computing_in(self.described.vision, dtype)
            return Run(model=vision_model, objective=VqGan.Config(), data=data)
        model = self.described.model
        assert model is not None
        if dtype is not None:
            model = _computing_in(model, dtype)
        return Run(
            model=model,
            objective=NextToken.Config(vocab=self.described.rows),
            data=PackedRows.Config(sources=(), row_length=self.described.context, batch_rows=8),
            tokens=self._tokens(text or self.folder, vision or self.folder),
        )

    def _tokens(self, text: Path, vision: Path) -> Tokens | None:
        """The tokenizers, where the folder has a text tokenizer and the family a grammar that we know."""
        name = GRAMMARS.get(self.described.family, "")
        if name not in grammars.names() or not tokenizer_files(self.folder):
            return None
        grammar = grammars.config(name)
        tokenizer = TextTokenizer.load(self.folder)
        own = self.described.vision
        places = str(vision) if own is not None else ""
        # Visual codes are the last ids: where no image tokenizer tells their number, it follows from where they begin.
        guess = own.codebooks if own is not None else (1,)
        start = grammar.build(tokenizer, guess).vocabulary.visual_start
        books = own.codebooks if own is not None else (self.described.rows - start,)
        if books[0] < 1:
            raise ConfigError(
                f"{self.folder}: its text tokenizer's ids end at {start}, but the model has {self.described.rows}: the "
                "tokenizer is of another model."
            )
        check_fits(grammar.build(tokenizer, books), self.described, self.folder)
        return Tokens(grammar=grammar, text=str(text), vision=places, codebooks=books)

    def open(self, part: Part, run: Run, dtype: DType | None = None) -> Opened:
        """The part's arrays, on the devices that are there."""
        built = build(run)
        with jax.set_mesh(built.mesh):
            abstract = states.weights(built.structure)
        found = load(self.parts[part], self.files, abstract, None if dtype is None else jnp.dtype(dtype))
        console.print(f"opened {printable(str(self.folder))}")
        return Opened(built, 0, found["params"], found["variables"])


def entries(described: Described, layout: Layout, part: Part) -> list[Entry]:
    """The tensors of one part of a checkpoint."""
    if part == "text":
        assert described.model is not None
        return decoder_entries(described.model, described.rows, layout)
    assert described.vision is not None and layout.vision is not None
    return movq_entries(described.vision, prefix=layout.vision, original=layout.original)


def layout_of(described: Described, names: Any) -> str:
    """Which of LAYOUTS a checkpoint's names have."""
    if described.model is None:
        return "original vision" if any(name.startswith("encoder.down.") for name in names) else "vision"
    if described.vision is None:
        return "decoder"
    return "emu3 file" if any(name.startswith("text_model.") for name in names) else "emu3 module"


def check_fits(grammar: Grammar, described: Described, folder: Path) -> None:
    """ConfigError when a grammar over a tokenizer does not give the ids that the model was trained with."""
    vocabulary = grammar.vocabulary
    ours = {**vocabulary.controls, "first visual code": vocabulary.visual_start}
    faults = [
        f"{name} is {ours[name]} by the tokenizer and {there} by config.json"
        for name, there in described.ids.items()
        if name in ours and ours[name] != there
    ]
    if vocabulary.used != described.rows:
        faults.append(f"ids go up to {vocabulary.used - 1}, the model has {described.rows} rows")
    if faults:
        raise ConfigError(
            f"{folder}: the tokenizer is of another model, or the grammar {grammar.name!r} is not the one that it was "
            f"trained with: {'; '.join(faults)}."
        )


def tokenizer_files(folder: Path) -> Sequence[Path]:
    """Files of a text tokenizer."""
    return [p for pattern in ("*.tiktoken", "tokenizer.json", "tokenizer.model") for p in sorted(folder.glob(pattern))]


def small_files(folder: Path) -> Sequence[Path]:
    """What lies beside the weights, such as tokenizers and settings of generation.

    ConfigError where one is a link out of the folder, which could bring in any file of this machine; those of hub
    caches lead to the `blobs` beside their `snapshots`.
    """
    weights = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix not in weights and not path.name.endswith(".index.json")
    ]
    real = Path(os.path.realpath(folder))
    homes = [real, *([real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [])]
    for path in found:
        target = Path(os.path.realpath(path))
        if not any(home in target.parents for home in homes):
            raise ConfigError(f"{path} is a link to {target}, outside its folder; put the file itself there.")
    return found


def copy_small_files(folder: Path, out: Path) -> None:
    """Copies them into a folder that is there."""
    for path in small_files(folder):
        shutil.copyfile(path, out / path.name)
