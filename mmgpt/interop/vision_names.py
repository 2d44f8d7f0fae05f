"""The tensors of published vision tokenizers and where they are with us.

Three ways to call the same numbers: those of the papers' own code, which VQGAN (arXiv 2012.09841) began and both Emu3's
and Emu3.5's tokenizers keep, and those of transformers' `Emu3VQVAE`.
"""

from collections.abc import Callable

from mmgpt.interop.names import Entry
from mmgpt.models.ibq import IBQ
from mmgpt.models.movq import MoVQ
from mmgpt.nn.pyramid import Pyramid

Names = Callable[[str], str]
"""A tensor's name in the papers' code -> its name in a checkpoint."""


def movq_entries(c: MoVQ.Config, *, prefix: str = "", original: bool = False) -> list[Entry]:
    """Every tensor of an Emu3 vision tokenizer: as transformers calls it, or as the `original` code does.

    `prefix` stands before each name, as "vqmodel." in the checkpoint of the whole model.
    """
    walk = _Walk(prefix, _same if original else _transformers, original)
    dim = c.latent
    walk.encoder(c.pyramid)
    for i in range(c.halvings):
        walk.conv(f"encoder.time_conv.{i}.conv.conv", f"halve/{i}", dim, dim, (4, 3, 3))
    for i in range(c.blocks):
        walk.time_residual(f"encoder.time_res_stack.{i}", f"after/{i}", dim)
    walk.decoder(c.pyramid, dim)
    for i in range(c.blocks):
        walk.time_residual(f"decoder.time_res_stack.{i}", f"before/{i}", dim)
    for i in range(c.halvings):
        walk.conv(f"decoder.time_conv.{i}.conv.conv", f"double/{i}", dim, dim, (3, 3, 3))
    walk.leaf("quantize.embedding.weight", "params/codebook", (c.codes, dim))
    walk.conv("quant_conv.conv", "quantise", dim, dim, (3, 1, 1))
    walk.conv("post_quant_conv.conv", "restore", dim, dim, (3, 1, 1))
    return walk.entries


def ibq_entries(c: IBQ.Config, *, prefix: str = "") -> list[Entry]:
    """Every tensor of an Emu3.5 vision tokenizer under the names of its own code."""
    walk = _Walk(prefix, _same, True)
    walk.encoder(c.pyramid)
    walk.decoder(c.pyramid, None)
    walk.leaf("quantize.embedding.weight", "params/codebook", (c.codes, c.dim))
    walk.conv("quant_conv", "quantise", c.latent, c.dim, (1, 1))
    walk.conv("post_quant_conv", "restore", c.dim, c.latent, (1, 1))
    return walk.entries


def _same(name: str) -> str:
    return name


def _transformers(name: str) -> str:
    """The name in transformers: parts of the coder lie one module deeper, and attention is called as in text models."""
    for side, levels in (("encoder", "down"), ("decoder", "up")):
        name = name.replace(f"{side}.{levels}.", f"{side}.{levels}_block.{levels}.")
        name = name.replace(f"{side}.mid.", f"{side}.middle_block.")
    name = name.replace(".attn_1.norm.", ".attn_norm.")
    before, attention, after = name.partition(".attn.")
    number, _, rest = after.partition(".norm.")
    if attention and rest:
        return f"{before}.attn_norms.{number}.{rest}"
    if ".attn" in name:
        for ours in ("q", "k", "v"):
            name = name.replace(f".{ours}.", f".{ours}_proj.")
        name = name.replace(".proj_out.", ".out_proj.")
    return name


