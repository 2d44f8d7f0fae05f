"""Cycles from a compiler's dump: a small one whose cycles are counted by hand, and a real one where libtpu is."""

from pathlib import Path

import pytest

from mmgpt.core.config import ConfigError
from mmgpt.plan import kernel_cycles
from mmgpt.plan.kernel_cycles import TARGETS

COLUMNS = "MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"
NOTHING = "0 0 0 0 0 0 0 0 0 0 0"
SPILL = "0 0 0 0 0 0 0 0 1 1 0"
PLAIN = "%1 = snop 0"


def dump(folder: Path, loop_exit: str = "10 /* loop exit test */") -> Path:
    """A grid loop of 26 bundles: a guarded part of 6, a guarded body of 5 with 3 matmuls on one MXU, and 15 others."""
    text = [[PLAIN] for _ in range(28)]
    text[1].append("Start region 20")
    text[3].append("%2 = sbr.rel (%p1) target = $region5")
    text[8].append("Start region 4")  # behind 4 bundles that are issued either way
    text[13].append("End region 4")
    text[14].append("Start/End empty region 5")
    text[14].append("%3 = sbr.rel (%p2) target = $region7")
    text[19].append("Start region 6")
    for i in (19, 20, 21):
        text[i].append("%4 = vmatmul.bf16.gmra.mxu1 %v1")
    text[23].append("End region 6")
    text[24].append("Start/End empty region 7")
    text[22].append("%5 = sbr.rel (!%p3) target = $region20")
    text[21].append(f"%p3 = scmp.ge.s32.totalorder %s1, {loop_exit}")
    text[26].append("End region 20")
    name = folder / "123-attention.1-72-final_bundles.txt"
    marks = ("Start", "End")
    lines = ["control target key"]
    for i, parts in enumerate(text):
        code = " ;; ".join(p for p in parts if not p.startswith(marks))
        notes = " ".join(f"/* {p} */" for p in parts if p.startswith(marks))
        lines.append(f" {hex(i)} {'LB' if i == 1 else '  '}: > {{ {code} }} {notes}")
    name.write_text("\n".join(lines) + "\n")
    rows = [SPILL if i in (20, 22) else NOTHING for i in range(len(text))]
    table = folder / "123-attention.1-73-final_hlo-static-per-bundle-utilization.txt"
    table.write_text("\n".join(["== CAPACITY:", COLUMNS, "4 4 3 4 2 1 3 3 1 1 2", "== UTILIZATION:", *rows]) + "\n")
    return name


def test_a_body_waits_for_its_mxu(tmp_path):
    dump(tmp_path)
    (kernel,) = kernel_cycles.read_all(tmp_path, TARGETS["v5p"])
    (body,) = kernel.bodies
    # Bundles 19 and 20 issue at 1 and 2, their matmuls hold the MXU to 17 and 33; the queue has room for the third at
    # 17, bundles 22 and 23 follow, and the MXU is busy for 48 cycles in all.
    assert (body.first, body.last) == (19, 23)
    assert (body.cost.bundles, body.cost.matmuls) == (5, 3)
    assert body.cost.mxu_busy == pytest.approx(48, rel=2e-3)
    assert body.cost.sim == pytest.approx(48, rel=2e-3)
    assert body.cost.spills == 2
    assert body.cost.fills == 0


def test_an_mxu_of_v6e_takes_two_rows_a_cycle(tmp_path):
    dump(tmp_path)
    (kernel,) = kernel_cycles.read_all(tmp_path, TARGETS["v6e"])
    assert kernel.bodies[0].cost.mxu_busy == pytest.approx(24, rel=2e-3)


def test_what_no_branch_skips_is_the_step(tmp_path):
    dump(tmp_path)
    (kernel,) = kernel_cycles.read_all(tmp_path, TARGETS["v5p"])
    assert kernel.grid is not None
    assert (kernel.grid.first, kernel.grid.last, kernel.steps) == (1, 26, 8)
    assert [(part.first, part.last) for part in kernel.parts] == [(8, 13), (19, 23)]
    assert kernel.step.sim == 26 - 6 - 5
    assert kernel.row == 6
    assert kernel.regions["R4"].bundles == 6
    assert kernel.regions["R20"].bundles == 26 - 6 - 5 - 2  # two bundles are of the empty regions


def test_a_dynamic_grid_has_no_steps(tmp_path):
    dump(tmp_path, "%s9 /* loop exit test */")
    (kernel,) = kernel_cycles.read_all(tmp_path, TARGETS["v5p"])
    assert kernel.steps is None
    assert kernel.step.sim == 15


@pytest.mark.parametrize(
    ("instruction", "rows"), [("bf16.gmra.", 16), ("f32.vlgmr.msra.gmra.", 8), ("f8e4m3.gmra.", 32), ("s4.gmra.", 64)]
)
def test_rows_follow_from_the_type(instruction: str, rows: int) -> None:
    assert kernel_cycles.rows_of(instruction) == rows


def test_a_file_without_bundles_is_told(tmp_path):
    path = tmp_path / "1-a-1-final_bundles.txt"
    path.write_text("nothing\n")
    with pytest.raises(ConfigError, match=r"no bundles; dumps of libtpu 0\.0\.52"):
        kernel_cycles.read(path, TARGETS["v5p"])


def test_the_peak_of_a_core_is_the_published_one() -> None:
    assert TARGETS["v5p"].rows_per_cycle == pytest.approx(1, rel=1e-2)
    assert TARGETS["v7x"].rows_per_cycle == pytest.approx(2, rel=1e-2)
