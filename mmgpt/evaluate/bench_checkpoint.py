"""`mmgpt bench checkpoint`: saving and loading beside Orbax as it comes, on the same arrays, taking turns."""

import contextlib
import ctypes
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from mmgpt.core.config import ConfigError
from mmgpt.core.log import check_writable, progress, show, table, write_json
from mmgpt.dist import axes as rules
from mmgpt.dist.mesh import Mesh
from mmgpt.train.checkpoint import Checkpoints

LAYERS = 12
DEVICES = 8
State = dict[str, Any]
Figures = dict[str, list[float]]


def bench_checkpoint(
    folder: Path | None = None,
    gigabytes: float = 1.0,
    repeats: int = 5,
    interval: float = 60.0,
    json: Path | None = None,
) -> None:
    """Times saves and loads of a training state: ours with all hashes, Orbax's with its default options.

    Args:
        folder: where to write, and what is measured with it; by default where temporary files go.
        gigabytes: size of the state: float32 parameters and two moments, over 8 devices.
        repeats: turns; the figures are medians.
        interval: seconds between saves, of which a save holds up a share.
        json: write the figures.
    """
    if not (0 < gigabytes < math.inf and 0 < interval < math.inf) or repeats < 1:
        raise ConfigError("--gigabytes and --interval must be above 0, and --repeats at least 1.")
    check_writable(json)
    Mesh.Config(cpu_devices=DEVICES).split_cpu()
    if jax.device_count() < DEVICES:
        raise ConfigError(f"there are {jax.device_count()} devices; moving between meshes needs {DEVICES}.")
    meshes = [Mesh.Config(fsdp=fsdp, tensor=DEVICES // fsdp).build(jax.devices()[:DEVICES]) for fsdp in (4, 2)]
    width = max(8, 8 * round(math.sqrt(gigabytes * 1e9 / (3 * 12 * 4 * LAYERS)) / 8))
    with tempfile.TemporaryDirectory(prefix="mmgpt-bench-", dir=folder) as place:
        figures = _measure(Path(place), meshes, width, repeats)
    show(table(f"{place}", {name: {"value": value} for name, value in _told(figures, width, interval).items()}))
    if json is not None:
        write_json(json, _told(figures, width, interval))


def _measure(place: Path, meshes: list[jax.sharding.Mesh], width: int, repeats: int) -> Figures:
    state = _drawn(meshes[0], width)
    wanted = {"same mesh": _abstract(meshes[0], width), "other mesh": _abstract(meshes[1], width)}
    settings = Checkpoints.Config(local=str(place / "local"), local_every=1)
    figures: Figures = {}

    def timed(name: str, action: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        done = jax.block_until_ready(action())
        figures.setdefault(name, []).append(time.perf_counter() - begin)
        return done

    for turn in progress(range(repeats + 1), label="turns"):  # of which the first warms up
        step, peer = turn + 1, place / f"orbax-{turn}"
        with settings.build(place / "run" / "checkpoints") as ours:
            os.sync()
            response = timed("orbax: blocks", lambda peer=peer: ocp.save_async(str(peer), state))
            timed("orbax: rest", response.result)
            os.sync()
            timed("ours: blocks", lambda step=step: ours.save(step, state, 0, {}))
            timed("ours: rest", ours.wait)
            for mesh, abstract in list(wanted.items())[
                :: 1 if turn % 2 else -1
            ]:  # neither always has the warmer memory
                timed(f"orbax: load, {mesh}", lambda peer=peer, abstract=abstract: ocp.load(str(peer), abstract))
                timed(f"ours: load, {mesh}", lambda abstract=abstract: _state(ours, abstract))
            os.sync()
            timed("local: blocks", lambda step=step: ours.save_local(step, state, 0, {}))
            timed("local: rest", ours.wait)
            loaded = timed("local: load, same mesh", lambda: _state(ours, wanted["same mesh"]))
        if not jax.tree.all(jax.tree.map(np.array_equal, loaded, state)):
            raise AssertionError("what was loaded is not what was saved")
        for old in (peer, *place.glob(f"run/checkpoints/{step - 1}"), *place.glob(f"local/*/*/{step - 1}")):
            shutil.rmtree(old)  # here, where no time is taken
        del loaded
        with contextlib.suppress(AttributeError):  # glibc alone keeps what loads have freed: soon ten times the state
            ctypes.CDLL(None).malloc_trim(0)
    return {name: seconds[1:] for name, seconds in figures.items()}


def _told(figures: Figures, width: int, interval: float) -> dict[str, float]:
    seconds = {name: float(np.median(values)) for name, values in figures.items()}
    saved = {
        who: float(np.median(np.add(figures[f"{who}: blocks"], figures[f"{who}: rest"])))
        for who in ("orbax", "ours", "local")
    }
    size = 3 * 4 * LAYERS * 12 * width**2 / 1e9
    told = {"gigabytes": size}
    told |= {f"seconds/{name}": value for name, value in seconds.items() if "rest" not in name}
    told |= {f"seconds/{who}: save": value for who, value in saved.items()}
    told |= {f"gigabytes a second/{who}: save": size / value for who, value in saved.items()}
    told["share of the interval that a save blocks"] = seconds["ours: blocks"] / interval
    told["times faster than orbax/save"] = saved["orbax"] / saved["ours"]
    told["times faster than orbax/local save"] = saved["orbax"] / saved["local"]
    told["times longer/other mesh than same"] = seconds["ours: load, other mesh"] / seconds["ours: load, same mesh"]
    told["times longer/other mesh than orbax, same"] = (
        seconds["ours: load, other mesh"] / seconds["orbax: load, same mesh"]
    )
    return {name: round(value, 5) for name, value in told.items()}


def _state(checkpoints: Checkpoints, abstract: State) -> State:
    restored = checkpoints.restore(abstract)
    assert restored is not None
    return restored.state


def _abstract(mesh: jax.sharding.Mesh, width: int) -> State:
    """Parameters and moments of LAYERS layers."""
    shapes = {
        "attention": ("layers embed heads", (LAYERS, width, 4 * width)),
        "up": ("layers embed mlp", (LAYERS, width, 4 * width)),
        "down": ("layers mlp embed", (LAYERS, 4 * width, width)),
    }
    with jax.set_mesh(mesh):
        leaves = {
            name: jax.ShapeDtypeStruct(
                shape, jnp.float32, sharding=jax.NamedSharding(mesh, rules.stored(logical, shape, name))
            )
            for name, (logical, shape) in shapes.items()
        }
    return {part: dict(leaves) for part in ("params", "mu", "nu")}


def _drawn(mesh: jax.sharding.Mesh, width: int) -> State:
    """Numbers as noisy as those of a model, which do not compress."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(rng.standard_normal(leaf.shape, np.float32), leaf.sharding)

    return jax.block_until_ready(jax.tree.map(draw, _abstract(mesh, width)))
