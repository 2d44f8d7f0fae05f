"""How a tensor of a Hugging Face checkpoint and a part of our state are called, and which order their numbers have."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mmgpt.models.decoder import Decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a Hugging Face checkpoint and where its numbers are with us.

    `path` is a leaf of the state, as "params/stack/stacked/mlp/up" or "variables/...", and `layer` its index along the
    leaf's leading axis where the leaf is a stack of layers. Without a path the tensor is nothing that we compute with;
    it is kept as it is and written back.

    The numbers are ours after `hf.reshape(split).transpose(order)`; both default to no change.
    """

    hf_name: str
    hf_shape: tuple[int, ...]
    path: str | None
    layer: int | None = None
    split: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """The tensor in our layout: a view, never a copy."""
        array = array.reshape(self.hf_shape if self.split is None else self.split)
        return array if self.order is None else array.transpose(self.order)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Our part of the leaf in the checkpoint's layout."""
        if self.order is not None:
            array = array.transpose(tuple(np.argsort(self.order)))
        return array.reshape(self.hf_shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape with us, of one layer; the leaf may have more rows of its first axes, as padding."""
        return self.to_ours(np.broadcast_to(np.float32(0), self.hf_shape)).shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a checkpoint keeps its parts: the prefix of the decoder's names, its head, the image tokenizer's prefix.

    `vision` is None where the checkpoint holds no image tokenizer that we compute with; `original` image tokenizers
    have the names of the papers' own code.
    """

    text: str = "model."
    head: str = "lm_head.weight"
    vision: str | None = None
    original: bool = False


LAYOUTS = {
    "decoder": Layout(),
    "emu3 module": Layout(text="model.text_model.", vision="model.vqmodel."),
    "emu3 file": Layout(text="text_model.model.", head="text_model.lm_head.weight", vision="vqmodel."),
    "vision": Layout(vision=""),
    "original vision": Layout(vision="", original=True),
}
"""A decoder alone; Emu3 as a whole, as its module names it and as it is saved; an image tokenizer alone."""


def decoder_entries(c: Decoder.Config, rows: int, layout: Layout = LAYOUTS["decoder"]) -> list[Entry]:
    """All tensors of a Llama-shaped decoder, in the order of its layers; `rows` of the embedding are in the checkpoint.

    The names are those of Emu3, Emu3.5, Qwen3, Llama and Chameleon alike.
    """
    entries = [Entry(hf_name=f"{layout.text}embed_tokens.weight", hf_shape=(rows, c.embed), path="params/embedding")]
    for layer in range(c.layers):
        entries += _block_entries(c, f"{layout.text}layers.{layer}.", layer)
    entries.append(Entry(hf_name=f"{layout.text}norm.weight", hf_shape=(c.embed,), path="params/norm/scale"))
    if not c.tied:
        entries.append(Entry(hf_name=layout.head, hf_shape=(rows, c.embed), path="params/head", order=(1, 0)))
    return entries


def _block_entries(c: Decoder.Config, prefix: str, layer: int) -> list[Entry]:
    D, F, K = c.embed, c.mlp, c.head_dim
    entries: list[Entry] = []

    def add(name: str, path: str, shape: tuple[int, ...], split: Sequence[int] = (), order: Sequence[int] = ()) -> None:
        entries.append(
            Entry(
                hf_name=f"{prefix}{name}",
                hf_shape=shape,
                path=f"params/stack/stacked/{path}",
                layer=layer,
                split=tuple(split) or None,
                order=tuple(order) or None,
            )
        )

    add("input_layernorm.weight", "attention_norm/scale", (D,))
    for name, heads in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads)):
        add(f"self_attn.{name}_proj.weight", f"attention/{name}", (heads * K, D), order=(1, 0))
        if c.qk_norm != "none" and name != "v":
            shape = (K,) if c.qk_norm == "rms" else (heads, K)
            add(f"self_attn.{name}_norm.weight", f"attention/{name}_norm/scale", shape)
            if c.qk_norm == "layer":
                add(f"self_attn.{name}_norm.bias", f"attention/{name}_norm/bias", shape)
    add("self_attn.o_proj.weight", "attention/out", (D, c.heads * K), order=(1, 0))
    add("post_attention_layernorm.weight", "mlp_norm/scale", (D,))
    add("mlp.gate_proj.weight", "mlp/gate", (F, D), order=(1, 0))
    add("mlp.up_proj.weight", "mlp/up", (F, D), order=(1, 0))
    add("mlp.down_proj.weight", "mlp/down", (D, F), order=(1, 0))
    return entries
