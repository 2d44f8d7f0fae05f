"""The commands that make data: raw files to datasets, and datasets to tokens."""

from pathlib import Path
from typing import Literal

import tyro

from mmgpt.core.config import ConfigError
from mmgpt.core.errors import UsageError
from mmgpt.core.log import console, show, table


def data_shapes(
    out: Path,
    pairs: int = 7000,
    stories: int = 1400,
    clips: int = 1800,
    questions: int = 3000,
    edits: int = 2500,
    eval_each: int = 100,
    seed: int = 0,
) -> None:
    """Writes the shapes corpus as real files: images in tars, jsonl documents, MP4 clips, evaluation prompts.

    Args:
        out: folder to write to; one that is complete with the same settings stays.
        pairs: images with captions.
        stories: interleaved documents of three images.
        clips: clips with captions.
        questions: images with six questions and answers.
        edits: images before and after an instruction.
        eval_each: prompts for each evaluation task.
        seed: of everything random.
    """
    from mmgpt.evaluate.shapes.corpus import write_corpus

    counts = write_corpus(
        out,
        pairs=pairs,
        stories=stories,
        clips=clips,
        questions=questions,
        edits=edits,
        eval_each=eval_each,
        seed=seed,
    )
    show(table(f"{out}", {name: {"documents": n} for name, n in counts.items()}))


def data_digits(out: Path, copies: int = 12, seed: int = 0) -> None:
    """Writes scikit-learn's handwritten digits as real files: scans with captions, and prompts on unseen scans.

    Args:
        out: folder to write to; one that is complete stays.
        copies: of each training scan, all but the first varied a little.
        seed: of the variations.
    """
    from mmgpt.evaluate.digits import write_digits

    counts = write_digits(out, copies, seed)
    show(table(str(out), {name: {"value": value} for name, value in counts.items()}))


def data_import(
    format: tyro.conf.Positional[str],
    path: tyro.conf.Positional[Path],
    out: Path,
    name: str = "",
    overwrite: bool = False,
) -> None:
    """Imports raw data into a record dataset; what is refused goes to its rejects.jsonl.

    Args:
        format: `docs/formats/` has a page for each; an unknown name lists them.
        path: the raw data.
        out: folder of the dataset.
        name: name of the dataset; by default that of the folder.
        overwrite: replace a complete dataset.
    """
    from mmgpt.data.importing import import_dataset

    done = import_dataset(format, path, out, name, overwrite=overwrite)
    console.print(f"{out}: {done.documents} documents, {sum(done.rejected.values())} rejected")


def tokenize_text(
    datasets: tyro.conf.Positional[tuple[Path, ...]],
    out: Path,
    size: int = 512,
    most: int = 200_000,
    superwords: bool = False,
    overwrite: bool = False,
) -> None:
    """Trains a SentencePiece tokenizer on the text of raw datasets.

    Args:
        datasets: dataset folders.
        out: the model file to write.
        size: pieces at most.
        most: texts to train on at most, taken evenly.
        superwords: pieces may hold several words.
        overwrite: replace the file.
    """
    from mmgpt.tokenize.text import train_text

    _check_named(datasets)
    trained = train_text(list(datasets), out, size, most, superwords, overwrite)
    console.print(f"{out}: {trained.size} pieces")


def tokenize_actions(
    datasets: tyro.conf.Positional[tuple[Path, ...]],
    out: Path,
    size: int = 1024,
    most: int = 20_000,
    scale: float = 10.0,
    overwrite: bool = False,
) -> None:
    """Trains a tokenizer on the robot actions of raw datasets, after FAST.

    Args:
        datasets: dataset folders, of one robot.
        out: the JSON file to write.
        size: tokens at most; FAST has 1024 or 2048.
        most: documents to train on at most, taken evenly.
        scale: steps of a quantised coefficient per half range of a dimension; more is finer and longer.
        overwrite: replace the file.
    """
    from mmgpt.tokenize.actions import train_actions

    _check_named(datasets)
    trained = train_actions(list(datasets), out, size, most, scale, overwrite)
    console.print(f"{out}: {trained.size} tokens for actions of {trained.dims} dimensions")


