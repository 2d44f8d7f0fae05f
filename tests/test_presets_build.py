"""Every shipped run builds at its full size, no field of a config is idle, and none is added in passing.

When a preset changes on purpose, its golden text is written anew with

    MMGPT_WRITE_GOLDEN=1 python -m pytest tests/test_presets_build.py

and the difference is reviewed with the change.
"""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import os
import pkgutil
import textwrap
from pathlib import Path
from typing import Any

import jax
import pytest

import mmgpt
from mmgpt import presets
from mmgpt.core import config
from mmgpt.core.config import Config
from mmgpt.dist.mesh import Mesh
from mmgpt.models.gain_shape_vq import GainShapeVQ
from mmgpt.train import state as states
from mmgpt.train.run import Run, build
from tests import tiny

GOLDEN = Path(__file__).parent / "golden"
FIELDS = 232
"""Fields of all configs in mmgpt, reviewed: a new knob is a decision, not an accident. The test below counts them."""

RUNS = [name for name in presets.names() if isinstance(presets.preset(name), Run)]


def built_in(run: Run, folder: Path) -> Run:
    """The run with tokenizers that are there: a small text model, and the config of the image tokenizer it names."""
    if run.tokens is None:
        return run
    (folder / "text.model").write_bytes(tiny.text().model)
    if run.tokens.codebooks:  # the image tokenizer need not be there
        return run.replace(tokens=run.tokens.replace(text=str(folder / "text.model")))
    named = [presets.preset(n) for n in RUNS if f"{n}".endswith("vision")]
    vision = next(r for r in named if Path(run.tokens.vision).parent.name in r.data.sources[0].path)
    (folder / "vision").mkdir()
    (folder / "vision" / "config.json").write_text(config.to_json(vision))
    assert isinstance(vision.model, GainShapeVQ.Config)
    return run.replace(tokens=run.tokens.replace(text=str(folder / "text.model"), vision=str(folder / "vision")))


def described(run: Run, state: Any) -> str:
    """Parameter counts by part and the config's leaves."""
    lines = []
    for part in ("params", "variables"):
        leaves = jax.tree.leaves_with_path(state[part])
        lines.append(f"{part}: {sum(leaf.size for _, leaf in leaves)} in {len(leaves)} arrays")
        lines += [f"  {jax.tree_util.keystr(p, simple=True, separator='/')} {list(leaf.shape)}" for p, leaf in leaves]
    lines += ["config:", *(f"  {key}: {value!r}" for key, value in config.leaves(run).items())]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", RUNS)
def test_every_run_builds_at_full_size_and_is_as_it_was_reviewed(name: str, tmp_path: Path) -> None:
    run = presets.preset(name)
    assert isinstance(run, Run)
    # One device, as on a laptop; the shapes do not depend on it.
    built = build(built_in(run, tmp_path).replace(mesh=Mesh.Config(fsdp=8, replica=1)))
    with jax.set_mesh(built.mesh):
        state = states.abstract(built.structure, built.optimizer, run.ema is not None)
    text = described(run, state)
    file = GOLDEN / f"{name}.txt"
    if "MMGPT_WRITE_GOLDEN" in os.environ:
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert file.exists(), f"{file} is missing; {__doc__}"
    assert text == file.read_text(), f"{name} differs from {file}; {__doc__}"


def test_golden_texts_are_of_presets() -> None:
    assert {p.stem for p in GOLDEN.glob("*.txt")} == set(RUNS)


def configs() -> list[type[Config]]:
    """Every Config class of the package and of launch/."""
    found: dict[str, type[Config]] = {}
    launch = importlib.import_module(presets.load_package("launch"))  # beside the package, or in it where installed
    beside = pkgutil.iter_modules(launch.__path__, "mmgpt.launch.")
    modules = {info.name: info for info in (*pkgutil.walk_packages(mmgpt.__path__, "mmgpt."), *beside)}
    for info in modules.values():
        if info.name.startswith("mmgpt.configs") or info.name == "mmgpt.__main__":
            continue
        if info.name == "mmgpt.evaluate.lm_eval" and importlib.util.find_spec("lm_eval") is None:
            continue  # it subclasses lm-eval's model, which is an extra
        if info.name == "mmgpt.launch.ray_driver" and importlib.util.find_spec("ray") is None:
            continue
        pending = list(vars(importlib.import_module(info.name)).values())
        while pending:
            item = pending.pop()
            if inspect.isclass(item) and item.__module__ == info.name:
                if issubclass(item, Config) and item is not Config:
                    found[f"{item.__module__}:{item.__qualname__}"] = item
                pending += [
                    v for v in vars(item).values() if inspect.isclass(v) and v not in found.values() and v is not item
                ]
    return [found[name] for name in sorted(found)]


def own_fields(cls: type[Config]) -> set[str]:
    """Fields that the class adds to those it inherits."""
    return {f.name for f in dataclasses.fields(cls)} & set(vars(cls).get("__annotations__", {}))


def test_the_number_of_fields_is_reviewed() -> None:
    counts = {f"{c.__module__}:{c.__qualname__}": len(own_fields(c)) for c in configs()}
    lines = "\n".join(f"  {name} {count}" for name, count in counts.items())
    total = sum(counts.values())
    assert total == FIELDS, f"{total} fields, reviewed were {FIELDS}. If each is needed, write {total} here:\n{lines}"


READERS = {
    "mmgpt.train.run:Run": (
        "mmgpt.train.run",
        "mmgpt.train.loop",
        "mmgpt.train.held_out",
        "mmgpt.train.life",
        "mmgpt.cli",
    ),
    "mmgpt.train.spikes:Spikes.Config": ("mmgpt.train.spikes", "mmgpt.train.rollback"),
    "mmgpt.data.mixture:Change": ("mmgpt.data.loader",),
    "mmgpt.data.loader:RowsConfig": ("mmgpt.train.run",),
    "mmgpt.generate.sampler:Sampling": ("mmgpt.generate.sampler", "mmgpt.generate.decode", "mmgpt.generate.passes"),
    "mmgpt.launch.spec:JobSpec": (
        "mmgpt.launch.spec",
        "mmgpt.launch.command",
        "mmgpt.launch.process",
        "mmgpt.launch.slurm",
    ),
    "mmgpt.launch.ray_jobs:Ray": ("mmgpt.launch.ray_jobs", "mmgpt.launch.ray_driver"),
    "mmgpt.tokens.grammars.grammar:Weights": ("mmgpt.tokens.grammars.raster",),
}
"""Configs that others than their own module read."""


@pytest.mark.parametrize("cls", configs(), ids=lambda c: f"{c.__module__}:{c.__qualname__}")
def test_every_field_is_read_by_its_owner(cls: type[Config]) -> None:
    modules = READERS.get(f"{cls.__module__}:{cls.__qualname__}", (cls.__module__,))
    read = set()
    for module in modules:
        tree = ast.parse(textwrap.dedent(inspect.getsource(importlib.import_module(module))))
        read |= {
            node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        }
    idle = own_fields(cls) - read
    assert not idle, f"{cls.__qualname__} has fields that {', '.join(modules)} never reads: {', '.join(sorted(idle))}."
