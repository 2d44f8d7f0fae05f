"""The shards of a job: what is beside a finished one, how it is known again, and the dataset that they become.

shard-00000.array_record        the records
shard-00000.array_record.npz    the index of its segments
shard-00000.array_record.done   JSON, written last: hash, bytes, counts, rejects, and the hash of the job's settings
"""

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from mmgpt.core.log import write_atomic, write_json
from mmgpt.data.index import Index
from mmgpt.data.record import ShardInfo, write_manifest
from mmgpt.tokenize.tokenizers import JobError

_COUNTS = {"sha256": str, "bytes": int, "documents": int, "segments": int, "rejects": list}
_TEMPORARY = re.compile(r"\.(?P<shard>.+?)(\.done|\.npz)?\.[0-9a-f-]+\.tmp")


def mark(shard: Path, settings: str, info: ShardInfo, rejects: list[dict[str, str]]) -> None:
    """Notes that a shard is whole, with all that its dataset's manifest needs: it is not read again."""
    data = io.BytesIO()
    np.savez(data, allow_pickle=False, **vars(info.index))
    write_atomic(_index(shard), data.getvalue())
    marker = {
        "settings": settings,
        "sha256": info.sha256,
        "bytes": info.bytes,
        "documents": info.documents,
        "segments": len(info.index.kind),
        "rejects": rejects,
    }
    write_json(_marker(shard), marker)


def finished(shard: Path, settings: str) -> dict[str, Any] | None:
    """The marker of a shard that is done, None if it must be written; its size is compared, not its hash.

    Raises JobError if it was made by other settings.
    """
    try:
        marker = json.loads(_marker(shard).read_bytes())
        found = marker["settings"]
        sound = all(isinstance(marker[field], kind) for field, kind in _COUNTS.items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if found != settings:
        raise JobError(
            f"{shard}: was made by other settings, tokenizers or from other data than this job's. "
            "Remove the folder, or name another one for the output."
        )
    whole = sound and _index(shard).is_file() and shard.is_file() and shard.stat().st_size == marker["bytes"]
    return marker if whole else None


def complete(out: Path, name: str, done: dict[Path, dict[str, Any]], settings: dict[str, Any]) -> None:
    """Writes rejects and manifest of a dataset, given the markers of all its shards."""
    infos = [_info(shard, marker) for shard, marker in done.items()]
    rejects = [reject for marker in done.values() for reject in marker["rejects"]]
    write_atomic(out / "rejects.jsonl", "".join(json.dumps(reject) + "\n" for reject in rejects))
    write_manifest(out, name, infos, len(rejects), {"form": "tokenised", "settings": settings})


def _info(shard: Path, marker: dict[str, Any]) -> ShardInfo:
    try:
        with np.load(io.BytesIO(_index(shard).read_bytes()), allow_pickle=False) as file:
            index = Index(**{field: file[field] for field in ("offset", "kind", "shape", "loss")})
        if (len(index.offset), len(index.kind)) != (marker["documents"] + 1, marker["segments"]):
            raise ValueError(f"its index is of {len(index.offset) - 1} documents, not {marker['documents']}")
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as e:
        raise JobError(f"{shard}: its index cannot be read ({e}). Delete {_index(shard)} and run the job again.") from e
    return ShardInfo(
        file=shard.name, documents=marker["documents"], bytes=marker["bytes"], sha256=marker["sha256"], index=index
    )


def sweep(out: Path, mine: set[str] | None) -> None:
    """Removes the temporary files that a killed process left: all, or those of the shards that are `mine`.

    Where several processes share the folder, the others' files may be ones that they are writing.
    """
    for path in out.glob("*.tmp"):
        found = _TEMPORARY.fullmatch(path.name)
        if mine is None or (found and found["shard"] in mine):
            path.unlink(missing_ok=True)


def _marker(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.done")


def _index(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.npz")
