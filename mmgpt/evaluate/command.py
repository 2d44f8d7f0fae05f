"""`mmgpt eval`: scores a run on tokenised prompts."""

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import tyro
from rich.table import Table

from mmgpt.core.document import Document
from mmgpt.core.log import printable, progress, show, write_json
from mmgpt.evaluate import tasks
from mmgpt.evaluate.records import save_records
from mmgpt.evaluate.shapes.tasks import TASKS as SHAPES
from mmgpt.evaluate.tasks import LABEL, Prompts, Task
from mmgpt.generate.decode import Sampling
from mmgpt.generate.model import Continuation, Model
from mmgpt.generate.sampler import Sampler

TASKS: dict[str, Task] = {**SHAPES, LABEL.name: LABEL}
"""All tasks by the name that prompts have in their meta."""


def evaluate(
    run: tyro.conf.Positional[Path],
    prompts: tuple[Path, ...],
    json: Path | None = None,
    guidance: float = 1.0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    limit: int | None = None,
    batch: int = 50,
    seed: int = 0,
) -> None:
    """Scores a run on prompts and keeps what it made under RUN/eval, for `mmgpt report`.

    Args:
        run: run folder of a decoder.
        prompts: tokenised datasets whose meta names the task, one task each.
        json: write the scores, {task: {metric: value, "count": prompts}, "seconds": s}.
        guidance: classifier-free guidance where the task allows it; 1 turns it off.
        temperature: of visual codes; 0 takes the likeliest.
        top_p: smallest set of visual codes with this probability that is sampled from.
        limit: prompts of each task at most.
        batch: prompts that are generated at once.
        seed: of sampling.
    """
    begin = time.perf_counter()
    loaded = [tasks.load_prompts(path, TASKS, limit) for path in prompts]
    model = Model.open(run, batch)
    image = Sampler(temperature=temperature, top_p=top_p)
    made = _generate(model, loaded, Sampling(guidance=guidance, image=image, seed=seed))
    results: dict[str, Any] = {}
    for prompt, continuations in zip(loaded, made, strict=True):
        results[prompt.task.name] = _judged(run, prompt, continuations)
    results["seconds"] = round(time.perf_counter() - begin, 1)
    show(_table(run, results))
    if json is not None:
        write_json(json, results)


def _generate(model: Model, loaded: list[Prompts], base: Sampling) -> list[list[Continuation]]:
    """What the model makes of the prompts of each task. Tasks that sample alike go together and compile once."""
    groups: dict[tuple[Sampling, int], list[int]] = defaultdict(list)
    for number, prompt in enumerate(loaded):
        groups[tasks.sampling_of(prompt.task, model, base), prompt.task.add_frames].append(number)
    made: list[list[Continuation]] = [[] for _ in loaded]
    for (sampling, frames), numbers in progress(groups.items(), label="generate"):
        documents: list[Document] = [d for number in numbers for d in loaded[number].documents]
        continuations = iter(model.go_on(documents, sampling, frames))
        for number in numbers:
            made[number] = [next(continuations) for _ in loaded[number].documents]
    return made


def _judged(run: Path, prompts: Prompts, made: list[Continuation]) -> dict[str, float]:
    task, documents = prompts.task, prompts.documents
    judgements = [task.judge(document.meta, m) for document, m in zip(documents, made, strict=True)]
    found = tasks.scores(task, [document.meta.get("kind", "") for document in documents], judgements)
    save_records(run / "eval" / task.name, task, found, documents, made, judgements)
    return found


def _table(run: Path, results: dict[str, Any]) -> Table:
    table = Table("task", "metric", "share", "prompts", title=printable(f"{run}: {results['seconds']} s"))
    for name, task in TASKS.items():
        if name in results:
            values = dict(results[name])
            count = values.pop("count")
            for i, (metric, value) in enumerate(values.items()):
                row = (name if i == 0 else "", metric, f"{value:.1%}", str(count) if i == 0 else "")
                table.add_row(*row, style="bold" if metric == task.figure else None)
            table.add_section()
    return table
