"""Record datasets: a folder of ArrayRecord shards of documents, an index of segment sizes, and a manifest.

manifest.json                written last: a folder without it is half-written and is never read
shard-00000.array_record     records in document order
index-{offset,kind,shape,loss}.npy   sizes of all segments, memory-mapped
rejects.jsonl                one {"key", "reason", "place"} a line for what was not accepted
"""

import bisect
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from mmgpt.core.document import Document
from mmgpt.core.log import write_atomic
from mmgpt.data.codec import RecordError, decode, encode
from mmgpt.data.folders import (
    MANIFEST,
    REJECTS,
    VERSION,
    DatasetError,
    check_free,
    check_name,
    clean,
    held,
    read_manifest,
    writing,
)
from mmgpt.data.index import Index, segment_shape

__all__ = [
    "Dataset",
    "DatasetError",
    "Index",
    "RecordError",
    "ShardInfo",
    "Writer",
    "decode",
    "encode",
    "read_shard_info",
    "segment_shape",
    "shard_name",
    "write_manifest",
    "write_shard",
]


log = logging.getLogger(__name__)

WAITS = (0.1, 0.4, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds between tries to read a file that cannot be read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """A finished shard: file name, documents, size in bytes, hash of the file, and the index of its segments."""

    file: str
    documents: int
    bytes: int
    sha256: str
    index: Index


class _ShardWriter:
    """One shard under a temporary name until `finish`."""

    def __init__(self, path: Path, options: str) -> None:
        self.path = path
        # A name of its own: a writer that should be dead, or the same command twice, writes to another file.
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        self._index: list[Index] = []
        with self._cleaning():
            self._writer = ArrayRecordWriter(str(self._temporary), options)

    @property
    def documents(self) -> int:
        return len(self._index)

    def add(self, document: Document) -> None:
        data = encode(document)
        with self._cleaning():
            self._writer.write(data)
        self._index.append(Index.of([document]))

    def finish(self) -> ShardInfo:
        with self._cleaning():
            self._writer.close()
            with open(self._temporary, "rb") as file:
                os.fsync(file.fileno())  # the manifest must not outlive the shards when the machine stops
            size, digest = self._temporary.stat().st_size, _sha256(self._temporary)
            self._temporary.replace(self.path)
        index = Index.joined(self._index)
        return ShardInfo(file=self.path.name, documents=self.documents, bytes=size, sha256=digest, index=index)

    def abort(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.close()
        self._temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _cleaning(self) -> Iterator[None]:
        try:
            with writing(self.path):
                yield
        except DatasetError:
            self._temporary.unlink(missing_ok=True)
            raise


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:05d}.array_record"


def write_shard(path: Path, documents: Iterable[Document], options: str = "group_size:1") -> ShardInfo:
    """Writes one shard that appears under `path` only when complete. Raises DatasetError, RecordError."""
    shard = _ShardWriter(path, options)
    try:
        for document in documents:
            shard.add(document)
        return shard.finish()
    except BaseException:
        shard.abort()
        raise


def read_shard_info(path: Path) -> ShardInfo:
    """What `write_shard` returned for a shard, read again from its records. Raises DatasetError, RecordError."""
    try:
        reader = ArrayRecordReader(str(path))
        records = reader.read_all()
        reader.close()
        size, digest = path.stat().st_size, _sha256(path)
    except (OSError, RuntimeError) as e:
        raise DatasetError(f"{path}: cannot be read ({e}). Delete it and write it again.") from e
    index = Index.of(decode(r, f"{path}, record {i}") for i, r in enumerate(records))
    return ShardInfo(file=path.name, documents=len(records), bytes=size, sha256=digest, index=index)


def write_manifest(
    directory: Path, name: str, infos: list[ShardInfo], rejected: int, meta: dict[str, Any] | None = None
) -> None:
    """Completes a dataset whose shards are in place: the joined index, then the manifest, atomically.

    `meta` is any JSON value table. Raises DatasetError.
    """
    index = Index.joined([info.index for info in infos])
    shards = [{"file": i.file, "documents": i.documents, "bytes": i.bytes, "sha256": i.sha256} for i in infos]
    manifest = {
        "version": VERSION,
        "name": name,
        "documents": sum(i.documents for i in infos),
        "segments": len(index.kind),
        "rejected": rejected,
        "shards": shards,
        "meta": meta or {},
    }
    with writing(directory):
        index.save(directory)
        write_atomic(directory / MANIFEST, json.dumps(manifest, indent=2) + "\n")


class Writer:
    """Writes a dataset folder, as a context manager; an exception inside leaves at most the rejects file.

    A half-written folder is cleaned first; a complete one raises DatasetError unless `overwrite`, which keeps it until
    the new one is complete; a folder that holds anything else always does.
    """

    def __init__(
        self,
        directory: Path,
        *,
        name: str,
        shard_documents: int = 4096,
        options: str = "group_size:1",
        overwrite: bool = False,
        meta: dict[str, Any] | None = None,
    ) -> None:
        check_name(name, directory)
        self._target = directory
        self.name = name
        self.meta = dict(meta or {})
        self.rejected = 0
        self._shard_documents = shard_documents
        self._options = options
        self._infos: list[ShardInfo] = []
        self._shard: _ShardWriter | None = None
        with writing(directory), contextlib.ExitStack() as stack:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(directory))
            check_free(directory, overwrite)
            self._replaces = overwrite and (directory / MANIFEST).exists()
            # A dataset that is overwritten stays whole until the new one is.
            self.directory = directory.with_name(f".{directory.name}.new") if self._replaces else directory
            self.directory.mkdir(exist_ok=True)
            clean(self.directory)
            self._rejects = open(self.rejects_path, "w", encoding="utf-8")  # noqa: SIM115
            self._held = stack.pop_all()

    @property
    def rejects_path(self) -> Path:
        return self.directory / REJECTS

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return sum(i.documents for i in self._infos) + (self._shard.documents if self._shard else 0)

    def write(self, document: Document) -> None:
        """Appends a document. Raises RecordError (the dataset stays usable) and DatasetError."""
        if self._shard is None:
            self._shard = _ShardWriter(self.directory / shard_name(len(self._infos)), self._options)
        self._shard.add(document)
        if self._shard.documents >= self._shard_documents:
            self._finish_shard()

    def reject(self, key: str, reason: str, place: str) -> None:
        """Notes in rejects.jsonl what was not accepted, why, and where it is."""
        with writing(self.rejects_path):
            self._rejects.write(json.dumps({"key": key, "reason": reason, "place": place}) + "\n")
        self.rejected += 1

    def close(self) -> None:
        """Finishes the last shard and writes index and manifest."""
        if self._shard is not None:
            self._finish_shard()
        with writing(self.rejects_path):
            self._rejects.close()
        write_manifest(self.directory, self.name, self._infos, self.rejected, self.meta)
        if self._replaces:
            with writing(self._target):
                clean(self._target)
                for path in sorted(self.directory.iterdir(), key=lambda path: path.name == MANIFEST):  # it goes last
                    path.replace(self._target / path.name)
                self.directory.rmdir()
        self._held.close()

    def abort(self) -> None:
        """Removes everything written but the rejects file."""
        if self._shard is not None:
            self._shard.abort()
        with contextlib.suppress(OSError):
            self._rejects.close()
        clean(self.directory, keep=REJECTS if self.rejected else "")
        with contextlib.suppress(OSError):
            self.directory.rmdir()  # only if empty
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.abort()
            return
        try:
            self.close()
        except BaseException:
            self.abort()
            raise

    def _finish_shard(self) -> None:
        assert self._shard is not None
        shard, self._shard = self._shard, None
        self._infos.append(shard.finish())


