"""The code of a job is that of its submission: what git tracks, as it lay there, or an installed wheel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mmgpt.launch import snapshot
from mmgpt.launch.spec import LaunchError


def git(root: Path, *command: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example"]
    return subprocess.run(
        ["git", *identity, *command], cwd=root, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
    ).stdout


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


FILES = {
    "mmgpt/__init__.py": "",
    "mmgpt/core/a.py": "1",
    "mmgpt/a b'$x.txt": "odd",
    "configs/__init__.py": "",
    "launch/__init__.py": "",
    "tests/test_a.py": "",
    ".gitignore": "__pycache__/\n*.log\n",
}
LAID_OUT = {
    "mmgpt/__init__.py": "",
    "mmgpt/core/a.py": "1",
    "mmgpt/a b'$x.txt": "odd",
    "mmgpt/configs/__init__.py": "",
    "mmgpt/launch/__init__.py": "",
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree like this repository's, without git."""
    write(tmp_path / "tree", FILES)
    monkeypatch.setattr(snapshot, "PACKAGE", tmp_path / "tree" / "mmgpt")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    return tmp_path / "tree"


@pytest.fixture
def checkout(tree: Path) -> Path:
    git(tree, "init", "--quiet")
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", "first")
    return tree


def taken(tree: Path) -> tuple[Path, dict[str, str]]:
    """A snapshot: its folder, and the files of its code."""
    folder = tree.parent / "job"
    folder.mkdir()
    snapshot.snapshot(folder)
    code = folder / "code"
    return folder, {str(path.relative_to(code)): path.read_text() for path in code.rglob("*") if path.is_file()}


def test_a_clean_checkout(checkout: Path) -> None:
    folder, code = taken(checkout)
    assert code == LAID_OUT
    assert (folder / "commit.txt").read_text() == git(checkout, "rev-parse", "HEAD")
    assert (folder / "diff.patch").read_text() == ""


def test_a_dirty_checkout_is_taken_as_it_lies_there_and_the_difference_tells_how(checkout: Path) -> None:
    (checkout / "mmgpt/core/a.py").write_text("2")
    (checkout / "configs/__init__.py").unlink()
    write(
        checkout, {"mmgpt/new.py": "staged", "mmgpt/x.log": "ignored", "mmgpt/__pycache__/a.pyc": "", "notes.txt": ""}
    )
    git(checkout, "add", "mmgpt/new.py")
    folder, code = taken(checkout)
    changed = {**LAID_OUT, "mmgpt/core/a.py": "2", "mmgpt/new.py": "staged"}
    del changed["mmgpt/configs/__init__.py"]
    assert code == changed
    clone = checkout.parent / "clone"
    git(checkout.parent, "clone", "--quiet", str(checkout), str(clone))
    git(clone, "apply", str(folder / "diff.patch"))
    assert (clone / "mmgpt/core/a.py").read_text() == "2" and (clone / "mmgpt/new.py").read_text() == "staged"
    assert not (clone / "configs/__init__.py").exists()


def test_a_file_that_git_does_not_track_is_not_left_out_in_silence(checkout: Path) -> None:
    write(checkout, {"mmgpt/models/mine.py": "", "configs/mine.py": ""})
    with pytest.raises(LaunchError, match=r"git does not track configs/mine.py, mmgpt/models/mine.py, so the job"):
        taken(checkout)


def test_a_checkout_that_git_does_not_read_is_told(checkout: Path) -> None:
    (checkout / ".git" / "HEAD").unlink()
    with pytest.raises(LaunchError, match=r"git does not list the files of .* though it is a checkout"):
        taken(checkout)


def test_before_the_first_commit(tree: Path) -> None:
    git(tree, "init", "--quiet")
    git(tree, "add", "--all")
    folder, code = taken(tree)
    assert code == LAID_OUT and (folder / "commit.txt").read_text() == "no commit yet\n"


def test_a_source_tree_without_git(tree: Path) -> None:
    write(tree, {"mmgpt/__pycache__/a.pyc": ""})
    folder, code = taken(tree)
    assert code == LAID_OUT
    assert "not of a git checkout" in (folder / "commit.txt").read_text() and not (folder / "diff.patch").exists()


def test_an_installed_package_that_lies_in_the_checkout_of_something_else(tmp_path: Path, monkeypatch) -> None:
    """As in a virtual environment inside a repository, beside other packages of such names."""
    site = tmp_path / "site"
    write(site, {**LAID_OUT, "configs/other.py": "", "launch/other.py": "", "mmgpt/__pycache__/a.pyc": ""})
    write(tmp_path, {".gitignore": "site/\n"})
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "--all")
    monkeypatch.setattr(snapshot, "PACKAGE", site / "mmgpt")
    assert taken(site)[1] == LAID_OUT


def test_this_repository_can_be_taken_and_runs(tmp_path: Path, root: Path) -> None:
    """From its snapshot the package finds its presets and this command, though the working folder is the checkout."""
    try:
        snapshot.snapshot(tmp_path)
    except LaunchError as why:  # a file here that is not added yet
        pytest.skip(str(why))
    program = (
        "import sys, mmgpt, mmgpt.cli; print(mmgpt.__file__)\n"
        "sys.exit(mmgpt.cli.main('launch quickstart_model --backend slurm --run-dir /x --dry-run'.split()))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "code"), "PYTHONSAFEPATH": "1"}
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, env=environment, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path}/code/mmgpt/__init__.py\n==> /x/jobs/1/start.sh <==")
