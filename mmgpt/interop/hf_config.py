"""Hugging Face's config.json and our model configs, in both directions.

A decoder is one of a few families whose tensors have the same names. A key that would change what the model computes
in a way that ours does not is refused by name.
"""

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mmgpt.core.config import ConfigError
from mmgpt.interop.hf_table import Table
from mmgpt.models.decoder import Decoder
from mmgpt.models.movq import MoVQ
from mmgpt.nn.attention import QKNorm
from mmgpt.nn.layers import RopeScaling

PAD_TO = 128
"""Our embeddings have a multiple of this many rows, so that they divide over devices and fill tiles."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of decoder: what its configs say besides the sizes, and what they leave out.

    With `drops` the attention's dropout also acts on embeddings and residuals.
    """

    model_type: str
    architecture: str
    qk_norm: QKNorm = "none"
    kv_heads: int = 0
    head_dim: int = 0
    theta: float = 1e4
    epsilon: float = 1e-6
    drops: bool = False


FAMILIES = {
    "emu3": Family(
        model_type="emu3_text_model",
        architecture="Emu3ForCausalLM",
        kv_heads=8,
        theta=1e6,
        epsilon=1e-5,
        drops=True,
    ),
    "emu3_5": Family(
        model_type="Emu3",
        architecture="Emu3ForCausalLM",
        qk_norm="rms",
        kv_heads=8,
        theta=1e6,
        epsilon=1e-5,
        drops=True,
    ),
    "qwen3": Family(
        model_type="qwen3", architecture="Qwen3ForCausalLM", qk_norm="rms", kv_heads=32, head_dim=128, theta=1e4
    ),
    "llama": Family(model_type="llama", architecture="LlamaForCausalLM"),
    "chameleon": Family(
        model_type="chameleon",
        architecture="ChameleonForConditionalGeneration",
        qk_norm="layer",
        kv_heads=32,
        epsilon=1e-5,
    ),
}
VISION_TYPES = ("emu3_vqgan", "Emu3VisionVQ")
IDS = {
    "bos_token_id": "BOS",
    "eos_token_id": "EOS",
    "pad_token_id": "PAD",
    "img_token_id": "IMG",
    "boi_token_id": "BOI",
    "eoi_token_id": "EOI",
    "eol_token_id": "EOL",
    "eof_token_id": "EOF",
}
"""Keys of control ids and the grammar's names for them."""
MAPPED = {
    "<|extra_200|>": "EOL",
    "<|extra_201|>": "EOF",
    "<|extra_203|>": "BOS",
    "<|extra_204|>": "EOS",
    "<|image token|>": "IMG",
    "<|image start|>": "BOI",
    "<|image end|>": "EOI",
    "<|visual token 000000|>": "first visual code",
}
"""The same in Emu3's vocabulary_map."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """What a config.json says: a decoder of a family, an image tokenizer, or both.

    `rows` of the embedding are in the checkpoint, `context` tokens at most were seen, `ids` are control ids by name.
    """

    family: str = ""
    model: Decoder.Config | None = None
    rows: int = 0
    context: int = 0
    ids: dict[str, int] = dataclasses.field(default_factory=dict)
    vision: MoVQ.Config | None = None


def is_hugging_face(folder: Path) -> bool:
    """Whether the folder's config.json is of Hugging Face's kind, not a run's; ConfigError where it is no JSON."""
    path = folder / "config.json"
    body = _body(path) if path.is_file() else None
    return isinstance(body, dict) and ("model_type" in body or "architectures" in body)


def _body(path: Path) -> Any:
    if not path.is_file():  # a pipe would never end
        raise ConfigError(f"{path}: no such file; copy or download it again.")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path}: not JSON ({e}). Copy or download it again.") from e


def read(path: Path, names: Collection[str] = ()) -> Described:
    """What a config.json describes; `names` are the checkpoint's tensors, by which Emu3.5 differs from Emu3.

    ConfigError names every key that we do not compute.
    """
    body = _body(path)
    table = Table(body, str(path), tensors=len(names))
    kind = body.get("model_type")
    normed = any(name.endswith("self_attn.q_norm.weight") for name in names)
    if kind in VISION_TYPES:
        found = Described(vision=_vision(table) if kind == "emu3_vqgan" else _original_vision(table))
    elif kind == "emu3":
        found = _whole(table, normed)
    elif kind in ("Emu3", "emu3_text_model"):
        found = _decoder(table, "emu3_5" if normed else "emu3")
    elif isinstance(kind, str) and kind in FAMILIES:
        found = _decoder(table, kind)
    else:
        known = ", ".join(sorted({"Emu3", "emu3", *VISION_TYPES, *(f.model_type for f in FAMILIES.values())}))
        raise ConfigError(f"{path}: model_type is {kind!r}; mmgpt reads {known}.")
    table.finish()
    return found


