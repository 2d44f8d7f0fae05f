"""The command line: `mmgpt COMMAND ...`. Presets and folders in, one clear error out."""

import dataclasses
import difflib
import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from mmgpt import presets
from mmgpt.core import config
from mmgpt.core.config import Config, ConfigError, as_flags
from mmgpt.core.errors import UserError
from mmgpt.core.log import PLAIN_WIDTH, console, printable, write_json

FLAGS = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
"""Booleans are written out (`--model.scan False`), so that `key=value` works for all of them."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 1 for a named error, 2 for wrong usage, 75 to be run again."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(_usage() + "\n")
        return 0 if argv else 2
    name, rest = _command(argv)
    if name is None:
        return 2
    try:
        return COMMANDS[name][0](rest) or 0
    except UserError as e:
        _complain(f"error: {e}")
        return 1
    except OSError as e:
        if e.errno != errno.ENOSPC:
            raise
        _complain(f"error: the disk is full ({e.filename}); free some space and run the same command again.")
        return 1
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130


def _complain(message: str) -> None:
    sys.stderr.write(message + "\n")


def _command(argv: list[str]) -> tuple[str | None, list[str]]:
    """The longest command name that the arguments begin with: commands have one or two words."""
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return name, argv[words:]
    asked = " ".join(a for a in argv[:2] if not a.startswith("-"))
    near = difflib.get_close_matches(asked, COMMANDS, 3, 0.5) or [c for c in COMMANDS if c.startswith(argv[0])]
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    _complain(f"error: no command {asked!r}.{hint} `mmgpt --help` lists them.")
    return None, []


def _usage() -> str:
    lines = ["usage: mmgpt COMMAND ...   (`mmgpt COMMAND --help` tells its options)", ""]
    return "\n".join(lines + [f"  {name:<16} {summary}" for name, (_, summary) in COMMANDS.items()])


def _parse(function: Callable[..., Any], args: list[str], name: str) -> Any:
    return tyro.cli(function, args=args, prog=f"mmgpt {name}", config=FLAGS)


def _preset_or_run(name: str) -> tuple[Any, Path | None]:
    """A preset's config, or that of a run folder with the folder."""
    if (Path(name) / "config.json").is_file():
        return config.load(Path(name) / "config.json"), Path(name)
    if Path(name).is_dir() or "/" in name:
        raise ConfigError(
            f"{name} is no run folder: it has no config.json. Give a preset or a folder that a run wrote."
        )
    return presets.preset(name), None


def _overridden(base: Any, args: list[str], prog: str) -> tuple[Any, Path | None]:
    """`base` with command-line changes of its leaves, and --run-dir."""

    @dataclasses.dataclass(frozen=True)
    class Overrides:
        config: Annotated[Config, tyro.conf.arg(name="")] = base
        run_dir: Path | None = None
        """Folder of the run; by default runs/PRESET."""

    parsed = tyro.cli(Overrides, args=as_flags(args), prog=prog, config=FLAGS)
    return parsed.config, parsed.run_dir


def _train(args: list[str]) -> int:
    if not args or args[0].startswith("-"):
        raise ConfigError(f"mmgpt train PRESET|FOLDER [--key value ...]; presets: {', '.join(presets.names())}.")
    name, *rest = args
    base, folder = _preset_or_run(name)
    from mmgpt.train.run import Run

    if not isinstance(base, Run):
        raise ConfigError(f"{name!r} is no training run but a {type(base).__name__}; `mmgpt run {name}` runs a recipe.")
    run, run_dir = _overridden(base, rest, f"mmgpt train {name}")
    run_dir = run_dir or folder or Path("runs") / name
    for key, (old, new) in config.difference(run, base).items():
        console.print(f"  {key}: {old} -> {new}", highlight=False)
    from mmgpt.dist.hosts import REQUEUE
    from mmgpt.train.loop import train

    outcome = train(run, run_dir, _sample_hook(run))
    if outcome.preempted:
        console.print(f"saved at step {outcome.step}; run the same command to go on", highlight=False)
        return REQUEUE
    return 0


