"""`mmgpt bench attention`: blocks of the mixes, projections counted by hand, the picture, and real compilations."""

import importlib.util
import json
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from mmgpt.core.config import ConfigError
from mmgpt.evaluate import bench_attention_compile, bench_attention_ours, bench_attention_time, plan_picture
from mmgpt.evaluate.bench_attention import bench_attention
from mmgpt.evaluate.bench_attention_compile import compiled, cycles_of
from mmgpt.evaluate.bench_attention_peers import Case
from mmgpt.kernels.attention.plan import Blocks
from mmgpt.plan.attention import (
    MIXES,
    Cycles,
    Visits,
    by_segments,
    causal,
    documents,
    planned,
    projected,
    useful_flops,
    visible_pairs,
    visits,
)

CYCLES = Cycles(full=100, edge=120, mixed=150, step=10, row=50)


def test_a_projection_is_the_sum_of_its_parts() -> None:
    seen = Visits(full=3, edge=2, mixed=1, skipped=4, rows=2)
    row = 3 * 100 + 2 * 120 + 150 + (3 + 2 + 1) * 10 + 4 * 10 + 2 * 50
    assert projected(seen, CYCLES, heads=8, sequences=1, cores=1, units=8) == 8 * row
    assert projected(seen, CYCLES, heads=8, sequences=2, cores=2, units=16) == 8 * row


@pytest.mark.parametrize(("units", "share"), [(1, 1.0), (2, 0.5), (3, 2 / 3)])
def test_what_cannot_be_spread_stays_on_one_core(units: int, share: float) -> None:
    seen = Visits(full=1)
    whole = projected(seen, CYCLES, heads=6, sequences=1, cores=1, units=units)
    assert projected(seen, CYCLES, heads=6, sequences=1, cores=2, units=units) == pytest.approx(share * whole)


def test_splash_visits_every_causal_block() -> None:
    assert causal(8192, 1024) == Visits(full=28, edge=8, skipped=28, rows=8)


@pytest.mark.parametrize("mix", ["8k: 2 of 4.1k", "8k: 1-2k"])
def test_the_plan_visits_what_the_documents_overlap(mix: str) -> None:
    document = documents(*MIXES[mix])
    made = planned(document, Blocks(1024, 1024))
    rows = document.reshape(8, 1024)
    overlap = [[rows[i, 0] <= rows[j, -1] for j in range(i + 1)] for i in range(8)]
    expected = sum(map(sum, overlap))
    for seen in (*visits(made).values(), by_segments(made)):
        assert (seen.blocks, seen.skipped, seen.rows) == (expected, 0, 8)
    assert by_segments(made).edge == 8


@pytest.mark.parametrize("mix", MIXES)
def test_a_mix_fills_its_row_and_is_always_the_same(mix: str) -> None:
    length, kind = MIXES[mix]
    document = documents(length, kind)
    assert document.shape == (length,)
    assert document[0] == 0 and set(np.diff(document).tolist()) <= {0, 1}
    np.testing.assert_array_equal(document, documents(length, kind))


def test_useful_work_is_that_of_visible_pairs() -> None:
    document = np.array([0, 0, 0, 1, 1], np.int32)
    assert visible_pairs(document) == 6 + 3
    assert useful_flops(document, heads=2, head_dim=4, sequences=3) == 9 * 2 * 7 * 4 * 2 * 3


