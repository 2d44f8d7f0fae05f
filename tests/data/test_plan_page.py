"""What `mmgpt data plan` tells: numbers that a count over every row gives too, and warnings only where they are due."""

import io
import json
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from matplotlib.colors import to_rgb

from mmgpt import cli
from mmgpt.core import config
from mmgpt.core.document import Document, Text
from mmgpt.data import plan_values
from mmgpt.data.figures import PADDING, colour
from mmgpt.data.loader import PackedRows
from mmgpt.data.mixture import Change, Source
from mmgpt.data.plan_page import plan_html, rows_picture
from mmgpt.data.plan_values import Described, describe
from mmgpt.data.plan_warnings import misfits, padding_expected, warnings
from mmgpt.dist.mesh import Mesh
from tests import tiny

STEPS, BATCH, ROW = 40, 4, 128


def write(folder: Path, name: str, lengths: list[int]) -> str:
    """A dataset of texts that are so many tokens each under the grammar."""
    rng = np.random.default_rng(len(lengths))
    known = np.unique(tiny.text().encode("".join(tiny.SENTENCES)))
    texts = [Text(ids=rng.choice(known, n - 2).astype(np.int32)) for n in lengths]
    return tiny.write(folder / name, [Document(key=str(i), segments=(text,)) for i, text in enumerate(texts)])


def lengths(count: int, low: int, high: int) -> list[int]:
    return np.random.default_rng(count).integers(low, high, count).tolist()


def told(sources: tuple[Source.Config, ...], steps: int = STEPS, **changes: object) -> Described:
    base = PackedRows.Config(sources=sources, row_length=ROW, batch_rows=BATCH, held_out=0.1).replace(**changes)
    rows = base.build(tiny.grammar(), seed=0, rows=steps * BATCH, folder=None)
    return describe(base, rows, steps)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Described:
    """A mixture that changes at step 20, with a source that ends."""
    folder = tmp_path_factory.mktemp("mixed")
    long, short, few = (
        Source.Config(path=write(folder, "long", lengths(300, 60, 120)), weight=3.0),
        Source.Config(path=write(folder, "short", lengths(900, 4, 30))),
        Source.Config(path=write(folder, "few", lengths(20, 20, 40)), max_epochs=2),
    )
    later = (long.replace(weight=1.0), short)
    return told((long, short, few), changes=(Change(step=20, sources=later),))


def names(found: Described, row: int) -> list[str]:
    return [found.plan.sources[i] for i in found.plan.row(row).source.tolist()]


def test_numbers_are_those_of_a_count_over_every_row(mixed: Described) -> None:
    values, plan = mixed.values, mixed.plan
    assert values["rows"] == STEPS * BATCH == len(plan) and values["looked_at_rows"] == len(plan)
    rows = [(names(mixed, r), plan.row(r).length.tolist()) for r in range(len(plan))]
    assert values["tokens"] == sum(sum(held) for _, held in rows)
    assert values["padding"] == sum(ROW - sum(held) for _, held in rows)
    assert values["padding"] + values["tokens"] == values["context"] == len(plan) * ROW
    for name, source in values["sources"].items():
        held = [n for which, tokens in rows for w, n in zip(which, tokens, strict=True) if w == name]
        assert (source["tokens"], source["documents"]) == (sum(held), len(held))
        assert source["rows"] == sum(name in which for which, _ in rows)
        assert source["mean_length"] == pytest.approx(np.mean(held))
        documents = np.concatenate([plan.row(r).document[np.array(names(mixed, r)) == name] for r in range(len(plan))])
        kept = source["epoch"]["documents"]
        assert source["epochs"] == pytest.approx(len(documents) / kept)
        assert kept == len(next(m for m in mixed.mixtures[0] if m.name == name).lengths)
        assert source["documents_a_batch"] == pytest.approx(len(held) / STEPS)
    assert sum(source["share"] for source in values["sources"].values()) == pytest.approx(1)
    assert sum(source["weight"] for source in values["sources"].values()) == pytest.approx(1)


def test_each_mixture_has_its_shares_and_its_fill(mixed: Described) -> None:
    first, second = mixed.values["mixtures"]
    assert (first["from_step"], first["to_step"], second["from_step"], second["to_step"]) == (0, 20, 20, STEPS)
    assert first["tokens"] + second["tokens"] == mixed.values["tokens"]
    assert list(second["sources"]) == ["long", "short"]
    assert all(s["share"] == pytest.approx(s["weight"], abs=0.05) for s in second["sources"].values())
    used = [sum(mixed.plan.row(r).length.tolist()) for r in range(STEPS * BATCH)]
    for mixture in (first, second):
        part = used[mixture["from_step"] * BATCH : mixture["to_step"] * BATCH]
        assert mixture["fill"] == pytest.approx(sum(part) / (len(part) * ROW))


