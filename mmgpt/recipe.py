"""Recipes: a whole road as a list of command lines, each one that a user could type."""

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from mmgpt.core.config import Config
from mmgpt.core.errors import UserError
from mmgpt.core.log import console, write_json


class RecipeError(UserError):
    """A step of a recipe failed; the message names its command."""


class Step(Config):
    """One `mmgpt` command. It is skipped where the file `makes` exists, relative to the recipe's folder."""

    command: tuple[str, ...]
    makes: str = ""


class Recipe(Config):
    """Commands in order; `{dir}` in them stands for the recipe's folder."""

    directory: str
    steps: tuple[Step, ...]


def run_recipe(recipe: Recipe, extra: list[str]) -> int:
    """Runs what is not done yet, each step in a process of its own; returns the exit code of the first that fails.

    Times and the largest memory of a step go to `times.json` in the folder, where they add up over continued runs.
    `extra` arguments go to every `train` step.
    """
    folder = Path(recipe.directory)
    folder.mkdir(parents=True, exist_ok=True)
    times = _times(folder / "times.json")
    for number, step in enumerate(recipe.steps, 1):
        command = [part.replace("{dir}", recipe.directory) for part in step.command]
        line = "mmgpt " + shlex.join(command)
        if step.makes and (folder / step.makes).exists():
            console.print(f"{number}/{len(recipe.steps)}  done before: {line}", style="dim")
            continue
        console.print(f"{number}/{len(recipe.steps)}  {line}", style="bold")
        if command[0] == "train":
            command += extra
        begin = time.perf_counter()
        code = _finished(command)
        record = times.setdefault(line, {"seconds": 0.0, "peak_gib": 0.0})
        record["seconds"] = round(record["seconds"] + time.perf_counter() - begin, 1)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        record["peak_gib"] = round(max(record["peak_gib"], peak), 2)
        write_json(folder / "times.json", times)
        if code != 0:
            console.print(f"stopped with exit code {code} at: {line}", style="red")
            return code
    return 0


def _finished(command: list[str]) -> int:
    """Runs a step to its end and returns its exit code. What stops us is the step's too, which may be saving."""
    child = subprocess.Popen([sys.executable, "-m", "mmgpt", *command], env=_environment())
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        return child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _times(path: Path) -> dict[str, dict[str, float]]:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as e:
        raise RecipeError(f"{path}: not what `mmgpt run` writes ({e}); delete it.") from e


def _environment() -> dict[str, str]:
    # Compiled programs are kept: a step that is run again, or another step with the same model, starts at once.
    return {"JAX_COMPILATION_CACHE_DIR": str(Path.home() / ".cache" / "mmgpt" / "xla"), **os.environ}
