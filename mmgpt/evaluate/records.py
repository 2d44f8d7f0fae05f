"""What an evaluation leaves in the run folder, `eval/TASK/`: each prompt, what was made of it, and the verdict.

`records.json` holds texts and verdicts; a medium is one PNG beside it with its frames side by side. A report is made
from these without the model.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from mmgpt.core.errors import UserError
from mmgpt.core.log import write_json
from mmgpt.data.media import decode_image, encode_png
from mmgpt.evaluate.tasks import Described, Outcome
from mmgpt.generate.model import Part


class RecordsError(UserError, ValueError):
    """Records that cannot be read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One judged prompt."""

    key: str
    kind: str
    right: bool
    truth: str
    prompt: tuple[Part, ...]
    made: tuple[Part, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records(Described):
    """All records of an evaluation, with its words and scores."""

    scores: dict[str, float]
    records: tuple[Record, ...]


def save_records(folder: Path, outcome: Outcome) -> None:
    """Writes `folder` anew, whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    records = []
    judged = zip(outcome.documents, outcome.made, outcome.judgements, strict=True)
    for number, (document, continuation, judgement) in enumerate(judged):
        parts = {
            side: [_write(temporary, f"{number:04d}-{side}-{i}.png", part) for i, part in enumerate(pieces)]
            for side, pieces in (("prompt", continuation.prompt), ("made", continuation.made))
        }
        verdict = {"right": judgement.right, "truth": judgement.truth, "finished": continuation.finished}
        records.append({"key": document.key, "kind": document.meta.get("kind", ""), **verdict, **parts})
    words = {field.name: getattr(outcome.described, field.name) for field in dataclasses.fields(Described)}
    words["numbers"] = sorted(outcome.described.numbers)
    write_json(temporary / "records.json", {**words, "scores": outcome.scores, "records": records})
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _write(folder: Path, name: str, part: Part) -> dict[str, Any]:
    if part.frames is None:
        return {"text": part.text}
    (folder / name).write_bytes(encode_png(np.concatenate(list(part.frames), axis=1)))
    return {"file": name, "frames": len(part.frames), "clip": part.clip, "given": part.given}


def load_records(folder: Path, limit: int) -> Records:
    """The first `limit` records of a task's folder; RecordsError where it holds something else."""
    path = folder / "records.json"
    try:
        value = json.loads(path.read_text())
        records = tuple(
            Record(
                key=record["key"],
                kind=record["kind"],
                right=record["right"],
                truth=record["truth"],
                prompt=tuple(_read(folder, part) for part in record["prompt"]),
                made=tuple(_read(folder, part) for part in record["made"]),
            )
            for record in value["records"][:limit]
        )
        words = {field.name: value[field.name] for field in dataclasses.fields(Described)}
        words["numbers"] = frozenset(words["numbers"])
        return Records(**words, scores=value["scores"], records=records)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise RecordsError(f"{path}: cannot be read ({type(e).__name__}: {e}). Run `mmgpt eval` again.") from e


def _read(folder: Path, part: dict[str, Any]) -> Part:
    if "text" in part:
        return Part(text=part["text"])
    wide = decode_image((folder / Path(part["file"]).name).read_bytes())
    frames = np.stack(np.split(wide, part["frames"], axis=1))
    return Part(frames=frames, clip=part["clip"], given=part["given"])
