"""From prompts to scores, records and a page, with a run of random parameters."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from mmgpt.core import config
from mmgpt.core.config import ConfigError
from mmgpt.core.log import Metrics
from mmgpt.dist.mesh import Mesh
from mmgpt.evaluate.charts import lines_svg
from mmgpt.evaluate.command import TASKS, evaluate
from mmgpt.evaluate.records import RecordsError, load_records
from mmgpt.evaluate.report import ReportError, report
from mmgpt.evaluate.samples import sample_hook
from mmgpt.evaluate.subject import Options
from mmgpt.train.run import Opened, Run, build


@pytest.fixture(scope="module")
def scored(model_run: Path) -> Path:
    """The folder of the run, with scores of every task there are prompts for."""
    folder = model_run.parent
    prompts = tuple(str(path) for path in sorted((folder / "prompts").iterdir()))
    evaluate(model_run, prompts, json=folder / "scores.json", options=Options(batch=8))
    report(folder, examples=2)
    return folder


def test_scores_hold_every_metric_of_every_task(scored: Path):
    scores = json.loads((scored / "scores.json").read_text())
    for name in ("label", "draw", "next_frame"):
        assert set(TASKS[name].metrics) <= set(scores[name]) and scores[name]["count"] == 3
        assert all(0 <= value <= 1 for metric, value in scores[name].items() if metric != "count")
    assert scores["seconds"] > 0


def test_records_keep_prompt_and_output(scored: Path):
    draw = load_records(scored / "model" / "eval" / "draw", 2)
    assert [record.key for record in draw.records] == ["draw-0", "draw-1"]
    assert draw.records[0].prompt[0].text == "a red circle" and draw.figure == "objects"
    clip = load_records(scored / "model" / "eval" / "next_frame", 1).records[0]
    assert clip.made[0].clip and clip.made[0].given == 1
    assert clip.made[0].frames is not None and clip.prompt[0].frames is not None
    assert clip.made[0].frames.shape == (2, 8, 8, 3) and np.array_equal(
        clip.made[0].frames[0], clip.prompt[0].frames[0]
    )


def test_report_adds_training_to_the_scores(scored: Path):
    scores = json.loads((scored / "scores.json").read_text())
    model = scores["training"]["model"]
    assert model["steps"] == 2 and model["matmul_share"] == 0.5 and model["parameters"] > 1000
    report(scored, examples=2)
    assert json.loads((scored / "scores.json").read_text()) == scores


def test_page_is_self_contained_and_escaped(scored: Path):
    path = scored / "model" / "eval" / "draw" / "records.json"
    before = path.read_text()
    path.write_text(before.replace("a red circle", "<script>alert(1)</script>"))
    report(scored, examples=2)
    path.write_text(before)
    page = (scored / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    linked = re.findall(r"(?:src|href)=\"([^\"]*)\"", page)
    assert linked and all(link.startswith(("data:image/", "#")) for link in linked)
    for name in ("Text → image", "Video → next frame", "held-out text", "The model draws"):
        assert name in page


def test_page_names_the_commands(scored: Path):
    (scored / "times.json").write_text(json.dumps({"mmgpt train it": {"seconds": 90.0, "peak_gib": 1.5}}))
    report(scored, examples=1)
    page = (scored / "report.html").read_text()
    assert "mmgpt train it" in page and "90 s" in page
    assert json.loads((scored / "scores.json").read_text())["peak_gib"] == 1.5


def test_a_folder_without_runs_and_damaged_records_are_clear_errors(tmp_path: Path, scored: Path):
    with pytest.raises(ReportError, match="neither a run folder"):
        report(tmp_path)
    (tmp_path / "records.json").write_text("{}")
    with pytest.raises(RecordsError, match="mmgpt eval"):
        load_records(tmp_path, 1)


def test_charts_have_ids_of_their_own_and_the_colour_of_the_page():
    one, two = (lines_svg({"loss": {"text": ([1, 2], [2.0, 1.0])}}, "step", name) for name in "ab")
    assert "currentColor" in one and "#123456" not in one
    assert not set(re.findall(r'id="(p[0-9a-f]+)"', one)) & set(re.findall(r'id="(p[0-9a-f]+)"', two))


def opened_config(folder: Path) -> Run:
    run = config.load(folder / "config.json")
    assert isinstance(run, Run)
    return run


@pytest.mark.parametrize("mesh", [Mesh.Config(), Mesh.Config(fsdp=2, context=2, tensor=2)], ids=["rows", "context"])
def test_samples_are_drawn_from_held_out_texts(mesh: Mesh.Config, model_run: Path, tmp_path: Path):
    """Also while devices share rows, which decoding cannot."""
    known = opened_config(model_run).replace(mesh=mesh)
    hook = sample_hook(known)
    assert hook is not None
    built = build(known)
    with jax.set_mesh(built.mesh):
        params, variables = jax.jit(built.structure.fresh)()
    metrics = Metrics(tmp_path)
    hook(Opened(built, 7, params, variables), metrics)
    metrics.close()
    lines = (tmp_path / "samples" / "00000007-drawings.txt").read_text().splitlines()
    assert len(lines) == 2 and lines[0].startswith("1. ")


def test_samples_never_end_a_run_but_their_lack_is_told_at_the_start(model_run: Path, tmp_path: Path):
    known = opened_config(model_run)
    hook = sample_hook(known)
    assert hook is not None
    metrics = Metrics(tmp_path)
    hook(Opened(build(known), 7, None, None), metrics)
    metrics.close()
    assert not (tmp_path / "samples").exists()
    tokens = known.tokens.replace(vision=str(tmp_path))  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match="no checkpoint of an image tokenizer"):
        sample_hook(known.replace(tokens=tokens))
