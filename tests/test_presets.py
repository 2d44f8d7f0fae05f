"""Presets are found by listing configs/, by name and never by path, from a checkout and from an installed wheel."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmgpt import presets
from mmgpt.core.config import Config
from mmgpt.presets import PresetError

FIRST = '''
"""A family."""
from mmgpt.core.config import Config
from .parts import DEPTH, with_depth

class Run(Config):
    depth: int = DEPTH

def small(): return Run()
def large(): return with_depth(Run, 9)
def wrong(): return {"depth": 1}
def _hidden(): return Run()
def sized(depth): return Run(depth=depth)
def defaulted(depth=3): return Run(depth=depth)
def keyword(*, depth=3): return Run(depth=depth)
def several(*depths): return Run(depth=depths[0])
not_a_function = Run
'''
PARTS = "DEPTH = 3\ndef with_depth(cls, depth): return cls(depth=depth)\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A configs/ folder beside an otherwise empty package, loaded instead of the repository's."""
    for name in [m for m in sys.modules if m == "mmgpt.configs" or m.startswith("mmgpt.configs.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(presets, "HERE", tmp_path / "mmgpt")
    configs = tmp_path / "configs"
    configs.mkdir()
    for name, text in {"__init__": "", "first": FIRST, "parts": PARTS}.items():
        (configs / f"{name}.py").write_text(text)
    yield configs
    for name in [m for m in sys.modules if m == "mmgpt.configs" or m.startswith("mmgpt.configs.")]:
        del sys.modules[name]


def test_presets_are_the_public_functions_without_arguments(folder: Path) -> None:
    assert presets.names() == ["large", "small", "wrong"]


def test_a_preset_returns_its_config(folder: Path) -> None:
    small, large = presets.preset("small"), presets.preset("large")
    assert isinstance(small, Config)
    assert small.replace(depth=9) == large


def test_listing_imports_no_preset_file(folder: Path) -> None:
    (folder / "broken.py").write_text("raise SystemExit\ndef other(): ...\n")
    assert "other" in presets.names()
    assert presets.preset("small")


def test_an_unknown_name_gets_close_matches(folder: Path) -> None:
    with pytest.raises(PresetError, match=r"no preset 'smal'.*Did you mean small\?"):
        presets.preset("smal")
    with pytest.raises(PresetError, match="There are: large, small, wrong"):
        presets.preset("emu")


@pytest.mark.parametrize(
    "name", ["../outside", "outside.py", "first.small", "os.getcwd", "", "_hidden", "sized", "Run"]
)
def test_a_name_is_never_a_path_or_a_hidden_thing(folder: Path, name: str) -> None:
    (folder.parent / "outside.py").write_text("raise SystemExit")
    with pytest.raises(PresetError, match="no preset"):
        presets.preset(name)


def test_what_is_not_a_config_is_refused(folder: Path) -> None:
    with pytest.raises(PresetError, match=r"configs/first\.py: wrong\(\) returned dict, expected a Config"):
        presets.preset("wrong")


def test_two_presets_of_one_name_are_refused(folder: Path) -> None:
    (folder / "second.py").write_text("def small(): ...\n")
    with pytest.raises(PresetError, match=r"first\.py and second\.py both define small"):
        presets.names()


def test_every_shipped_preset_builds_its_config() -> None:
    assert all(isinstance(presets.preset(name), Config) for name in presets.names())


@pytest.mark.slow
def test_an_installed_wheel_finds_its_presets_from_an_empty_folder(root: Path, empty: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, root], check=True)
    (wheel,) = wheels.glob("mmgpt-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    program = (
        "import json, mmgpt, mmgpt.launch; from mmgpt import presets\n"
        "names = presets.names()\n"
        "built = [type(presets.preset(n)).__name__ for n in names]\n"
        "print(json.dumps([mmgpt.__file__, names, built]))"
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=empty, check=True, capture_output=True, text=True
    )
    file, names, built = json.loads(done.stdout)
    assert Path(file).is_relative_to(site)
    assert sorted(p.name for p in site.iterdir() if p.suffix != ".dist-info") in (["bin", "mmgpt"], ["mmgpt"])
    assert names == presets.names()
    assert len(built) == len(names)
    run_dir, arguments = tmp_path / "run", ["launch", "quickstart_model", "--backend", "local", "--job.python", "true"]
    launch = [sys.executable, "-m", "mmgpt", *arguments, "--run-dir", str(run_dir)]
    subprocess.run(launch, env=environment, cwd=empty, check=True)
    assert (run_dir / "jobs" / "1" / "code" / "mmgpt" / "launch" / "submit.py").is_file()
    assert "not of a git checkout" in (run_dir / "jobs" / "1" / "commit.txt").read_text()