def _whole(table: Table, normed: bool) -> Described:
    """Emu3ForConditionalGeneration: decoder and image tokenizer."""
    text, vision = table.table("text_config"), table.table("vq_config")
    mapped = table.table("vocabulary_map")
    table.any("image_token_id")
    table.must("tie_word_embeddings", False)
    table.rest()
    if text is None or vision is None:
        raise ConfigError(f"{table.where}: Emu3 as a whole has a text_config and a vq_config, one is missing.")
    found = _decoder(text, "emu3_5" if normed else "emu3")
    ids = found.ids | _mapped(mapped)
    return dataclasses.replace(found, vision=_vision(vision), ids=ids)


def _mapped(table: Table | None) -> dict[str, int]:
    return {} if table is None else {v: table.take(k, 0) for k, v in MAPPED.items() if table.has(k)}


def _decoder(table: Table, kind: str) -> Described:
    family = FAMILIES[kind]
    embed, heads = table.size("hidden_size"), table.size("num_attention_heads")
    rows, dropout = table.size("vocab_size"), table.take("attention_dropout", 0.1 if family.drops else 0.0)
    context = table.size("max_position_embeddings", 2048)
    theta, scaling = _rope(table, family.theta, context)
    model = Decoder.Config(
        vocab=-(-rows // PAD_TO) * PAD_TO,
        layers=table.depth("num_hidden_layers"),
        embed=embed,
        mlp=table.size("intermediate_size"),
        heads=heads,
        kv_heads=table.size("num_key_value_heads", family.kv_heads or heads),
        head_dim=table.size("head_dim", family.head_dim or embed // heads or 1),
        rope_theta=theta,
        rope_scaling=scaling,
        qk_norm=family.qk_norm,
        norm_epsilon=table.take("rms_norm_eps", family.epsilon),
        tied=table.take("tie_word_embeddings", False),
        dropout=dropout if family.drops else 0.0,
        attention_dropout=dropout,
    )
    table.must("hidden_act", "silu")
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        table.must(key, False)
    if kind == "qwen3":
        table.any("sliding_window")  # says something only together with use_sliding_window
    table.must("layer_types", ["full_attention"] * model.layers)
    if kind == "chameleon":
        model = model.replace(post_norm=table.take("swin_norm", False))
        for key in ("model_parallel_size", "vq_config", "vocabulary_map", "image_token_id"):
            table.any(key)  # how its weights were split, and its image tokenizer, which is kept as it is
    ids = {name: table.any(key) for key, name in IDS.items()}
    table.rest()
    known = {name: value for name, value in ids.items() if isinstance(value, int)}
    return Described(family=kind, model=model, rows=rows, context=context, ids=known)


def _rope(table: Table, theta: float, context: int) -> tuple[float, RopeScaling | None]:
    """Base and stretch of the rotary frequencies, as newer and older configs say them."""
    theta = table.take("rope_theta", theta)
    table.must("partial_rotary_factor", 1.0)
    parameters, scaling = table.table("rope_parameters"), None
    for rope in (table.table("rope_scaling"), parameters):
        if rope is None:
            continue
        theta = rope.take("rope_theta", theta)
        rope.must("partial_rotary_factor", 1.0)
        old, kind = rope.take("type", "default"), ""
        kind = rope.take("rope_type", old)
        if kind in ("linear", "llama3"):
            scaling = RopeScaling(
                kind="linear" if kind == "linear" else "llama3",
                factor=rope.take("factor", 1.0),
                low=rope.take("low_freq_factor", 1.0),
                high=rope.take("high_freq_factor", 4.0),
                original=rope.take("original_max_position_embeddings", context if kind == "llama3" else 8192),
            )
        elif kind != "default":
            rope.faults.append(f"{rope.where}.rope_type is {kind!r}; mmgpt computes 'default', 'linear' or 'llama3'")
            continue
        rope.rest()
    if theta == 0 or (scaling is not None and scaling.factor == 0):
        table.faults.append(f"{table.where}: rope_theta and factor divide, expected numbers above 0")
    return theta, scaling


def _vision(table: Table) -> MoVQ.Config:
    base = MoVQ.Config()
    latent = table.size("latent_channels", base.latent)
    model = MoVQ.Config(
        codes=table.size("codebook_size", base.codes),
        latent=latent,
        channels=table.size("base_channels", base.channels),
        multiples=table.sizes("channel_multiplier", base.multiples, least=1),
        blocks=table.depth("num_res_blocks", base.blocks),
        attention=table.sizes("attn_resolutions", base.attention),
        heads=table.size("num_attention_heads", base.heads),
        temporal=table.size("temporal_downsample_factor", base.temporal),
    )
    table.must("embed_dim", latent)
    table.must("double_latent", False)
    for key in ("in_channels", "out_channels"):
        table.must(key, 3)
    table.must("hidden_size", model.channels * model.multiples[-1])
    table.must("attention_dropout", 0.0)
    table.rest()
    return model


def _original_vision(table: Table) -> MoVQ.Config:
    """The same as Emu3's own code calls it."""
    base = MoVQ.Config()
    latent = table.size("z_channels", base.latent)
    model = MoVQ.Config(
        codes=table.size("codebook_size", base.codes),
        latent=latent,
        channels=table.size("ch", base.channels),
        multiples=table.sizes("ch_mult", base.multiples, least=1),
        blocks=table.depth("num_res_blocks", base.blocks),
        attention=table.sizes("attn_resolutions", base.attention),
        temporal=table.size("temporal_downsample_factor", base.temporal),
    )
    table.must("embed_dim", latent)
    table.must("double_z", False)
    for key in ("in_channels", "out_channels"):
        table.must(key, 3)
    table.must("dropout", 0.0)
    table.rest()
    return model


def write(described: Described, dtype: str, whole: bool = False) -> dict[str, Any]:
    """The config.json of a model; `whole` is Emu3 with its image tokenizer. ConfigError names what it cannot say."""
    if described.model is None:
        assert described.vision is not None
        return {"architectures": ["Emu3VQVAE"], "dtype": dtype, **_vision_body(described.vision)}
    body = _decoder_body(described)
    if not whole:
        return {"architectures": [FAMILIES[described.family].architecture], "dtype": dtype, **body}
    assert described.vision is not None
    return {
        "architectures": ["Emu3ForConditionalGeneration"],
        "dtype": dtype,
        "model_type": "emu3",
        "text_config": body,
        "vq_config": _vision_body(described.vision),
        "tie_word_embeddings": False,
    }


def _decoder_body(described: Described) -> dict[str, Any]:
    family, c = FAMILIES[described.family], described.model
    assert c is not None
    _check_writable(described.family, c)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling is not None:
        s = c.rope_scaling
        rope |= {"rope_type": s.kind, "factor": s.factor}
        if s.kind == "llama3":
            rope |= {"low_freq_factor": s.low, "high_freq_factor": s.high}
            rope |= {"original_max_position_embeddings": s.original}
    body: dict[str, Any] = {
        "model_type": family.model_type,
        "vocab_size": described.rows,
        "hidden_size": c.embed,
        "intermediate_size": c.mlp,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": described.context,
        "rms_norm_eps": c.norm_epsilon,
        "rope_parameters": rope,
        "attention_dropout": c.attention_dropout,
        "tie_word_embeddings": c.tied,
        "attention_bias": False,
    }
    if described.family == "chameleon":
        body |= {"swin_norm": c.post_norm, "vocabulary_map": None}
    names = {name: key for key, name in IDS.items()}
    return body | {names[name]: value for name, value in described.ids.items() if name in names}


def _check_writable(kind: str, c: Decoder.Config) -> None:
    family = FAMILIES[kind]
    told = {
        "model.rope_grid": (c.rope_grid, 0),
        "model.places": (c.places, 0),
        "model.qk_norm": (c.qk_norm, family.qk_norm),
        "model.post_norm": (c.post_norm, c.post_norm and kind == "chameleon"),
    }
    if kind == "chameleon":
        told["model.head_dim"] = (c.head_dim, c.embed // c.heads)
    faults = [f"{key} is {found!r}, expected {wanted!r}" for key, (found, wanted) in told.items() if found != wanted]
    if faults:
        raise ConfigError(
            f"the model has what a {kind} checkpoint cannot say: {'; '.join(faults)}. Choose another --to of "
            f"{', '.join(FAMILIES)}, or train without it."
        )


def _vision_body(c: MoVQ.Config) -> dict[str, Any]:
    if c.channels % 32:
        raise ConfigError(
            f"model.channels is {c.channels}, expected a multiple of 32: norms there have 32 groups. "
            "Train with other channels to export."
        )
    return {
        "model_type": "emu3_vqgan",
        "codebook_size": c.codes,
        "embed_dim": c.latent,
        "latent_channels": c.latent,
        "double_latent": False,
        "in_channels": 3,
        "out_channels": 3,
        "temporal_downsample_factor": c.temporal,
        "base_channels": c.channels,
        "channel_multiplier": list(c.multiples),
        "num_res_blocks": c.blocks,
        "attn_resolutions": list(c.attention),
        "hidden_size": c.channels * c.multiples[-1],
        "num_attention_heads": c.heads,
        "attention_dropout": 0.0,
    }
