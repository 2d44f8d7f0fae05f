"""The page of a plan: of a step that is really compiled, with the numbers that `--json` writes."""

import html
import json
import re
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest

from mmgpt import cli
from mmgpt.data.pages import number, percent
from mmgpt.plan.memory import Memory
from mmgpt.plan.page import memory_svg, turn_svg
from mmgpt.plan.schedule import Piece, Turn

pytest.importorskip("libtpu", reason="compiles for TPUs: pip install libtpu")
SMALL = ["model.layers=4", "model.embed=512", "model.mlp=1024", "model.heads=4", "model.kv_heads=2", "model.vocab=4096"]
SMALL += ["data.row_length=2048", "data.batch_rows=8", "mesh.fsdp=4", "mesh.replica=1", "model.remat=projections"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The page and the numbers of one plan."""
    folder = tmp_path_factory.mktemp("plan")
    page, numbers = folder / "plan.html", folder / "plan.json"
    written = ["--html", str(page), "--json", str(numbers)]
    assert cli.main(["plan", "emu3_0_1b", "--topology", "v5p:2x2x1", *SMALL, *written]) == 0
    return page.read_text(), json.loads(numbers.read_text())


def charts(page: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", page, re.DOTALL)


def words(svg: str) -> str:
    return " ".join(text for text in ET.fromstring(svg).itertext() if text.strip())


@pytest.mark.slow
def test_the_numbers_of_the_page_are_those_of_the_plan(made: tuple[str, dict[str, Any]]) -> None:
    page, numbers = made
    found = re.search(r'<pre id="numbers"[^>]*>(.*?)</pre>', page, re.DOTALL)
    assert found and json.loads(html.unescape(found[1])) == numbers
    seen = re.sub(r"<[^>]*>", "", page[: page.index("<h2>All numbers")])
    for told in (
        f"{number(numbers['step_seconds'])} s a step of {numbers['tokens_a_step']:,} tokens",
        f"{number(numbers['tokens_a_second_and_chip'])} tokens a second and chip",
        f"{percent(numbers['utilisation'])} of the peak",
        f"memory {number(numbers['memory_total'] / 1e9)} GB",
        "4 chips: fsdp 4",
    ):
        assert told in seen, told
    for kind, size in numbers["memory"].items():
        assert f"{kind}{number(size * 1e-9)} GB" in seen, kind
    for what, seconds in numbers["seconds_by_what"].items():
        assert not seconds or f"{what}{number(seconds * 1e3)} ms" in seen, what


@pytest.mark.slow
def test_pictures_are_whole_and_tell_the_peak_and_the_phases(made: tuple[str, dict[str, Any]]) -> None:
    page, numbers = made
    memory, time, *turns = charts(page)
    in_use = sum(size for kind, size in numbers["memory"].items() if kind != "between buffers")
    assert f"peak: {in_use / 1e9:.3g} GB" in words(memory)
    for kind in ("parameters", "moments", "kept activations", "gradients"):
        assert kind in words(memory), kind
    for phase, seconds in numbers["seconds_by_phase"].items():
        assert phase in words(time) and f"{seconds / numbers['step_seconds']:.1%}" in words(time)
    assert len(turns) >= 2
    said = re.findall(r"<h3>([^<]*): ([\d,]+) turns of", page)
    assert len(said) == len(turns)
    assert any(
        "backward" in phases and int(times) in (3, 4) for phases, times in said
    )  # of 4 layers: one may be taken out
    assert all("TensorCores" in words(turn) for turn in turns)
    assert sum("links" in words(turn) for turn in turns) >= 2


@pytest.mark.slow
def test_the_page_tells_lines_that_ask_for_communication_and_loads_nothing(made: tuple[str, dict[str, Any]]) -> None:
    page, _ = made
    assert re.search(r"<td>all-gather over 4: mmgpt/\w+/\w+\.py:\d+ \w+", page)
    assert re.search(r"<td>reduce-scatter over 4: mmgpt/", page)
    assert not re.search(r'<script|<link|(?:src|href)="(?!#|data:)', page)


@pytest.mark.parametrize(("limit", "said"), [(8e9, "a chip has 8 GB"), (95e9, "a chip has 95 GB, far above")])
def test_a_picture_of_memory_tells_the_peak_what_is_laid_out_and_the_limit(limit: float, said: str) -> None:
    over = {"kept activations": np.arange(2000) * 10**6, "working": np.zeros(2000, np.int64)}
    over["working"][1234] = 10**9  # one instruction of two thousand
    held = {"parameters": 4 * 10**9}
    told = words(memory_svg(Memory(held=held, over=over, temporary=25 * 10**8, limit=limit, largest=())))
    assert "peak: 6.23 GB" in told and "laid out: 6.5 GB" in told and f" {said} " in f" {told} "


def test_a_transfer_that_outlasts_a_turn_goes_on_at_its_beginning() -> None:
    def bars(begin: float) -> int:
        carried = Piece(begin=begin, seconds=3e-4, what="all-gather", phase="", name="", row="links")
        work = Piece(begin=0.0, seconds=1e-3, what="products", phase="forward", name="")
        return turn_svg(Turn(times=2, seconds=1e-3, pieces=(work, carried)), "turn").count('id="PolyCollection')

    assert (bars(2e-4), bars(9e-4)) == (3, 4)
