"""The time of a step from its schedule: loops, what transfers hide behind, links of the torus."""

import itertools
from types import SimpleNamespace

import pytest

from mmgpt.core.config import ConfigError
from mmgpt.plan import hlo
from mmgpt.plan.chips import CHIPS, chip_of
from mmgpt.plan.collectives import Torus, groups_of
from mmgpt.plan.schedule import WAITING, Schedule, exposed_bytes

V5P = CHIPS["v5p"]
HEAD = """HloModule m, is_scheduled=true

%gathered (p: bf16[64,128]) -> bf16[1024,128] {
  %p = bf16[64,128]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[1024,128]{1,0} all-gather(%p), replica_groups=mesh['replica'=4,'fsdp'=16] {'fsdp'}
}

%fused (p: bf16[1024,128]) -> bf16[1024,128] {
  %p = bf16[1024,128]{1,0} parameter(0)
  ROOT %d = bf16[1024,128]{1,0} convolution(%p, %p)
}

%condition (arg: (s32[], bf16[64,128])) -> pred[] {
  %arg = (s32[], bf16[64,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
"""
BODY = """
%body (arg: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {{
  %arg = (s32[], bf16[64,128]{{1,0}}) parameter(0)
  %w = bf16[64,128]{{1,0}} get-tuple-element(%arg), index=1
  %start = ((), ()) custom-call-start(), called_computations={{%gathered}}
  %update = ((), ()) custom-call-update(%start, %w)
  %work = bf16[1024,128]{{1,0}} fusion(%w), calls=%fused, metadata={{op_name="jvp()/dot"}}, {{"estimated_cycles":"{c}"}}
  %done = bf16[1024,128]{{1,0}} custom-call-done(%update)
  %fill = bf16[4096,128]{{1,0}} broadcast(%zero), dimensions={{}}
  ROOT %out = (s32[], bf16[64,128]{{1,0}}) tuple(%w, %w)
}}

ENTRY %main (w: bf16[64,128]) -> bf16[64,128] {{
  %w = bf16[64,128]{{1,0}} parameter(0)
  %init = (s32[], bf16[64,128]{{1,0}}) tuple(%w, %w)
  %loop = (s32[], bf16[64,128]{{1,0}}) while(%init), condition=%condition, body=%body
  ROOT %r = bf16[64,128]{{1,0}} get-tuple-element(%loop), index=1
}}
"""
GATHER = 1024 * 128 * 2 * 15 / 16 / (4 * V5P.link)
FILL = 4096 * 128 * 2 / V5P.bandwidth


def cube(*sides: int) -> list[SimpleNamespace]:
    """Devices in the order of a mesh that lies on the torus as its sides do."""
    return [SimpleNamespace(coords=place) for place in itertools.product(*map(range, sides))]


def told(cycles: int):
    program = hlo.parse(HEAD + BODY.format(c=cycles))
    return Schedule(program, V5P, Torus(V5P, cube(4, 4, 4)), lambda _: None).told()


def test_work_that_is_longer_hides_a_transfer() -> None:
    work = 2 * GATHER
    found = told(round(work * V5P.clock))
    assert found.exposed == 0.0
    assert found.seconds == pytest.approx(5 * (work + FILL), rel=1e-3)
    assert found.by_what["products"] == pytest.approx(5 * work, rel=2e-3)
    assert found.by_what["filling arrays"] == pytest.approx(5 * FILL)
    assert exposed_bytes(found) == (pytest.approx(5 * 1024 * 128 * 2), 0.0)


def test_what_work_does_not_hide_is_waited_for_and_told_as_bytes() -> None:
    work = GATHER / 4
    found = told(round(work * V5P.clock))
    assert found.exposed == pytest.approx(5 * (GATHER - work), rel=1e-3)
    total, waited = exposed_bytes(found)
    assert waited / total == pytest.approx(0.75, rel=1e-3)
    assert found.by_phase["forward"] == pytest.approx(5 * work, rel=1e-2)  # whole cycles


@pytest.mark.parametrize(("microbatched", "runs"), [(True, 25), (False, 30)])
def test_what_a_loop_over_microbatches_moves_itself_is_not_of_the_layers(microbatched: bool, runs: int) -> None:
    layers, entry = BODY.format(c=1).split("ENTRY")
    around = """
%around (arg: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %arg = (s32[], bf16[64,128]{1,0}) parameter(0)
  %w = bf16[64,128]{1,0} get-tuple-element(%arg), index=1
  %start = ((), ()) custom-call-start(), called_computations={%gathered}
  %update = ((), ()) custom-call-update(%start, %w)
  %done = bf16[1024,128]{1,0} custom-call-done(%update)
  %layers = (s32[], bf16[64,128]{1,0}) while(%arg), condition=%condition, body=%body
  ROOT %out = (s32[], bf16[64,128]{1,0}) tuple(%w, %w)
}

ENTRY"""
    program = hlo.parse(HEAD + layers + around + entry.replace("body=%body", "body=%around"))
    torus = Torus(V5P, cube(4, 4, 4))
    found = Schedule(program, V5P, torus, lambda _: None, microbatched=microbatched).told()
    assert sum(times for _, times, _ in found.transfers) == 30
    assert exposed_bytes(found)[0] == pytest.approx(runs * 1024 * 128 * 2)