class _Walk:
    """Goes through a model and lists its tensors; `pixelwise`: attention projects by 1 x 1 convolutions."""

    def __init__(self, prefix: str, names: Names, pixelwise: bool):
        self.entries: list[Entry] = []
        self._prefix, self._names, self._pixelwise = prefix, names, pixelwise

    def leaf(self, name: str, path: str | None, shape: tuple[int, ...], order: tuple[int, ...] | None = None) -> None:
        self.entries.append(Entry(hf_name=self._prefix + self._names(name), hf_shape=shape, path=path, order=order))

    def conv(self, name: str, path: str, inputs: int, outputs: int, window: tuple[int, ...]) -> None:
        """A kernel `[outputs, inputs, *window]` that is `[*window, inputs, outputs]` with us, and its bias."""
        order = (*range(2, 2 + len(window)), 1, 0)
        self.leaf(f"{name}.weight", f"params/{path}/kernel", (outputs, inputs, *window), order)
        self.leaf(f"{name}.bias", f"params/{path}/bias", (outputs,))

    def time_residual(self, name: str, path: str, dim: int) -> None:
        for i in (1, 2):
            self.leaf(f"{name}.norm{i}.weight", f"params/{path}/norm{i}/scale", (dim,))
            self.leaf(f"{name}.norm{i}.bias", f"params/{path}/norm{i}/bias", (dim,))
            self.leaf(f"{name}.norm{i}.running_mean", f"variables/{path}/norm{i}/mean", (dim,))
            self.leaf(f"{name}.norm{i}.running_var", f"variables/{path}/norm{i}/variance", (dim,))
            self.leaf(f"{name}.norm{i}.num_batches_tracked", f"variables/{path}/norm{i}/batches", ())
            self.conv(f"{name}.conv{i}.conv", f"{path}/conv{i}", dim, dim, (3, 3, 3))

    def encoder(self, p: Pyramid) -> None:
        self.conv("encoder.conv_in", "encoder/enter", 3, p.channels, (3, 3))
        for i, (inputs, outputs) in enumerate(zip((p.channels, *p.widths), p.widths, strict=False)):
            self._level(f"encoder.down.{i}", f"encoder/level/{i}", inputs, outputs, p.blocks, i in p.attention, None)
            if i < len(p.widths) - 1:
                resized = f"encoder/level/{i}/resize/conv"
                self.conv(f"encoder.down.{i}.downsample.conv", resized, outputs, outputs, (3, 3))
        self._middle("encoder", p.widths[-1], None)
        self._norm("encoder.norm_out", "encoder/norm", p.widths[-1], None)
        self.conv("encoder.conv_out", "encoder/leave", p.widths[-1], p.latent, (3, 3))

    def decoder(self, p: Pyramid, steering: int | None) -> None:
        self.conv("decoder.conv_in", "decoder/enter", p.latent, p.widths[-1], (3, 3))
        self._middle("decoder", p.widths[-1], steering)
        for i, outputs in enumerate(p.widths):
            inputs, blocks = p.widths[min(i + 1, len(p.widths) - 1)], p.blocks + 1
            self._level(f"decoder.up.{i}", f"decoder/level/{i}", inputs, outputs, blocks, i in p.attention, steering)
            if i > 0:
                resized = f"decoder/level/{i}/resize/conv"
                self.conv(f"decoder.up.{i}.upsample.conv", resized, outputs, outputs, (3, 3))
        self._norm("decoder.norm_out", "decoder/norm", p.widths[0], steering)
        self.conv("decoder.conv_out", "decoder/leave", p.widths[0], 3, (3, 3))

    def _level(
        self, name: str, path: str, inputs: int, outputs: int, blocks: int, attends: bool, steering: int | None
    ) -> None:
        for i in range(blocks):
            ends = (inputs if i == 0 else outputs, outputs)
            self._residual(f"{name}.block.{i}", f"{path}/block/{i}", *ends, steering)
            if attends:
                self._attention(f"{name}.attn.{i}", f"{path}/attention/{i}", outputs, steering)

    def _middle(self, side: str, width: int, steering: int | None) -> None:
        self._residual(f"{side}.mid.block_1", f"{side}/middle/before", width, width, steering)
        self._attention(f"{side}.mid.attn_1", f"{side}/middle/attention", width, steering)
        self._residual(f"{side}.mid.block_2", f"{side}/middle/after", width, width, steering)

    def _residual(self, name: str, path: str, inputs: int, outputs: int, steering: int | None) -> None:
        self._norm(f"{name}.norm1", f"{path}/norm1", inputs, steering)
        self.conv(f"{name}.conv1", f"{path}/conv1", inputs, outputs, (3, 3))
        self._norm(f"{name}.norm2", f"{path}/norm2", outputs, steering)
        self.conv(f"{name}.conv2", f"{path}/conv2", outputs, outputs, (3, 3))
        if inputs != outputs:
            self.conv(f"{name}.nin_shortcut", f"{path}/past", inputs, outputs, (1, 1))

    def _attention(self, name: str, path: str, width: int, steering: int | None) -> None:
        self._norm(f"{name}.norm", f"{path}/norm", width, steering)
        for theirs, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("proj_out", "out")):
            if self._pixelwise:
                self.conv(f"{name}.{theirs}", f"{path}/{ours}", width, width, (1, 1))
                continue
            self.entries.append(
                Entry(
                    hf_name=self._prefix + self._names(f"{name}.{theirs}.weight"),
                    hf_shape=(width, width),
                    path=f"params/{path}/{ours}/kernel",
                    split=(width, width, 1, 1),
                    order=(2, 3, 1, 0),
                )
            )
            self.leaf(f"{name}.{theirs}.bias", f"params/{path}/{ours}/bias", (width,))

    def _norm(self, name: str, path: str, width: int, steering: int | None) -> None:
        if steering is None:
            self.leaf(f"{name}.weight", f"params/{path}/scale", (width,))
            self.leaf(f"{name}.bias", f"params/{path}/bias", (width,))
            return
        self._norm(f"{name}.norm_layer", f"{path}/norm", width, None)
        self.conv(f"{name}.conv_y", f"{path}/gain", steering, width, (1, 1))
        self.conv(f"{name}.conv_b", f"{path}/shift", steering, width, (1, 1))
