"""The folder that a conversion writes appears whole or not at all, and takes the place of nothing but a model."""

import shutil
from pathlib import Path

import pytest

from mmgpt import presets
from mmgpt.core.config import ConfigError
from mmgpt.interop.convert import convert
from mmgpt.interop.whole_folder import whole_folder
from mmgpt.train.run import Run, load_run


def test_a_folder_that_is_there_is_not_overwritten_unasked(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        convert(llama, tmp_path / "run")
    convert(llama, tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "mine.txt").touch()
    with pytest.raises(ConfigError, match="something else than a model"):
        convert(llama, tmp_path / "papers", overwrite=True)
    assert (tmp_path / "papers" / "mine.txt").exists()


@pytest.mark.parametrize(
    ("config", "beside"),
    [
        ("{}", "model.safetensors"),
        ('{"model_type": "llama"}', "notes.txt"),
        ('{"model_type": "llama"}', "model.safetensors src/mine.py"),
        ("run", "mine.txt"),
        ("run", "checkpoints/0/manifest.json src/mine.py"),
        ("[" * 100_000, "model.safetensors"),
    ],
)
def test_a_folder_that_is_no_model_is_never_overwritten(
    config: str, beside: str, llama: Path, converted: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    for name in ("config.json", *beside.split()):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text((converted / "config.json").read_text() if config == "run" else config)
    with pytest.raises(ConfigError, match="something else than a model"):
        convert(llama, mine, overwrite=True)
    assert all((mine / name).exists() for name in ("config.json", *beside.split()))
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("out", ["hf", "link", "hf/inside", "."])
@pytest.mark.parametrize("back", [False, True], ids=["to a run", "to Hugging Face"])
def test_what_is_read_is_never_overwritten(out: str, back: bool, llama: Path, converted: Path, tmp_path: Path) -> None:
    source = shutil.copytree(converted if back else llama, tmp_path / "hf")
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(ConfigError, match="one or inside each other"):
        convert(source, tmp_path / out, overwrite=True)
    if not back:
        with pytest.raises(ConfigError, match="one or inside each other"):
            convert(llama, tmp_path / out, vision=source, overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {"hf", "link"}
    assert {p.name for p in source.iterdir()} == {p.name for p in (converted if back else llama).iterdir()}


def test_the_tokenizers_of_a_run_are_never_overwritten(llama: Path, converted: Path, tmp_path: Path) -> None:
    model = shutil.copytree(converted, tmp_path / "vision")
    like = presets.preset("quickstart_model")
    assert isinstance(like, Run) and like.tokens is not None
    with pytest.raises(ConfigError, match="one or inside each other"):
        convert(llama, model, like=like.replace(tokens=like.tokens.replace(vision=str(model))), overwrite=True)
    assert load_run(model) == load_run(converted)


def test_a_link_is_written_through(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("there")
    with pytest.raises(ConfigError, match="is a link to what is not there"):
        convert(llama, tmp_path / "link")
    (tmp_path / "there").mkdir()
    convert(llama, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "config.json").is_file()


def test_what_a_kill_left_is_cleared_and_what_it_took_away_comes_back(
    llama: Path, converted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (tmp_path / ".out.converting" / "half").mkdir(parents=True)
    shutil.copytree(converted, tmp_path / ".out.replaced")
    with pytest.raises(ConfigError, match="is there already"):
        convert(llama, out)
    assert {p.name for p in tmp_path.iterdir()} == {"out"} and load_run(out) == load_run(converted)
    with whole_folder(out, True, []), pytest.raises(ConfigError, match="another process writes it"):
        convert(llama, out, overwrite=True)
