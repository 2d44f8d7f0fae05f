"""The command line says in one line what is wrong, and with which word it would be right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmgpt import cli, presets
from mmgpt.core import config
from mmgpt.core.document import Document, Text
from mmgpt.train.run import Run
from tests import tiny

RUNS = [name for name in presets.names() if isinstance(presets.preset(name), Run)]


def call(*arguments: str) -> int:
    try:
        return cli.main(list(arguments))
    except SystemExit as e:  # tyro exits by itself
        assert isinstance(e.code, int)
        return e.code


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["trian", "x"], "Did you mean 'train'"),
        (["data", "imprt"], "'data import'"),
        (["tokenise", "text"], "'tokenize text'"),
        (["data"], "'data import'"),
        (["xyzzy"], "`mmgpt --help` lists them"),
        (["--version"], "`mmgpt --help` lists them"),
    ],
)
def test_an_unknown_command(arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == 2
    assert hint in one_error(capsys)


@pytest.mark.parametrize("command", ["train", "config", "run"])
def test_an_unknown_preset(command: str, empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "quickstrat") == 1
    assert "no preset 'quickstrat'" in (error := one_error(capsys)) and "Did you mean quickstart" in error


def test_a_folder_that_is_no_run(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("runs/nothing", "."):
        assert call("config", name) == 1
        assert "is no run folder: it has no config.json" in one_error(capsys)


def test_a_preset_of_another_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "quickstart") == 1
    assert "`mmgpt run quickstart` runs a recipe" in one_error(capsys)
    assert call("run", RUNS[0]) == 1
    assert f"`mmgpt train {RUNS[0]}` trains a run" in one_error(capsys)


def test_a_recipe_refuses_a_flag_before_it_writes_anything(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "quickstart", "--stepz", "3") == 2
    assert "--stepz" in capsys.readouterr().err
    assert call("run", "quickstart", "--run-dir", "x") == 1
    assert "writes to runs/quickstart" in one_error(capsys)
    assert not list(empty.iterdir())


@pytest.mark.parametrize("arguments", [["config", RUNS[0]], ["config", RUNS[0], "--help"]])
def test_a_reader_that_leaves_early_gets_no_complaint(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "mmgpt", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 1


@pytest.mark.parametrize("command", [c for c in cli.COMMANDS if not c.startswith("bench") or c == "bench train"])
def test_a_command_without_what_it_needs_exits_with_2(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*command.split()) == 2
    out, err = capsys.readouterr()
    assert f"mmgpt {command}" in out + err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("tokenize text --out x", "no dataset is named"),
        ("tokenize actions --out x", "no dataset is named"),
        ("bench generate --batches", "--batches and --windows need a number"),
        ("bench generate --windows", "--batches and --windows need a number"),
    ],
)
def test_a_list_without_a_value_exits_with_2(
    arguments: str, told: str, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments.split()) == 2
    assert told in one_error(capsys) and not list(empty.iterdir())


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 2 and "usage: mmgpt COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("typo", ["--optimizer.lerning-rate=1", "optimizer.lerning_rate=1"])
def test_a_typo_in_a_key(typo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("config", RUNS[0], typo) == 2
    out, err = capsys.readouterr()
    assert "--optimizer.learning-rate" in out + err and "Traceback" not in out + err


def test_a_value_of_another_kind(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("steps=many", "model.dtype=float8", "optimizer.schedule=cosin"):
        name = next(n for n in RUNS if wrong.split("=")[0] in config.leaves(presets.preset(n)))
        assert call("config", name, wrong) == 2
        out, err = capsys.readouterr()
        assert wrong.split("=")[1] in out + err and "Traceback" not in out + err


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_is_shown_and_written(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("config", name, "--json", str(tmp_path / "config.json")) == 0
    assert config.load(tmp_path / "config.json") == presets.preset(name)
    shown = capsys.readouterr().out
    assert name in shown


@pytest.mark.parametrize("name", RUNS)
def test_both_spellings_of_a_change_agree(name: str, tmp_path: Path) -> None:
    written = []
    for number, change in enumerate((["--optimizer.learning-rate", "0.5"], ["optimizer.learning_rate=0.5"])):
        file = tmp_path / f"{number}.json"
        assert call("config", name, *change, "steps=7", f"--json={file}") == 0
        written.append(config.load(file))
    base = presets.preset(name)
    expected = base.replace(optimizer=base.optimizer.replace(learning_rate=0.5), steps=7)
    assert written[0] == written[1] == expected


def test_a_run_folder_is_shown_with_its_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny.run(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(config.to_json(run))
    assert call("config", str(tmp_path / "run"), "model.dropout=0.25", "--json", str(tmp_path / "c.json")) == 0
    assert json.loads((tmp_path / "c.json").read_text())["model"]["dropout"] == 0.25


def test_booleans_are_written_out(tmp_path: Path) -> None:
    name = next(n for n in RUNS if "model.scan" in config.leaves(presets.preset(n)))
    for value in (True, False):
        assert call("config", name, f"model.scan={value}", f"--json={tmp_path / 'c.json'}") == 0
        assert config.load(tmp_path / "c.json").model.scan is value


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_tells_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    if command in ("run", "train", "launch", "config"):
        arguments = [*command.split(), "quickstart" if command == "run" else RUNS[0], "--help"]
    else:
        arguments = [*command.split(), "--help"]
    assert call(*arguments) == 0
    assert f"mmgpt {command}" in (out := capsys.readouterr().out)
    for flag in ("--json", "--html", "--png"):
        known = any([*command.split(), flag] == [*writer[: len(command.split())], writer[-1]] for writer in WRITERS)
        assert known or flag not in out, f"let {flag} be among WRITERS"


def test_run_and_launch_alone_tell_their_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("run RECIPE", "launch PRESET"):
        assert call(command.split()[0], "--help") == 0
        assert f"usage: mmgpt {command}" in capsys.readouterr().out


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    out = capsys.readouterr().out
    assert all(command in out for command in cli.COMMANDS)


def test_bad_input_of_data_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = str(tmp_path / "nowhere")
    for arguments in (
        ["data", "import", "jsonl", nowhere, "--out", str(tmp_path / "o")],
        ["data", "import", "jsnl", str(tmp_path), "--out", str(tmp_path / "o")],
        ["data", "inspect", nowhere],
        ["tokenize", "text", nowhere, "--out", str(tmp_path / "t.model")],
        ["tokenize", "data", nowhere, "--text", nowhere, "--vision", nowhere, "--out", nowhere],
    ):
        assert call(*arguments) == 1, arguments
        assert one_error(capsys)


def test_a_text_tokenizer_is_not_replaced_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write(tmp_path / "data", [Document(key="a", segments=(Text(text="a red ring " * 9),))])
    train = ("tokenize", "text", str(tmp_path / "data"), "--out", str(tmp_path / "t.model"))
    assert call(*train, "--size", "9") == 1
    assert "bytes and digits alone take 269" in one_error(capsys)
    assert call(*train, "--size", "290") == 0
    capsys.readouterr()
    made = (tmp_path / "t.model").read_bytes()
    assert call(*train, "--size", "300") == 1
    assert "datasets may be tokenised with it" in one_error(capsys)
    assert (tmp_path / "t.model").read_bytes() == made
    assert call(*train, "--size", "300", "--overwrite", "True") == 0


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(arguments: list[str]) -> int:
        raise OSError(28, "No space left on device", "runs/x")

    monkeypatch.setitem(cli.COMMANDS, "train", (full, ""))
    assert call("train") == 1
    assert "runs/x: the disk is full; free some space" in one_error(capsys)


WRITERS = [
    *(["bench", "attention", "--target", "cpu", flag] for flag in ("--json", "--picture")),
    ["bench", "checkpoint", "--gigabytes", "0.004", "--repeats", "1", "--json"],
    [
        "bench",
        "data",
        "--planned-tokens",
        "131072",
        "--records",
        "100",
        "--documents",
        "50000",
        "--turns",
        "1",
        "--json",
    ],
    ["bench", "generate", "--side", "1", "--layers", "1", "--turns", "1", "--json"],
    ["bench", "goodput", "--seeds", "1", "--json"],
    ["bench", "plan", "--only", "mistral_7b_v6e_8", "--json"],
    ["bench", "tokenizer", "--channels", "32", "--side", "32", "--repeats", "1", "--json"],
    ["bench", "train", "RUN", "--steps", "1", "--json"],
    ["config", "quickstart_model", "--json"],
    *(["data", "inspect", "RUN", flag] for flag in ("--json", "--html")),
    *(["data", "plan", "quickstart_model", flag] for flag in ("--json", "--html", "--png")),
    ["eval", "RUN", "--tasks", "perplexity=x", "--json"],
    *(["plan", "emu3_0_1b", "--topology", "v5p:2x2x1", flag] for flag in ("--json", "--html")),
]
"""Commands that work for long and then write a file that is named on the command line; RUN is a run folder."""


def test_a_path_that_cannot_be_written_is_told_before_all_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(config.to_json(tiny.run(tmp_path)))
    (folder := tmp_path / "a.png").mkdir()
    for command in WRITERS:
        arguments = [str(tmp_path) if argument == "RUN" else argument for argument in command]
        flag, shown = arguments.pop(), " ".join(command)
        for path, why in ((folder, "is a folder, not a file"), ("/dev/null/a.png", "/dev/null is no folder")):
            assert call(*arguments, flag, str(path)) == 1, shown
            assert one_error(capsys).startswith(f"error: {path}: {why}."), shown