class Dataset:
    """Random access to the documents of a dataset folder, safe from many threads; shards open when first read.

    Raises DatasetError if the folder is missing, empty, half-written or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self.name: str = self.manifest["name"]
        self._shards: list[dict[str, Any]] = self.manifest["shards"]
        for shard in self._shards:
            path = self.directory / shard["file"]
            found = path.stat().st_size if path.is_file() else None
            if found != shard["bytes"]:
                state = "is missing" if found is None else f"has {found} bytes"
                raise DatasetError(
                    f"{path}: {state}, the manifest says {shard['bytes']}. Copy it again or write the dataset again."
                )
        counts = [shard["documents"] for shard in self._shards]
        self._starts: list[int] = np.cumsum([0, *counts]).tolist()
        self._readers: list[ArrayRecordReader | None] = [None] * len(self._shards)
        self._lock = threading.Lock()
        try:
            self.index = Index.load(self.directory, self._starts[-1], self.manifest["segments"])
        except (OSError, ValueError) as e:
            raise DatasetError(f"{e}. Copy the index again or write the dataset again.") from e

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: int) -> Document:
        """Document `i`. Raises IndexError, and RecordError if the record is damaged."""
        return decode(self.raw(i), f"{self.directory}, document {i}")

    def raw(self, i: int) -> bytes:
        """The bytes of record `i`. Raises IndexError, and RecordError if the record is damaged.

        Where it is the file that cannot be read, as on a network that is gone for a moment, no record is to blame: it
        is tried again for a minute, and then raises DatasetError.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"{self.directory}: document {i} of {len(self)}")
        shard = bisect.bisect_right(self._starts, i) - 1
        path = self.directory / self._shards[shard]["file"]
        opened_again = False
        for wait in (*WAITS, None):
            try:
                if found := self._reader(shard).read([int(i) - self._starts[shard]])[0]:
                    return found
                reason = "nothing is there"
            except RuntimeError as e:
                reason = str(e)
            self._readers[shard] = None  # a reader that met an error repeats it
            lacking = _lacking(path, self._shards[shard]["bytes"])
            if not lacking and opened_again:
                break
            opened_again = not lacking
            if lacking and wait is not None:
                log.warning("%s: %s; trying again in %s s", path, lacking, wait)
                time.sleep(wait)
        else:
            raise DatasetError(f"{path}: {lacking or reason}, for a minute. Make it readable and run this again.")
        raise RecordError(f"cannot be read ({reason}); copy the shard again", f"{path}, document {i}")

    def verify(self) -> None:
        """Compares the hash of every shard with the manifest (reads all bytes). Raises DatasetError."""
        for shard in self._shards:
            path = self.directory / shard["file"]
            if _sha256(path) != shard["sha256"]:
                raise DatasetError(f"{path}: its hash differs from the manifest. Copy it again.")

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened_again, (self.directory,)  # open readers stay in their process

    def _reader(self, shard: int) -> ArrayRecordReader:
        reader = self._readers[shard]
        if reader is None:
            with self._lock:
                reader = self._readers[shard]
                if reader is None:
                    path = self.directory / self._shards[shard]["file"]
                    reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
                    self._readers[shard] = reader
        return reader


def _opened_again(directory: Path) -> Dataset:
    """A dataset that was whole when it was opened first: where it is not now it is tried again, as a record is."""
    for wait in WAITS:
        try:
            return Dataset(directory)
        except DatasetError as e:
            log.warning("%s Trying again in %s s", e, wait)
            time.sleep(wait)
    return Dataset(directory)


def _lacking(path: Path, size: int) -> str:
    """Why a shard's file cannot be read as a whole; "" if it can."""
    try:
        with open(path, "rb") as file:
            file.read(1)
            found = os.fstat(file.fileno()).st_size
    except OSError as e:
        return e.strerror or str(e)
    return "" if found == size else f"has {found} bytes, the manifest says {size}"
