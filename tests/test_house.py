"""The house holds its rules (`tests/house.py`), and each rule still finds what it forbids."""

import subprocess
from pathlib import Path

import pytest

from tests.house import (
    NNX_TRANSFORMS,
    Rule,
    config_defaults,
    docstrings,
    file_names,
    floors,
    forbidden,
    places,
    sharding,
    sizes,
    transforms,
)

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("mmgpt", "configs", "launch")


def files(*roots: str) -> list[str]:
    """Python files below the given folders of the repository, as relative paths."""
    return [p.relative_to(ROOT).as_posix() for r in roots for p in sorted((ROOT / r).rglob("*.py"))]


def tracked() -> list[str]:
    """What git tracks or would track; every file of a source tree without git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return [f for f in done.stdout.splitlines() if (ROOT / f).is_file()]
    return files(*SOURCES, "tests")


RULES: dict[Rule, tuple[str, ...]] = {
    floors: SOURCES,
    forbidden: SOURCES,
    transforms: SOURCES,
    sharding: SOURCES,
    config_defaults: SOURCES,
    docstrings: (*SOURCES, "tests"),
    sizes: (*SOURCES, "tests"),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    faults = [fault for path in files(*RULES[rule]) for fault in rule(path, (ROOT / path).read_text(encoding="utf-8"))]
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize("rule", [file_names, places], ids=lambda rule: rule.__name__)
def test_rule_holds_in_every_tracked_file(rule: Rule) -> None:
    faults = []
    for path in tracked():
        content = (ROOT / path).read_bytes()
        if b"\0" not in content[:8192]:
            faults += rule(path, content.decode("utf-8", errors="replace"))
    assert not faults, "\n" + "\n".join(faults)


# --- each rule can fail

LONG_FILE = "x = 1\n" * 401


def long_function(lines: int) -> str:
    return '"""m"""\ndef f():\n' + "    x = 1\n" * (lines - 1)


BROKEN: list[tuple[Rule, str, str]] = [
    (floors, "mmgpt/core/a.py", "from mmgpt.nn.layers import Linear"),
    (floors, "mmgpt/core/a.py", "import mmgpt.train.loop"),
    (floors, "mmgpt/core/a.py", "def f():\n    from mmgpt import nn"),
    (floors, "mmgpt/core/a.py", "from ..nn import layers"),
    (floors, "mmgpt/train/a.py", "from mmgpt.generate.sample import generate"),
    (floors, "mmgpt/data/a.py", "from mmgpt.kernels.attention.api import attention"),
    (floors, "mmgpt/plan/a.py", "from mmgpt.cli import main"),
    (floors, "mmgpt/plan/a.py", "from mmgpt.generate.sample import generate"),
    (floors, "mmgpt/attic/a.py", "x = 1"),
    (floors, "configs/a.py", "from mmgpt.cli import main"),
    (floors, "configs/a.py", "from mmgpt import presets"),
    (floors, "mmgpt/train/a.py", "from mmgpt.configs import quickstart"),
    (forbidden, "mmgpt/a.py", "import pickle"),
    (forbidden, "mmgpt/a.py", "from pickle import loads"),
    (forbidden, "mmgpt/a.py", "import torch.nn as nn"),
    (forbidden, "mmgpt/a.py", "eval('1')"),
    (forbidden, "mmgpt/a.py", "exec('x = 1')"),
    (forbidden, "mmgpt/a.py", "subprocess.run('ls', shell=True)"),
    (forbidden, "mmgpt/a.py", "os.system('ls')"),
    (forbidden, "mmgpt/a.py", "from os import system"),
    (forbidden, "mmgpt/a.py", "yaml.load(text)"),
    (forbidden, "mmgpt/a.py", "tarfile.open(path).extractall(folder)"),
    (forbidden, "mmgpt/a.py", "torch.load(path)"),
    (forbidden, "mmgpt/evaluate/bench_a.py", "torch.load(path)"),
    (forbidden, "mmgpt/a.py", "AutoModel.from_pretrained(name, trust_remote_code=True)"),
    (forbidden, "mmgpt/a.py", "np.load(path, allow_pickle=True)"),
    *((transforms, "mmgpt/a.py", f"from flax import nnx\nx = nnx.{name}(f)") for name in NNX_TRANSFORMS),
    (transforms, "mmgpt/a.py", "from flax.nnx import jit"),
    (transforms, "mmgpt/a.py", "import flax\n@flax.nnx.jit\ndef f(): ..."),
    (sharding, "mmgpt/nn/layers.py", "from jax.sharding import PartitionSpec as P"),
    (sharding, "mmgpt/nn/layers.py", "spec = jax.sharding.PartitionSpec('fsdp')"),
    (sharding, "mmgpt/train/step.py", "jax.shard_map(f, mesh=mesh)"),
    (sharding, "mmgpt/train/step.py", "from jax import shard_map"),
    (config_defaults, "mmgpt/a.py", "config.get('depth', 4)"),
    (config_defaults, "mmgpt/a.py", "self.config.get('depth')"),
    (config_defaults, "mmgpt/a.py", "getattr(model_config, 'depth', 4)"),
    (file_names, "mmgpt/nn/utils.py", ""),
    (file_names, "mmgpt/helpers/a.py", ""),
    (file_names, "mmgpt/common.py", ""),
    (file_names, "tests/misc.md", ""),
    (file_names, "mmgpt/train/loop_v2.py", ""),
    (sizes, "mmgpt/nn/a.py", LONG_FILE),
    (sizes, "mmgpt/kernels/a/b.py", "x = 1\n" * 601),
    (sizes, "mmgpt/nn/a.py", long_function(61)),
    (sizes, "mmgpt/train/loop.py", long_function(151)),
    (docstrings, "mmgpt/nn/a.py", "x = 1"),
    (docstrings, "mmgpt/nn/__init__.py", "x = 1"),
    (places, "README.md", "cd /wo" + "rk/main && make"),
    (places, "configs/a.py", "path = '/ro" + "ot/data'"),
    (places, "Makefile", "pip install --index-url=ht" + "tps://host/simple ."),
    (places, "constraints/a.txt", "# from pypi.or" + "g"),
]


@pytest.mark.parametrize(("rule", "path", "text"), BROKEN, ids=lambda v: v.__name__ if callable(v) else repr(v)[1:40])
def test_rule_finds_the_fault(rule: Rule, path: str, text: str) -> None:
    faults = rule(path, text)
    assert faults
    assert all(fault.startswith(path) for fault in faults)


SOUND: list[tuple[Rule, str, str]] = [
    (floors, "mmgpt/nn/a.py", "from mmgpt.core.config import Config\nfrom mmgpt.nn.layers import Linear"),
    (floors, "mmgpt/data/sources/a.py", "from mmgpt.data.media import decode_image"),
    (floors, "mmgpt/cli.py", "from mmgpt import presets\nfrom mmgpt.plan.memory import table"),
    (
        floors,
        "configs/a.py",
        "from mmgpt.recipe import Recipe\nfrom mmgpt.models.decoder import Decoder\nfrom .b import model",
    ),
    (forbidden, "mmgpt/a.py", "yaml.safe_load(text)\nsubprocess.run(['ls'], shell=False)\nre.compile('a')\n# eval(x)"),
    (transforms, "mmgpt/a.py", "from flax import nnx\nnnx.split(m)\njax.jit(f)\njax.lax.scan(f, x, y)"),
    (sharding, "mmgpt/dist/axes.py", "from jax.sharding import PartitionSpec"),
    (sharding, "mmgpt/kernels/attention/api.py", "jax.shard_map(f)"),
    (sharding, "mmgpt/nn/attention.py", "jax.shard_map(f)"),
    (config_defaults, "mmgpt/a.py", "config.depth\ntable.get('a', 1)\ngetattr(config, name)"),
    (file_names, "mmgpt/evaluate/shapes/world.py", ""),
    (sizes, "mmgpt/kernels/a/b.py", LONG_FILE),
    (sizes, "mmgpt/train/loop.py", long_function(150)),
    (docstrings, "mmgpt/nn/__init__.py", ""),
    (places, "README.md", "runs/quickstart/report.html and a/work/b and /workshop"),
    (forbidden, "mmgpt/evaluate/bench_a.py", "def peer():\n    import torch"),
]


@pytest.mark.parametrize(("rule", "path", "text"), SOUND, ids=lambda v: v.__name__ if callable(v) else repr(v)[1:40])
def test_rule_leaves_sound_code_alone(rule: Rule, path: str, text: str) -> None:
    assert rule(path, text) == []
