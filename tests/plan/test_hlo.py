"""The text of compiled programs: what is read from it, and where it was asked for."""

import jax
import jax.numpy as jnp

from mmgpt.plan import hlo

TEXT = """HloModule m, is_scheduled=true

FileNames
1 "/somewhere/mmgpt/nn/param.py"
2 "/lib/python3/site-packages/jax/_src/api.py"

FunctionNames
1 "einsum"
2 "grad.<locals>.f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=75 end_line=75 column=4 end_column=8}
2 {file_name_id=2 function_name_id=2 line=9 end_line=9 column=4 end_column=8}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%region (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} add(%x, %x), metadata={op_name="jit(f)/add" stack_frame_id=2}, x={"estimated_cycles":"321"}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %k = f32[8]{0:T(8)S(1)} custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"text":"one
 two
", "estimated_cycles":"9223372036854775807"}
  ROOT %z = f32[8]{0} call(%k), to_apply=%region
}
"""


def test_instructions_have_their_cycles_operation_and_line() -> None:
    program = hlo.parse(TEXT)
    assert program.entry == "main" and set(program.computations) == {"region", "main"}
    y, k = program.computations["region"]["y"], program.computations["main"]["k"]
    assert (y.cycles, y.op_name, y.operands) == (321, "jit(f)/add", ("x", "x"))
    assert k.cycles is None  # the largest integer stands for no estimate
    assert str(program.source(y)) == "mmgpt/nn/param.py:75 einsum"  # and not the line of JAX inside it
    assert program.source(k) is None
    assert program.computations["main"]["z"].calls == {"to_apply": "region"}


def test_sizes_leave_out_fast_memory_unless_asked() -> None:
    k = hlo.parse(TEXT).computations["main"]["k"]
    assert hlo.size(k.type) == 0 and hlo.size_of_result(k) == 32


def test_loops_of_a_program_of_this_machine_have_their_length() -> None:
    text = jax.jit(lambda x: jax.lax.scan(lambda x, _: (jnp.sin(x), None), x, None, length=13)[0])
    program = hlo.parse(text.lower(jnp.ones(8)).compile().as_text() or "")
    loops = [i for c in program.computations.values() for i in c.values() if i.opcode == "while"]
    assert [hlo.trips(program.computations, loop) for loop in loops] == [13]
