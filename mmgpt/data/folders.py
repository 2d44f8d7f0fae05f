"""The folder of a dataset: what lies in it, its manifest, and who may write there."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmgpt.core.errors import UserError

MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
VERSION = 2
_OURS = ("shard-*.array_record*", "index-*.npy*", ".*.tmp", REJECTS, MANIFEST)


class DatasetError(UserError, RuntimeError):
    """A dataset folder that cannot be read or written; the message says what to do."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns failures to write into DatasetError: OSError, and ArrayRecord's RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        if isinstance(e, DatasetError):
            raise
        full = getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(e)
        advice = "The disk is full: free space and run it again" if full else "Check the folder and run it again"
        raise DatasetError(f"{path}: could not be written ({e}). {advice}; nothing half-written was kept.") from e


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Holds a folder that exists against a second writer; DatasetError where there is one. A kill frees it."""
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(lock)
        raise DatasetError(f"{directory}: another process writes it. Wait for it, or choose another folder.") from e
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(lock)


def check_name(name: str, place: Path) -> None:
    """DatasetError unless a folder can have the name: what is made of a dataset is put in one that has its name."""
    if name != Path(name).name or name in ("", ".", "..") or not name.isprintable() or len(name.encode()) > 200:
        raise DatasetError(
            f"{place}: a folder cannot have the dataset's name {name[:100]!r}. Write it with another, without '/'."
        )


def check_free(directory: Path, overwrite: bool) -> None:
    """DatasetError for a folder that holds a complete dataset, unless `overwrite`, or anything else."""
    if (directory / MANIFEST).exists() and not overwrite:
        raise DatasetError(f"{directory}: already holds a dataset. Remove the folder, or pass --overwrite True.")
    ours = {path for pattern in _OURS for path in directory.glob(pattern)}
    foreign = sorted(path.name for path in directory.iterdir() if path not in ours)
    if foreign:
        raise DatasetError(f"{directory}: is not a dataset folder, it holds {foreign[0]!r}. Choose an empty folder.")


def clean(directory: Path, keep: str = "") -> None:
    """Removes everything of a dataset but the file `keep`."""
    (directory / MANIFEST).unlink(missing_ok=True)  # first, so that a kill in between leaves no complete-looking folder
    for path in {path for pattern in _OURS for path in directory.glob(pattern)}:
        if path.name != keep:
            path.unlink(missing_ok=True)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a dataset. Raises DatasetError if the folder is missing, empty, half-written or damaged."""
    path = directory / MANIFEST
    if not path.is_file():
        if not directory.is_dir():
            state = "no such folder"
        elif any(directory.iterdir()):
            state = "no manifest.json, so this is no dataset or its writing was interrupted"
        else:
            state = "the folder is empty"
        raise DatasetError(f"{directory}: {state}. Write it with `mmgpt data import` or `mmgpt tokenize`.")
    types = {"name": str, "documents": int, "segments": int, "rejected": int, "shards": list, "meta": dict}
    fields = {"file": str, "documents": int, "bytes": int, "sha256": str}
    try:
        manifest = json.loads(path.read_bytes())
        if manifest.get("version", VERSION) != VERSION:
            raise DatasetError(
                f"{path}: its format is version {manifest['version']}, this mmgpt reads {VERSION}. Delete "
                f"{directory} and write the dataset again."
            )
        sound = "version" in manifest and all(isinstance(manifest.get(k), t) for k, t in types.items())
        settings = manifest["meta"].get("settings", {}) if sound else {}
        books = settings.get("codebooks", [])
        sound = sound and isinstance(books, list) and all(isinstance(size, int) for size in books)
        for shard in manifest["shards"] if sound else ():
            sound = sound and all(isinstance(shard.get(k), t) for k, t in fields.items())
            sound = sound and Path(shard["file"]).name == shard["file"]
        sound = sound and sum(s["documents"] for s in manifest["shards"]) == manifest["documents"]
    except (ValueError, AttributeError) as e:
        raise DatasetError(f"{path}: not a manifest ({e}). Write the dataset again.") from e
    if not sound:
        raise DatasetError(f"{path}: damaged. Write the dataset again.")
    check_name(manifest["name"], path)
    return manifest
