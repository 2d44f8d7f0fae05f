"""The Pallas kernels compile for every TPU and GPU that the project names, at the shapes of every shipped config."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmgpt import presets
from mmgpt.models.decoder import Decoder
from mmgpt.train.run import Run
from tests.kernels.attention.hopper import GPU_SHAPES
from tests.kernels.attention.mosaic import SHAPES, TOPOLOGIES

PLUGINS = [name for name in ("jax_cuda12_plugin", "jax_cuda13_plugin") if importlib.util.find_spec(name)]


def compiled(module: str, *arguments: str, shapes: int) -> str:
    """What a process that compiles says, once all its shapes compiled."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.attention.{module}", *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "FAILED" not in done.stdout, done.stdout[-4000:]
    assert done.stdout.count("compiled in") == shapes
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, which is for Python 3.11 here")
@pytest.mark.parametrize("target", TOPOLOGIES)
def test_the_kernels_compile(target: str) -> None:
    said = compiled("mosaic", target, shapes=len(SHAPES))
    if target == "v5p":  # k and v forward; k, v and their gradients backward: all on their way behind the work
        assert "ring: [(2, 2), (4, 4)]" in said, said[-4000:]


@pytest.mark.slow
@pytest.mark.skipif(not PLUGINS, reason="needs a CUDA plugin of JAX: pip install mmgpt[gpu]")
def test_the_kernels_compile_for_an_h100() -> None:
    compiled("hopper", shapes=len(GPU_SHAPES))


def test_every_shipped_decoder_is_among_the_shapes() -> None:
    # A block holds the query heads of one key head: how many key heads there are is the grid's alone.
    compiled = {(shape.heads // shape.kv_heads, shape.head_dim) for shape in SHAPES}
    found = 0
    for name in presets.names():
        run = presets.preset(name)
        if isinstance(run, Run) and isinstance(run.model, Decoder.Config):
            model = run.model
            wanted = (model.heads // model.kv_heads, model.head_dim)
            assert wanted in compiled, f"{name}: add its shape {wanted} to tests/kernels/attention/mosaic.py"
            found += 1
    assert found >= 4
