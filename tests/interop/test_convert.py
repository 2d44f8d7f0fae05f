"""A checkpoint goes in and comes back byte for byte; a run begins from it; what does not fit is told, all at once."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mmgpt import presets
from mmgpt.cli import main
from mmgpt.core import config
from mmgpt.core.config import ConfigError
from mmgpt.core.errors import UserError
from mmgpt.interop import safetensors_writer
from mmgpt.interop.convert import convert, to_hugging_face
from mmgpt.interop.open import open_folder
from mmgpt.interop.safetensors_folder import FolderError
from mmgpt.models.decoder import Decoder
from mmgpt.models.movq import MoVQ
from mmgpt.train.run import Run, load_run
from tests.interop import reference
from tests.interop.reference import torch, transformers
from tests.small_disk import small_disk


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for path in folder.glob("*.safetensors") for name, array in load_file(path).items()}


def same(found: Path, wanted: Path) -> None:
    here, there = tensors(found), tensors(wanted)
    assert here.keys() == there.keys()
    for name, array in there.items():
        assert here[name].dtype == array.dtype and here[name].shape == array.shape, name
        assert here[name].tobytes() == array.tobytes(), name


def published(name: str, folder: Path, dtype: Any = torch.float32, shard: str = "1GB") -> Path:
    if name == "emu3_5":
        return reference.emu3_5(folder, dtype)
    model = reference.drawn(reference.MODELS[name]())
    for module in (model.model, model.lm_head) if hasattr(model, "lm_head") else (model,):
        module.to(dtype)
    return reference.save(model, folder, shard)


LONG = (("emu3 vision", True), ("emu3 vision", False), ("emu3 whole", False))
"""Hundreds of small arrays take their time; the whole in the other number format holds them too."""


@pytest.mark.parametrize(
    ("name", "half"),
    [
        pytest.param(name, half, marks=[pytest.mark.slow] if (name, half) in LONG else [])
        for name in [*reference.MODELS, "emu3_5"]
        for half in (False, True)
    ],
)
def test_a_checkpoint_comes_back_byte_for_byte(name: str, half: bool, tmp_path: Path) -> None:
    """In one file and in shards; names, number formats, config and tensors that we only keep as well."""
    source = published(name, tmp_path / "hf", torch.bfloat16 if half else torch.float32, "100KB" if half else "1GB")
    (source / "tokenizer_config.json").write_text('{"a": 1}')
    convert(source, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back", shard_bytes=100_000 if half else 1 << 30)
    same(tmp_path / "back", source)
    for file in ("config.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    assert half == (tmp_path / "back" / "model.safetensors.index.json").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"hf", "run", "back"}


def test_transformers_reads_what_is_written(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back", to="llama", dtype="bfloat16", shard_bytes=50_000)
    loaded, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values())
    assert loaded.dtype == torch.bfloat16
    before = transformers.LlamaForCausalLM.from_pretrained(llama)
    for name, value in before.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.bfloat16()), name


def test_the_whole_of_emu3_is_read_by_transformers_in_another_number_format(tmp_path: Path) -> None:
    convert(published("emu3 whole", tmp_path / "hf"), tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back", dtype="bfloat16")
    kind = transformers.Emu3ForConditionalGeneration
    loaded, report = kind.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values())
    for name, value in kind.from_pretrained(tmp_path / "hf").state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.to(loaded.state_dict()[name].dtype)), name


def test_the_parts_of_emu3_become_runs_that_open(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = published("emu3 whole", tmp_path / "hf")
    convert(source, tmp_path / "run")
    assert isinstance(load_run(tmp_path / "run").model, Decoder.Config)
    assert isinstance(load_run(tmp_path / "run" / "vision").model, MoVQ.Config)
    for part, run in (("text", tmp_path / "run"), ("vision", tmp_path / "run" / "vision")):
        there, here = open_folder(source, part=part), open_folder(run)
        jax.tree.map(np.testing.assert_array_equal, here.params, there.params)
        jax.tree.map(np.testing.assert_array_equal, here.variables, there.variables)
    with pytest.raises(ConfigError, match="expected an image tokenizer"):
        open_folder(tmp_path / "run", part="vision")
    with pytest.raises(ConfigError, match="holds no vision model"):
        open_folder(published("emu3", tmp_path / "text"), part="vision")
    capsys.readouterr()
    shutil.rmtree(tmp_path / "run" / "vision")
    with pytest.raises(ConfigError, match=r"vision/config\.json: no such file"):
        convert(tmp_path / "run", tmp_path / "back")
    assert "opened" not in capsys.readouterr().err  # nothing was loaded


def test_names_shapes_and_number_formats_that_do_not_fit_are_listed_in_one_error(copy: Path, tmp_path: Path) -> None:
    found = load_file(copy / "model.safetensors")
    del found["model.layers.1.mlp.up_proj.weight"]
    found["model.layers.0.self_attn.q_norm.weight"] = np.ones(16, np.float32)
    found["model.norm.weight"] = np.ones(65, np.float32)
    found["lm_head.weight"] = found["lm_head.weight"].astype(np.float64)
    save_file(found, copy / "model.safetensors")
    with pytest.raises(FolderError) as error:
        convert(copy, tmp_path / "run")
    for line in (
        "4 of 22 tensors",
        "model.layers.1.mlp.up_proj.weight: missing, expected [96, 64]",
        "model.layers.0.self_attn.q_norm.weight: F32[16], the model has no such tensor",
        "model.norm.weight: shape [65], expected [64]",
        "lm_head.weight: numbers are F64, expected F32, BF16, F16",
    ):
        assert line in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_fault_is_told_before_a_device_is_touched(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("memory was taken")

    monkeypatch.setattr(jax, "device_put", never)
    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", never)
    with pytest.raises(AssertionError, match="memory was taken"):
        open_folder(copy)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(FolderError, match="cut off"):
        open_folder(copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "there"}, "is there already"),
        ({"out": "file/out"}, "file"),
        ({"family": "bert"}, "no such family"),
        ({"family": "chameleon"}, "model.qk_norm"),
        ({"shard_bytes": 0}, "--shard-bytes is 0"),
        ({"shard_bytes": -5}, "--shard-bytes is -5"),
        ({"gone": "config.json"}, r"config\.json: no such file"),
        ({"notes": {"layout": "zzz"}}, r"source\.json: damaged"),
        ({"notes": {"layout": "vision"}}, r"source\.json: damaged"),
        ({"notes": {"layout": ["decoder"]}}, r"source\.json: damaged"),
        ({"notes": {"dtypes": {}}}, r"source\.json: damaged"),
        ({"notes": {"dtypes": 5}}, r"source\.json: damaged"),
        ({"notes": {"dtypes": {"lm_head.weight": "F99"}}}, r"source\.json: damaged"),
        ({"notes": {"metadata": {"a": 1}}}, r"source\.json: damaged"),
    ],
)
def test_faults_of_a_run_are_told_before_its_weights_are_loaded(
    options: dict[str, Any], message: str, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(converted, tmp_path / "run")
    (tmp_path / "there").mkdir()
    for path in (tmp_path / "file", tmp_path / "there" / "config.json"):
        path.touch()
    memory = run / "huggingface"
    notes = json.loads((memory / "source.json").read_text()) | options.pop("notes", {})
    (memory / "source.json").write_text(json.dumps(notes))
    if "gone" in options:
        (memory / options.pop("gone")).unlink()

    def never(*_: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("mmgpt.interop.convert.open_run", never)
    with pytest.raises((UserError, OSError), match=message):
        to_hugging_face(run, tmp_path / options.pop("out", "out"), **options)
    assert {p.name for p in tmp_path.iterdir()} == {"run", "there", "file"}


def test_options_that_fit_another_kind_of_model_are_refused(llama: Path, tmp_path: Path) -> None:
    tokenizer = presets.preset("quickstart_vision")
    assert isinstance(tokenizer, Run)
    with pytest.raises(ConfigError, match="name the preset of a decoder"):
        convert(llama, tmp_path / "out", like=tokenizer)
    model = MoVQ.Config(codes=64, latent=8, channels=32, multiples=(1, 2), blocks=1, attention=(1,), temporal=2)
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision" / "config.json").write_text(config.to_json(tokenizer.replace(model=model)))
    with pytest.raises(ConfigError, match="--to llama is of decoders"):
        convert(tmp_path / "vision", tmp_path / "out", to="llama")
    assert {p.name for p in tmp_path.iterdir()} == {"vision"}


def test_numbers_that_are_not_finite_are_told_and_those_that_would_be_are_refused(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = load_file(copy / "model.safetensors")
    found["model.norm.weight"][:3] = np.nan, np.inf, 1e6
    save_file(found, copy / "model.safetensors")
    convert(copy, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    line = "warning: 2 numbers of model.norm.weight are NaN or infinite."
    assert capsys.readouterr().err.count(line) == 2
    with pytest.raises(ConfigError, match=r"model\.norm\.weight: 1 of its 64 numbers are too large for float16"):
        convert(tmp_path / "run", tmp_path / "half", dtype="float16")
    assert {p.name for p in tmp_path.iterdir()} == {"hf", "run", "back"}


def test_links_out_of_a_folder_are_not_followed(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    cache = tmp_path / "models--llama"
    (cache / "blobs").mkdir(parents=True)
    folder = shutil.copytree(llama, cache / "snapshots" / "0123")
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(cache / "blobs" / str(i))
        path.symlink_to(Path("../../blobs") / str(i))
    convert(folder, tmp_path / "run")
    (folder / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json is a link to .*secret, outside its folder"):
        convert(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_names_that_a_terminal_would_obey_are_escaped(
    copy: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    strange = tmp_path / "o[red]x[/red]"
    convert(converted, strange)
    assert open_folder(strange).step == 0
    told = capsys.readouterr().err
    assert "".join(told.split()).count("o[red]x[/red]") == 2
    found = load_file(copy / "model.safetensors")
    save_file(found | {"\x1b[31mred\n": np.ones(1, np.float32)}, copy / "model.safetensors")
    with pytest.raises(FolderError, match=r"\\x1b\[31mred : F32\[1\]"):
        convert(copy, tmp_path / "other")


@pytest.mark.parametrize("name", ["a[b]", "a*", "a?"])
def test_a_run_whose_path_orbax_takes_for_a_pattern_is_refused(name: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint can be written under a path with"):
        convert(llama, tmp_path / name / "run")
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_tensor_is_told(copy: Path, tmp_path: Path) -> None:
    save_file({}, copy / "model.safetensors")
    with pytest.raises(FolderError, match="hold no tensor"):
        convert(copy, tmp_path / "run")


@pytest.mark.parametrize("back", [False, True], ids=["to a run", "to Hugging Face"])
def test_a_full_disk_leaves_nothing(
    back: bool, llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    source = llama
    if back:
        convert(llama, tmp_path / "run")
        source = tmp_path / "run"
    with small_disk(tmp_path / "disk", "256k") as disk:
        with pytest.raises(OSError) as error:
            convert(source, disk / "out")
        assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(disk / "out"))
        told = capfd.readouterr().err + caplog.text
        assert "Traceback" not in told and "was not saved" not in told
        assert list(disk.iterdir()) == []


def test_what_stops_in_the_middle_leaves_what_was_there(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(llama, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    monkeypatch.setattr(safetensors_writer.os, "fsync", lambda _: os.close(-1))
    with pytest.raises(OSError, match="descriptor"):
        convert(tmp_path / "run", tmp_path / "back", overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {"run", "back"}
    same(tmp_path / "back", llama)


def test_the_command_converts_and_tells_faults(
    llama: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["convert", str(llama), str(tmp_path / "run")]) == 0
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "back"), "--dtype", "float16"]) == 0
    assert {a.dtype for a in tensors(tmp_path / "back").values()} == {np.dtype(np.float16)}
    assert main(["convert", str(llama), str(tmp_path / "x"), "--dtype", "float16"]) == 1
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "x"), "--to", "chameleon"]) == 1
    assert "model.qk_norm is 'none', expected 'layer'" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "x"), "--to", "bert"]) == 1
    body = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(body | {"mlp_bias": True}))
    assert main(["convert", str(copy), str(tmp_path / "x")]) == 1
    assert "mlp_bias is True; mmgpt computes False only" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_converted_run_says_that_it_has_no_data_only_when_it_is_trained(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    convert(llama, tmp_path / "run")
    assert open_folder(tmp_path / "run").step == 0
    assert main(["train", str(tmp_path / "run")]) == 1
    assert "need a" in capsys.readouterr().err
    assert config.load(tmp_path / "run" / "config.json").data.sources == ()
