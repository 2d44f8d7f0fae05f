"""The decoder computes what transformers computes: the same logits from the same folder, whole and token by token."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgpt.core.stream import Batch, Stream, packed_causal
from mmgpt.interop.open import open_folder
from mmgpt.train.run import Opened
from mmgpt.train.step import place
from tests.interop import reference
from tests.interop.reference import torch

TOLERANCE = 2e-4
"""Largest difference of logits of order one, in float32."""
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SMALL = {"num_hidden_layers": 2}
CASES: dict[str, tuple[Any, dict[str, Any], tuple[int, ...]]] = {
    "emu3": (reference.emu3, {}, (1, 2, 130, 513)),
    "emu3, one kv head, wide": (
        reference.emu3,
        SMALL | {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 1},
        (33,),
    ),
    "emu3 whole": (reference.emu3_whole, SMALL, (64,)),
    "qwen3": (reference.qwen3, {}, (1, 513)),
    "qwen3, heads wider than the model": (
        reference.qwen3,
        SMALL | {"head_dim": 40, "num_key_value_heads": 4, "rms_norm_eps": 1e-3},
        (33,),
    ),
    "qwen3, tied": (reference.qwen3, SMALL | {"tie_word_embeddings": True, "vocab_size": 256}, (33,)),
    "llama": (reference.llama, {}, (1, 513)),
    "llama, stretched": (reference.llama, SMALL | {"rope_parameters": LLAMA3}, (257,)),
    "llama, stretched evenly": (
        reference.llama,
        SMALL | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, "head_dim": 32},
        (257,),
    ),
    "chameleon": (reference.chameleon, {}, (1, 513)),
    "chameleon, normed outputs": (
        reference.chameleon,
        SMALL | {"swin_norm": True, "num_key_value_heads": 4},
        (33,),
    ),
}


def expected(model: Any, ids: np.ndarray) -> np.ndarray:
    """Logits by transformers. Chameleon's forward hides those of image tokens, so its head is applied to its model."""
    given = torch.as_tensor(ids)
    with torch.no_grad():
        hidden = model.model(input_ids=given).last_hidden_state
        return model.lm_head(hidden).numpy()


def batch(ids: np.ndarray) -> Batch:
    position = np.zeros((*ids.shape, 5), np.int32)
    position[..., 0] = np.arange(ids.shape[1])
    seen = packed_causal(np.zeros(ids.shape, np.int32))
    stream = Stream(ids=ids.astype(np.int32), position=position)
    return Batch(streams={"tokens": stream}, visibility={"tokens": seen}, row_id=np.arange(len(ids)))


def forward(opened: Opened, ids: np.ndarray) -> np.ndarray:
    """Logits by the decoder, on all devices: the rows are repeated so that each has one."""
    structure, rows = opened.built.structure, len(ids)
    ids = np.resize(ids, (jax.device_count(), ids.shape[1]))
    with jax.set_mesh(opened.built.mesh):
        call = jax.jit(lambda params, batch: structure.merge(params, {})(batch))
        return np.asarray(call(opened.params, place(batch(ids))))[:rows]


def stepped(opened: Opened, ids: np.ndarray) -> np.ndarray:
    """Logits with a cache, one token at a time."""
    structure, length, rows = opened.built.structure, ids.shape[1], len(ids)
    ids = np.resize(ids, (jax.device_count(), length))
    seen = batch(ids).visibility["tokens"]

    def step(params: Any, id_B1: jax.Array, caches: Any, slot: jax.Array) -> Any:
        module = structure.merge(params, {})
        here = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(jnp.asarray(leaf), slot, 1, axis=1), seen)
        key_island = jnp.where(jnp.asarray(seen.index) <= slot, 0, -1)
        visibility = dataclasses.replace(here, index=jnp.asarray(seen.index), key_island=key_island)
        position = jnp.zeros((len(ids), 1, 5), jnp.int32).at[..., 0].set(slot)
        x, caches = module.extend(module.stack.unstacked(), id_B1, position, visibility, caches, slot)
        return module.logits(x), caches

    with jax.set_mesh(opened.built.mesh):
        jitted, parts = jax.jit(step, donate_argnums=2), []
        caches = jax.jit(lambda: structure.merge(opened.params, {}).caches(len(ids), length))()
        for at in range(length):
            logits, caches = jitted(opened.params, jnp.asarray(ids[:, at : at + 1], jnp.int32), caches, jnp.int32(at))
            parts.append(np.asarray(logits))
    return np.concatenate(parts, axis=1)[:rows]


def drawn_ids(length: int, rows: int) -> np.ndarray:
    return np.random.default_rng(length).integers(5, rows, (3, length))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    make, sizes, lengths = CASES[case]
    model = reference.drawn(make(**sizes))
    opened = open_folder(reference.save(model, tmp_path / "hf"))
    rows = model.get_input_embeddings().weight.shape[0]
    assert opened.built.run.model.vocab % 128 == 0
    for length in lengths:
        ids = drawn_ids(length, rows)
        wanted, found = expected(model, ids), forward(opened, ids)
        assert 0.3 < wanted.std() < 5, "the weights are drawn so that a wrong model would differ"
        assert found.dtype == np.float32
        np.testing.assert_allclose(found[..., :rows], wanted, rtol=0, atol=TOLERANCE)


def test_emu3_5_is_emu3_with_normed_queries_and_keys(tmp_path: Path) -> None:
    """It has no class in transformers; Qwen3's is the same computation."""
    opened = open_folder(reference.emu3_5(tmp_path))
    assert opened.built.run.model.qk_norm == "rms"
    model, ids = reference.drawn(reference.qwen3()), drawn_ids(40, 131)
    np.testing.assert_allclose(forward(opened, ids)[..., :131], expected(model, ids), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["emu3", "qwen3", "llama", "chameleon"])
def test_token_by_token_with_a_cache_is_the_whole_forward(family: str, tmp_path: Path) -> None:
    model = reference.drawn(reference.MODELS[family](num_hidden_layers=2))
    opened = open_folder(reference.save(model, tmp_path / "hf"))
    ids = drawn_ids(24, 131)
    found = stepped(opened, ids)
    np.testing.assert_allclose(found, forward(opened, ids), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(found[..., :131], expected(model, ids), rtol=0, atol=TOLERANCE)


def test_bfloat16_parameters_take_half_and_compute_nearly_the_same(tmp_path: Path) -> None:
    model = reference.drawn(reference.qwen3(num_hidden_layers=2))
    folder, ids = reference.save(model, tmp_path / "hf"), drawn_ids(16, 131)
    whole, half = open_folder(folder), open_folder(folder, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
    difference = np.abs(forward(half, ids) - forward(whole, ids))[..., :131]
    assert 0 < difference.max() and difference.mean() < 0.05