def _sample_hook(run: Any) -> Any:
    """Draws at every evaluation, with the run's own kind of picture."""
    if run.samples == 0:
        return None
    from mmgpt.evaluate.samples import sample_hook

    return sample_hook(run)


def _run(args: list[str]) -> int:
    if not args or args[0].startswith("-"):
        raise ConfigError("mmgpt run RECIPE; recipes: quickstart, shapes, digits.")
    from mmgpt.recipe import Recipe, run_recipe

    recipe = presets.preset(args[0])
    if not isinstance(recipe, Recipe):
        raise ConfigError(
            f"{args[0]!r} is no recipe but a {type(recipe).__name__}; `mmgpt train {args[0]}` trains a run."
        )

    @dataclasses.dataclass(frozen=True)
    class Options:
        dir: str = recipe.directory
        """Folder that everything is written to."""

    options, extra = tyro.cli(
        Options, args=args[1:], prog=f"mmgpt run {args[0]}", config=FLAGS, return_unknown_args=True
    )
    return run_recipe(recipe.replace(directory=options.dir), extra)


def _config(args: list[str]) -> int:
    if not args or args[0].startswith("-"):
        raise ConfigError(
            f"mmgpt config PRESET|FOLDER [--key value ...] [--json FILE]; presets: {', '.join(presets.names())}."
        )
    base, _ = _preset_or_run(args[0])
    rest, json_file = _take_option(args[1:], "--json")
    tree, _ = _overridden(base, rest, f"mmgpt config {args[0]}")
    table = Table("key", "value", title=args[0])
    changed = config.difference(tree, base)
    for key, value in config.leaves(tree).items():
        table.add_row(key, printable(str(value)), style="bold" if key in changed else None)
    _show(table)
    if json_file:
        Path(json_file).write_text(config.to_json(tree))
    return 0


def _take_option(args: list[str], flag: str) -> tuple[list[str], str | None]:
    for i, arg in enumerate(args):
        if arg == flag and i + 1 < len(args):
            return args[:i] + args[i + 2 :], args[i + 1]
        if arg.startswith(f"{flag}="):
            return args[:i] + args[i + 1 :], arg.partition("=")[2]
    return args, None