def test_a_kernel_without_a_known_time_is_told() -> None:
    text = HEAD + BODY.format(c=1).replace(
        "%fill = bf16[4096,128]{1,0} broadcast(%zero), dimensions={}",
        '%mine = bf16[8,128]{1,0} custom-call(%w), custom_call_target="tpu_custom_call"',
    )
    torus = Torus(V5P, cube(4, 4, 4))
    assert Schedule(hlo.parse(text), V5P, torus, lambda _: None).told().unknown == {"mine": 5}
    for name, what in (
        ("attention_forward.2", "attention"),
        ("attention_turn.1", "heads"),
        ("jvp_heads_forward_.1", "heads"),
    ):
        timed = Schedule(hlo.parse(text.replace("%mine", f"%{name}")), V5P, torus, lambda _: 0.5).told()
        assert timed.by_what[what] == 2.5 and not timed.unknown


@pytest.mark.parametrize(
    ("line", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, use", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=3] {'a'}, x", [[0, 3], [1, 4], [2, 5]]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([8]) {'b'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("channel_id=1", []),
    ],
)
def test_groups_are_read_in_each_way_that_the_text_has(line: str, groups: list[list[int]]) -> None:
    assert groups_of(line, 8) == groups


def test_a_ring_uses_both_directions_of_each_dimension_whose_ends_are_joined() -> None:
    pod = Torus(V5P, cube(4, 4, 2))
    plane = [i for i, d in enumerate(cube(4, 4, 2)) if d.coords[2] == 0]
    assert pod.links(plane) == 4
    assert pod.links(range(32)) == 5  # two joined dimensions, and one of two chips
    assert pod.links([0, 1]) == 1
    flat = Torus(CHIPS["v6e"], cube(16, 4))
    assert flat.links([i * 4 for i in range(16)]) == 2 and flat.links(range(4)) == 1  # only 16 in a line are a ring


def test_topologies_that_cannot_be_are_told() -> None:
    assert chip_of("v6e:16x16") is CHIPS["v6e"]
    for name, message in (
        ("v5p", "give a chip and the sides"),
        ("h100:8", "chips are v4, v5e"),
        ("v5p:8x8", "a v5p has 3 dimensions"),
        ("v6e:4xx", "give a chip"),
    ):
        with pytest.raises(ConfigError, match=message):
            chip_of(name)


AWAY = """
ENTRY %main (w: bf16[1024,128]) -> bf16[1024,128] {{
  %w = bf16[1024,128]{{1,0}} parameter(0)
  %t = token[] after-all()
  %send = (bf16[1024,128]{{1,0}}, u32[]{{:S(2)}}, token[]) send(%w, %t), frontend_attributes={{{runtime}}}
  %recv = (bf16[1024,128]{{1,0}}, u32[]{{:S(2)}}, token[]) recv(%t), frontend_attributes={{{runtime}}}
  %kept = (bf16[1024,128]{{1,0:S(5)}}, bf16[1024,128]{{1,0}}, u32[]{{:S(2)}}) copy-start(%w)
  %work = bf16[1024,128]{{1,0}} fusion(%w), calls=%fused, metadata={{op_name="jvp()/dot"}}, {{"estimated_cycles":"{c}"}}
  %sent = token[] send-done(%send)
  %got = (bf16[1024,128]{{1,0}}, token[]) recv-done(%recv)
  %there = bf16[1024,128]{{1,0:S(5)}} copy-done(%kept)
  ROOT %r = bf16[1024,128]{{1,0}} get-tuple-element(%got), index=0
}}
"""


@pytest.mark.parametrize("share", [0.0, 0.5, 3.0])
def test_the_network_and_the_host_are_channels_of_their_own(share: float) -> None:
    size = 1024 * 128 * 2
    network, host = size / V5P.network, size / V5P.host
    body = AWAY.format(
        c=round(share * network * V5P.clock), runtime='_xla_host_transfer_handler_name="xla_megascale_runtime"'
    )
    two = [SimpleNamespace(coords=d.coords, slice_index=i) for i in (0, 1) for d in cube(2, 2, 1)]
    told = Schedule(hlo.parse(HEAD + body), V5P, Torus(V5P, two), lambda _: None).told()
    assert network > host
    assert told.seconds == pytest.approx(max(share, 1.0) * network, rel=1e-3)
    found = {c.kind: c.bytes for c, _, _ in told.transfers}
    assert found == pytest.approx({"sum between slices": size, "host copy": size}, rel=1e-3)


def test_a_turn_of_a_loop_tells_its_work_its_waiting_and_its_transfers() -> None:
    work = GATHER / 4
    found = told(round(work * V5P.clock))
    turn = found.turns["body"]
    assert (turn.times, turn.seconds) == (5, pytest.approx(GATHER + FILL, rel=1e-3))
    cores = [(p.what, p.begin, p.seconds) for p in turn.pieces if p.row == "cores" and p.seconds]
    expected = [("products", 0.0, work), (WAITING, work, GATHER - work), ("filling arrays", GATHER, FILL)]
    for (what, *times), (kind, *spans) in zip(cores, expected, strict=True):
        assert what == kind and times == pytest.approx(spans, rel=2e-3)  # cycles are whole
    (carried,) = [p for p in turn.pieces if p.row == "links"]
    assert (carried.what, carried.begin, carried.seconds) == ("all-gather", 0.0, pytest.approx(GATHER))
    assert sum(found.by_part.values()) == pytest.approx(found.seconds)
    assert found.by_part["forward", "products"] == pytest.approx(5 * work, rel=2e-3)
    assert found.by_part["", WAITING] == found.exposed
