"""Which mesh, number of microbatches and remat policy a run should have on a topology.

All that divide are ranked by an estimate from sizes alone, which takes no compiler; the most promising are compiled and
timed by their schedules, as `mmgpt plan` does for one.

The estimate: products at `PRODUCTS` of the peak, with what a policy recomputes; what is no product by the bytes it
moves; attention by its schedules; transfers by bytes and links, of which those of weights hide behind the layer and
those of activations (tensor, context) do not.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mmgpt.core.config import ConfigError
from mmgpt.data.loader import PackedRows
from mmgpt.dist.axes import ShardingError
from mmgpt.dist.mesh import Mesh
from mmgpt.models.decoder import Decoder
from mmgpt.nn.stack import Remat
from mmgpt.objectives.next_token import NextToken
from mmgpt.plan import useful
from mmgpt.plan.attention_time import attention
from mmgpt.plan.chips import Chip
from mmgpt.plan.collectives import Torus
from mmgpt.train import state as states
from mmgpt.train.run import Run
from mmgpt.train.state import Structure

PRODUCTS = 0.93
"""Of the peak, what products reach that are as large as a model's."""
MOVED = 40
"""Numbers read and written for each of the residual stream's in a layer, forward and backward, outside products."""
POLICIES: tuple[Remat, ...] = ("matmuls", "projections", "attention", "full", "offload")
DISTURBED = 0.02
"""Of the time of transfers that hide, what they cost the work beside them."""
HOST = 128 * 2**30
"""Bytes of its host's memory that a chip's program may take, by the compiler."""
FULLEST = 0.95
"""Share of a chip's memory that an estimate may fill; the compiler has the last word."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A run with a mesh, microbatches and a policy, and what is guessed of it: seconds of a step, bytes on a chip."""

    run: Run
    sizes: tuple[int, ...]
    seconds: float
    memory: float


def candidates(run: Run, devices: Sequence[Any], chip: Chip, *, documents: str, slices: int = 1) -> list[Candidate]:
    """All that could fit, fastest first. ConfigError where nothing does."""
    per_parameter = _state_bytes(run)
    found = []
    for sizes in _meshes(run, len(devices), slices):
        mesh = Mesh.Config(**dict(zip(("replica", "fsdp", "context", "tensor"), sizes, strict=True)))
        try:
            built = mesh.build(devices)
        except ShardingError:
            continue
        links = _links(built, chip)
        for microbatches, policy in itertools.product(_microbatches(run, sizes), POLICIES):
            tried = run.replace(mesh=mesh, microbatches=microbatches, model=run.model.replace(remat=policy))
            made = _guess(tried, sizes, links, chip, documents, per_parameter)
            if made.memory <= FULLEST * chip.memory:
                found.append(made)
    if not found:
        raise ConfigError(
            f"no mesh, number of microbatches and remat policy makes this run fit {len(devices)} devices; take a "
            "larger topology, or give fewer --data.batch-rows a device."
        )
    return sorted(found, key=lambda c: c.seconds)


def promising(ranked: Sequence[Candidate]) -> Iterator[Candidate]:
    """The candidates in the order to compile them: the best of each mesh in turn, then the second best of each."""
    by_mesh: dict[tuple[int, ...], list[Candidate]] = {}
    for candidate in ranked:
        by_mesh.setdefault(candidate.sizes, []).append(candidate)
    for same_rank in itertools.zip_longest(*by_mesh.values()):
        yield from sorted((c for c in same_rank if c is not None), key=lambda c: c.seconds)


def _state_bytes(run: Run) -> float:
    """Bytes for each parameter that lie on the chips through a step: itself, moments, average, gradient."""
    with jax.set_mesh(Mesh.Config().build(jax.devices("cpu")[:1])):
        structure, optimizer = Structure(run.objective.trained(run.model), run.seed), run.optimizer.build(run.steps)
        state = states.abstract(structure, optimizer, run.ema is not None)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state["params"]))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) / count + 4


def _meshes(run: Run, count: int, slices: int) -> Iterator[tuple[int, int, int, int]]:
    """Sizes of the axes that divide what they split."""
    model, data = run.model, run.data
    assert isinstance(model, Decoder.Config) and isinstance(data, PackedRows.Config)
    for tensor, context, fsdp in itertools.product(_powers(count), repeat=3):
        replica, rest = divmod(count, tensor * context * fsdp)
        if rest or replica < 1 or replica % slices:
            continue
        split = (model.heads, model.kv_heads, model.mlp, model.vocab)
        whole_blocks = context == 1 or data.row_length % (256 * context) == 0
        if all(n % tensor == 0 for n in split) and whole_blocks and data.batch_rows % (replica * fsdp) == 0:
            yield replica, fsdp, context, tensor


