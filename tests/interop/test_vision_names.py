"""Names and shapes of published image tokenizers: complete, at full size, and one-to-one with our arrays."""

import os
import re

os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import numpy as np
import pytest

from mmgpt.core.config import Config
from mmgpt.dist.mesh import Mesh
from mmgpt.interop.names import Entry
from mmgpt.interop.vision_names import ibq_entries, movq_entries
from mmgpt.models.ibq import IBQ
from mmgpt.models.movq import MoVQ
from mmgpt.train.state import Structure


def shapes(entries: list[Entry]) -> dict[str, tuple[int, ...]]:
    found = {entry.hf_name: entry.hf_shape for entry in entries}
    assert len(found) == len(entries)
    return found


def test_full_size_is_transformers_emu3_vqvae() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        peer = transformers.Emu3VQVAE(transformers.Emu3VQVAEConfig())
    assert shapes(movq_entries(MoVQ.Config())) == {name: tuple(t.shape) for name, t in peer.state_dict().items()}


def test_coder_names_are_taming_as_janus_has_them() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    c = IBQ.Config()
    sizes = transformers.JanusVQVAEConfig(
        embed_dim=c.dim,
        num_embeddings=c.codes,
        latent_channels=c.latent,
        base_channels=c.channels,
        channel_multiplier=list(c.multiples),
        num_res_blocks=c.blocks,
    )
    with torch.device("meta"):
        peer = transformers.JanusVQVAE(sizes)
    last = len(c.multiples) - 1

    def counted_from_above(name: str) -> str:
        return re.sub(r"decoder\.up\.(\d)", lambda m: f"decoder.up.{last - int(m[1])}", name)

    expected = {counted_from_above(name): tuple(t.shape) for name, t in peer.state_dict().items()}
    assert shapes(ibq_entries(c)) == expected


def test_the_original_names_differ_where_the_papers_code_does() -> None:
    """A sample, written down from the released code: its modules, and its attention of 1 x 1 convolutions."""
    found = shapes(movq_entries(MoVQ.Config(), original=True))
    expected = {
        "encoder.conv_in.weight": (256, 3, 3, 3),
        "encoder.down.0.block.1.norm2.bias": (256,),
        "encoder.down.1.block.0.nin_shortcut.weight": (512, 256, 1, 1),
        "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "encoder.down.3.attn.1.norm.weight": (1024,),
        "encoder.down.3.attn.1.proj_out.weight": (1024, 1024, 1, 1),
        "encoder.mid.attn_1.q.weight": (1024, 1024, 1, 1),
        "encoder.mid.attn_1.norm.bias": (1024,),
        "encoder.mid.block_2.conv1.bias": (1024,),
        "encoder.time_conv.1.conv.conv.weight": (4, 4, 4, 3, 3),
        "encoder.time_res_stack.1.norm2.running_var": (4,),
        "encoder.time_res_stack.0.norm1.num_batches_tracked": (),
        "decoder.time_conv.0.conv.conv.weight": (4, 4, 3, 3, 3),
        "decoder.mid.attn_1.norm.norm_layer.weight": (1024,),
        "decoder.mid.attn_1.norm.conv_y.weight": (1024, 4, 1, 1),
        "decoder.mid.block_1.norm1.conv_b.bias": (1024,),
        "decoder.up.3.attn.2.k.bias": (1024,),
        "decoder.up.1.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.norm_out.conv_y.weight": (256, 4, 1, 1),
        "quantize.embedding.weight": (32_768, 4),
        "quant_conv.conv.weight": (4, 4, 3, 1, 1),
        "post_quant_conv.conv.bias": (4,),
    }
    assert expected.items() <= found.items()
    assert len(found) == len(movq_entries(MoVQ.Config()))


@pytest.mark.parametrize(
    ("c", "entries"),
    [
        (MoVQ.Config(), movq_entries(MoVQ.Config())),
        (MoVQ.Config(), movq_entries(MoVQ.Config(), prefix="vqmodel.", original=True)),
        (
            MoVQ.Config(temporal=1, blocks=1, attention=()),
            movq_entries(MoVQ.Config(temporal=1, blocks=1, attention=())),
        ),
        (IBQ.Config(), ibq_entries(IBQ.Config())),
    ],
    ids=["movq", "movq, original", "movq without time", "ibq"],
)
def test_every_array_of_ours_has_one_tensor_of_its_shape(c: Config, entries: list[Entry]) -> None:
    with jax.set_mesh(Mesh.Config(fsdp=8).build()):
        params, variables = Structure(c.build, 0).abstract()  # pyright: ignore[reportAttributeAccessIssue]
    ours = {
        f"{part}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf.shape
        for part, tree in (("params", params), ("variables", variables))
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    assert {entry.path: entry.shape for entry in entries} == ours
    assert len(entries) == len(ours)


def test_a_tensor_comes_back_from_ours_as_it_was() -> None:
    c = MoVQ.Config(channels=32, codes=16, multiples=(1, 2), blocks=1, attention=(1,))
    rng = np.random.default_rng(0)
    for entry in [*movq_entries(c), *movq_entries(c, original=True)]:
        tensor = rng.standard_normal(entry.hf_shape)
        np.testing.assert_array_equal(entry.to_hf(entry.to_ours(tensor)), tensor)
