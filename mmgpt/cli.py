"""The command line: `mmgpt COMMAND ...`. Presets and folders in, one clear error out."""

import contextlib
import dataclasses
import difflib
import errno
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from mmgpt import presets
from mmgpt.commands import (
    convert,
    data_digits,
    data_import,
    data_shapes,
    tokenize_actions,
    tokenize_data,
    tokenize_text,
)
from mmgpt.core import config
from mmgpt.core.config import Config, ConfigError, as_flags
from mmgpt.core.errors import UsageError, UserError
from mmgpt.core.log import check_writable, console, printable, show, write_atomic
from mmgpt.data_commands import data_inspect, data_plan, preset_or_run

FLAGS = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
"""Booleans are written out (`--model.scan False`), so that `key=value` works for all of them."""

RECIPES = "quickstart, shapes, digits, tiny_vision"


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
        return 2 if isinstance(e, UsageError) else 1
    except BrokenPipeError:  # whoever read has seen enough, as `| head` does; nothing is left to flush to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        if e.errno == errno.ENOSPC:
            _complain(f"error: {where}the disk is full; free some space and run the same command again.")
        else:
            _complain(f"error: {where}{e.strerror or e}. Give a path that this process can read or write.")
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
    group = [command for command in COMMANDS if command.startswith(f"{asked} ")]
    near = group or difflib.get_close_matches(asked, COMMANDS, 3, 0.5) or [c for c in COMMANDS if c.startswith(argv[0])]
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    _complain(f"error: no command {asked!r}.{hint} `mmgpt --help` lists them.")
    return None, []


def _usage() -> str:
    lines = ["usage: mmgpt COMMAND ...   (`mmgpt COMMAND --help` tells its options)", ""]
    return "\n".join(lines + [f"  {name:<16} {summary}" for name, (_, summary) in COMMANDS.items()])


def _parse(function: Callable[..., Any], args: list[str], name: str) -> Any:
    return tyro.cli(function, args=args, prog=f"mmgpt {name}", config=FLAGS)


def overridden(base: Any, args: list[str], prog: str) -> tuple[Any, Path | None]:
    """`base` with command-line changes of its leaves, and --run-dir."""

    @dataclasses.dataclass(frozen=True)
    class Overrides:
        config: Annotated[Config, tyro.conf.arg(name="")] = base
        run_dir: Path | None = None
        """Folder of the run; by default runs/PRESET."""

    parsed = tyro.cli(Overrides, args=as_flags(args), prog=prog, config=FLAGS)
    return parsed.config, parsed.run_dir


def _data_plan(args: list[str]) -> None:
    usage = "mmgpt data plan PRESET|FOLDER [--key value ...] [--html FILE] [--json FILE] [--png FILE]"
    if args and args[0] in ("-h", "--help"):
        sys.stdout.write(f"usage: {usage}   (`mmgpt data plan PRESET --help` tells all keys)\n")
        return
    if not args or args[0].startswith("-"):
        raise UsageError(f"{usage}; presets: {', '.join(presets.names())}.")
    name, *rest = args
    base, folder = preset_or_run(name)
    check_run(base, name)

    @dataclasses.dataclass(frozen=True)
    class Options:
        config: Annotated[Config, tyro.conf.arg(name="")] = base
        run_dir: Path | None = folder
        """Folder of the run, where its plan is kept; by default that of FOLDER, and of a preset none."""
        html: Path | None = None
        """Write a page with the warnings, tables and pictures."""
        json: Path | None = None
        """Write the numbers and the warnings."""
        png: Path | None = None
        """Write the picture of some packed rows."""

    asked = tyro.cli(Options, args=as_flags(rest), prog=f"mmgpt data plan {name}", config=FLAGS)
    data_plan(name, asked.config, asked.run_dir, asked.html, asked.json, asked.png)


