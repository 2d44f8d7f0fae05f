"""Converts a Hugging Face folder to a run folder, which training can go on from, and a run folder back.

What a checkpoint has besides the numbers that we compute with is remembered in the run's `huggingface/`: its config,
tokenizer files, number formats, names, and tensors that we only keep. So a checkpoint comes back byte for byte.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from mmgpt.core import config
from mmgpt.core.config import ConfigError
from mmgpt.core.log import console, write_atomic, write_json
from mmgpt.interop import hf_config
from mmgpt.interop.hf_config import Described, is_hugging_face
from mmgpt.interop.names import LAYOUTS, Entry
from mmgpt.interop.open import Source, entries
from mmgpt.interop.open import copy_small_files as copy_small
from mmgpt.interop.safetensors_folder import SafetensorsFolder
from mmgpt.interop.safetensors_writer import SHARD_BYTES, Planned, write_file, write_folder
from mmgpt.models import VisionConfig
from mmgpt.models.decoder import Decoder
from mmgpt.models.movq import MoVQ
from mmgpt.objectives.objective import ObjectiveConfig
from mmgpt.train.run import Opened, Run, load_run, open_run
from mmgpt.train.weights import save_weights

MEMORY = "huggingface"
"""Folder of a converted run that remembers the checkpoint it came from."""
NOTES, KEPT = "source.json", "kept.safetensors"
FORMATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
Format = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Notes:
    """What `huggingface/` says of a checkpoint: a name of LAYOUTS, each tensor's number format, header metadata."""

    layout: str
    dtypes: dict[str, str]
    metadata: dict[str, str]


def to_run(
    source: Path, out: Path, *, like: Run | None = None, vision: Path | None = None, overwrite: bool = False
) -> None:
    """Writes a run folder at step 0 from a Hugging Face folder; an image tokenizer in it becomes the run `out/vision`.

    `like` gives the decoder's run everything but model and tokens, `vision` is the folder of an image tokenizer that
    was published apart. ConfigError, FolderError, OSError.
    """
    found = Source(source)
    if vision is not None:
        _check_vision(found, vision)
    main: Literal["text", "vision"] = "text" if found.holds("text") else "vision"
    with whole_folder(out, overwrite) as folder:
        for part in ("text", "vision"):
            if not found.holds(part):
                continue
            run_dir = folder if part == main else folder / "vision"
            run_dir.mkdir(exist_ok=True)
            run = found.run(part, text=out / MEMORY, vision=out / "vision")
            if vision is not None and run.tokens is not None:
                run = run.replace(tokens=run.tokens.replace(vision=str(vision)))
            if like is not None and part == "text":
                run = like.replace(model=run.model, objective=_of_ids(like, run), tokens=run.tokens or like.tokens)
            write_atomic(run_dir / "config.json", config.to_json(run))
            opened = found.open(part, found.run(part))
            with jax.set_mesh(opened.built.mesh), run.checkpoint.build(run_dir / "checkpoints") as checkpoints:
                save_weights(checkpoints, opened.params, opened.variables)
        _remember(found, folder / MEMORY)


def _check_vision(source: Source, folder: Path) -> None:
    """ConfigError where this is no image tokenizer that the decoder's ids are made for."""
    model = Source(folder).described.vision if is_hugging_face(folder) else load_run(folder).model
    tokens = source.run("text").tokens
    if tokens is None:
        raise ConfigError(
            f"--vision {folder}: {source.folder} has no text tokenizer, or a layout that is not known here."
        )
    if not isinstance(model, VisionConfig) or model.codebooks != tokens.codebooks:
        found = model.codebooks if isinstance(model, VisionConfig) else "none"
        raise ConfigError(f"--vision {folder}: its codebooks are {found}, the model's ids are of {tokens.codebooks}.")


def _of_ids(like: Run, run: Run) -> ObjectiveConfig:
    """The objective of `like` over the ids of the checkpoint."""
    ids: dict[str, Any] = {name: value for name, value in vars(run.objective).items() if name == "vocab"}
    return like.objective.replace(**{name: value for name, value in ids.items() if name in vars(like.objective)})


