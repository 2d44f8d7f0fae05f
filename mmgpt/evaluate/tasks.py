"""Evaluation tasks: prompts are tokenised documents whose `meta` names the task and what a right answer is.

A task says how much the model may make of a prompt and judges what it made. Metrics are shares: each judgement gives
`(sum, weight)` pairs, which add up over the prompts. `meta` holds "task", "kind" (figures are also given by kind),
"answer", and whatever else the task's judge reads.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from mmgpt.core.document import Document
from mmgpt.core.errors import UserError
from mmgpt.data.loader import check_text
from mmgpt.data.record import Dataset
from mmgpt.generate.model import Continuation, Model, token_run
from mmgpt.generate.sampler import Sampling
from mmgpt.tokens.text import TextTokenizer

TEXT_ROOM = 64
"""Tokens that an answer or a caption may take."""


class TaskError(UserError, ValueError):
    """Prompts that no task can use; the message says which and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """Whether everything was right, what would have been (in words), and `(sum, weight)` for each metric."""

    right: bool
    truth: str
    shares: dict[str, tuple[float, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """What is told of an evaluation. `figure` is the metric that sums it up; `metrics` says each metric in words.

    Metrics are shares of 1 but for `numbers`, such as a perplexity or a distance.
    """

    name: str
    title: str
    about: str
    figure: str
    metrics: dict[str, str]
    numbers: frozenset[str] = frozenset()

    def shown(self, metric: str, value: float) -> str:
        """A metric's value as people read it; figures by kind are named "figure/kind"."""
        return f"{value:.4g}" if self.is_number(metric) else f"{value:.1%}"

    def is_number(self, metric: str) -> bool:
        """Whether a metric is no share."""
        return metric.partition("/")[0] in self.numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Described):
    """One kind of prompt, and how what the model makes of it is judged.

    `stop` ends what is made after a text piece: an answer that another question may follow has no other end.
    `long`: the model may go on for as long as a training row, through several media. `guided`: guidance has a meaning
    here, since the model was trained on such documents without their text. `add_frames` of a clip are to be predicted.
    """

    judge: Callable[[dict[str, str], Continuation], Judgement]
    stop: str = ""
    long: bool = False
    guided: bool = False
    add_frames: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an evaluation found, and what it was found from, one judgement a prompt; none where nothing was made."""

    described: Described
    scores: dict[str, float]
    documents: tuple[Document, ...] = ()
    made: tuple[Continuation, ...] = ()
    judgements: tuple[Judgement, ...] = ()


def judge_text(meta: dict[str, str], made: Continuation) -> Judgement:
    """Right where the output is one text, equal to the answer but for case, spaces and a full stop."""
    said = [part.text for part in made.made if part.frames is None]
    right = len(said) == len(made.made) == 1 and normalised(said[0]) == normalised(meta["answer"])
    return Judgement(right=right, truth=meta["answer"], shares={"right": (float(right), 1.0)})


def normalised(text: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return re.sub(r"\s+", " ", text).strip().rstrip(".").rstrip().lower()


LABEL = Task(
    name="label",
    title="Image → label",
    about="The model reads a picture it never saw and says what it is.",
    figure="right",
    metrics={"right": "answers right"},
    judge=judge_text,
)
"""A task that needs nothing but an answer: an image and its caption."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of one task, in order."""

    task: Task
    documents: tuple[Document, ...]


def load_prompts(path: Path, tasks: dict[str, Task], limit: int | None, text: TextTokenizer) -> Prompts:
    """The first `limit` prompts of a tokenised dataset; TaskError where they name no known task."""
    dataset = Dataset(path)
    check_text(dataset, text)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    documents = tuple(dataset[i] for i in range(count))
    names = sorted({document.meta.get("task", "") for document in documents})
    if len(names) != 1 or names[0] not in tasks:
        raise TaskError(
            f"{path}: expected prompts of one known task ({', '.join(tasks)}) in their meta, "
            f"found {', '.join(map(repr, names)) or 'no documents'}."
        )
    return Prompts(task=tasks[names[0]], documents=documents)


def sampling_of(task: Task, model: Model, base: Sampling) -> Sampling:
    """How a task samples: room for one medium or a text; tasks that sample alike share a compilation."""
    _, data = token_run(model.generator.opened.built.run)
    medium = model.longest_medium + 8  # a few words may come before it
    room = data.row_length if task.long else max(TEXT_ROOM, medium * max(1, task.add_frames))
    stop = model.text.symbol(task.stop) if task.stop else -1
    return base.replace(room=room, guidance=base.guidance if task.guided else 1.0, stop=stop)


def scores(task: Described, kinds: Sequence[str], judgements: Sequence[Judgement]) -> dict[str, float]:
    """Every metric over the prompts that it weighs, the figure by kind as `figure/kind`, and their `count`."""
    values = {name: _share(judgements, name) for name in task.metrics}
    for kind in sorted(set(kinds)) if len(set(kinds)) > 1 else ():
        mine = [j for j, k in zip(judgements, kinds, strict=True) if k == kind]
        values[f"{task.figure}/{kind}"] = _share(mine, task.figure)
    return {**{name: round(value, 4) for name, value in values.items()}, "count": len(judgements)}


def _share(judgements: Sequence[Judgement], name: str) -> float:
    pairs = [j.shares[name] for j in judgements if name in j.shares]
    weight = sum(w for _, w in pairs)
    return sum(s for s, _ in pairs) / weight if weight else 0.0
