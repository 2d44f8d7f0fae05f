"""`mmgpt bench attention`: our kernels beside splash and tokamax over packed documents, on TPUs that are not there."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import jax

from mmgpt.core.config import ConfigError
from mmgpt.core.log import check_writable, console, show, table, write_json
from mmgpt.evaluate.bench_attention_compile import TOPOLOGIES, compiled, cycles_of
from mmgpt.evaluate.bench_attention_ours import BACKWARD, cores, side
from mmgpt.evaluate.bench_attention_peers import Case
from mmgpt.evaluate.plan_picture import picture_of
from mmgpt.kernels.attention.plan import Blocks
from mmgpt.plan import attention as project
from mmgpt.plan.attention import MIXES, Cycles, Visits, projected
from mmgpt.plan.kernel_cycles import TARGETS, Chip

LONG = 131_072
BLOCK = 1024
"""Of the peers, and of a picture."""
PHASES = ("forward", "backward")
GIGABYTE = 1e9
DEVICES = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*")


def bench_attention(
    target: str = "v5p",
    head_dim: int = 128,
    heads: int = 32,
    kv_heads: int = 8,
    block: int | None = None,
    bound: float | None = None,
    tokamax: bool = True,
    picture: Path | None = None,
    picture_mix: str = "131k: lognormal",
    json: Path | None = None,
) -> None:
    """Compiles attention for a TPU ahead of time and tells the cycles of a block, and of whole rows of documents.

    Where there is an accelerator, and with `--target cpu`, the time of each implementation is measured instead; on CPUs
    of two heads over one of 64 numbers, whatever the flags say.

    Args:
        target: v5p, v5e, v6e or v7x, which libtpu compiles for on any machine; cpu.
        head_dim: of the heads.
        heads: query heads.
        kv_heads: heads of keys and values.
        block: queries and keys of a block; by default 1,024 for the peers, and for ours what fits each row.
        bound: promise that no logit passes it, so that kernels which take one need no running maximum.
        tokamax: compare with tokamax too, which the extra `bench` installs on Python 3.12.
        picture: write the plan of one mix as a PNG, and do nothing else.
        picture_mix: tokens and documents, as '8k: 1-2k', '32k: 4.1k', '131k: lognormal', '131k: one document'.
        json: write the figures.
    """
    _check(target, head_dim, heads, kv_heads, block, bound)
    if picture_mix not in MIXES:
        raise ConfigError(f"--picture-mix {picture_mix!r}: one of {', '.join(map(repr, MIXES))}.")
    if picture is not None and picture.suffix != ".png":
        raise ConfigError(f"--picture {picture}: its name must end in .png.")
    if picture is not None and json is not None:
        raise ConfigError("--picture writes the picture and no figures; run again for --json.")
    check_writable(picture, json)
    if picture is not None:
        return _picture(picture_mix, block or BLOCK, picture)
    if target == "cpu" or _accelerated():
        from mmgpt.evaluate.bench_attention_time import timed

        figures = timed(heads=heads, kv_heads=kv_heads, head_dim=head_dim, block=block, bound=bound)
        show(table(f"attention, {jax.default_backend()}", figures))
    else:
        names = ["splash", *_tokamax(tokamax), "ours"]
        case = Case(
            implementation="splash",
            target=target,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            block=block or BLOCK,
            bound=bound,
        )
        figures = static(case, names, {length: block or side(case, length) for length, _ in MIXES.values()})
    if json is not None:
        write_json(json, figures)


def _tokamax(wanted: bool) -> list[str]:
    if wanted and importlib.util.find_spec("tokamax") is None:
        console.print("without tokamax, which is not here: `pip install 'mmgpt[bench]'` on Python 3.12")
        return []
    return ["tokamax"] if wanted else []


def _check(target: str, head_dim: int, heads: int, kv_heads: int, block: int | None, bound: float | None) -> None:
    if target not in (*TOPOLOGIES, "cpu"):
        raise ConfigError(f"--target {target}: one of {', '.join(TOPOLOGIES)}, or cpu.")
    if not 8 <= head_dim <= 256 or head_dim % 8:
        raise ConfigError(f"--head-dim {head_dim}: a multiple of 8 up to 256.")
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ConfigError(f"--heads {heads} must be a multiple of --kv-heads {kv_heads}, and both at least 1.")
    if block is not None and (block % 128 or not 128 <= block <= 2048):
        raise ConfigError(f"--block {block}: a multiple of 128 up to 2,048.")
    if bound is not None and not 0.0 < bound < float("inf"):
        raise ConfigError(f"--bound {bound}: what no logit passes, a number above 0.")


def _accelerated() -> bool:
    """Whether there is a TPU or GPU. JAX is not asked where no device file speaks for one: it would load libtpu, and
    then hold the lock for which the processes that compile wait."""
    if not any(found for pattern in DEVICES for found in Path("/dev").glob(pattern)):
        jax.config.update("jax_platforms", "cpu")
    return jax.default_backend() != "cpu"


def _picture(mix: str, block: int, path: Path) -> None:
    picture_of(project.documents(*MIXES[mix]), Blocks(block, block), mix, path)
    console.print(f"wrote {path}")


def static(case: Case, names: list[str], sides: dict[int, int]) -> dict[str, Any]:
    """Cycles of each implementation's parts, projections for all mixes, and the memory of a long row.

    `sides` of our blocks by the length of a row.
    """
    chip, memory = TARGETS[case.target], {}
    cycles: dict[tuple[str, int], dict[str, Cycles]] = {}
    for name in names:
        console.print(f"compiling {name} for {case.target}, head dim {case.head_dim}")
        for block in sorted(set(sides.values())) if name == "ours" else [case.block]:
            one = dataclasses.replace(case, implementation=name, block=block)
            cycles[name, block] = cycles_of(one, compiled(one, "backward").kernels)
        mine = dataclasses.replace(case, implementation=name, block=sides[LONG] if name == "ours" else case.block)
        console.print(f"compiling {name}: memory of {LONG} tokens")
        try:
            long = compiled(dataclasses.replace(mine, length=LONG), "backward", cycles=False)
        except ConfigError as e:
            if name == "ours":
                raise
            console.print(str(e))  # a peer that cannot be compiled for long rows is still one for short ones
            memory[name] = {"fits": False}
            continue
        memory[name] = {"forward and backward, temporary GB": round(long.temp / GIGABYTE, 2), "fits": long.fits}
    if "ours" in names:
        memory["ours"] |= _of_ours(dataclasses.replace(case, implementation="ours", length=LONG, block=sides[LONG]))
    per_block = {
        f"{name}, {block} x {block}, {phase}": _parts(found[phase], phase, case.head_dim, block, chip)
        for (name, block), found in cycles.items()
        for phase in PHASES
    }
    show(table(f"cycles of a block, {case.target}, head dim {case.head_dim}", per_block))
    projections = {}
    for sequences in (1, 2):
        rows = {}
        for mix, (length, _) in MIXES.items():
            mine = {name: c for (name, block), c in cycles.items() if name != "ours" or block == sides[length]}
            rows[mix] = _mix(mix, mine, case, sides[length], sequences)
        projections[f"{sequences} a chip"] = rows
        show(table(f"forward and backward, {sequences} row{'s' * (sequences > 1)} a chip, million cycles", rows))
    show(table(f"memory of one row of {LONG} tokens", memory))
    return {"blocks": per_block, "projections": projections, "memory": memory}


def _of_ours(case: Case) -> dict[str, float]:
    """Cores that one row keeps busy, memory of its backward pass alone and of its plan, the plan's scalars and time."""
    alone, plan = (compiled(case, phase, cycles=False) for phase in ("backward alone", "plan"))
    short = dataclasses.replace(case, length=8 * case.block)
    kernels = compiled(short, "fixed grid").kernels
    side = case.length // case.block
    return {
        "cores at work backward": round(cores(short, next(k for k in kernels if BACKWARD in k.name)), 2),
        "backward alone, temporary GB": round(alone.temp / GIGABYTE, 2),
        "plan, temporary MB": round(plan.temp / 1e6, 1),
        "plan, scalar KB": round(4 * (side * side + 2 * side) / 1024, 1),  # the list, bases and first keys
        "plan, million cycles": round(plan.cycles[0] / 1e6, 1),
        "with islands": round(plan.cycles[1] / 1e6, 1),
    }


