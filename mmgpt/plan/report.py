"""What a plan says of a run on a topology: memory, time, utilisation, communication, warnings."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from rich.table import Table

from mmgpt.core.log import console
from mmgpt.data.loader import PackedRows
from mmgpt.models.decoder import Decoder
from mmgpt.plan import useful
from mmgpt.plan.attention import documents as packed
from mmgpt.plan.attention_time import Attention, attention
from mmgpt.plan.chips import Chip, chip_of, devices
from mmgpt.plan.collectives import Torus
from mmgpt.plan.compiled import Compiled, compiled, fitted
from mmgpt.plan.hlo import Instruction, size_of_result
from mmgpt.plan.schedule import Schedule, Told, by_source, exposed_bytes
from mmgpt.train.run import Run

TILE = (8, 128)
"""Rows and columns of a tile of a chip's memory, which a part of a weight should fill."""
LARGE = 1 << 20
"""Bytes from which on a weight is worth spreading over devices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A compiled step and what its schedule tells; `useful` operations of all chips a step."""

    topology: str
    documents: str
    chip: Chip
    compiled: Compiled
    attention: Attention
    told: Told
    useful: float
    warnings: tuple[str, ...]

    @property
    def devices(self) -> int:
        return self.compiled.mesh.size

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        data = self.compiled.run.data
        assert isinstance(data, PackedRows.Config)
        return data.batch_rows * data.row_length

    @property
    def utilisation(self) -> float:
        """Useful operations over the peak's in the time of a step: model-FLOPs utilisation."""
        return self.useful / (self.told.seconds * self.devices * self.chip.peak)

    def numbers(self) -> dict[str, Any]:
        """Everything that is told, as plain numbers and texts."""
        total, waited = exposed_bytes(self.told)
        chips = self.devices // self.chip.whole
        return {
            "topology": self.topology,
            "mesh": dict(self.compiled.mesh.shape),
            "documents": self.documents,
            "step_seconds": self.told.seconds,
            "tokens_a_step": self.tokens,
            "tokens_a_second_and_chip": self.tokens / self.told.seconds / chips,
            "useful_flops_a_step": self.useful,
            "utilisation": self.utilisation,
            "seconds_by_what": dict(self.told.by_what),
            "seconds_by_phase": dict(self.told.by_phase),
            "memory": self.compiled.memory.at_peak(),
            "memory_total": self.compiled.memory.total,
            "memory_share": self.compiled.memory.share,
            "communication_of_layers_bytes": total,
            "communication_of_layers_exposed_share": waited / total if total else 0.0,
            "compile_seconds": self.compiled.seconds,
            "warnings": list(self.warnings),
        }


def plan(
    run: Run, topology: str, *, documents: str = "one", slices: int = 1, options: dict[str, str] | None = None
) -> Plan:
    """Compiles a run's step for a topology and times it; `options` are for the compiler, before those of the chip.

    TooLarge where it does not fit, ConfigError on the rest.
    """
    chip, run = chip_of(topology), fitted(run)
    model, data = run.model, run.data
    assert isinstance(model, Decoder.Config) and isinstance(data, PackedRows.Config)
    packed(data.row_length, documents)  # a kind that is not there is told before minutes of compiling
    found = compiled(run, devices(topology, slices), chip, options)
    shards = dict(found.mesh.shape)
    rows = data.batch_rows // (shards["replica"] * shards["fsdp"] * run.microbatches)
    kernels = attention(model, chip, length=data.row_length, rows=rows, kind=documents, shards=shards)

    made = {i.name: i for computation in found.program.computations.values() for i in computation.values()}

    def seconds(instruction: Instruction) -> float | None:
        if "tpu_custom_call" not in instruction.line:
            return None
        for name, value in (("attention_forward", kernels.forward), ("attention_backward", kernels.backward)):
            if name in instruction.name:
                return value
        if any(name in instruction.name for name in MOVERS):
            moved = [instruction, *(made[name] for name in instruction.operands)]
            return sum(size_of_result(i) for i in moved) / chip.bandwidth
        return None

    torus = Torus(chip, list(found.mesh.devices.flat))
    told = Schedule(found.program, chip, torus, seconds, microbatched=run.microbatches > 1).told()
    flops = useful.of_weights(model, data.batch_rows * data.row_length)
    flops += useful.of_attention(model, kernels.pairs * data.batch_rows)
    return Plan(
        topology=topology,
        documents=documents,
        chip=chip,
        compiled=found,
        attention=kernels,
        told=told,
        useful=flops,
        warnings=tuple(_warnings(found, told, chip)),
    )


OLDER = (
    f"JAX {jax.__version__}: its compiler for TPUs lays some runs out worse and ends on others, and what it writes is "
    "read only in part; plan with Python 3.12, JAX 0.12 or later and libtpu 0.0.52."
    if jax.__version_info__ < (0, 12)
    else None
)
"""What is to be known of plans by this JAX; None where they are as documented."""
MOVERS = ("heads_forward", "heads_backward", "attention_sums", "attention_turn")
"""Kernels that take as long as the memory takes to move what they read and write."""