def _plan(args: list[str]) -> None:
    usage = "mmgpt plan PRESET|FOLDER --topology v5p:8x8x4 [--key value ...] [--search [N]] [--json FILE] [--html FILE]"
    if args and args[0] in ("-h", "--help"):
        sys.stdout.write(f"usage: {usage}   (`mmgpt plan PRESET --help` tells all keys)\n")
        return
    if not args or args[0].startswith("-"):
        raise UsageError(f"{usage}; presets: {', '.join(presets.names())}.")
    name, *rest = args
    base, _ = preset_or_run(name)
    check_run(base, name)

    @dataclasses.dataclass(frozen=True)
    class Options:
        topology: str
        """The pod: a chip and the sides of its torus, as v5p:8x8x4, v6e:16x16 or tpu7x:4x4x4."""
        config: Annotated[Config, tyro.conf.arg(name="")] = base
        slices: int = 1
        """Pods of that size, between which only replicas talk."""
        documents: str = "one"
        """What a row holds: one, 4.1k, 1-2k, 8-24k or lognormal."""
        search: int | None = None
        """Try meshes, microbatches and remat policies, compile so many of the most promising (4 if no number is said),
        and tell the best."""
        json: Path | None = None
        """Write the numbers."""
        html: Path | None = None
        """Write a page with pictures of memory, time and communication."""

    if "--search" in rest:
        number = rest.index("--search") + 1
        if not rest[number:] or rest[number].startswith("--") or "=" in rest[number]:
            rest.insert(number, "4")
    asked = tyro.cli(Options, args=as_flags(rest), prog=f"mmgpt plan {name}", config=FLAGS)
    from mmgpt.plan.command import plan_run

    run: Any = asked.config
    plan_run(
        run,
        asked.topology,
        name=name,
        slices=asked.slices,
        documents=asked.documents,
        search=asked.search,
        json_file=asked.json,
        html=asked.html,
    )


def check_run(base: Any, name: str) -> None:
    """ConfigError where a preset is something else than a training run."""
    from mmgpt.train.run import Run

    if not isinstance(base, Run):
        raise ConfigError(f"{name!r} is no training run but a {type(base).__name__}; `mmgpt run {name}` runs a recipe.")


def _train(args: list[str]) -> int:
    if not args or args[0].startswith("-"):
        raise UsageError(f"mmgpt train PRESET|FOLDER [--key value ...]; presets: {', '.join(presets.names())}.")
    name, *rest = args
    base, folder = preset_or_run(name)
    check_run(base, name)
    run, run_dir = overridden(base, rest, f"mmgpt train {name}")
    run_dir = run_dir or folder or Path("runs") / name
    for key, (old, new) in config.difference(run, base).items():
        console.print(f"  {key}: {old} -> {new}")
    from mmgpt.dist.hosts import REQUEUE
    from mmgpt.train.loop import train
    from mmgpt.train.replay import Corruption

    try:
        with _export_hook(run, run_dir) as export:
            outcome = train(run, run_dir, _sample_hook(run), export)
    except Corruption as e:
        _complain(f"error: {e}")
        return REQUEUE
    if outcome.preempted:
        console.print(f"saved at step {outcome.step}; run the same command to go on")
        return REQUEUE
    return 0


def _sample_hook(run: Any) -> Any:
    """Draws at every evaluation, with the run's own kind of picture."""
    if run.samples == 0:
        return None
    from mmgpt.evaluate.samples import sample_hook

    return sample_hook(run)


def _export_hook(run: Any, run_dir: Path) -> Any:
    """Writes the model in Hugging Face's format while the run goes on."""
    if run.export_every is None:
        return contextlib.nullcontext()
    from mmgpt.interop.export import Export

    return Export(run, run_dir)


def _run(args: list[str]) -> int:
    usage = f"mmgpt run RECIPE [--key value ... of its training steps]; recipes: {RECIPES}."
    if args and args[0] in ("-h", "--help"):
        sys.stdout.write(f"usage: {usage}\n")
        return 0
    if not args or args[0].startswith("-"):
        raise UsageError(usage)
    from mmgpt.recipe import Recipe, run_recipe

    recipe = presets.preset(args[0])
    if not isinstance(recipe, Recipe):
        raise ConfigError(
            f"{args[0]!r} is no recipe but a {type(recipe).__name__}; `mmgpt train {args[0]}` trains a run."
        )
    for step in recipe.steps:  # a flag that a training step does not take is told now, and not an hour later
        if step.command[0] == "train":
            _, run_dir = overridden(presets.preset(step.command[1]), args[1:], f"mmgpt run {args[0]}")
            if run_dir is not None:
                raise ConfigError(f"mmgpt run {args[0]} writes to {recipe.directory}; --run-dir is of `mmgpt train`.")
    return run_recipe(recipe, args[1:])


def _launch(args: list[str]) -> int:
    return importlib.import_module(f"{presets.load_package('launch')}.command").launch(args)


