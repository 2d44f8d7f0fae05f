"""What a plan knows of a TPU: peak, memory, links, as published, and what its topologies are called."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from typing import Any

import jax

from mmgpt.core.config import ConfigError
from mmgpt.dist.hosts import devices_in_use
from mmgpt.plan.kernel_cycles import TARGETS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device of JAX: a chip, of a v7x one of its two.

    `target` is the name of its cores' schedule (`kernel_cycles.TARGETS`); `memory` bytes of HBM and `bandwidth` of it,
    bytes a second; `link` bytes a second of one ICI link, one way; `network` those of its share of the network between
    slices, and `host` those to and from its host's memory; `dimensions` of the torus; `whole`, devices of a chip.
    """

    target: str
    memory: float
    bandwidth: float
    link: float
    network: float
    host: float
    dimensions: int
    whole: int = 1

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return TARGETS[self.target].clock * 1e9

    @property
    def peak(self) -> float:
        """bfloat16 FLOP/s."""
        return TARGETS[self.target].peak * TARGETS[self.target].cores * 1e12


CHIPS = {
    "v4": Chip(target="v4", memory=32e9, bandwidth=1.23e12, link=45e9, network=6.25e9, host=16e9, dimensions=3),
    "v5e": Chip(target="v5e", memory=16e9, bandwidth=0.82e12, link=45e9, network=3.125e9, host=16e9, dimensions=2),
    "v5p": Chip(target="v5p", memory=95e9, bandwidth=2.46e12, link=90e9, network=6.25e9, host=16e9, dimensions=3),
    "v6e": Chip(target="v6e", memory=32e9, bandwidth=1.64e12, link=90e9, network=12.5e9, host=32e9, dimensions=2),
    "tpu7x": Chip(
        target="v7x", memory=96e9, bandwidth=3.7e12, link=100e9, network=6.25e9, host=16e9, dimensions=3, whole=2
    ),
}
"""Memory, bandwidth and links as published (jax-ml.github.io/scaling-book, docs.cloud.google.com/tpu); of a v7x half a
chip's, and its link is the published 1.2 TB/s over six links in both directions; its network and host are taken to be
a v6e's."""


def chip_of(topology: str) -> Chip:
    """The chip of a topology's name, as "v5p:8x8x4". ConfigError where it is none."""
    kind, _, sides = topology.partition(":")
    numbers = sides.split("x")
    if kind not in CHIPS or not all(n.isdigit() and int(n) > 0 for n in numbers):
        raise ConfigError(
            f"--topology {topology!r}: give a chip and the sides of its torus, as v5p:8x8x4, v5e:16x16 or tpu7x:4x4x4; "
            f"chips are {', '.join(CHIPS)}."
        )
    if len(numbers) != CHIPS[kind].dimensions and not (kind == "v4" and len(numbers) == 3):
        raise ConfigError(
            f"--topology {topology!r}: a {kind} has {CHIPS[kind].dimensions} dimensions, as in "
            f"{kind}:{'x'.join(['4'] * CHIPS[kind].dimensions)}."
        )
    return CHIPS[kind]


def devices(topology: str, slices: int = 1) -> list[Any]:
    """The devices of a topology that is not there; ConfigError where there is no such pod or no compiler for it."""
    from jax.experimental import topologies

    chip_of(topology)
    if slices < 1:
        raise ConfigError(f"--slices is {slices}; it must be at least 1.")
    if (misfit := _misfit()) is not None:
        raise ConfigError(f"no compiler for {topology}: {misfit}")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # What a TPU's machine would say of itself. It changes no topology; without it libtpu complains at length.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing here takes a TPU from another process
    if not devices_in_use():
        jax.config.update("jax_platforms", "cpu")  # libtpu alone makes JAX look for a TPU, which takes minutes
    try:
        options = {} if slices == 1 else {"num_slices": slices}
        return list(topologies.get_topology_desc(topology, platform="tpu", **options).devices)
    except Exception as e:
        raise ConfigError(_reason(topology, str(e)[:300])) from e


INSTALL = "`pip install libtpu==0.0.52` where Python is 3.12 and JAX 0.12"
"""How to get the compiler that figures here are of."""
if jax.__version_info__ < (0, 12):
    INSTALL += "; beside this JAX 0.0.42.1 is the one, whose compiler ends on some programs"


def _misfit() -> str | None:
    """What is wrong with the libtpu that is here, if anything: one of another JAX ends in the middle of a compile."""
    if importlib.util.find_spec("libtpu") is None:
        return f"libtpu is not installed; {INSTALL}."
    have = importlib.metadata.version("libtpu")
    if jax.__version_info__ < (0, 12) and not have.startswith("0.0.42"):
        return f"libtpu {have} is not for JAX {jax.__version__}; {INSTALL}."
    return None


LOCKED = re.compile(r"ABORTED|already in use|lockfile", re.IGNORECASE)
"""What libtpu says where another process holds it."""


def _reason(topology: str, said: str) -> str:
    """Why there is no compiler for a topology, by what was `said` when it was asked for, and what helps."""
    if LOCKED.search(said):
        return f"no compiler for {topology}: another process holds libtpu ({said}). Wait until it has ended."
    if "INVALID_ARGUMENT" in said:
        kind = topology.partition(":")[0]
        sides = "x".join(["4"] * CHIPS[kind].dimensions)
        return (
            f"--topology {topology!r}: libtpu knows no such pod ({said}). Name sides that one has, as {kind}:{sides}."
        )
    return f"no compiler for {topology}: {said}. {INSTALL}."