def test_a_picture_shows_the_classes_of_the_plan(tmp_path) -> None:
    document = documents(*MIXES["8k: 1-2k"])
    made = jax.device_get(planned(document, Blocks(512, 512)))
    klass = plan_picture.classes(made)
    seen = visits(made)["forward"]
    assert (klass.shape, int((klass != 0).sum())) == ((16, 16), seen.blocks)
    assert not np.triu(klass, 1).any()
    bench_attention(picture=tmp_path / "plan.png", picture_mix="8k: 1-2k", block=512)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"target": "v9"}, "one of v5p, v5e, v6e, v7x, or cpu"),
        ({"heads": 5}, "--heads 5 must be a multiple of --kv-heads 8"),
        ({"block": 100}, "--block 100: a multiple of 128"),
        ({"bound": float("nan")}, "--bound nan: what no logit passes"),
        ({"head_dim": 7}, "--head-dim 7: a multiple of 8"),
        ({"picture": Path("plan.pdf")}, "--picture plan.pdf: its name must end in .png"),
    ],
)
def test_wrong_arguments_are_told(arguments: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        bench_attention(**arguments)


@pytest.mark.parametrize(
    ("stderr", "told"),
    [
        ("RuntimeError: Unable to initialize: no libtpu.so found", "pip install libtpu"),
        ("jax.errors.JaxRuntimeError: INTERNAL: Mosaic failed", "splash does not compile for v5p, head dim 128"),
        ("mmgpt.core.config.ConfigError: a peer is missing (tokamax)", "a peer is missing"),
    ],
)
def test_a_failed_compilation_tells_what_helps(monkeypatch, stderr: str, told: str) -> None:
    done = bench_attention_compile.subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(bench_attention_compile.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(ConfigError, match=told):
        compiled(Case(implementation="splash", target="v5p"), "forward")


def test_a_locked_compiler_is_tried_again(monkeypatch) -> None:
    results = [("", "ABORTED: The TPU is already in use", 1), ('{"temp": 7, "fits": true}\n', "", 0)]

    def run(*_: object, **__: object) -> object:
        out, err, code = results.pop(0)
        return bench_attention_compile.subprocess.CompletedProcess([], code, out, err)

    monkeypatch.setattr(bench_attention_compile.subprocess, "run", run)
    monkeypatch.setattr(bench_attention_compile.time, "sleep", lambda _: None)
    assert compiled(Case(implementation="splash", target="v5p"), "forward", cycles=False).temp == 7
    assert not results


def test_cpus_are_measured_on_small_rows(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(bench_attention_time, "CPU_MIXES", {"small": (512, "1-2k")})
    bench_attention(target="cpu", json=tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) == {"small, forward", "small, forward and backward"}
    assert all(line["reference / xla"] > 0 for line in figures.values())


def test_useful_operations_are_those_on_what_is_seen(monkeypatch) -> None:
    case = Case(implementation="splash", target="gpu", length=6, heads=4, head_dim=8)
    document = np.array([0, 0, 0, 0, 1, 1], np.int32)  # 10 + 3 pairs
    forward = bench_attention_time.useful(case, document, "forward", 1e-12)
    assert forward == {"ours, useful TFLOP/s": 4 * 8 * 4 * 13}
    chip = types.SimpleNamespace(device_kind="NVIDIA H200")
    monkeypatch.setattr(bench_attention_time.jax, "devices", lambda: [chip])
    both = bench_attention_time.useful(case, document, "forward and backward", 1e-9)
    assert both["ours, useful TFLOP/s"] == round(3.5 * 4 * 8 * 4 * 13 / 1e3, 1)
    assert both["ours, % of H200's dense peak"] == round(100 * 3.5 * 4 * 8 * 4 * 13 / 1e3 / 989, 1)


def test_the_cost_of_a_program_is_that_of_its_loops_and_of_one_branch() -> None:
    program = """
%body.1 (p: s32[]) -> s32[] {
  %a = s32[] add(%p, %p), backend_config={"estimated_cycles":"10"}
}

%near.2 (p: s32[]) -> s32[] {
  %b = s32[] add(%p, %p), backend_config={"estimated_cycles":"5"}
}

%far.3 (p: s32[]) -> s32[] {
  %w = s32[] while(%p), condition=%c.4, body=%body.1
  %d = s32[] add(%p, %p), backend_config={"estimated_cycles":"9223372036854775807"}
}

ENTRY %main.5 (p: s32[]) -> s32[] {
  %e = s32[] add(%p, %p), backend_config={"estimated_cycles":"100"}
  %w = s32[] while(%p), condition=%c.4, body=%body.1
  %f = s32[] conditional(%p, %p, %p), branch_computations={%near.2, %far.3}
}
"""
    assert bench_attention_ours.estimated(program, 8) == (100 + 80 + 5, 100 + 80 + 80)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_splash_compiles_to_the_known_cycles() -> None:
    case = Case(implementation="splash", target="v5p", heads=8)
    cycles = cycles_of(case, compiled(case, "backward").kernels)
    # Another libtpu schedules anew; 0.0.52: 4709 and 10356.
    assert cycles["forward"].full == pytest.approx(4709, rel=0.1)
    assert cycles["backward"].full == pytest.approx(10356, rel=0.1)
