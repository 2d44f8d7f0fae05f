"""Converts a Hugging Face folder to a run folder, which training can go on from, and a run folder back.

What a checkpoint has besides the numbers that we compute with is remembered in the run's `huggingface/`: its config,
tokenizer files, number formats, names, and tensors that we only keep. So a checkpoint comes back byte for byte.
"""

import dataclasses
import json
from collections.abc import Mapping
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
from mmgpt.interop.open import Source, entries, layout_of, small_files
from mmgpt.interop.open import copy_small_files as copy_small
from mmgpt.interop.safetensors_folder import DTYPES, SafetensorsFolder, shown
from mmgpt.interop.safetensors_writer import SHARD_BYTES, Planned, not_finite, write_file, write_folder
from mmgpt.interop.whole_folder import whole_folder
from mmgpt.models import VisionConfig
from mmgpt.models.decoder import Decoder
from mmgpt.models.movq import MoVQ
from mmgpt.objectives.objective import ObjectiveConfig
from mmgpt.tokens.grammars.grammar import Grammar
from mmgpt.train.arrays import check_path
from mmgpt.train.run import Opened, Run, Tokens, load_run, open_run
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
    check_path(out)
    needed = [source, *([] if vision is None else [vision]), *([] if like is None else _tokenizers(like.tokens))]
    with whole_folder(out, overwrite, needed) as folder:
        found = Source(source)
        small_files(source)  # tells links out of the folder
        main: Literal["text", "vision"] = "text" if found.holds("text") else "vision"
        if vision is not None:
            _check_vision(found, vision)
        if like is not None and (main != "text" or not isinstance(like.model, Decoder.Config)):
            raise ConfigError(
                "--like gives its settings to a decoder's run: name the preset of a decoder, or leave it out."
            )
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
            with jax.set_mesh(opened.built.mesh), run.checkpoint.build(run_dir / "checkpoints", quiet=True) as saved:
                save_weights(saved, opened.params, opened.variables)
        _remember(found, folder / MEMORY)
        _tell_not_finite(_counted(found.files))


def _tokenizers(tokens: Tokens | None) -> list[Path]:
    return [] if tokens is None else [Path(path) for path in (tokens.text, tokens.vision) if path]


def _counted(files: SafetensorsFolder) -> dict[str, int]:
    """How many numbers of each tensor are not finite."""
    counts = {}
    for name in sorted(files.tensors):
        counts[name] = not_finite(files.read(name))
        files.release()
    return counts


def _tell_not_finite(counts: Mapping[str, int]) -> None:
    """A line where some numbers are not: nothing can be computed with them, but they may be wanted as they are."""
    if found := {name: count for name, count in counts.items() if count}:
        first = next(iter(found))
        more = f"; so are some of {len(found) - 1} more tensors" if len(found) > 1 else ""
        console.print(f"warning: {found[first]} numbers of {shown(first)} are NaN or infinite{more}.")


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
    models: Mapping[Path, Opened] | None = None,
) -> None:
    """Writes a Hugging Face folder from a run's newest checkpoint, or of `models` in memory, by run folder.

    A run that was converted keeps names, number formats and files of where it came from unless `family` or `dtype` say
    otherwise; another has its `family` from its config, and float32. ConfigError, CheckpointError, OSError.
    """
    if shard_bytes < 1:
        raise ConfigError(f"--shard-bytes is {shard_bytes}; it must be at least 1.")
    run, memory = load_run(run_dir), run_dir / MEMORY
    read = [run_dir] if models is None else []
    with whole_folder(out, overwrite, [*read, *_tokenizers(run.tokens)]) as folder:
        notes = _notes(memory) if family is None else None
        described = _described(run, None if run.tokens is None else run.tokens.build(), notes, memory, family)
        layout = LAYOUTS[notes.layout if notes is not None else "decoder" if described.model is not None else "vision"]
        main: Literal["text", "vision"] = "text" if described.model is not None else "vision"
        parts = {run_dir: entries(described, layout, main)}
        whole = described.model is not None and described.vision is not None
        if whole:
            parts[run_dir / "vision"] = entries(described, layout, "vision")
        kept = SafetensorsFolder(memory) if notes is not None and (memory / KEPT).exists() else None
        plan = [
            Planned(name=e.hf_name, dtype=_format(e.hf_name, notes, dtype, memory), shape=e.hf_shape)
            for part in parts.values()
            for e in part
        ]
        if kept is not None:
            plan += [Planned(name=t.name, dtype=t.dtype, shape=t.shape) for t in kept.tensors.values()]
        body = _config(described, dtype, whole, None if notes is None else memory / "config.json", notes)
        # Faults that show without the weights are told by now. The image tokenizer, the smaller part, is opened first.
        opened = models or {path: open_run(path) for path in reversed(parts)}
        readers = {entry.hf_name: (opened[path], entry) for path, part in parts.items() for entry in part}
        counts: dict[str, int] = {}

        def numbers(name: str) -> np.ndarray:
            array = _numbers(*readers[name]) if name in readers else kept.read(name) if kept else np.empty(0)
            counts[name] = not_finite(array)
            return array

        if notes is not None:
            copy_small(memory, folder)
            (folder / NOTES).unlink()
        if body is not None:
            write_json(folder / "config.json", body)
        metadata = {"format": "pt"} if notes is None else notes.metadata
        write_folder(folder, plan, numbers, metadata=metadata, shard_bytes=shard_bytes)
        _tell_not_finite(counts)


