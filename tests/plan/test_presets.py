"""Plans of the presets stay as good as they were; on Python 3.12, whose JAX has the compiler that they were made with.

    MMGPT_WRITE_GOLDEN=1 pytest -m slow tests/plan/test_presets.py      writes them anew

What is held: time of a step, memory, the share of communication that is waited for, each kind of communication by the
function that asked for it, the warnings. Better than held by more than the margin is red too, so that it is written.
"""

import importlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import jax
import pytest

from mmgpt import presets
from mmgpt.plan import report
from mmgpt.plan.report import Plan
from mmgpt.train.run import Run

pytest.importorskip("libtpu", reason="compiles for TPUs: pip install libtpu")
GOLDEN = Path(__file__).parent / "golden"
WRITE = os.environ.get("MMGPT_WRITE_GOLDEN") == "1"
PLANS = {
    "emu3_0_1b": "v5e:2x4",
    "emu3_1b": "v5p:2x2x4",
    "emu3_8b": "v5p:8x8x4",
    "emu3_8b_131k": "v5p:8x8x4",
    "emu3_5_34b": "v5p:8x8x8",
}
"""The topology that each preset's docstring plans."""
QUICK = {"xla_tpu_scoped_vmem_limit_kib": "16384"}
"""With the compiler's own windows for products it needs a third of the time: steps are some 5 % slower than planned."""
MARGINS = {"step_seconds": 0.01, "memory_total": 0.01, "useful_flops_a_step": 1e-9}
"""Relative; what is not here is equal."""


def held(made: Plan) -> dict[str, Any]:
    numbers = made.numbers()
    found: dict[str, Any] = {key: numbers[key] for key in MARGINS}
    found["exposed_share"] = round(numbers["communication_of_layers_exposed_share"], 2)
    kinds: dict[str, list[float]] = {}
    for c, times, _ in made.told.transfers:
        where = f"{c.source.file} {c.source.function}" if c.source else "the compiler"
        of_kind = kinds.setdefault(f"{c.kind} over {c.group}: {where}", [0, 0])
        of_kind[0] += times
        of_kind[1] += c.bytes * times
    found["communication"] = {key: [runs, round(size / 1e9, 2)] for key, (runs, size) in sorted(kinds.items())}
    found["warnings"] = [warning.split(":")[0] for warning in made.warnings]
    return found


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="plans are held for JAX 0.12 with libtpu 0.0.52")
@pytest.mark.parametrize("name", PLANS)
def test_the_plan_is_as_it_was(name: str) -> None:
    run = presets.preset(name)
    assert isinstance(run, Run)
    path, libtpu = GOLDEN / f"{name}.json", importlib.metadata.version("libtpu")
    golden = {} if WRITE else json.loads(path.read_text())
    if not WRITE and golden["libtpu"] != libtpu:
        pytest.skip(f"the plans that are held are of libtpu {golden['libtpu']}, and this is {libtpu}")
    found = held(report.plan(run, PLANS[name], documents="4.1k", options=QUICK)) | {"libtpu": libtpu}
    if WRITE:
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")
        return
    for key, margin in MARGINS.items():
        assert found.pop(key) == pytest.approx(golden.pop(key), rel=margin), key
    assert found == golden


def test_docstrings_tell_the_topology_and_the_command() -> None:
    module = importlib.import_module(f"{presets.load_package('configs')}.emu3")
    for name, topology in PLANS.items():
        assert f"mmgpt plan {name} --topology {topology}" in getattr(module, name).__doc__, name
