"""The attention layer over a block plan: made once a step, the same on every mesh, with the bound of QK-norm."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmgpt.core.stream import Batch, Stream, packed_causal
from mmgpt.dist import axes as rules
from mmgpt.dist.mesh import Mesh
from mmgpt.kernels.attention import api
from mmgpt.kernels.attention.plan import Plan
from mmgpt.kernels.attention.ring import Ring
from mmgpt.models.decoder import Decoder
from mmgpt.nn import attention

CONFIG = Decoder.Config(
    vocab=128,
    layers=2,
    embed=64,
    mlp=128,
    heads=4,
    kv_heads=2,
    head_dim=16,
    rope_theta=1e4,
    qk_norm="rms",
    dtype="float32",
)
MESHES = (Mesh.Config(fsdp=1), Mesh.Config(fsdp=2, context=2, tensor=2), Mesh.Config(fsdp=1, context=4))


def batch(rows: int = 2, length: int = 256) -> Batch:
    rng = np.random.default_rng(0)
    document = np.minimum(np.arange(length) // 90, 2)[None].repeat(rows, 0).astype(np.int32)
    document[1, -60:] = -1
    position = np.broadcast_to(np.arange(length, dtype=np.int32)[None, :, None], (rows, length, 5))
    stream = Stream(ids=rng.integers(0, 128, (rows, length)).astype(np.int32), position=position)
    return Batch(
        streams={"tokens": stream},
        visibility={"tokens": packed_causal(document)},
        row_id=np.arange(rows, dtype=np.int64),
    )


def solved(
    mesh: Mesh.Config, length: int = 256, context: attention.Context = "gather"
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The logits and all gradients of a sum over them."""
    with jax.set_mesh(mesh.build(jax.devices()[: max(1, mesh.fsdp * mesh.context * mesh.tensor)])):
        model = CONFIG.replace(context=context).build(nnx.Rngs(0))
        structure, state = nnx.split(model)
        weight = jnp.asarray(np.random.default_rng(1).standard_normal(128), jnp.float32)

        def loss(state, batch):
            logits = nnx.merge(structure, state)(batch)
            real = (batch.visibility["tokens"].key_island >= 0)[:, :, None]
            return jnp.sum(jnp.where(real, jnp.tanh(logits), 0.0) * weight[None, None]), logits

        made = batch(length=length)
        placed = jax.tree.map(
            lambda x: (
                jax.device_put(x, rules.sharding("batch seq" if x.ndim == 2 else "batch", rules.ACT))
                if x.ndim < 3
                else jax.device_put(x, rules.sharding("batch seq embed", rules.ACT))
            ),
            dataclasses.replace(made, row_id=made.row_id.astype(np.int32)),
        )
        grads, logits = jax.jit(jax.grad(loss, has_aux=True))(state, placed)
        return np.asarray(logits), [np.asarray(leaf) for leaf in jax.tree.leaves(grads)]


@pytest.mark.parametrize(
    ("mesh", "context"),
    [(0, "gather"), (1, "gather"), (1, "ring"), (2, "gather"), (2, "ring")],
    ids=["one", "all axes", "all axes, ring", "context", "context, ring"],
)
def test_a_plan_gives_what_the_specification_gives(
    mesh: int, context: attention.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, expected_grads = solved(Mesh.Config(fsdp=1))
    made = []
    plan_for = api.plan_for
    monkeypatch.setattr(api, "DENSE_PAIRS", 0)
    monkeypatch.setattr(api, "plan_for", lambda *a, **k: made.append(plan_for(*a, **k)) or made[-1])
    logits, grads = solved(MESHES[mesh], context=context)
    assert len(made) == 1 and isinstance(made[0], Ring if context == "ring" else Plan)  # once for all layers
    real = batch().visibility["tokens"].key_island >= 0
    np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=2e-5)
    for grad, other in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, other, rtol=0, atol=2e-4 * max(1.0, np.abs(other).max()))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_no_logit_passes_the_bound(kind: attention.QKNorm, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gains and biases of any size, and queries and keys that point the same way."""
    seen = {}

    def spy(q, k, v, visibility, dropout, key, logit_bound, scale):
        seen["logits"] = jnp.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
        seen["bound"] = logit_bound
        return q, None

    monkeypatch.setattr(attention, "_sharded", spy)
    with jax.set_mesh(MESHES[0].build(jax.devices()[:1])):
        config = CONFIG.replace(qk_norm=kind, kv_heads=4)
        block = config.build(nnx.Rngs(0)).stack.unstacked()[0]
        layer = block.attention
        rng = np.random.default_rng(0)
        for norm in (layer.q_norm, layer.k_norm):
            for gain in jax.tree.leaves(nnx.state(norm), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
                gain[...] = jnp.asarray(rng.uniform(-3, 3, gain.shape), jnp.float32)
        layer.k[...] = layer.q[...]
        x = jnp.asarray(rng.standard_normal((1, 64, 64)), jnp.float32)
        turn = attention.Turn(jnp.concatenate([jnp.ones((1, 64, 8)), jnp.zeros((1, 64, 8))], axis=-1))
        layer(x, (turn, turn), None)
    assert float(jnp.max(jnp.abs(seen["logits"]))) <= float(seen["bound"])
