"""A folder that appears whole under its name or not at all, and replaces nothing but a model."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from mmgpt.core.config import ConfigError
from mmgpt.core.log import console, printable
from mmgpt.interop.hf_config import is_hugging_face
from mmgpt.interop.safetensors_folder import has_safetensors
from mmgpt.train.run import load_run

FOLDERS = {"checkpoints", "huggingface", "vision", "tensorboard", "samples"}
"""Folders that a run holds; a Hugging Face folder holds none."""


@contextlib.contextmanager
def whole_folder(out: Path, overwrite: bool, needed: Iterable[Path]) -> Iterator[Path]:
    """A folder to write into, which becomes `out` once all is written; after an error nothing is left of it.

    `needed` folders and files are not to be touched. ConfigError, before anything is written, where `out` cannot be.
    """
    if out.is_symlink() and not out.exists():
        raise ConfigError(f"{out} is a link to what is not there; remove it, or give another folder.")
    place = Path(os.path.realpath(out))
    for path in needed:
        real = Path(os.path.realpath(path))
        if place == real or place in real.parents or real in place.parents:
            raise ConfigError(f"{out} and {path}, which is read, are one or inside each other; give another folder.")
    # The names are always the same, so that the next call finds what a kill left.
    temporary, old = (place.with_name(f".{place.name}.{what}") for what in ("converting", "replaced"))
    made = [parent for parent in place.parents if not parent.exists()]
    try:
        with _alone(temporary, out):
            if old.exists() and not place.exists():
                old.rename(place)  # killed between the two renames below
            _check_replaceable(place, out, overwrite)
            yield temporary
            shutil.rmtree(old, ignore_errors=True)
            if place.exists():
                place.rename(old)
            temporary.rename(place)
            shutil.rmtree(old, ignore_errors=True)
    except BaseException as e:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(e, OSError) and (e.errno == errno.ENOSPC or str(e.filename).startswith(str(temporary))):
            e.filename = str(out)  # a failed write names no file, or one that nobody knows
        raise
    console.print(f"wrote {printable(str(out))}")


@contextlib.contextmanager
def _alone(folder: Path, out: Path) -> Iterator[None]:
    """Makes the folder, empty, and holds it against a second process; after an error it is removed.

    A kill leaves it, and the lock free, for the next call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(lock)
        raise ConfigError(f"{out}: another process writes it. Wait for it, or give another folder.") from e
    except OSError:
        pass  # a file system without locks
    try:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _check_replaceable(place: Path, out: Path, overwrite: bool) -> None:
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"{out} is there already; give another folder, or --overwrite True.")
    if not place.is_dir() or not _is_model(place):
        raise ConfigError(f"{out} holds something else than a model and is not overwritten; give another folder.")


def _is_model(folder: Path) -> bool:
    """Whether it holds a config and weights as mmgpt or transformers write them, and no folder of another kind."""
    folders = {path.name for path in folder.iterdir() if path.is_dir()}
    try:
        if is_hugging_face(folder):
            return has_safetensors(folder) and not folders
        load_run(folder)
    except (OSError, ValueError, RecursionError):
        return False
    return "checkpoints" in folders <= FOLDERS
