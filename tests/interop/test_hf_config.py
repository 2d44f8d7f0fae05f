"""config.json in both directions, and every key that would change the model without our knowing is refused by name."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mmgpt.core.config import ConfigError
from mmgpt.interop import hf_config
from mmgpt.interop.hf_config import Described
from mmgpt.models.decoder import Decoder
from mmgpt.models.movq import MoVQ
from mmgpt.nn.layers import RopeScaling

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
NORMED = tuple(f"model.layers.{i}.self_attn.q_norm.weight" for i in range(2))


def read(folder: Path, body: dict[str, Any], names: tuple[str, ...] = ()) -> Described:
    path = folder / "config.json"
    path.write_text(json.dumps(body))
    return hf_config.read(path, names)


def model(found: Described) -> Decoder.Config:
    assert found.model is not None
    return found.model


def test_what_a_config_leaves_out_is_its_familys_default(tmp_path: Path) -> None:
    c = model(read(tmp_path, LLAMA))
    assert (c.vocab, c.kv_heads, c.head_dim, c.rope_theta, c.norm_epsilon) == (1024, 4, 16, 1e4, 1e-6)
    c = model(read(tmp_path, LLAMA | {"model_type": "Emu3", "num_attention_heads": 16}))
    assert (c.kv_heads, c.rope_theta, c.norm_epsilon, c.dropout, c.qk_norm) == (8, 1e6, 1e-5, 0.1, "none")
    c = model(read(tmp_path, LLAMA | {"model_type": "Emu3"}, NORMED))
    assert c.qk_norm == "rms"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("use_sliding_window", True),
        ("sliding_window", 4096),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"bits": 4}),
        ("num_experts", 8),
        ("rope_scaling.rope_type", {"type": "yarn", "factor": 2.0}),
        ("rope_parameters.rope_type", {"rope_type": "dynamic", "factor": 2.0}),
        ("rope_parameters.partial_rotary_factor", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("rope_parameters.attention_factor", {"rope_type": "linear", "factor": 2.0, "attention_factor": 1.2}),
        ("hidden_size", "64"),
        ("num_hidden_layers", 0),
        ("rms_norm_eps", "tiny"),
        ("vocab_size", True),
        ("vocab_size", 10**12),
        ("rope_theta", -1),
        ("rope_theta", 0),
        ("rope_theta", float("nan")),
        ("rope_theta", 10**400),
        ("rms_norm_eps", -1e-6),
    ],
)
def test_what_we_do_not_compute_is_refused_by_its_key(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        read(tmp_path, LLAMA | {key.split(".")[0]: value})


def test_every_fault_is_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, LLAMA | {"mlp_bias": True, "num_experts": 2, "hidden_act": "relu", "vocab_size": None})
    assert all(key in str(error.value) for key in ("mlp_bias", "num_experts", "hidden_act", "vocab_size is missing"))


@pytest.mark.parametrize(
    "body",
    [
        "[]",
        "{",
        '{"model_type": "bert"}',
        '{"model_type": "emu3"}',
        '{"model_type": ["llama"]}',
        '{"model_type": {}}',
        pytest.param('{"model_type": ' + "[" * 100_000, id="deep"),
        pytest.param('{"vocab_size": ' + "9" * 5000 + "}", id="many digits"),
    ],
)
def test_what_is_no_model_of_ours_is_told(body: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(body)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        hf_config.read(tmp_path / "config.json")


def test_a_config_of_more_layers_than_tensors_or_of_no_width_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_hidden_layers is 1000000000, but the checkpoint has 2 tensors"):
        read(tmp_path, LLAMA | {"num_hidden_layers": 10**9}, NORMED)
    vision = {"model_type": "emu3_vqgan", "num_res_blocks": 10**9, "channel_multiplier": []}
    with pytest.raises(ConfigError, match="num_res_blocks is 1000000000, but the checkpoint has 2") as error:
        read(tmp_path, vision | {"\x1b[31m": 1}, NORMED)
    assert "channel_multiplier is []" in str(error.value) and "\x1b" not in str(error.value)


def test_a_config_that_is_a_pipe_or_no_json_is_told_when_its_kind_is_asked(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    assert not hf_config.is_hugging_face(tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        hf_config.read(tmp_path / "config.json")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="not JSON"):
        hf_config.is_hugging_face(tmp_path)


SIZES: dict[str, Any] = {
    "layers": 2,
    "embed": 64,
    "mlp": 96,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "norm_epsilon": 1e-4,
    "rope_theta": 5e5,
    "attention_dropout": 0.25,
}


@pytest.mark.parametrize("family", hf_config.FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_written_is_read_again(family: str, tied: bool, tmp_path: Path) -> None:
    kind = hf_config.FAMILIES[family]
    c = Decoder.Config(
        vocab=1024,
        tied=tied,
        qk_norm=kind.qk_norm,
        dropout=0.25 if kind.drops else 0.0,
        post_norm=family == "chameleon",
        rope_scaling=RopeScaling(kind="llama3", factor=8.0, low=2.0, high=5.0, original=512) if tied else None,
        **SIZES,
    )
    described = Described(family=family, model=c, rows=1000, context=512, ids={"BOS": 3, "EOI": 7})
    names = NORMED if kind.qk_norm == "rms" else ()
    assert read(tmp_path, hf_config.write(described, "float32"), names) == described


def test_an_image_tokenizer_and_the_whole_are_written_and_read_again(tmp_path: Path) -> None:
    vision = MoVQ.Config(codes=64, latent=8, channels=32, multiples=(1, 2), blocks=1, attention=(1,), temporal=2)
    described = Described(vision=vision)
    assert read(tmp_path, hf_config.write(described, "float32")) == described
    c = Decoder.Config(vocab=1024, qk_norm="none", dropout=0.25, **SIZES)
    whole = Described(family="emu3", model=c, rows=1000, context=512, vision=vision)
    assert read(tmp_path, hf_config.write(whole, "float32", whole=True)) == whole


def test_emu3s_own_names_of_its_image_tokenizer_are_read(tmp_path: Path) -> None:
    body = {
        "model_type": "Emu3VisionVQ",
        "architectures": ["Emu3VisionVQModel"],
        "auto_map": {"AutoModel": "modeling_emu3visionvq.Emu3VisionVQModel"},
        "codebook_size": 32768,
        "embed_dim": 4,
        "z_channels": 4,
        "double_z": False,
        "in_channels": 3,
        "out_channels": 3,
        "temporal_downsample_factor": 4,
        "ch": 256,
        "ch_mult": [1, 2, 2, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [3],
        "dropout": 0.0,
    }
    assert read(tmp_path, body).vision == MoVQ.Config()
    with pytest.raises(ConfigError, match="double_z is True"):
        read(tmp_path, body | {"double_z": True})


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"qk_norm": "rms"}, "model.qk_norm is 'rms'"),
        ("qwen3", {"rope_grid": 1}, "model.rope_grid is 1"),
        ("qwen3", {"places": 4}, "model.places is 4"),
        ("llama", {"qk_norm": "none", "post_norm": True}, "model.post_norm is True"),
        ("chameleon", {"qk_norm": "layer", "head_dim": 32}, "model.head_dim is 32"),
    ],
)
def test_what_a_family_cannot_say_is_refused(family: str, changes: dict, message: str) -> None:
    c = Decoder.Config(**{"vocab": 1024, **SIZES, **changes})
    with pytest.raises(ConfigError, match=message):
        hf_config.write(Described(family=family, model=c, rows=1000, context=512), "float32")