def _powers(count: int) -> list[int]:
    return [n for n in (2**i for i in range(count.bit_length())) if count % n == 0]


def _microbatches(run: Run, sizes: tuple[int, ...]) -> list[int]:
    rows = vars(run.data)["batch_rows"] // (sizes[0] * sizes[1])
    return [n for n in range(1, min(rows, 16) + 1) if rows % n == 0]


def _links(mesh: jax.sharding.Mesh, chip: Chip) -> dict[str, int]:
    """Links of the torus that carry a ring along each axis of a mesh."""
    torus, numbers = Torus(chip, list(mesh.devices.flat)), np.arange(mesh.size).reshape(mesh.devices.shape)
    found = {}
    for i, name in enumerate(mesh.axis_names):
        first = tuple(slice(None) if j == i else 0 for j in range(numbers.ndim))
        found[name] = torus.links([int(n) for n in numbers[first]])
    return found


def _guess(
    run: Run,
    sizes: tuple[int, ...],
    links: dict[str, int],
    chip: Chip,
    documents: str,
    per_parameter: float,
) -> Candidate:
    replica, fsdp, context, tensor = sizes
    model, data = run.model, run.data
    assert isinstance(model, Decoder.Config) and isinstance(data, PackedRows.Config)
    assert isinstance(run.objective, NextToken.Config)
    T, n = data.row_length, run.microbatches
    rows = data.batch_rows // (replica * fsdp * n)  # of a microbatch, on the devices that share them
    tokens = rows * T / context
    D, F, H, G = model.embed, model.mlp, model.heads * model.head_dim, model.kv_heads * model.head_dim
    shards = {"replica": replica, "fsdp": fsdp, "context": context, "tensor": tensor}
    kernels = attention(model, chip, length=T, rows=rows, kind=documents, shards=shards)
    layer = D * 2 * (H + G) + 3 * D * F
    parameters = useful.weights(model) + (0 if model.tied else D * model.vocab)

    again = {"matmuls": 0, "projections": 2 * D * F, "attention": layer - D * F, "full": layer - D * F}
    products = (6 * useful.weights(model) + 2 * model.layers * again.get(model.remat, layer - D * F)) * tokens / tensor
    dense = products / (PRODUCTS * chip.peak) + model.layers * tokens * D * MOVED * 2 / chip.bandwidth
    scores = model.layers * (kernels.backward + kernels.forward * (2 if model.remat == "full" else 1))

    def over(axis: str, size: float) -> float:
        """Seconds to gather `size` bytes along an axis, or to add them up there."""
        return size * (shards[axis] - 1) / shards[axis] / (chip.link * links[axis])

    weights = 3 * over("fsdp", 2 * layer / tensor) + 2 * over("replica", 4 * layer / tensor / fsdp) / n
    activations = (8 * over("tensor", 2 * tokens * D) + 4 * over("context", 4 * rows * T * G / tensor)) * model.layers
    hidden = (dense + scores) / model.layers
    exposed = max(0.0, weights - hidden) + DISTURBED * weights
    seconds = n * (dense + scores + activations + model.layers * exposed)
    return Candidate(
        run=run, sizes=sizes, seconds=seconds, memory=_memory(run, tokens, fsdp * tensor, per_parameter, parameters)
    )


def _memory(run: Run, tokens: float, ways: int, per_parameter: float, parameters: float) -> float:
    """Bytes on a chip: the state, what the policy keeps, one layer at work, the loss."""
    model, objective = run.model, run.objective
    assert isinstance(model, Decoder.Config) and isinstance(objective, NextToken.Config)
    tensor = run.mesh.tensor
    D, F, H, G = model.embed, model.mlp, model.heads * model.head_dim, model.kv_heads * model.head_dim
    kept = {"full": D, "attention": D + H / tensor, "offload": 0}
    kept["projections"] = kept["attention"] + D + (H + 2 * G) / tensor
    kept["matmuls"] = kept["projections"] + 2 * F / tensor
    if model.remat == "offload" and 2 * tokens * model.layers * kept["attention"] > HOST:
        return math.inf
    working = 8 * D + 6 * F / tensor + 4 * (H + G) / tensor
    layer = (D * 2 * (H + G) + 3 * D * F) / tensor
    loss = D * model.vocab / tensor * (4 + 2) + min(objective.chunk_bytes, 4 * tokens * model.vocab / tensor) * 2
    held = per_parameter * parameters / ways + 2 * layer * 2
    return held + 2 * tokens * model.layers * kept.get(model.remat, 0) + max(2 * tokens * working, loss)
