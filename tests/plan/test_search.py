"""The search for a mesh: what is tried divides, what is ranked first fits, and slices are replicas."""

import math
from typing import Any

import pytest

from mmgpt.core.config import ConfigError
from mmgpt.data.loader import PackedRows
from mmgpt.dist.axes import ShardingError
from mmgpt.dist.mesh import Mesh
from mmgpt.models.decoder import Decoder
from mmgpt.objectives.next_token import NextToken
from mmgpt.plan.chips import CHIPS, devices
from mmgpt.plan.compiled import fitted
from mmgpt.plan.search import FULLEST, candidates, promising
from mmgpt.train.run import Run

pytest.importorskip("libtpu", reason="compiles for TPUs: pip install libtpu")
V5P = CHIPS["v5p"]


def run(rows: int = 64, **model: Any) -> Run:
    sizes: dict[str, Any] = {
        "layers": 8,
        "embed": 4096,
        "mlp": 8192,
        "heads": 32,
        "kv_heads": 4,
        "head_dim": 128,
    } | model
    return fitted(
        Run(
            model=Decoder.Config(vocab=65_536, dtype="bfloat16", **sizes),
            objective=NextToken.Config(z_loss=0.0),
            data=PackedRows.Config(sources=(), row_length=8192, batch_rows=rows),
        )
    )


@pytest.mark.parametrize("heads, most", [(4, 4), (2, 2)])
def test_what_is_tried_divides_and_is_estimated_to_fit(heads: int, most: int) -> None:
    found = candidates(run(kv_heads=heads), devices("v5p:4x4x4"), V5P, documents="4.1k")
    assert found == sorted(found, key=lambda c: c.seconds)
    for c in found:
        replica, fsdp, _, tensor = c.sizes
        assert math.prod(c.sizes) == 64 and 64 % (replica * fsdp * c.run.microbatches) == 0 and tensor <= most
        assert c.memory <= FULLEST * V5P.memory
        assert c.run.mesh.sizes(64) == c.sizes
    assert {vars(c.run.model)["remat"] for c in found} >= {"matmuls", "full"}
    assert max(c.sizes[3] for c in found) == most


def test_each_mesh_is_tried_once_before_any_is_tried_again() -> None:
    found = candidates(run(), devices("v5p:4x4x4"), V5P, documents="one")
    meshes = len({c.sizes for c in found})
    order = list(promising(found))
    assert sorted(map(id, order)) == sorted(map(id, found))
    assert len({c.sizes for c in order[:meshes]}) == meshes and order[0] is found[0]


def test_a_run_that_fits_nowhere_is_told() -> None:
    with pytest.raises(ConfigError, match="a larger topology"):
        candidates(run(rows=4, layers=400, embed=16_384), devices("v5p:2x2x1"), V5P, documents="one")


def test_slices_are_replicas() -> None:
    there = devices("v5p:2x2x1", slices=2)
    mesh = Mesh.Config(replica=2, fsdp=4).build(there)
    for i, half in enumerate(mesh.devices):
        assert {d.slice_index for d in half.flat} == {i}
    found = candidates(run(rows=16), there, V5P, documents="one", slices=2)
    assert all(c.sizes[0] % 2 == 0 for c in found)
    with pytest.raises(ShardingError, match=r"--mesh\.replica to a multiple of 2"):
        Mesh.Config(fsdp=8).build(there)


def test_an_axis_may_take_a_part_of_a_dimension_of_the_torus() -> None:
    there = devices("v5p:4x4x4")
    assert Mesh.Config(replica=8, fsdp=2, context=2, tensor=2).build(there).devices.shape == (8, 2, 2, 2)
