"""At full size: every tensor of the published models, by name and shape, and no weight is ever made."""

import math
from typing import Any

import jax
import pytest

from mmgpt import presets
from mmgpt.dist.mesh import Mesh
from mmgpt.interop.names import LAYOUTS, Entry, decoder_entries
from mmgpt.interop.vision_names import movq_entries
from mmgpt.models.decoder import Decoder
from mmgpt.models.movq import MoVQ
from mmgpt.train.run import Run
from mmgpt.train.state import Structure
from tests.interop.reference import torch, transformers


def preset(name: str) -> Decoder.Config:
    run = presets.preset(name)
    assert isinstance(run, Run) and isinstance(run.model, Decoder.Config)
    return run.model


def shapes(make: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model of transformers on the meta device, where tensors have no memory."""
    with torch.device("meta"):
        model = make()
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def named(entries: list[Entry]) -> dict[str, tuple[int, ...]]:
    found = {entry.hf_name: entry.hf_shape for entry in entries}
    assert len(found) == len(entries)
    return found


def test_emu3_8b_has_the_tensors_of_its_text_model() -> None:
    config = transformers.Emu3TextConfig()
    theirs = shapes(lambda: transformers.Emu3ForCausalLM(config))
    assert named(decoder_entries(preset("emu3_8b"), config.vocab_size)) == theirs
    assert len(theirs) == 291 and sum(map(math.prod, theirs.values())) == 8_492_011_520


def test_emu3_8b_has_the_tensors_of_the_whole() -> None:
    layout = LAYOUTS["emu3 module"]
    assert layout.vision is not None
    entries = decoder_entries(preset("emu3_8b"), 184_622, layout) + movq_entries(MoVQ.Config(), prefix=layout.vision)
    config = transformers.Emu3Config(vocabulary_map={"<image>": 151_646})
    assert named(entries) == shapes(lambda: transformers.Emu3ForConditionalGeneration(config))


def test_emu3_5_has_its_34_billion_parameters_and_the_names_of_qwen3() -> None:
    c = preset("emu3_5_34b")
    ours = named(decoder_entries(c, 282_926))
    assert round(sum(map(math.prod, ours.values())) / 1e9, 1) == 34.1
    config = transformers.Qwen3Config(
        vocab_size=282_926,
        hidden_size=5120,
        intermediate_size=25_600,
        num_hidden_layers=64,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
    )
    assert ours == shapes(lambda: transformers.Qwen3ForCausalLM(config))


@pytest.mark.parametrize("swin", [False, True])
def test_chameleon_has_its_tensors(swin: bool) -> None:
    config = transformers.ChameleonConfig(
        vocabulary_map={"<image>": 8711},
        swin_norm=swin,
        num_key_value_heads=8,
        hidden_size=8192,
        num_attention_heads=64,
    )
    theirs = shapes(lambda: transformers.ChameleonForConditionalGeneration(config))
    model = Decoder.Config(
        vocab=65_536,
        layers=32,
        embed=8192,
        mlp=11_008,
        heads=64,
        kv_heads=8,
        head_dim=128,
        qk_norm="layer",
        post_norm=swin,
    )
    assert named(decoder_entries(model, 65_536)) == {n: s for n, s in theirs.items() if "vqmodel" not in n}


@pytest.mark.parametrize("name", ["emu3_8b", "emu3_5_34b"])
def test_every_array_of_ours_is_filled_and_by_nothing_that_does_not_fit(name: str) -> None:
    c = preset(name)
    with jax.set_mesh(Mesh.Config(fsdp=1).build(jax.devices()[:1])):
        params = Structure(c.build, seed=0).abstract()[0]
    leaves = {
        "params/" + jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    rows = {"emu3_8b": 184_622, "emu3_5_34b": 282_926}[name]
    filled: dict[str, list[int | None]] = {}
    for entry in decoder_entries(c, rows):
        assert entry.path is not None
        filled.setdefault(entry.path, []).append(entry.layer)
        shape = leaves[entry.path] if entry.layer is None else leaves[entry.path][1:]
        padded = tuple(c.vocab if n == rows else n for n in entry.shape)
        assert padded == shape, entry
    assert filled.keys() == leaves.keys()
    assert all(layers in ([None], list(range(c.layers))) for layers in filled.values())
