"""A recipe runs what is not done yet, in order, and stops at the first step that fails."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from mmgpt import recipe
from mmgpt.core.config import from_json, to_json
from mmgpt.recipe import Recipe, Step, run_recipe

# Stands for `python -m mmgpt`: writes what it was called with, makes a file, exits with a code.
PROGRAM = """
import pathlib, sys
folder, name, made, code, *rest = sys.argv[1:]
with open(pathlib.Path(folder) / "calls.txt", "a") as f:
    f.write(" ".join([name, *rest]) + "\\n")
if name == "wait":
    import signal, time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (pathlib.Path(folder) / "waiting").touch()
    time.sleep(60)
if made != "-":
    (pathlib.Path(folder) / made).touch()
sys.exit(int(code))
"""


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are `NAME FOLDER ...`: what `-m mmgpt` would get, the program gets with the folder first."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    plain = recipe.subprocess.Popen

    def popen(command: list[str], **options):
        assert command[:3] == [sys.executable, "-m", "mmgpt"]
        name, folder, *rest = command[3:]
        return plain([sys.executable, str(script), folder, name, *rest], **options)

    monkeypatch.setattr(recipe.subprocess, "Popen", popen)


def step(name: str, makes: str = "", code: int = 0) -> Step:
    return Step(command=(name, "{dir}", makes or "-", str(code)), makes=makes)


def calls(folder: Path) -> list[str]:
    path = folder / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def test_steps_run_in_order_and_those_that_made_their_file_once(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    steps = (step("first", makes="a"), step("second"), step("train"))
    assert run_recipe(Recipe(directory=str(folder), steps=steps), ["--steps", "3"]) == 0
    assert calls(folder) == ["first", "second", "train --steps 3"]
    assert run_recipe(Recipe(directory=str(folder), steps=steps), []) == 0
    assert calls(folder)[3:] == ["second", "train"]


@pytest.mark.parametrize("code", [1, 2, 75])
def test_the_code_of_the_step_that_fails_is_passed_on(tmp_path: Path, code: int) -> None:
    steps = (step("first"), step("second", code=code), step("third"))
    assert run_recipe(Recipe(directory=str(tmp_path), steps=steps), []) == code
    assert calls(tmp_path) == ["first", "second"]


def test_a_sigterm_is_passed_on_to_the_step(tmp_path: Path) -> None:
    """The step saves and says with its code that it may go on; nothing is left running."""

    def kill() -> None:
        while not (tmp_path / "waiting").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    killer = threading.Thread(target=kill)
    killer.start()
    assert run_recipe(Recipe(directory=str(tmp_path), steps=(step("wait"), step("second"))), []) == 75
    killer.join()
    assert calls(tmp_path) == ["wait"] and signal.getsignal(signal.SIGTERM) is before


def test_a_step_that_failed_without_its_file_runs_again(tmp_path: Path) -> None:
    failing = Recipe(directory=str(tmp_path), steps=(Step(command=("first", "{dir}", "-", "1"), makes="a"),))
    assert run_recipe(failing, []) == 1 and run_recipe(failing, []) == 1
    assert calls(tmp_path) == ["first", "first"]


def test_times_and_memory_are_kept_and_add_up(tmp_path: Path) -> None:
    whole = Recipe(directory=str(tmp_path), steps=(step("first", makes="a"), step("second")))
    run_recipe(whole, [])
    first = json.loads((tmp_path / "times.json").read_text())
    assert len(first) == 2 and all(line.startswith("mmgpt ") for line in first)
    run_recipe(whole, [])
    second = json.loads((tmp_path / "times.json").read_text())
    assert second.keys() == first.keys()
    for line, before in first.items():
        assert second[line]["seconds"] >= before["seconds"] and second[line]["peak_gib"] >= before["peak_gib"] > 0


def test_the_folder_may_have_spaces(tmp_path: Path) -> None:
    folder = tmp_path / "my runs; rm"
    assert run_recipe(Recipe(directory=str(folder), steps=(step("first"),)), []) == 0
    assert calls(folder) == ["first"]


def test_a_recipe_is_a_config_like_others() -> None:
    whole = Recipe(directory="runs/x", steps=(step("first", makes="a"), step("second")))
    assert from_json(to_json(whole)) == whole
