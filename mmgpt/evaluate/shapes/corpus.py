"""Writes the shapes corpus: real files in the formats that the importers read, and the prompts of its evaluation.

    pairs/shard-00000.tar ...            WebDataset: KEY.jpg or KEY.png with KEY.txt
    stories/documents.jsonl, images/     sentence, image, three times
    clips/NAME.mp4, NAME.txt             H.264, four frames
    questions/documents.jsonl, images/   one image, six questions with answers
    edits/documents.jsonl, images/       image, instruction, image
    eval/TASK/documents.jsonl, images/   prompts only; `meta` holds task, kind, answer and the true scene as JSON
    corpus.json                          settings and counts, written last

Each unit of work draws from its own random stream, named by (seed, task, unit), so that the bytes do not depend on
the number of processes.
"""

import concurrent.futures
import dataclasses
import io
import json
import multiprocessing
import os
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmgpt.core.errors import UserError
from mmgpt.data.media import encode_jpeg, encode_mp4, encode_png
from mmgpt.evaluate.shapes import attributes, changes, language, world
from mmgpt.evaluate.shapes.questions import KINDS, question
from mmgpt.evaluate.shapes.world import Clip, Scene

EVALUATIONS = ("draw", "unseen", "attributes", "caption", "answer", "next_frame", "story", "edit")
FPS = 4.0
QUESTIONS_PER_IMAGE = 6
_KEYS = {"stories": "story", "questions": "question", "edits": "edit"}
_UNIT = 1000
_PNG_EVERY = 16
_VERSION = 3


class CorpusError(UserError, RuntimeError):
    """The output folder cannot take this corpus."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Unit:
    """Documents `start` to `stop` of a task, written below `folder`."""

    task: str
    folder: Path
    start: int
    stop: int
    seed: int

    @property
    def rng(self) -> random.Random:
        return random.Random(f"shapes {_VERSION} {self.seed} {self.task} {self.start}")


def write_corpus(
    out: Path,
    *,
    pairs: int,
    stories: int,
    clips: int,
    questions: int,
    edits: int,
    eval_each: int,
    seed: int,
    workers: int | None = None,
) -> dict[str, int]:
    """Writes the corpus below `out` and returns the number of documents by task ("pairs", ..., "eval/draw", ...).

    `eval_each` prompts are written for each of EVALUATIONS. A folder that is complete with the same settings is left
    as it is; one that was cut off is written again. `workers` processes share the work (default: one a CPU).

    Raises:
        CorpusError: `out` holds other files, or a corpus with other settings.
    """
    trained = {"pairs": pairs, "stories": stories, "clips": clips, "questions": questions, "edits": edits}
    settings = {"version": _VERSION, **trained, "eval_each": eval_each, "seed": seed, "tasks": list(EVALUATIONS)}
    for task, count in {**trained, "eval_each": eval_each}.items():
        if count < 0:
            raise CorpusError(f"{task} is {count}; give 0 or more.")
    counts = {**trained, **{f"eval/{task}": eval_each for task in EVALUATIONS}}
    if _is_complete(out, settings):
        return counts
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / "corpus.partial.json", {"settings": settings})
    units = [
        _Unit(task=task, folder=out / task, start=start, stop=min(start + _UNIT, count), seed=seed)
        for task, count in counts.items()
        for start in range(0, count, _UNIT)
    ]
    for unit in units:
        medium = {"pairs": "", "clips": "", "eval/next_frame": "clips"}.get(unit.task, "images")
        (unit.folder / medium).mkdir(parents=True, exist_ok=True)
    lines: dict[Path, list[str]] = {}
    for unit, written in zip(units, _run(units, workers or _cpus()), strict=True):
        lines.setdefault(unit.folder, []).extend(written)
    for folder, text in lines.items():
        if text:
            (folder / "documents.jsonl").write_text("".join(text), encoding="utf-8")
    _write_json(out / "corpus.json", {"settings": settings, "documents": counts})
    (out / "corpus.partial.json").unlink()
    return counts


def _is_complete(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` already holds this corpus; raises where it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    for name in ("corpus.json", "corpus.partial.json"):
        if (out / name).is_file():
            try:
                found = json.loads((out / name).read_text(encoding="utf-8"))["settings"]
            except (ValueError, KeyError, TypeError) as error:
                raise CorpusError(f"{out / name} is not what write_corpus writes ({error}); delete {out}") from error
            if found != settings:
                raise CorpusError(
                    f"{out} holds a shapes corpus with settings {found}, asked for {settings}; "
                    "choose another folder or delete this one"
                )
            return name == "corpus.json"
    raise CorpusError(f"{out} is neither an empty folder nor a shapes corpus; choose an empty or a new folder")


def _run(units: list[_Unit], workers: int) -> Iterator[list[str]]:
    if workers == 1 or len(units) <= 1:
        yield from map(_write_unit, units)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process that runs JAX can hang
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(units)), mp_context=context) as pool:
        yield from pool.map(_write_unit, units)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write_json(path: Path, value: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _write_unit(unit: _Unit) -> list[str]:
    """Writes a unit's media and returns its lines of documents.jsonl, if its format has any."""
    if unit.task == "pairs":
        return _write_pairs(unit)
    if unit.task == "clips":
        return _write_clips(unit)
    document, rng = _DOCUMENTS[unit.task], unit.rng
    prefix = _KEYS.get(unit.task) or unit.task.removeprefix("eval/")
    lines = []
    for n in range(unit.start, unit.stop):
        key = f"{prefix}-{n:05d}"
        segments, meta = document(rng, unit.folder, key, n)
        lines.append(json.dumps({"key": key, "segments": segments, "meta": meta}) + "\n")
    return lines