def _warnings(found: Compiled, told: Told, chip: Chip) -> list[str]:
    said = [] if OLDER is None else [OLDER]
    if found.memory.share > 0.9:
        said.append(f"memory: {found.memory.share:.0%} of a chip's; leave a tenth for what the runtime needs.")
    said += _ill_laid(found)
    for c, times, _ in told.transfers:
        if c.kind == "all-reduce" and "convert_element_type" in c.op_name and c.bytes > 1 << 20:
            said.append(
                f"{c.source or c.op_name}: a gather became an all-reduce of the whole weight ({c.bytes / 1e6:.0f} MB, "
                f"{times:.0f} times), as where its parts over fsdp={found.mesh.shape['fsdp']} are less than a tile: "
                "take a smaller mesh.fsdp, and more of mesh.replica."
            )
    for name, times in told.unknown.items():
        said.append(f"{name}: a kernel whose time is not known ({times} times); it counts as nothing.")
    waited = [(key, value) for key, value in by_source(told).items() if value[2] > 0.01 * told.seconds]
    for key, (_, _, seconds) in waited:
        said.append(f"{key}: waited for, {seconds / told.seconds:.1%} of the step.")
    return list(dict.fromkeys(said))


def _ill_laid(found: Compiled) -> list[str]:
    """Weights that lie whole on all devices, or in parts that waste memory and links, and ids that nothing uses."""
    model, objective, mesh = found.run.model, found.run.objective, found.mesh.shape
    assert isinstance(model, Decoder.Config)
    said = []
    for weight in found.weights:
        matrix = weight.part[-2:]
        gain = weight.name.rpartition("/")[2].split("_")[-1] in ("scale", "bias")  # stacked ones look like matrices
        if gain or len(weight.part) < 2 or weight.bytes < LARGE:
            continue
        if mesh["fsdp"] > 1 and weight.part == weight.shape:
            said.append(f"{weight.name}: {weight.bytes / 1e6:.0f} MB lie whole on every device; no dimension divides.")
        elif any(size < least for size, least in zip(matrix, TILE, strict=True)):
            said.append(
                f"{weight.name}: a device's part is {matrix[0]} x {matrix[1]}, under a tile of {TILE[0]} x {TILE[1]}; "
                "take a smaller mesh.fsdp or mesh.tensor, and more of mesh.replica."
            )
    used = vars(objective).get("vocab", model.vocab) or model.vocab
    if model.vocab - used > 0.03 * model.vocab:
        said.append(
            f"model.vocab {model.vocab} has {model.vocab - used} rows beyond the {used} ids; they cost as much."
        )
    if model.head_dim % TILE[1]:
        said.append(f"model.head_dim {model.head_dim} is padded to a multiple of {TILE[1]} in attention.")
    return said


def shown(made: Plan) -> list[Table]:
    """The plan as tables for a terminal."""
    numbers, chip, memory = made.numbers(), made.chip, made.compiled.memory
    overview = Table("", "", title=f"{made.topology}, mesh {_mesh(made.compiled.mesh.shape)}", show_header=False)
    rows: dict[str, str] = {
        "step": f"{made.told.seconds:.3f} s for {made.tokens:,} tokens",
        "useful operations": f"{made.useful:.3e}, {made.utilisation:.1%} of the peak (static)",
        "tokens a second and chip": f"{numbers['tokens_a_second_and_chip']:,.0f}",
        "memory": f"{memory.total / 1e9:.1f} GB of {chip.memory / 1e9:.0f} ({memory.share:.0%})",
        "communication of layers": f"{numbers['communication_of_layers_bytes'] / 1e9:.1f} GB a chip, "
        f"{numbers['communication_of_layers_exposed_share']:.2%} of it waited for",
        "attention": f"{made.attention.visited} blocks a row and head, of {made.attention.causal} causal ones",
        "compiled in": f"{made.compiled.seconds:.0f} s",
    }
    for name, value in rows.items():
        overview.add_row(name, value)
    tables = [
        overview,
        _parts("time of a step", made.told.by_what, 1e3, "ms"),
        _parts("by phase", made.told.by_phase, 1e3, "ms"),
    ]
    tables.append(_parts("memory at the peak", memory.at_peak(), 1e-9, "GB"))
    transfers = Table(
        "runs", "GB", "waited, ms", "what, and the line that asked for it", title="communication of a chip"
    )
    for key, (runs, size, waited) in sorted(by_source(made.told).items(), key=lambda item: -item[1][1])[:12]:
        transfers.add_row(f"{runs:.0f}", f"{size / 1e9:.2f}", f"{waited * 1e3:.2f}", key)
    return [*tables, transfers]


def _parts(title: str, parts: Mapping[str, float], scale: float, unit: str) -> Table:
    table = Table("", unit, "%", title=title)
    whole = sum(parts.values()) or 1.0
    for name, value in sorted(parts.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{value * scale:,.1f}", f"{100 * value / whole:.1f}")
    return table


def _mesh(shape: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in shape.items() if size > 1) or "one device"


def tell(made: Plan) -> None:
    """Warnings on the console, but for the one that is told before the compile."""
    for warning in made.warnings:
        if warning == OLDER:
            continue
        console.print(f"warning: {warning}", style="yellow")