def _parts(c: Cycles, phase: str, head_dim: int, block: int, chip: Chip) -> dict[str, float]:
    """Parts in cycles, and the share of the peak that a full block's useful work is of its body."""
    matmuls = {"forward": 2, "backward": 5}[phase]
    flops = 2.0 * matmuls * block**2 * head_dim * c.heads
    named = {"full": c.full, "edge": c.edge, "mixed": c.mixed, "step": c.step, "row": c.row}
    return {name: round(value) for name, value in named.items()} | {
        "% of a core's peak": round(100 * flops / (c.full * chip.flops_per_cycle), 1)
    }


def _mix(mix: str, cycles: dict[str, dict[str, Cycles]], case: Case, side: int, sequences: int) -> dict[str, float]:
    """Our blocks of `side` and those of the causal half, million cycles of each implementation, useful work against the
    chip's peak, and ratios to ours."""
    chip = TARGETS[case.target]
    length, kind = MIXES[mix]
    document = project.documents(length, kind)
    ours = project.visits(project.planned(document, Blocks(side, side)))
    every = project.causal(length, case.block)
    made = project.planned(document, Blocks(case.block, case.block))
    overlapping = project.by_segments(made)
    seen: dict[str, dict[str, Visits]] = {
        "ours": ours,
        "splash": dict.fromkeys(PHASES, every),
        "tokamax": dict.fromkeys(PHASES, overlapping),
    }
    useful = project.useful_flops(document, heads=case.heads, head_dim=case.head_dim, sequences=sequences)
    causal = project.causal(length, side)
    line: dict[str, float] = {"our blocks": side, "causal": causal.blocks, "visited": ours["forward"].blocks}
    total = {}
    for name, passes in cycles.items():
        total[name] = 0.0
        for phase in PHASES:
            # The peers' backward kernels accumulate over all heads in order: only a vmapped axis spreads over cores.
            units = sequences if phase == "backward" and name != "ours" else sequences * case.kv_heads
            total[name] += projected(
                seen[name][phase],
                passes[phase],
                heads=case.heads,
                sequences=sequences,
                cores=chip.cores,
                units=units,
            )
        line[name] = round(total[name] / 1e6, 2)
        line[f"{name}, useful %"] = round(100 * useful / (total[name] * chip.cores * chip.flops_per_cycle), 1)
    if "ours" in total:
        line |= {f"{name} / ours": round(total[name] / total["ours"], 2) for name in total if name != "ours"}
    return line
