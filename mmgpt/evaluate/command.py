"""`mmgpt eval`: scores a run on tasks: prompts, perplexity, captions, questions, pictures, lm-eval's."""

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from mmgpt.core.document import Document
from mmgpt.core.errors import UsageError
from mmgpt.core.log import check_writable, printable, progress, show, write_json
from mmgpt.evaluate import kinds
from mmgpt.evaluate.kinds import Job
from mmgpt.evaluate.records import save_records
from mmgpt.evaluate.shapes.tasks import TASKS as SHAPES
from mmgpt.evaluate.subject import Options, Subject
from mmgpt.evaluate.tasks import LABEL, Outcome, Prompts, Task, TaskError, load_prompts, sampling_of, scores
from mmgpt.generate.model import Continuation, Model
from mmgpt.generate.sampler import Sampling

TASKS: dict[str, Task] = {**SHAPES, LABEL.name: LABEL}
"""All tasks by the name that prompts have in their meta."""


def evaluate(
    run: tyro.conf.Positional[Path],
    tasks: tuple[str, ...],
    json: Path | None = None,
    options: Annotated[Options, tyro.conf.arg(name="")] = Options(),  # noqa: B008
) -> None:
    """Scores a run on tasks and keeps what it made under RUN/eval, for `mmgpt report`.

    A task is a folder of tokenised prompts, whose meta names what they are, or one of these:

      perplexity=DATASET[,held_out]        of a tokenised dataset, by modality
      captions=CAPTIONS.json,FOLDER        CIDEr, BLEU, ROUGE-L; files as COCO has them
      vqa=QUESTIONS.json,ANNOTATIONS.json,FOLDER   and so okvqa, vizwiz, msrvtt_qa, nextqa with their files
      fid=DATASET[,FEATURE]                pictures drawn from captions against the true ones
      reconstruction=DATASET[,FEATURE]     what an image tokenizer keeps: PSNR, SSIM, use of codes
      lm_eval=TASK[,FOLDER]                a text task of lm-eval

    Args:
        run: run folder, or Hugging Face folder, of a model over tokens or an image tokenizer.
        tasks: what to evaluate, in order.
        json: write the scores, {task: {metric: value, "count": prompts}, "seconds": s}.
        options: how.
    """
    begin = time.perf_counter()
    options.check()
    check_writable(json)
    subject = Subject(run, options.batch, options.area)
    prompts, jobs = _prepared(tasks, options, subject)
    check_writable(run / "eval" / "records")
    found: dict[int, tuple[str, Outcome]] = {}
    try:
        for place, outcome in _outcomes(prompts, jobs, options, subject):
            found[place] = _name(outcome, [name for name, _ in found.values()]), outcome
            save_records(run / "eval" / found[place][0], outcome)
    finally:  # where one fails, the scores of those before it are still told
        if found:
            _tell(run, dict(found[place] for place in sorted(found)), round(time.perf_counter() - begin, 1), json)


def _prepared(specs: Sequence[str], options: Options, subject: Subject) -> tuple[dict[int, Prompts], dict[int, Job]]:
    """Prompts and other evaluations by their place in the order; all that is wrong with them is told here."""
    if not specs:
        raise UsageError(f"--tasks: name at least one. Give folders of tokenised prompts, or:\n{kinds.usage()}")
    if len(set(specs)) < len(specs):
        raise TaskError("--tasks: one is given twice.")
    prompts: dict[int, Prompts] = {}
    jobs: dict[int, Job] = {}
    for place, spec in enumerate(specs):
        if spec.partition("=")[0] not in kinds.names() and Path(spec).exists():
            subject.require_tokens(spec)
            prompts[place] = load_prompts(Path(spec), TASKS, options.limit, subject.text)
        else:
            jobs[place] = kinds.prepare(spec, options, subject)
    return prompts, jobs


def _outcomes(
    prompts: dict[int, Prompts], jobs: dict[int, Job], options: Options, subject: Subject
) -> Iterator[tuple[int, Outcome]]:
    """What each evaluation found, with its place in the order."""
    if prompts:
        made = _generate(subject.model, list(prompts.values()), options.sampling)
        for place, continuations in zip(prompts, made, strict=True):
            yield place, _judged(prompts[place], continuations)
    for place, job in jobs.items():
        yield place, job()


def _name(outcome: Outcome, taken: Sequence[str]) -> str:
    """The task's name, with a number where one of that name is there."""
    name = outcome.described.name
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)


def _generate(model: Model, loaded: list[Prompts], base: Sampling) -> list[list[Continuation]]:
    """What the model makes of the prompts of each task. Tasks that sample alike go together and compile once."""
    groups: dict[tuple[Sampling, int], list[int]] = defaultdict(list)
    for number, prompt in enumerate(loaded):
        groups[sampling_of(prompt.task, model, base), prompt.task.add_frames].append(number)
    made: list[list[Continuation]] = [[] for _ in loaded]
    for (sampling, frames), numbers in progress(groups.items(), label="generate"):
        documents: list[Document] = [d for number in numbers for d in loaded[number].documents]
        continuations = iter(model.go_on(documents, sampling, frames))
        for number in numbers:
            made[number] = [next(continuations) for _ in loaded[number].documents]
    return made


def _judged(prompts: Prompts, made: list[Continuation]) -> Outcome:
    task, documents = prompts.task, prompts.documents
    judgements = [task.judge(document.meta, m) for document, m in zip(documents, made, strict=True)]
    found = scores(task, [document.meta.get("kind", "") for document in documents], judgements)
    return Outcome(described=task, scores=found, documents=documents, made=tuple(made), judgements=tuple(judgements))


def _tell(run: Path, found: dict[str, Outcome], seconds: float, json: Path | None) -> None:
    table = Table("task", "metric", "value", "count", title=printable(f"{run}: {seconds} s"))
    for name, outcome in found.items():
        _add(table, name, outcome)
    show(table)
    if json is not None:
        write_json(json, {name: outcome.scores for name, outcome in found.items()} | {"seconds": seconds})


def _add(table: Table, name: str, outcome: Outcome) -> None:
    described = outcome.described
    values = [(metric, value) for metric, value in outcome.scores.items() if metric != "count"]
    for i, (metric, value) in enumerate(values):
        first = (name, str(outcome.scores["count"])) if i == 0 else ("", "")
        bold = "bold" if metric == described.figure else None
        table.add_row(first[0], metric, described.shown(metric, value), first[1], style=bold)
    table.add_section()
