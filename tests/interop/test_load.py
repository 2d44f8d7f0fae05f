"""Loading: every device gets its part, of stacks and padded rows too, and little memory is taken besides the arrays."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from mmgpt.dist.mesh import Mesh
from mmgpt.interop import load as loading
from mmgpt.interop.load import load
from mmgpt.interop.names import decoder_entries
from mmgpt.interop.safetensors_folder import SafetensorsFolder
from mmgpt.models.decoder import Decoder
from mmgpt.train import state as states
from mmgpt.train.state import Structure
from tests.interop import peak

MODEL = Decoder.Config(vocab=256, layers=2, embed=64, mlp=96, heads=4, kv_heads=2, head_dim=16, qk_norm="layer")
ROWS = 131
MESHES = {8: [{"fsdp": 8}, {"fsdp": 2, "tensor": 2, "context": 2}, {"replica": 4, "tensor": 2}], 2: [{"tensor": 2}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("hf")
    tensors = {e.hf_name: rng.standard_normal(e.hf_shape).astype(np.float32) for e in decoder_entries(MODEL, ROWS)}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(jnp.bfloat16)
    save_file(tensors, path / "model.safetensors")
    return path


def loaded(folder: Path, devices: int, **mesh: int) -> dict:
    with jax.set_mesh(Mesh.Config(**{"fsdp": 1} | mesh).build(jax.devices()[:devices])):
        abstract = states.weights(Structure(MODEL.build, seed=0))
    found = load(decoder_entries(MODEL, ROWS), SafetensorsFolder(folder), abstract)
    for array, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(abstract), strict=True):
        assert array.sharding == wanted.sharding and array.dtype == wanted.dtype
    return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize(("block", "devices"), [(1 << 30, 8), (4000, 2)], ids=["whole", "in blocks"])
def test_every_device_gets_its_part(block: int, devices: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "BLOCK", block)
    source, params = SafetensorsFolder(folder), loaded(folder, 1)["params"]
    np.testing.assert_array_equal(params["embedding"][:ROWS], source.read("model.embed_tokens.weight"))
    np.testing.assert_array_equal(params["head"][:, :ROWS], source.read("lm_head.weight").T)
    assert not params["embedding"][ROWS:].any() and not params["head"][:, ROWS:].any()
    attention = params["stack"]["stacked"]["attention"]
    for layer in range(MODEL.layers):
        prefix = f"model.layers.{layer}.self_attn"
        q = source.read(f"{prefix}.q_proj.weight")
        np.testing.assert_array_equal(attention["q"][layer].reshape(64, -1), q.T)
        np.testing.assert_array_equal(attention["out"][layer].reshape(-1, 64), source.read(f"{prefix}.o_proj.weight").T)
        np.testing.assert_array_equal(attention["k_norm"]["bias"][layer], source.read(f"{prefix}.k_norm.bias"))
    for mesh in MESHES[devices]:
        jax.tree.map(np.testing.assert_array_equal, loaded(folder, devices, **mesh)["params"], params)


@pytest.mark.parametrize("devices", [1, 2])
def test_memory_stays_below_the_arrays_and_half_again_the_largest_tensor(devices: int, tmp_path: Path) -> None:
    """128 MiB a tensor in float32, 64 MiB in the file: the files' own pages count, if they are kept."""
    rng = np.random.default_rng(0)
    tensors = {e.hf_name: rng.standard_normal(e.hf_shape, np.float32).astype(jnp.bfloat16) for e in peak.entries()}
    save_file(tensors, tmp_path / "model.safetensors")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-m", "tests.interop.peak", str(tmp_path), str(devices)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1.5