def _config(args: list[str]) -> int:
    if not args or args[0].startswith("-"):
        raise UsageError(
            f"mmgpt config PRESET|FOLDER [--key value ...] [--json FILE]; presets: {', '.join(presets.names())}."
        )
    base, _ = preset_or_run(args[0])
    rest, said = _take_option(args[1:], "--json")
    json_file = None if said is None else Path(said)
    check_writable(json_file)
    tree, _ = overridden(base, rest, f"mmgpt config {args[0]}")
    table = Table("key", "value", title=args[0])
    changed = config.difference(tree, base)
    for key, value in config.leaves(tree).items():
        table.add_row(key, printable(str(value)), style="bold" if key in changed else None)
    show(table)
    if json_file is not None:
        write_atomic(json_file, config.to_json(tree))
    return 0


def _take_option(args: list[str], flag: str) -> tuple[list[str], str | None]:
    for i, arg in enumerate(args):
        if arg == flag and i + 1 < len(args):
            return args[:i] + args[i + 2 :], args[i + 1]
        if arg.startswith(f"{flag}="):
            return args[:i] + args[i + 1 :], arg.partition("=")[2]
    return args, None


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


def _bench_attention(args: list[str]) -> None:
    from mmgpt.evaluate.bench_attention import bench_attention

    return _parse(bench_attention, args, "bench attention")


def _bench_checkpoint(args: list[str]) -> None:
    from mmgpt.evaluate.bench_checkpoint import bench_checkpoint

    return _parse(bench_checkpoint, args, "bench checkpoint")


def _bench_data(args: list[str]) -> None:
    from mmgpt.evaluate.bench_data import bench_data

    return _parse(bench_data, args, "bench data")


def _bench_generate(args: list[str]) -> None:
    from mmgpt.evaluate.bench_generate import bench_generate

    return _parse(bench_generate, args, "bench generate")


def _bench_plan(args: list[str]) -> None:
    from mmgpt.bench_plan import bench_plan

    return _parse(bench_plan, args, "bench plan")


def _bench_goodput(args: list[str]) -> None:
    from mmgpt.evaluate.bench_goodput import bench_goodput

    return _parse(bench_goodput, args, "bench goodput")


def _bench_tokenizer(args: list[str]) -> None:
    from mmgpt.evaluate.bench_tokenizer import bench_tokenizer

    return _parse(bench_tokenizer, args, "bench tokenizer")


def _parsed(function: Callable[..., None], name: str) -> Callable[[list[str]], None]:
    return lambda args: _parse(function, args, name)


COMMANDS: dict[str, tuple[Callable[[list[str]], int | None], str]] = {
    "run": (_run, f"run a recipe from raw files to a report: {RECIPES}"),
    "plan": (_plan, "what a run will take on a pod that is not there: memory, time, communication"),
    "train": (_train, "train a preset, or go on with a run folder"),
    "launch": (_launch, "submit a training job: to this machine, Slurm, Kubernetes, Ray or Cloud TPU"),
    "generate": (_generate, "text and pictures from a run"),
    "eval": (_eval, "score a run on prompts"),
    "report": (_report, "a page that shows what a run learned"),
    "data shapes": (_parsed(data_shapes, "data shapes"), "write the shapes corpus as raw files"),
    "data digits": (_parsed(data_digits, "data digits"), "write scikit-learn's handwritten digits as raw files"),
    "data import": (_parsed(data_import, "data import"), "raw files to a record dataset"),
    "data inspect": (_parsed(data_inspect, "data inspect"), "what a dataset, or a folder of them, holds"),
    "data plan": (_data_plan, "what a run will read: fill, tokens by source, warnings"),
    "tokenize text": (_parsed(tokenize_text, "tokenize text"), "train a text tokenizer"),
    "tokenize actions": (_parsed(tokenize_actions, "tokenize actions"), "train a tokenizer of robot actions"),
    "tokenize data": (_parsed(tokenize_data, "tokenize data"), "raw datasets to ids and codes"),
    "convert": (_parsed(convert, "convert"), "Hugging Face folders in and out"),
    "config": (_config, "show a preset or a run's config"),
    "bench attention": (
        _bench_attention,
        "cycles of attention on a TPU that is not there, beside splash attention",
    ),
    "bench checkpoint": (_bench_checkpoint, "speed of saving and loading beside Orbax as it comes"),
    "bench data": (_bench_data, "fill and speed of packing, loading beside Grain's packers, resume, image decoding"),
    "bench generate": (_bench_generate, "speed of generation, bytes read on a TPU, passes of Jacobi decoding"),
    "bench goodput": (_bench_goodput, "what failures take of a run over a thousand hosts, simulated"),
    "bench plan": (_bench_plan, "the planner's times beside speeds that others measured on TPUs"),
    "bench tokenizer": (_bench_tokenizer, "speed of the Emu3 vision tokenizer beside transformers'"),
    "bench train": (_bench, "speed of a training step beside a plain matmul"),
}