def tokenize_data(
    datasets: tyro.conf.Positional[tuple[Path, ...]],
    text: Path,
    vision: Path,
    out: Path,
    actions: Path | None = None,
    area: int = 512 * 512,
    fps: float | None = None,
    frames: int = 256,
    batch: int = 64,
    threads: int = 0,
    share: str = "0/1",
    engine: Literal["process", "ray"] = "process",
    workers: int = 0,
    ray_address: str | None = None,
) -> None:
    """Turns raw datasets into ids and code grids, one folder each below `out`; run again, it goes on.

    Args:
        datasets: dataset folders.
        text: text tokenizer file.
        vision: run folder of the image tokenizer.
        out: folder that receives one dataset for each.
        actions: tokenizer file for robot actions; without it documents that hold them are rejected.
        area: pixels of an image at most.
        fps: frames a second to sample clips at; by default all frames.
        frames: of a clip at most; a longer one is cut, and `cut` in its document's meta tells so.
        batch: images encoded at once.
        threads: threads that decode media; by default one per CPU, at most 16.
        share: i/n, this process does every n-th shard from the i-th on, 0/n to n-1/n together do all.
        engine: process, or ray for workers on this machine or a cluster (needs `pip install 'mmgpt[ray]'`).
        workers: Ray workers; by default one for each GPU, or one.
        ray_address: a Ray cluster to run on; by default one is started on this machine alone.
    """
    from mmgpt.data.record import Dataset
    from mmgpt.tokenize.job import Order, parse_share, tokenize
    from mmgpt.tokenize.on_ray import Files, tokenize_on_ray

    _check_named(datasets)
    if engine != "ray" and (ray_address is not None or workers):
        raise ConfigError("--ray-address and --workers are of --engine ray; add that, or leave them out.")
    if threads < 0:
        raise ConfigError(f"--threads is {threads}; give 1 or more, or leave it out.")
    folders = {path: out / Dataset(path).name for path in datasets}
    order = Order(folders=folders, area=area, fps=fps, frames=frames, share=parse_share(share))
    files = Files(text=text, vision=vision, actions=actions, batch=batch)
    if engine == "ray":
        done = tokenize_on_ray(order, files, threads=threads, workers=workers, address=ray_address)
    else:
        done = tokenize(order, files.load(), threads)
    for each in done:
        state = "" if each.complete else "; not complete, other processes have shards to write"
        console.print(
            f"{each.directory}: {each.documents} documents, {each.rejected} rejected, {each.written} of "
            f"{each.shards} shards written now{state}"
        )


def convert(
    source: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    to: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    like: str | None = None,
    vision: Path | None = None,
    shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Converts a Hugging Face folder to a run folder, or a run folder to a Hugging Face folder.

    Args:
        source: a Hugging Face folder of Emu3, Emu3.5, Chameleon, Qwen3 or Llama, or a run folder.
        out: the folder to write; it appears once it is whole.
        to: family to write: emu3, emu3_5, qwen3, llama, chameleon; by default where the run came from.
        dtype: number format to write; by default as in the checkpoint that the run came from, else float32.
        like: preset that the run folder takes everything from but model and tokens, its data above all.
        vision: folder of the image tokenizer, where it was published apart from the model.
        shard_bytes: size of a file at most.
        overwrite: replace a model that is there.
    """
    from mmgpt import presets
    from mmgpt.interop import convert as interop
    from mmgpt.train.run import Run

    preset = None if like is None else presets.preset(like)
    if preset is not None and not isinstance(preset, Run):
        raise ConfigError(f"--like {like} is a {type(preset).__name__}, expected the preset of a training run.")
    interop.convert(
        source,
        out,
        to=to,
        dtype=dtype,
        like=preset,
        vision=vision,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
    )


def _check_named(datasets: tuple[Path, ...]) -> None:
    if not datasets:
        raise UsageError("no dataset is named: give folders that `mmgpt data import` wrote.")
