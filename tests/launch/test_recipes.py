"""The recipes of docs/launch.md run as they are printed, as far as a dry run goes."""

import shlex
from pathlib import Path

import pytest
from mmgpt.launch.command import BACKENDS

from mmgpt import cli


def test_recipes_run_as_they_are_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "launch.md").read_text()
    recipes = page.split("## Recipes")[1].split("```")[1].replace("\\\n", " ").replace("$PWD", str(tmp_path))
    commands = [shlex.split(line) for line in recipes.splitlines() if line.startswith("mmgpt ")]
    assert {command[command.index("--backend") + 1] for command in commands} == set(BACKENDS)
    for command in commands:
        assert cli.main([*command[1:], "--dry-run"]) == 0
        assert "mmgpt train" in capfd.readouterr().out