def check_exportable(run: Run, run_dir: Path) -> None:
    """ConfigError where `to_hugging_face` could not write the model of this run."""
    memory = run_dir / MEMORY
    _described(run, None if run.tokens is None else run.tokens.build(), _notes(memory), memory, None)


def _notes(memory: Path) -> Notes | None:
    if not (memory / NOTES).exists():
        return None
    try:
        notes = Notes(**json.loads((memory / NOTES).read_bytes()))
        fits = notes.layout in LAYOUTS and all(dtype in DTYPES for dtype in notes.dtypes.values())
        fits = fits and all(isinstance(text, str) for text in notes.metadata.values())
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise ConfigError(_damaged(memory, str(e))) from e
    if not fits:
        raise ConfigError(_damaged(memory, "no layout, number format or metadata that is written there"))
    return notes


def _damaged(memory: Path, what: str) -> str:
    return f"{memory / NOTES}: damaged ({what}). Convert the checkpoint again."


def _format(name: str, notes: Notes | None, dtype: str | None, memory: Path) -> str:
    if name.endswith("num_batches_tracked"):
        return "I64"
    if notes is None or dtype is not None:
        return FORMATS[dtype or "float32"]
    if name not in notes.dtypes:
        raise ConfigError(_damaged(memory, f"no number format of {name}"))
    return notes.dtypes[name]


def _described(run: Run, grammar: Grammar | None, notes: Notes | None, memory: Path, family: str | None) -> Described:
    """What the config.json is to say: of where the run came from, with the model as it is now.

    With another `family` than there, `notes` is None: what was remembered then tells ids, rows and context alone.
    """
    model = run.model
    from_there = _notes(memory)
    before = None if from_there is None else hf_config.read(memory / "config.json", from_there.dtypes)
    if before is not None and from_there is not None and layout_of(before, from_there.dtypes) != from_there.layout:
        raise ConfigError(_damaged(memory, f"its names are not of layout {from_there.layout!r}"))
    if isinstance(model, MoVQ.Config):
        if family is not None:
            raise ConfigError(f"--to {family} is of decoders, the run is of an image tokenizer; leave --to out.")
        return Described(vision=_as_before(model, None if before is None else before.vision))
    if not isinstance(model, Decoder.Config):
        raise ConfigError(
            f"{type(model).__qualname__} is no model that Hugging Face folders hold; decoders and MoVQ are."
        )
    if before is not None:
        whole = before.vision if notes is not None else None
        kind = before.family if family is None else family
        return dataclasses.replace(before, model=_as_before(model, before.model), family=_known(kind), vision=whole)
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