def test_the_step_at_which_a_source_ends_is_that_of_its_last_document(mixed: Described) -> None:
    last = max(r for r in range(len(mixed.plan)) if "few" in names(mixed, r))
    assert mixed.values["sources"]["few"]["ends_at_step"] == last // BATCH < STEPS - 1
    assert mixed.values["sources"]["long"]["ends_at_step"] is None
    (warning,) = [warning for warning in warnings(mixed) if warning.startswith("few: max_epochs 2 ends ")]
    assert f"at step {last // BATCH} of {STEPS}" in warning and "--data.sources.2.max-epochs" in warning


def test_of_a_long_plan_totals_stay_exact(mixed: Described, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_values, "SPANS", 10)
    monkeypatch.setattr(plan_values, "LOOK", 200)
    paths = tuple(m.config for m in mixed.mixtures[0])
    found = told(paths, changes=mixed.config.changes)
    assert 0 < found.values["looked_at_rows"] < found.values["rows"]
    for name, source in found.values["sources"].items():
        whole = mixed.values["sources"][name]
        assert {k: source[k] for k in ("tokens", "documents", "epochs")} == {
            k: whole[k] for k in ("tokens", "documents", "epochs")
        }
        assert source["rows"] == pytest.approx(whole["rows"], abs=0.25 * found.values["rows"])
    reckoned = sum(mixture["tokens"] for mixture in found.values["mixtures"])
    assert reckoned == pytest.approx(found.values["tokens"], rel=0.2)
    assert "reckoned from" in plan_html(found, [], "x") and "reckoned from" not in plan_html(mixed, [], "x")


# --- warnings


@pytest.mark.parametrize("length", [66, 72, 50])
@pytest.mark.parametrize("weight", [0.5, 0.12, 0.02])
def test_pictures_that_do_not_fit_twice_are_told_with_the_padding_they_cost(
    tmp_path: Path, length: int, weight: float
) -> None:
    pictures = Source.Config(path=write(tmp_path, "pictures", [length] * 200), weight=1 - weight)
    found = told((pictures, Source.Config(path=write(tmp_path, "text", lengths(900, 4, 20)), weight=weight)))
    (misfit,) = misfits(found.mixtures[0], ROW)
    assert misfit.count == ROW // length and misfit.left == ROW % length
    _, expected = padding_expected(found.mixtures[0], [misfit])
    assert expected == pytest.approx(found.values["padding_share"], abs=0.06)
    told_so = [warning for warning in warnings(found) if "do not fit a row" in warning]
    assert bool(told_so) == (expected >= 0.02 and found.values["padding_share"] >= 0.01)
    (full,) = [w for w in warnings(found) if "full: " in w] or [""]
    assert bool(full) == (found.values["fill"] < 0.95) and ("Longer rows" in full) == bool(full and not told_so)
    for warning in told_so:
        more = ROW // length + 1
        assert f"{length} tokens do not fit a row of {ROW} ({length} x {more} = {length * more})" in warning
        assert f"--data.row-length) hold {['two', 'three'][more - 2]}" in warning


def test_a_mixture_that_fits_is_not_warned_of(tmp_path: Path) -> None:
    sources = (
        Source.Config(path=write(tmp_path, "pictures", [64] * 200)),
        Source.Config(path=write(tmp_path, "text", lengths(1800, 4, 10))),
    )
    assert warnings(told(sources, steps=50)) == []


def test_each_thing_that_is_wrong_is_told_once_with_its_flag(tmp_path: Path) -> None:
    sources = (
        Source.Config(path=write(tmp_path, "many", lengths(3000, 40, 90))),
        Source.Config(path=write(tmp_path, "again", lengths(30, 10, 20)), weight=0.2),
        Source.Config(path=write(tmp_path, "long", [20] * 90 + [200] * 10), weight=0.1),
        Source.Config(path=write(tmp_path, "rare", lengths(40, 40, 50)), weight=0.02),
        Source.Config(path=write(tmp_path, "kept", [20]), weight=0.1),
    )
    change = Change(step=STEPS + 5, sources=sources[:1])
    found = warnings(told(sources, changes=(change,), held_out=0.001))
    expected = {
        r"^many: the run ends before its first pass does: .* never read": 1,
        r"^again: its \d+ documents come .* times each.*--data\.sources\.1\.weight": 1,
        rf"^long: 10 documents are longer than a row of {ROW} tokens.* 52.6 % of its tokens\. Split .*"
        r"--data\.sources\.2\.split True.* has 200 tokens": 1,
        r"^rare: a batch holds 0\.\d+ documents.*--data\.sources\.3\.weight": 1,
        r"^kept: none of its documents is held out": 1,
        r"^The mixture from step 45 on is never reached.*--data\.changes\.0\.step": 1,
    }
    for pattern, count in expected.items():
        assert sum(bool(re.search(pattern, warning)) for warning in found) == count, (pattern, found)


