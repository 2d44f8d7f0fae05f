"""Text tasks of lm-eval: one that it knows by name, or one of a folder of yaml files alone. `--shots` are examples."""

import difflib
from pathlib import Path
from typing import Any

from mmgpt.evaluate.kinds import Job, one_path
from mmgpt.evaluate.subject import Options, Subject
from mmgpt.evaluate.tasks import Described, Outcome, TaskError

USAGE = "TASK[,FOLDER]"
_SHARES = ("acc", "exact_match", "em", "f1", "mc1", "mc2")


def prepare(arguments: list[str], options: Options, subject: Subject) -> Job:
    """lm-eval fetches the data of its own tasks; those of a folder may name local files."""
    subject.require_tokens("lm_eval")
    if len(arguments) > 2:
        raise TaskError(f"lm_eval={','.join(arguments)}: expected lm_eval={USAGE}.")
    folder = one_path(arguments[1], "folder of task files") if len(arguments) == 2 else None
    manager = _manager(folder)
    if arguments[0] not in manager.all_tasks:
        near = difflib.get_close_matches(arguments[0], manager.all_tasks, 3)
        hint = f" Did you mean {' or '.join(near)}?" if near else " `lm-eval ls tasks` lists them."
        raise TaskError(f"lm_eval has no task {arguments[0]!r}.{hint}")
    return lambda: _run(arguments[0], manager, options, subject)


def _manager(folder: Path | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise TaskError(f"lm_eval tasks need lm-eval ({e}): pip install 'mmgpt[eval]'.") from e
    if folder is None:
        return TaskManager()
    return TaskManager(include_path=str(folder), include_defaults=False)  # reading its own thousands takes seconds


def _run(task: str, manager: Any, options: Options, subject: Subject) -> Outcome:
    from lm_eval.evaluator import simple_evaluate

    from mmgpt.evaluate.lm_eval import TextModel

    found: Any = simple_evaluate(
        model=TextModel(subject, options.batch, options.seed),
        tasks=[task],
        num_fewshot=options.shots or None,
        limit=options.limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
        random_seed=options.seed,
        numpy_random_seed=options.seed,
        torch_random_seed=None,  # pyright: ignore[reportArgumentType] # without it torch is not imported
        fewshot_random_seed=options.seed,
    )
    scores: dict[str, float] = {}
    for name, values in found["results"].items():
        for metric, value in values.items():
            plain, _, way = metric.partition(",")
            if isinstance(value, (int, float)) and not plain.endswith("_stderr") and plain != "sample_len":
                key = plain if way in ("", "none") else f"{plain}/{way}"
                scores[key if name == task else f"{key}/{name}"] = round(float(value), 4)
    if not scores:
        raise TaskError(f"lm_eval={task}: no metric came back.")
    names = {key.partition("/")[0] for key in scores}
    described = Described(
        name=f"lm_eval-{task}",
        title=f"lm-eval: {task}",
        about=f"A text task of lm-eval, {options.shots} examples.",
        figure=next(iter(scores)),
        metrics={key: key.replace("_", " ") for key in scores},
        numbers=frozenset(name for name in names if not name.startswith(_SHARES)),
    )
    count = sum(n["effective"] for n in found["n-samples"].values())
    return Outcome(described=described, scores={**scores, "count": count})
