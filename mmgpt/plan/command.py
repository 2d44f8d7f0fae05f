"""`mmgpt plan`: compiles a run's step for a pod that is not there, and tells what it takes."""

import json
from pathlib import Path

from rich.table import Table

from mmgpt.core.config import ConfigError
from mmgpt.core.log import check_writable, console, show, write_atomic
from mmgpt.plan import report
from mmgpt.plan.chips import chip_of, devices
from mmgpt.plan.compiled import TooLarge, fitted
from mmgpt.plan.page import plan_html
from mmgpt.plan.report import Plan
from mmgpt.plan.search import Candidate, candidates, promising
from mmgpt.train.run import Run


def plan_run(
    run: Run,
    topology: str,
    *,
    name: str,
    slices: int,
    documents: str,
    search: int | None,
    json_file: Path | None,
    html: Path | None,
) -> None:
    """Tells a plan, with `search` the best of so many. ConfigError where run, topology or mesh cannot be."""
    check_writable(json_file, html)  # before minutes of compiling
    if report.OLDER is not None:
        console.print(f"warning: {report.OLDER}", style="yellow")  # now: it may end in the middle
    if search is not None:
        made = _searched(run, topology, slices, documents, search)
    else:
        with console.status(f"compiling for {topology}"):
            made = report.plan(run, topology, documents=documents, slices=slices)
    for table in report.shown(made):
        show(table)
    report.tell(made)
    if json_file is not None:
        write_atomic(json_file, json.dumps(made.numbers(), indent=2) + "\n")
    if html is not None:
        write_atomic(html, plan_html(made, name))


def _searched(run: Run, topology: str, slices: int, documents: str, count: int) -> Plan:
    """The fastest of the `count` most promising candidates that fit, with a table of all that were compiled."""
    if count < 1:
        raise ConfigError(f"--search is {count}; give the number of candidates to compile, 1 or more.")
    run = fitted(run)
    ranked = candidates(run, devices(topology, slices), chip_of(topology), documents=documents, slices=slices)
    console.print(f"{len(ranked)} ways to lay the run out are estimated to fit; compiling the best {count}")
    columns = ("replica", "fsdp", "context", "tensor", "microbatches", "remat", "estimated", "s/step", "MFU", "memory")
    table = Table(*columns, title=f"{topology}: what was compiled")
    best: Plan | None = None
    fit = 0
    for candidate in promising(ranked):
        with console.status(f"compiling {' '.join(flags(candidate))} ({fit + 1} of {count})"):
            try:
                made = report.plan(candidate.run, topology, documents=documents, slices=slices)
            except TooLarge:
                made = None
        chosen = candidate.run
        row = [*map(str, candidate.sizes), str(chosen.microbatches), vars(chosen.model)["remat"]]
        row.append(f"{candidate.seconds:.3f} s")
        if made is None:
            table.add_row(*row, "", "", "too large", style="dim")
            continue
        table.add_row(*row, f"{made.told.seconds:.3f}", f"{made.utilisation:.1%}", f"{made.compiled.memory.share:.0%}")
        fit += 1
        if best is None or made.told.seconds < best.told.seconds:
            best = made
        if fit == count:
            break
    show(table)
    if best is None:
        raise TooLarge(f"none of the {len(ranked)} candidates fits a chip of {topology}; take a larger one.")
    console.print(f"the best: {' '.join(flags(best.compiled.run))}", soft_wrap=True)
    return best


def flags(chosen: Candidate | Run) -> list[str]:
    """The command line's way to say a candidate's mesh, microbatches and policy."""
    run = chosen.run if isinstance(chosen, Candidate) else chosen
    sizes = {name: getattr(run.mesh, name) for name in ("replica", "fsdp", "context", "tensor")}
    said = [f"--mesh.{name} {size}" for name, size in sizes.items()]
    return [*said, f"--microbatches {run.microbatches}", f"--model.remat {vars(run.model)['remat']}"]