def _write_pairs(unit: _Unit) -> list[str]:
    rng = unit.rng
    with tarfile.open(unit.folder / f"shard-{unit.start // _UNIT:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for n in range(unit.start, unit.stop):
            scene = _scene(rng)
            suffix, data = _encoded(scene, n)
            for name, blob in ((suffix, data), ("txt", language.caption(rng, scene).encode())):
                member = tarfile.TarInfo(f"pair-{n:05d}.{name}")
                member.size = len(blob)
                tar.addfile(member, io.BytesIO(blob))
    return []


def _write_clips(unit: _Unit) -> list[str]:
    rng = unit.rng
    for n in range(unit.start, unit.stop):
        clip = _clip(rng, lambda clip: not any(world.for_evaluation(f) for f in clip.frames))
        (unit.folder / f"clip-{n:05d}.mp4").write_bytes(_film(clip.frames))
        (unit.folder / f"clip-{n:05d}.txt").write_text(language.clip_caption(rng, clip), encoding="utf-8")
    return []


def _story(rng: random.Random, folder: Path, key: str, n: int) -> tuple[list[dict], dict[str, str]]:
    while True:
        sentences, scenes = changes.story(rng, rng.choice((1, 2)))
        if not any(world.for_evaluation(s) for s in scenes):
            break
    segments: list[dict] = []
    for step, (sentence, scene) in enumerate(zip(sentences, scenes, strict=True)):
        segments += [{"text": sentence}, {"image": _picture(folder, f"{key}-{step}", scene, 3 * n + step)}]
    return segments, {}


def _questions(rng: random.Random, folder: Path, key: str, n: int) -> tuple[list[dict], dict[str, str]]:
    scene = _scene(rng, (1, 2, 2, 3, 3))
    segments: list[dict] = [{"image": _picture(folder, key, scene, n), "role": "user", "loss": 0.0}]
    for kind in rng.sample(KINDS, QUESTIONS_PER_IMAGE):
        text, answer = question(rng, scene, kind)
        segments += [{"text": text, "role": "user", "loss": 0.0}, {"text": f"{answer}.", "role": "assistant"}]
    return segments, {}


def _edit(rng: random.Random, folder: Path, key: str, n: int) -> tuple[list[dict], dict[str, str]]:
    change, before, after = _edited(rng, rng.choice(changes.EDITS), evaluation=False)
    return [
        {"image": _picture(folder, f"{key}-before", before, 2 * n), "role": "user", "loss": 0.0},
        {"text": changes.instruction(rng, change), "role": "user", "loss": 0.0},
        {"image": _picture(folder, f"{key}-after", after, 2 * n + 1), "role": "assistant"},
    ], {}


def _eval_draw(rng: random.Random, folder: Path, key: str, n: int) -> tuple[list[dict], dict[str, str]]:
    scene = _scene(rng, (1 + n % 3,), evaluation=True)
    return [{"text": language.caption(rng, scene)}], _meta("draw", _counted(scene), scene)


def _eval_unseen(rng: random.Random, folder: Path, key: str, n: int) -> tuple[list[dict], dict[str, str]]:
    pair = sorted(world.UNSEEN)[n % len(world.UNSEEN)]
    while True:
        scene = world.random_scene(rng, rng.choice((1, 2, 3)), first_pair=pair)
        if world.for_evaluation(scene):
            return [{"text": language.caption(rng, scene)}], _meta("unseen", " ".join(pair), scene)


def _eval_attributes(rng: random.Random, folder: Path, key: str, n: int) -> tuple[list[dict], dict[str, str]]:
    kind = attributes.KINDS[n % len(attributes.KINDS)]
    scene, wanted = attributes.demands(rng, kind)
    meta = _meta("attributes", kind, scene) | {"demands": attributes.as_text(wanted)}
    return [{"text": language.caption(rng, scene)}], meta


def _eval_caption(rng: random.Random, folder: Path, key: str, n: int) -> tuple[list[dict], dict[str, str]]:
    scene = _scene(rng, (1 + n % 3,), evaluation=True)
    meta = _meta("caption", _counted(scene), scene, answer=language.caption(rng, scene))
    return [{"image": _picture(folder, key, scene, n)}], meta


def _eval_answer(rng: random.Random, folder: Path, key: str, n: int) -> tuple[list[dict], dict[str, str]]:
    kind = KINDS[n % len(KINDS)]
    scene = _scene(rng, (1, 2, 2, 3, 3), evaluation=True)
    text, answer = question(rng, scene, kind)
    return [
        {"image": _picture(folder, key, scene, n), "role": "user", "loss": 0.0},
        {"text": text, "role": "user", "loss": 0.0},
    ], _meta("answer", kind, scene, answer=answer)


def _eval_next_frame(rng: random.Random, folder: Path, key: str, n: int) -> tuple[list[dict], dict[str, str]]:
    clip = _clip(rng, lambda clip: world.for_evaluation(clip.frames[-1]))
    (folder / "clips" / f"{key}.mp4").write_bytes(_film(clip.frames[:-1]))
    kind = " ".join(sorted(set(clip.directions)))
    return [{"video": f"clips/{key}.mp4"}], _meta("next_frame", kind, clip.frames[-1])


def _eval_story(rng: random.Random, folder: Path, key: str, n: int) -> tuple[list[dict], dict[str, str]]:
    scene = _scene(rng, (1, 2), evaluation=True)
    return [{"text": changes.opening(rng, scene)}], _meta("story", _counted(scene), scene)


def _eval_edit(rng: random.Random, folder: Path, key: str, n: int) -> tuple[list[dict], dict[str, str]]:
    change, before, after = _edited(rng, changes.EDITS[n % len(changes.EDITS)], evaluation=True)
    return [
        {"image": _picture(folder, key, before, n), "role": "user", "loss": 0.0},
        {"text": changes.instruction(rng, change), "role": "user", "loss": 0.0},
    ], _meta("edit", change.kind, after)


_DOCUMENTS: dict[str, Callable[[random.Random, Path, str, int], tuple[list[dict], dict[str, str]]]] = {
    "stories": _story,
    "questions": _questions,
    "edits": _edit,
    "eval/draw": _eval_draw,
    "eval/unseen": _eval_unseen,
    "eval/attributes": _eval_attributes,
    "eval/caption": _eval_caption,
    "eval/answer": _eval_answer,
    "eval/next_frame": _eval_next_frame,
    "eval/story": _eval_story,
    "eval/edit": _eval_edit,
}


def _meta(task: str, kind: str, truth: Scene, answer: str = "") -> dict[str, str]:
    return {"task": task, "kind": kind, "answer": answer, "scene": json.dumps(truth.as_json())}


def _counted(scene: Scene) -> str:
    return "1 object" if len(scene.objects) == 1 else f"{len(scene.objects)} objects"


def _scene(rng: random.Random, counts: tuple[int, ...] = (1, 2, 3), *, evaluation: bool = False) -> Scene:
    while True:
        scene = world.random_scene(rng, rng.choice(counts))
        if world.for_evaluation(scene) == evaluation:
            return scene


def _clip(rng: random.Random, wanted: Callable[[Clip], bool]) -> Clip:
    while True:
        clip = world.random_clip(rng, rng.choice((1, 2)))
        if wanted(clip):
            return clip


def _edited(rng: random.Random, kind: str, *, evaluation: bool) -> tuple[changes.Change, Scene, Scene]:
    while True:
        before = _scene(rng, evaluation=evaluation)
        found = changes.random_change(rng, before, kind)
        if found is not None and world.for_evaluation(found[1]) == evaluation:
            return found[0], before, found[1]


def _encoded(scene: Scene, number: int) -> tuple[str, bytes]:
    """A picture's suffix and bytes: JPEG, and now and then PNG so that both are read."""
    image = world.render(scene)
    return ("png", encode_png(image)) if number % _PNG_EVERY == _PNG_EVERY - 1 else ("jpg", encode_jpeg(image, 92))


def _picture(folder: Path, name: str, scene: Scene, number: int) -> str:
    suffix, data = _encoded(scene, number)
    (folder / "images" / f"{name}.{suffix}").write_bytes(data)
    return f"images/{name}.{suffix}"


def _film(scenes: tuple[Scene, ...]) -> bytes:
    return encode_mp4(np.stack([world.render(scene) for scene in scenes]), FPS)
