"""Copies the code into a job's folder, laid out as a wheel installs it, with the commit and what differs from it.

Of a checkout that is what git tracks, as it lies in the working tree; of an installed package, its files.
"""

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import mmgpt
from mmgpt.core.log import printable, write_atomic

from .spec import LaunchError

PACKAGE = Path(mmgpt.__file__).resolve().parent
BESIDE = ("configs", "launch")
"""Folders that lie beside the package in a checkout, and inside it once installed."""


def snapshot(folder: Path) -> None:
    """Writes `code/`, `commit.txt` and `diff.patch`; LaunchError where a file of the code would be left out."""
    root = PACKAGE.parent
    tracked = _listed(root, "--cached")
    if not tracked and (root / ".git").exists():
        raise LaunchError(
            f"git does not list the files of {root}, though it is a checkout: `git -C {root} status` says why. Where "
            f"another user owns it: git config --global --add safe.directory {root}"
        )
    if not tracked:
        _copy(((root / path, _installed(path)) for path in _files(root)), folder / "code")
        write_atomic(folder / "commit.txt", "no commit: the code is not of a git checkout\n")
        return
    if left_out := _listed(root, "--others", "--exclude-standard"):
        names = ", ".join(printable(str(path), 80) for path in left_out[:5])
        raise LaunchError(
            f"git does not track {names}{' and more' if len(left_out) > 5 else ''}, so the job would not have "
            f"{'it' if len(left_out) == 1 else 'them'}: `git add` what the run needs, move or ignore the rest."
        )
    _copy(((root / path, _installed(path)) for path in tracked), folder / "code")
    head = _git(root, "rev-parse", "HEAD")
    write_atomic(folder / "commit.txt", head or b"no commit yet\n")
    write_atomic(folder / "diff.patch", _git(root, "diff", "--binary", "HEAD") or b"")


def _listed(root: Path, *which: str) -> list[Path]:
    """The package's files of a kind, as git lists them; none where git does not know the package."""
    names = _git(root, "ls-files", "-z", *which, "--", PACKAGE.name, *BESIDE) or b""
    return [Path(name.decode("utf-8", "surrogateescape")) for name in names.split(b"\0") if name]


def _git(root: Path, *command: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, check=False)
    except OSError:
        return None  # no git here
    return done.stdout if done.returncode == 0 else None


def _installed(path: Path) -> Path:
    return PACKAGE.name / path if path.parts[0] in BESIDE else path


def _files(root: Path) -> list[Path]:
    """The package's files, and of a source tree without git those beside it."""
    beside = [name for name in BESIDE if not (PACKAGE / name).is_dir()]
    paths = [path for name in (PACKAGE.name, *beside) for path in sorted((root / name).rglob("*"))]
    return [path.relative_to(root) for path in paths if path.is_file() and "__pycache__" not in path.parts]


def _copy(files: Iterable[tuple[Path, Path]], folder: Path) -> None:
    for source, name in files:
        if source.is_file():  # one that is tracked may have been deleted, or be a submodule
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / name)