def _remember(source: Source, folder: Path) -> None:
    folder.mkdir()
    copy_small(source.folder, folder)
    tensors = source.files.tensors
    notes = Notes(
        layout=source.layout,
        dtypes={name: tensor.dtype for name, tensor in tensors.items()},
        metadata=source.files.metadata,
    )
    write_json(folder / NOTES, dataclasses.asdict(notes))
    kept = [Planned(name=e.hf_name, dtype=tensors[e.hf_name].dtype, shape=e.hf_shape) for e in source.kept]
    if kept:
        write_file(folder / KEPT, kept, source.files.read, {})


def to_hugging_face(
    run_dir: Path,
    out: Path,
    *,
    family: str | None = None,
    dtype: Format | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes a Hugging Face folder from a run's newest checkpoint.

    A run that was converted keeps names, number formats and files of where it came from unless `family` or `dtype` say
    otherwise; another has its `family` from its config, and float32. ConfigError, CheckpointError, OSError.
    """
    run, memory = load_run(run_dir), run_dir / MEMORY
    notes = _notes(memory) if family is None else None
    opened = open_run(run_dir)
    described = _described(run, opened, notes, memory, family)
    layout = LAYOUTS[notes.layout if notes is not None else "decoder" if described.model is not None else "vision"]
    parts = [(opened, entries(described, layout, "text" if described.model is not None else "vision"))]
    whole = described.model is not None and described.vision is not None
    if whole:
        parts.append((open_run(run_dir / "vision"), entries(described, layout, "vision")))
    readers = {entry.hf_name: (opened, entry) for opened, part in parts for entry in part}
    kept = SafetensorsFolder(memory) if notes is not None and (memory / KEPT).exists() else None
    plan = [
        Planned(name=name, dtype=_format(name, notes, dtype), shape=entry.hf_shape)
        for name, (_, entry) in readers.items()
    ]
    if kept is not None:
        plan += [Planned(name=t.name, dtype=t.dtype, shape=t.shape) for t in kept.tensors.values()]

    def read(name: str) -> np.ndarray:
        return _numbers(*readers[name]) if name in readers else kept.read(name) if kept else np.empty(0)

    with whole_folder(out, overwrite) as folder:
        if notes is not None:
            copy_small(memory, folder)
            (folder / NOTES).unlink()
        body = _config(described, dtype, whole, None if notes is None else memory / "config.json", notes)
        if body is not None:
            write_json(folder / "config.json", body)
        metadata = {"format": "pt"} if notes is None else notes.metadata
        write_folder(folder, plan, read, metadata=metadata, shard_bytes=shard_bytes)


def _notes(memory: Path) -> Notes | None:
    if not (memory / NOTES).exists():
        return None
    try:
        return Notes(**json.loads((memory / NOTES).read_bytes()))
    except (ValueError, TypeError) as e:
        raise ConfigError(f"{memory / NOTES}: damaged ({e}). Convert the checkpoint again, or name a family.") from e


def _format(name: str, notes: Notes | None, dtype: str | None) -> str:
    if name.endswith("num_batches_tracked"):
        return "I64"
    return FORMATS[dtype or "float32"] if notes is None or dtype is not None else notes.dtypes[name]


def _described(run: Run, opened: Opened, notes: Notes | None, memory: Path, family: str | None) -> Described:
    """What the config.json is to say: of where the run came from, with the model as it is now.

    With another `family` than there, `notes` is None: what was remembered then tells ids, rows and context alone.
    """
    model = run.model
    from_there = _notes(memory)
    before = None if from_there is None else hf_config.read(memory / "config.json", from_there.dtypes)
    if isinstance(model, MoVQ.Config):
        return Described(vision=_as_before(model, None if before is None else before.vision))
    if not isinstance(model, Decoder.Config):
        raise ConfigError(
            f"{type(model).__qualname__} is no model that Hugging Face folders hold; decoders and MoVQ are."
        )
    if before is not None:
        whole = before.vision if notes is not None else None
        kind = before.family if family is None else family
        return dataclasses.replace(before, model=_as_before(model, before.model), family=_known(kind), vision=whole)
    grammar = opened.built.grammar
    if grammar is not None:
        model = model.fit(grammar.vocabulary)
    kind = _known(family or _family(model, visual=grammar is not None))
    rows, ids = (model.vocab, {}) if grammar is None else (grammar.vocabulary.used, dict(grammar.vocabulary.controls))
    context = vars(run.data).get("row_length", 2048)
    return Described(family=kind, model=model, rows=rows, context=context, ids=ids)


def _config(
    described: Described, dtype: Format | None, whole: bool, before: Path | None, notes: Notes | None
) -> dict[str, Any] | None:
    """The config.json to write; None where the one from `before` says it all."""
    if before is None or notes is None:
        return hf_config.write(described, dtype or "float32", whole)
    body = json.loads(before.read_bytes())
    if described == hf_config.read(before, notes.dtypes):
        changes = {key: dtype for key in ("dtype", "torch_dtype") if key in body}
        return None if dtype is None else body | (changes or {"dtype": dtype})
    carried = {key: body[key] for key in ("vocabulary_map", "image_token_id", "vq_config") if key in body}
    return hf_config.write(described, dtype or body.get("dtype", "float32"), whole) | carried


def _known(family: str) -> str:
    if family not in hf_config.FAMILIES:
        raise ConfigError(f"--to {family}: no such family; there is {', '.join(hf_config.FAMILIES)}.")
    return family


def _family(model: Decoder.Config, visual: bool) -> str:
    return {"none": "emu3" if visual else "llama", "rms": "emu3_5" if visual else "qwen3", "layer": "chameleon"}[
        model.qk_norm
    ]


def _as_before(model: Any, before: Any) -> Any:
    """The model as the checkpoint's config says it, where they differ only in how it is run here."""
    if before is None:
        return model
    here = {name: vars(before)[name] for name in ("scan", "remat", "dtype") if name in vars(before)}
    return model.replace(**here)


def _numbers(opened: Opened, entry: Entry) -> np.ndarray:
    """A tensor as it goes into the checkpoint: without padding, in its layout."""
    assert entry.path is not None
    leaf: Any = {"params": opened.params, "variables": opened.variables}
    for name in entry.path.split("/"):
        leaf = leaf[int(name) if name not in leaf and name.isdecimal() else name]
    with jax.set_mesh(opened.built.mesh):
        array = np.asarray(leaf if entry.layer is None else leaf[entry.layer])
    return entry.to_hf(array[tuple(slice(n) for n in entry.shape)])


@contextlib.contextmanager
def whole_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which appears under its name once all is written; after an error nothing is left."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not overwrite:
            raise ConfigError(f"{out} is there already; give another folder, or --overwrite True.")
        if not (out / "config.json").is_file():
            raise ConfigError(f"{out} holds something else than a model and is not overwritten; give another folder.")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        old = out.with_name(f".{out.name}.{os.getpid()}.old")
        if out.exists():
            out.rename(old)
        temporary.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    console.print(f"wrote {out}", highlight=False)


def convert(
    source: Path,
    out: Path,
    *,
    to: str | None = None,
    dtype: Format | None = None,
    like: Run | None = None,
    vision: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Either way: what `source` is decides. ConfigError where an option is of the other way."""
    if is_hugging_face(source):
        if to is not None or dtype is not None:
            raise ConfigError("--to and --dtype say how a Hugging Face folder is written; this one is read.")
        to_run(source, out, like=like, vision=vision, overwrite=overwrite)
        return
    if like is not None or vision is not None:
        raise ConfigError("--like and --vision say what a run is written with; this one is read.")
    to_hugging_face(source, out, family=to, dtype=dtype, shard_bytes=shard_bytes, overwrite=overwrite)
