"""`mmgpt plan`: compiles a run's step for a pod that is not there, and tells what it takes."""

import json
from pathlib import Path

from mmgpt.core.log import console, show, write_atomic
from mmgpt.plan import report
from mmgpt.train.run import Run


def plan_run(run: Run, topology: str, *, slices: int, documents: str, json_file: Path | None) -> None:
    """Tells a plan; ConfigError where the run, the topology or the mesh cannot be."""
    with console.status(f"compiling for {topology}"):
        made = report.plan(run, topology, documents=documents, slices=slices)
    for table in report.shown(made):
        show(table)
    report.tell(made)
    if json_file is not None:
        write_atomic(json_file, json.dumps(made.numbers(), indent=2) + "\n")