def _data_shapes(args: list[str]) -> int:
    def shapes(
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
        _table(f"{out}", {name: {"documents": n} for name, n in counts.items()})

    return _parse(shapes, args, "data shapes")


def _data_import(args: list[str]) -> int:
    def import_(
        format: tyro.conf.Positional[str],
        path: tyro.conf.Positional[Path],
        out: Path,
        name: str = "",
        overwrite: bool = False,
    ) -> None:
        """Imports raw data into a record dataset; what is refused goes to its rejects.jsonl.

        Args:
            format: folder, jsonl, mp4 or webdataset (`mmgpt/data/sources/` holds one file each).
            path: the raw data.
            out: folder of the dataset.
            name: name of the dataset; by default that of the folder.
            overwrite: replace a complete dataset.
        """
        from mmgpt.data.importing import import_dataset

        done = import_dataset(format, path, out, name, overwrite=overwrite)
        console.print(f"{out}: {done.documents} documents, {sum(done.rejected.values())} rejected", highlight=False)

    return _parse(import_, args, "data import")


def _data_inspect(args: list[str]) -> int:
    def inspect(
        path: tyro.conf.Positional[Path],
        documents: int = 20,
        html: Path | None = None,
        text: Path | None = None,
        vision: Path | None = None,
        json: Path | None = None,
    ) -> None:
        """Shows what a dataset holds.

        Args:
            path: a dataset folder, raw or tokenised.
            documents: how many documents the page shows.
            html: write a page of documents with their pictures.
            text: text tokenizer that turns a tokenised dataset's ids back into text on the page.
            vision: image tokenizer's run folder that draws its codes.
            json: write the statistics.
        """
        from mmgpt.data.inspect import documents_html, statistics
        from mmgpt.data.record import Dataset
        from mmgpt.tokens.text import TextTokenizer

        dataset = Dataset(path)
        found = statistics(dataset)
        _table(str(path), {key: {"value": value} for key, value in config_free(found).items()})
        if html is not None:
            decode_text = TextTokenizer.load(text).decode if text is not None else None
            decode_codes = None
            if vision is not None:
                from mmgpt.tokenize.vision import VisionTokenizer

                decode_codes = VisionTokenizer.load(vision).decode
            page = documents_html(dataset, documents, text=decode_text, pixels=decode_codes)
            html.write_text(page)
            console.print(f"wrote {html}", highlight=False)
        if json is not None:
            write_json(json, found)

    return _parse(inspect, args, "data inspect")


def config_free(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= config_free(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _tokenize_text(args: list[str]) -> int:
    def text(datasets: tyro.conf.Positional[tuple[Path, ...]], out: Path, size: int = 512, most: int = 200_000) -> None:
        """Trains a SentencePiece tokenizer on the text of raw datasets.

        Args:
            datasets: dataset folders.
            out: the model file to write.
            size: pieces at most.
            most: texts to train on at most, taken evenly.
        """
        from mmgpt.tokenize.text import train_text

        trained = train_text(list(datasets), out, size, most)
        console.print(f"{out}: {trained.size} pieces", highlight=False)

    return _parse(text, args, "tokenize text")


def _tokenize_data(args: list[str]) -> int:
    def data(
        datasets: tyro.conf.Positional[tuple[Path, ...]],
        text: Path,
        vision: Path,
        out: Path,
        area: int = 512 * 512,
        fps: float | None = None,
        batch: int = 64,
    ) -> None:
        """Turns raw datasets into ids and code grids, one folder each below `out`; run again, it goes on.

        Args:
            datasets: dataset folders.
            text: text tokenizer file.
            vision: run folder of the image tokenizer.
            out: folder that receives one dataset for each.
            area: pixels of an image at most.
            fps: frames a second to sample clips at; by default all frames.
            batch: images encoded at once.
        """
        from mmgpt.data.record import Dataset
        from mmgpt.tokenize.job import tokenize_dataset
        from mmgpt.tokenize.vision import VisionTokenizer
        from mmgpt.tokens.text import TextTokenizer

        names = {path: Dataset(path).name for path in datasets}
        texts, images = TextTokenizer.load(text), VisionTokenizer.load(vision)
        for path, name in names.items():
            done = tokenize_dataset(path, out / name, text=texts, image=images, area=area, fps=fps, batch=batch)
            console.print(f"{out / name}: {done}", highlight=False)

    return _parse(data, args, "tokenize data")


def _eval(args: list[str]) -> int:
    from mmgpt.evaluate.command import evaluate

    return _parse(evaluate, args, "eval")


def _report(args: list[str]) -> int:
    from mmgpt.evaluate.report import report

    return _parse(report, args, "report")


def _generate(args: list[str]) -> int:
    from mmgpt.generate.command import generate

    return _parse(generate, args, "generate")


def _bench(args: list[str]) -> int:
    from mmgpt.evaluate.bench import bench_train

    return _parse(bench_train, args, "bench train")


def _table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = Table("", *columns, title=title)
    for name, row in rows.items():
        table.add_row(name, *(json.dumps(row[c]) if c in row else "" for c in columns))
    _show(table)


def _show(table: Table) -> None:
    """A result: to stdout, where what the program says about its work does not go."""
    Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(table)


COMMANDS: dict[str, tuple[Callable[[list[str]], int | None], str]] = {
    "run": (_run, "run a recipe from raw files to a report: quickstart, shapes, digits"),
    "train": (_train, "train a preset, or go on with a run folder"),
    "generate": (_generate, "text and pictures from a run"),
    "eval": (_eval, "score a run on prompts"),
    "report": (_report, "a page that shows what a run learned"),
    "data shapes": (_data_shapes, "write the shapes corpus as raw files"),
    "data import": (_data_import, "raw files to a record dataset"),
    "data inspect": (_data_inspect, "what a dataset holds"),
    "tokenize text": (_tokenize_text, "train a text tokenizer"),
    "tokenize data": (_tokenize_data, "raw datasets to ids and codes"),
    "config": (_config, "show a preset or a run's config"),
    "bench train": (_bench, "speed of a training step beside a plain matmul"),
}
