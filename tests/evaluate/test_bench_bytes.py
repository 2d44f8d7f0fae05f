"""Bytes counted from compiled programs: loops by their length, slices as slices, whole operands otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgpt.evaluate import bench_bytes
from mmgpt.plan import hlo

HLO = """HloModule m, is_scheduled=true

%fused_slice (p0: bf16[4,8,16], p1: s32[]) -> bf16[1,8,16] {
  %p0 = bf16[4,8,16]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %ds = bf16[1,8,16]{2,1,0:S(1)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,16}
}

%fused_write (p0: bf16[4,8,16], p1: bf16[1,8,16], p2: s32[]) -> bf16[4,8,16] {
  %p0 = bf16[4,8,16]{2,1,0} parameter(0)
  %p1 = bf16[1,8,16]{2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %dus = bf16[4,8,16]{2,1,0} dynamic-update-slice(%p0, %p1, %p2, %zero, %zero)
}

%cond (arg: (s32[], bf16[4,8,16])) -> pred[] {
  %arg = (s32[], bf16[4,8,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %n = s32[] constant(4)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (arg: (s32[], bf16[4,8,16])) -> (s32[], bf16[4,8,16]) {
  %arg = (s32[], bf16[4,8,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %w = bf16[4,8,16]{2,1,0} get-tuple-element(%arg), index=1
  %slice = bf16[1,8,16]{2,1,0:S(1)} fusion(%w, %i), kind=kLoop, calls=%fused_slice
  %new = bf16[4,8,16]{2,1,0} fusion(%w, %slice, %i), kind=kLoop, calls=%fused_write
  ROOT %out = (s32[], bf16[4,8,16]{2,1,0}) tuple(%i, %new)
}

ENTRY %main (w: bf16[4,8,16], x: f32[8]) -> f32[8] {
  %w = bf16[4,8,16]{2,1,0} parameter(0)
  %x = f32[8]{0} parameter(1)
  %zero = s32[] constant(0)
  %init = (s32[], bf16[4,8,16]{2,1,0}) tuple(%zero, %w)
  %loop = (s32[], bf16[4,8,16]{2,1,0}) while(%init), condition=%cond, body=%body
  ROOT %y = f32[8]{0} add(%x, %x)
}
"""


def test_loops_count_their_slices_and_writes_in_place() -> None:
    """Four times a slice of 256 bytes and a counter read by two fusions; what lies in fast memory is free."""
    program = hlo.parse(HLO)
    assert bench_bytes.bytes_read(program.computations, program.entry) == 4 * (256 + 4 + 4) + 2 * 32


@pytest.mark.parametrize("layers", [3, 7])
def test_a_scan_reads_each_layer_once_and_a_gather_its_rows(layers: int) -> None:
    """A compiled program of this machine: within a tenth of its weights, however many layers; never the table."""

    @jax.jit
    def run(table: jax.Array, weights: jax.Array, ids: jax.Array) -> jax.Array:
        x = table[ids]
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((5000, 256), (layers, 256, 256))]
    text = run.lower(*shapes, jax.ShapeDtypeStruct((1,), jnp.int32)).compile().as_text()
    assert text is not None
    program = hlo.parse(text)
    computations, entry = program.computations, program.entry
    least = layers * 256 * 256 * 4
    found = bench_bytes.bytes_read(computations, entry)
    assert least <= found < 2.2 * least  # a CPU may copy a layer out of the stack before it reads it
    assert np.prod(shapes[0].shape) * 4 > found


def test_the_decoding_loop_is_the_one_whose_length_depends_on_data() -> None:
    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        x = jax.lax.fori_loop(0, 9, lambda i, x: x * 1.5, x)
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e6, lambda x: jax.lax.sin(x) + 2.0 * x, x)

    text = run.lower(jax.ShapeDtypeStruct((64,), jnp.float32)).compile().as_text()
    assert text is not None
    program = hlo.parse(text)
    computations, entry = program.computations, program.entry
    body = bench_bytes.decoding_loop(computations, entry)
    assert 256 <= bench_bytes.bytes_read(computations, body) < 1024
