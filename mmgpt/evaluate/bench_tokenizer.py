"""Speed of Emu3's vision tokenizer beside transformers' `Emu3VQVAE`: same weights, same pictures, same processor."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.core.config import ConfigError
from mmgpt.core.log import check_writable, console, show, table, write_json
from mmgpt.dist.mesh import Mesh
from mmgpt.interop.vision_names import movq_entries
from mmgpt.models.movq import MoVQ
from mmgpt.train.state import Structure


def bench_tokenizer(
    channels: int = 64, side: int = 256, pictures: int = 1, frames: int = 4, repeats: int = 3, json: Path | None = None
) -> None:
    """Times encoding and decoding of pictures and of a clip, ours and transformers' taking turns.

    All sizes but `channels` are those of the published tokenizer, which has 256. Needs torch and transformers.

    Args:
        channels: of the first level; a multiple of 32, since transformers' norms have 32 groups.
        side: of pictures and frames, in pixels.
        pictures: encoded and decoded at once.
        frames: of the clip.
        repeats: turns; the figures are medians.
        json: write the figures.
    """
    c = MoVQ.Config(channels=channels)
    if side % c.patch or frames % c.temporal or channels % 32 or min(channels, side, pictures, frames, repeats) < 1:
        raise ConfigError(
            f"--side must be a multiple of {c.patch}, --frames of {c.temporal}, --channels of 32, and none below 1."
        )
    check_writable(json)
    rng = np.random.default_rng(0)
    shapes = {"pictures": (pictures, side, side, 3), "clip": (1, frames, side, side, 3)}
    inputs = {name: rng.uniform(-1, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    mesh = Mesh.Config(fsdp=1).build(jax.devices()[:1])
    with jax.set_mesh(mesh):
        structure = Structure(c.build, 0)
        arrays = _drawn(structure, rng)
        ours, theirs = _ours(structure, arrays), _theirs(c, arrays)
        figures = {}
        for name, x in inputs.items():
            figures |= {f"{name}/{key}": value for key, value in _measure(ours, theirs, x, repeats).items()}
    show(table(f"{channels} channels, {side} x {side}", {key: {"value": value} for key, value in figures.items()}))
    if json is not None:
        write_json(json, figures)


Coder = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]
"""Pixels to codes without the last axis, and codes to pixels."""


def _measure(ours: Coder, theirs: Coder, x: np.ndarray, repeats: int) -> dict[str, float]:
    """Medians of seconds, their ratios, and how far codes and pixels agree."""
    codes, drawn = theirs[0](x), theirs[1](theirs[0](x))
    same = float(np.mean(ours[0](x) == codes))
    apart = float(np.abs(ours[1](codes) - drawn).max() / np.ptp(drawn))
    seconds: dict[str, list[float]] = {}
    for turn in range(repeats):
        console.print(f"turn {turn + 1} of {repeats}")
        for who, (encode, decode) in {"ours": ours, "theirs": theirs}.items():
            for what, function, argument in (("encode", encode, x), ("decode", decode, codes)):
                begin = time.perf_counter()
                function(argument)
                seconds.setdefault(f"{who}/{what}", []).append(time.perf_counter() - begin)
    medians = {key: float(np.median(values)) for key, values in seconds.items()}
    both = {who: medians[f"{who}/encode"] + medians[f"{who}/decode"] for who in ("ours", "theirs")}
    ratios = {what: medians[f"theirs/{what}"] / medians[f"ours/{what}"] for what in ("encode", "decode")}
    ratios["both"] = both["theirs"] / both["ours"]
    figures = {f"seconds/{key}": round(value, 4) for key, value in medians.items()}
    figures |= {f"times faster/{key}": round(value, 2) for key, value in ratios.items()}
    return figures | {"codes equal": round(same, 5), "pixels apart, of their range": round(apart, 7)}


def _drawn(structure: Structure, rng: np.random.Generator) -> tuple[Any, Any]:
    """Parameters that keep a signal's size through the layers, and statistics of no data."""

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        match path[-1].key:
            case "scale" | "variance":
                value = np.ones(leaf.shape)
            case "kernel":
                value = rng.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
            case "codebook":
                value = 0.1 * rng.standard_normal(leaf.shape)
            case _:
                value = np.zeros(leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    params, variables = structure.abstract()
    return jax.tree.map_with_path(draw, params), jax.tree.map_with_path(draw, variables)


def _ours(structure: Structure, arrays: tuple[Any, Any]) -> Coder:
    def jitted(method: str) -> Callable[[np.ndarray], np.ndarray]:
        function = jax.jit(lambda arrays, x: getattr(structure.merge(*arrays), method)(x))
        return lambda x: np.asarray(function(arrays, x))

    encode, encode_clip, decode, decode_clip = map(jitted, ("encode", "encode_clip", "decode", "decode_clip"))

    def to_codes(x: np.ndarray) -> np.ndarray:
        return (encode if x.ndim == 4 else encode_clip)(x)[..., 0]

    def to_pixels(codes: np.ndarray) -> np.ndarray:
        return (decode if codes.ndim == 3 else decode_clip)(codes[..., None].astype(np.int32))

    return to_codes, to_pixels


def _theirs(c: MoVQ.Config, arrays: tuple[Any, Any]) -> Coder:
    """transformers' tokenizer with the same numbers; ConfigError where it is not installed."""
    try:
        import torch
        from transformers import Emu3VQVAE, Emu3VQVAEConfig
    except ImportError as e:
        raise ConfigError(f"the peer is missing ({e}); install torch and transformers, or use Python 3.11.") from e
    sizes = Emu3VQVAEConfig(
        codebook_size=c.codes,
        base_channels=c.channels,
        channel_multiplier=list(c.multiples),
        num_res_blocks=c.blocks,
        attn_resolutions=list(c.attention),
        hidden_size=c.channels * c.multiples[-1],
    )
    peer: Any = Emu3VQVAE(sizes).eval()
    leaves = {
        f"{part}/{jax.tree_util.keystr(path, simple=True, separator='/')}": np.asarray(leaf)
        for part, tree in zip(("params", "variables"), arrays, strict=True)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    tensors = {e.hf_name: torch.tensor(e.to_hf(leaves[e.path])) for e in movq_entries(c) if e.path is not None}
    peer.load_state_dict(tensors)

    def to_codes(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            pixels = torch.from_numpy(np.moveaxis(x, -1, -3)).contiguous()
            if x.ndim == 4:
                return torch.stack(peer.encode(pixels, [x.shape[1:3]] * len(x)).image_tokens).numpy()
            return _clip_codes(peer, pixels).numpy()

    def to_pixels(codes: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.moveaxis(peer.decode(torch.from_numpy(codes.astype(np.int64))).numpy(), -3, -1)

    return to_codes, to_pixels


def _clip_codes(peer: Any, pixels: Any) -> Any:
    """As its `encode`, which would cut the codes' time axis by the size of a frame."""
    hidden = peer.quant_conv(peer.encoder(pixels).permute(0, 2, 1, 3, 4))
    return peer.quantize(hidden.permute(0, 2, 1, 3, 4))