def test_a_source_that_is_alone_is_to_be_seen_in_fewer_steps(tmp_path: Path) -> None:
    source = Source.Config(path=write(tmp_path, "alone", lengths(300, 4, 20)))
    (warning,) = warnings(told((source,)))
    assert "weight" not in warning
    steps = int(re.findall(r"4 times is (\d+) steps", warning)[0])
    assert told((source,), steps=steps).values["sources"]["alone"]["epochs"] == pytest.approx(4, rel=0.05)


def test_texts_too_long_and_a_lone_document_are_told_in_words_that_fit(tmp_path: Path) -> None:
    sources = (
        Source.Config(path=write(tmp_path, "long", [20] * 90 + [200]), split=True),
        Source.Config(path=write(tmp_path, "lone", [20])),
    )
    found = "\n".join(warnings(told(sources)))
    assert "1 segment is alone longer" in found and "a long text is imported in segments of up to 8,000" in found
    assert re.search(r"lone: its one document comes [\d.]+ times, and beyond 4 times it teaches less", found)


# --- the page and the command


def test_the_page_loads_nothing_and_its_text_is_escaped(mixed: Described) -> None:
    page = plan_html(mixed, ["<script>a warning</script>"], "<b>title</b>")
    assert "<script" not in page and "<b>title" not in page and "&lt;script&gt;a warning" in page
    assert re.findall(r'(?:src|href)="([a-z]+:)', page) == ["data:", "data:"] and "default-src 'none'" in page


def test_the_picture_has_the_colour_of_every_source_and_of_padding(mixed: Described) -> None:
    picture = np.asarray(PIL.Image.open(io.BytesIO(rows_picture(mixed))).convert("RGB")).reshape(-1, 3)
    for paint in (PADDING, *(colour(i) for i in range(3))):
        wanted = np.round(255 * np.array(to_rgb(paint))).astype(int)
        assert (np.abs(picture.astype(int) - wanted).max(axis=1) <= 1).sum() > 200, paint


def call(*arguments: str) -> int:
    try:
        return cli.main(list(arguments))
    except SystemExit as e:
        return int(e.code or 0)


def saved(tmp_path: Path) -> Path:
    run = tiny.run(tmp_path, steps=3)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(config.to_json(run))
    return tmp_path / "run"


def test_the_command_writes_what_it_tells_and_needs_no_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved(tmp_path)
    monkeypatch.setattr(Mesh.Config, "build", lambda self: pytest.fail("a plan needs no devices"))
    files = {kind: tmp_path / f"plan.{kind}" for kind in ("html", "json", "png")}
    flags = [part for kind, file in files.items() for part in (f"--{kind}", str(file))]
    assert call("data", "plan", str(run), "--data.sources.0.weight", "3", "steps=5", *flags) == 0
    values = json.loads(files["json"].read_text())
    assert values["steps"] == 5 and values["rows"] == 40
    assert [round(s["weight"], 2) for s in values["sources"].values()] == [0.75, 0.25]
    out = " ".join(capsys.readouterr().out.split())
    assert all(warning[:60] in out for warning in values["warnings"]) and "wasted context" in out
    assert files["png"].read_bytes().startswith(b"\x89PNG") and "<h1>" in files["html"].read_text()
    (kept,) = (run / "plans").iterdir()  # where training finds it
    assert (kept / "plan.json").is_file()


def test_a_wrong_key_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("data", "plan", str(saved(tmp_path)), "--data.rowlength", "9") == 2
    assert "row-length" in capsys.readouterr().err
    assert call("data", "plan", "quickstart_model", "--help") == 0
    assert "--png" in capsys.readouterr().out


def test_missing_data_are_named_with_the_command_that_makes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("data", "plan", "quickstart_model") == 1
    error = capsys.readouterr().err
    assert "runs/quickstart/tokens/pairs (and 4 more: " in error and "`mmgpt run quickstart` makes it" in error
    assert "--out runs/quickstart/tokens`" in error and "--text runs/quickstart/text.model" in error
    assert call("data", "plan", "emu3_8b") == 1
    error = capsys.readouterr().err
    assert "runs/emu3/tokens/pairs: no dataset" in error and "mmgpt run" not in error
    assert call("data", "plan", "quickstart_vision") == 1
    assert "reads no packed documents but ImageRows" in capsys.readouterr().err
    assert call("data", "plan", "quickstart") == 1
    assert "is no training run but a Recipe" in capsys.readouterr().err
