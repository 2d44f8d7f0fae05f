"""Compiles one attention program for a TPU that is not there, in a process of its own, and reads its kernels' cycles.

libtpu reads `LIBTPU_INIT_ARGS` once, when it loads, and lets one process of a machine compile at a time: each dump
needs a process, and one that meets a locked compiler is started again. That process is `python -m
mmgpt.evaluate.bench_attention_compile CASE PHASE`, with CASE as JSON; it prints the temporary bytes, which the compiler
tells even of a program that does not fit.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import typing
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.core.config import ConfigError
from mmgpt.core.log import console
from mmgpt.evaluate import bench_attention_ours, bench_attention_peers
from mmgpt.evaluate.bench_attention_peers import Case
from mmgpt.plan.attention import Cycles
from mmgpt.plan.chips import INSTALL, LOCKED
from mmgpt.plan.kernel_cycles import TARGETS, Kernel, read_all

TOPOLOGIES = {"v5p": "v5p:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
PROGRAMS = {
    "splash": bench_attention_peers.splash,
    "tokamax": bench_attention_peers.tokamax,
    "ours": bench_attention_ours.ours,
}
NAMES = {
    "splash": ("splash_mha_fwd", "splash_mha_dkv"),
    "tokamax": ("splash_mha_fwd", "splash_mha_dkv"),
    "ours": (bench_attention_ours.FORWARD, bench_attention_ours.BACKWARD),
}
"""What the names of the forward and the backward kernel hold."""
BODIES = {"splash": ("full",), "tokamax": ("full", "edge"), "ours": bench_attention_ours.BODIES}
"""The classes of their bodies, in the order of the program; a class without its own has the last one's."""

Phase = Literal["forward", "backward", "backward alone", "fixed grid", "plan"]
"""A backward pass has the forward pass in it, unless it is alone; all but the first two are ours."""
HBM = re.compile(r"HLO temporaries \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
WAIT_SECONDS, TRY_SECONDS = 600.0, 600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """`temp` bytes, whether they fit in the chip's memory, the dump's kernels, and the `cycles` of making a plan.

    Of rows without islands, and with them.
    """

    temp: int
    fits: bool
    cycles: tuple[int, int]
    kernels: tuple[Kernel, ...]


def compiled(case: Case, phase: Phase, *, cycles: bool = True) -> Compiled:
    """One program compiled by libtpu. ConfigError says what is missing."""
    if case.target not in TOPOLOGIES:
        raise ConfigError(f"--target {case.target}: one of {', '.join(TOPOLOGIES)}, or cpu.")
    with tempfile.TemporaryDirectory(prefix="mmgpt-attention-") as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true" if cycles else ""
        environment = {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what is not compiled is not dumped
        told = _run(case, phase, os.environ | environment)
        kernels = read_all(Path(folder), TARGETS[case.target]) if cycles else ()
    return Compiled(temp=told["temp"], fits=told["fits"], cycles=tuple(told.get("cycles", (0, 0))), kernels=kernels)


def _run(case: Case, phase: Phase, environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, json.dumps(dataclasses.asdict(case)), phase]
    begin = said = time.monotonic()
    while True:
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=TRY_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as e:
            raise ConfigError(
                f"{case}: not compiled in {TRY_SECONDS:.0f} s; try a smaller --block or fewer --heads."
            ) from e
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        if not LOCKED.search(done.stderr):
            raise ConfigError(_reason(case, done.stderr))
        if time.monotonic() - begin > WAIT_SECONDS:
            raise ConfigError("another process has held the TPU compiler for ten minutes; let it end, then retry.")
        if time.monotonic() - said > 30:
            console.print("waiting for another process that compiles for a TPU")
            said = time.monotonic()
        time.sleep(2.0)


def _reason(case: Case, stderr: str) -> str:
    """The last error of a failed compilation, and what helps."""
    lines = [line for line in stderr.splitlines() if re.match(r"^[\w.]*(Error|Exception)\b", line)]
    last = lines[-1].removeprefix("mmgpt.core.config.ConfigError: ") if lines else stderr[-500:]
    if "libtpu" in last.lower() or "topolog" in last.lower():
        return f"no compiler for {case.target} ({last[:300]}); {INSTALL}, of which the documented figures are."
    return f"{case.implementation} does not compile for {case.target}, head dim {case.head_dim}: {last[:700]}"


def cycles_of(case: Case, kernels: tuple[Kernel, ...]) -> dict[str, Cycles]:
    """`forward` and `backward` of a dump, from the kernels whose bodies have most matmuls."""
    found = {}
    for phase, name in zip(("forward", "backward"), NAMES[case.implementation], strict=True):
        mine = [kernel for kernel in kernels if name in kernel.name and kernel.bodies]
        if not mine:
            raise ConfigError(f"{case.implementation}: no kernel {name}* in the dump, but {[k.name for k in kernels]}.")
        kernel = mine[-1]
        most = max(part.cost.matmuls for part in kernel.bodies)
        bodies = [part.cost.sim for part in kernel.bodies if part.cost.matmuls > most / 4]
        names = BODIES[case.implementation]
        if len(bodies) != len(names):
            raise ConfigError(f"{kernel.name}: {len(bodies)} bodies where {names} were expected, in a dump of {case}.")
        by_name = dict(zip(names, bodies, strict=True))
        ours = case.implementation == "ours"
        # The peers' backward kernel keeps dk and dv over all query heads of a key head.
        shared = phase == "backward" and not ours
        found[phase] = Cycles(
            full=by_name["full"],
            edge=by_name.get("edge", bodies[-1]),
            mixed=by_name.get("mixed", bodies[-1]),
            step=kernel.step.sim,
            row=kernel.row * (case.kv_heads / case.heads if shared else 1),
            heads=case.heads // case.kv_heads if ours else 1,  # ours handles all of a key head's in one step
        )
    return found


# --- the process that compiles


def shaped(case: Case, phase: Phase) -> tuple[Any, list[Any]]:
    """The function to lower and the shapes of its arguments."""
    if phase == "plan":
        return bench_attention_ours.planning(case)
    if phase == "backward alone":
        return bench_attention_ours.backward_alone(case)
    if phase == "fixed grid":
        return bench_attention_ours.fixed_grid(case)
    program = PROGRAMS[case.implementation](case)
    shapes = list(program.arguments)
    if phase == "forward":
        return program.call, shapes
    return program.backward, [*shapes, jax.ShapeDtypeStruct(shapes[0].shape, jnp.bfloat16)]


def _compile(case: Case, phase: Phase) -> dict[str, Any]:
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[case.target])
    # An Auto axis: the peers were not written for Explicit ones.
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    function, shapes = shaped(case, phase)  # makes arrays, which must lie on a device that is there
    whole = jax.NamedSharding(mesh, jax.P())
    arguments = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole), shapes)
    with jax.set_mesh(mesh):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
        try:
            made = lowered.compile()
            memory: Any = made.memory_analysis()
        except jax.errors.JaxRuntimeError as e:
            used = HBM.search(str(e))
            if used is None:
                raise
            number, unit = (used[1], used[2]) if used[1] else (used[3], used[4])
            return {"temp": int(float(number) * UNITS[unit]), "fits": False}
    told = {"temp": memory.temp_size_in_bytes, "fits": True}
    if phase != "plan":
        return told
    return told | {"cycles": bench_attention_ours.estimated(made.as_text() or "", case.length // case.block)}


if __name__ == "__main__":
    told = _compile(Case(**json.loads(sys.argv[1])), next(p for p in typing.get_args(Phase) if p == sys.argv[2]))
    sys.stdout.write(json.dumps(told) + "\n")
