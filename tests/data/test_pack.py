"""What a pack plan promises: exactly once, a prefix whatever is asked for, high fill; and what a row looks like."""

import itertools
from collections import Counter

import numpy as np
import pytest

from mmgpt.data import mixture, pack
from mmgpt.data.lengths import Lengths
from mmgpt.data.mixture import Source
from mmgpt.data.pack import Plan, PlanError
from mmgpt.data.row import RowError, assemble
from mmgpt.tokens.grammars.grammar import Tokens

ROW = 512


def source(name: str, full: np.ndarray, no_text: np.ndarray | None = None, **knobs) -> Source:
    full = np.asarray(full, np.int32)
    no_text = full if no_text is None else np.asarray(no_text, np.int32)
    change = no_text < full
    lengths = Lengths(full=full, no_text=no_text, swappable=change, droppable=change, overhead=2)
    return Source(Source.Config(path=name, **knobs), name, lengths, ROW)


def mix() -> list[Source]:
    """Captions of 64-code pictures, stories of four of them, and plain text."""
    rng = np.random.default_rng(0)
    caption, story = rng.integers(15, 40, 4000), rng.integers(30, 150, 1000)
    return [
        source("captions", caption + 70, np.full(4000, 70), weight=2.0, drop_text=0.1, swap=0.5),
        source("stories", story + 280, np.full(1000, 280), drop_text=0.1),
        source("text", np.clip(rng.lognormal(4.5, 0.6, 2000), 5, 500)),
    ]


def encoded(n: int, first: int = 0) -> Tokens:
    ids = np.arange(first, first + n, dtype=np.int32)
    place, weight = np.stack([ids, -ids], axis=1), np.linspace(0.5, 1, n).astype(np.float32)
    return Tokens(ids=ids, place=place, modality=ids % 3, weight=weight)


def rows_equal(a: Plan, b: Plan, count: int) -> bool:
    end = int(a.row_offset[count])
    columns = ("source", "document", "epoch", "flags", "part", "length")
    return np.array_equal(a.row_offset[: count + 1], b.row_offset[: count + 1]) and all(
        np.array_equal(getattr(a.draws, name)[:end], getattr(b.draws, name)[:end]) for name in columns
    )


def test_no_row_is_over_full_and_the_fill_is_high():
    plan = pack.plan(mix(), seed=0, row_length=ROW, rows=2000)
    used = np.add.reduceat(plan.draws.length, plan.row_offset[:-1])
    assert len(plan) == 2000 and used.max() <= ROW and used.min() > 0
    assert plan.summary()["fill"] == pytest.approx(used.sum() / (2000 * ROW))
    assert plan.summary()["fill"] >= 0.97


def test_token_shares_follow_weights():
    sources = pack.plan(mix(), seed=0, row_length=ROW, rows=2000).summary()["sources"]
    total = sum(s["tokens"] for s in sources.values())
    for name, share in {"captions": 0.5, "stories": 0.25, "text": 0.25}.items():
        assert abs(sources[name]["tokens"] / total - share) < 0.02


def test_every_document_exactly_once_per_epoch():
    plan = pack.plan(mix(), seed=3, row_length=ROW, rows=9000)
    seen = Counter(
        zip(plan.draws.source.tolist(), plan.draws.epoch.tolist(), plan.draws.document.tolist(), strict=True)
    )
    assert set(seen.values()) == {1}
    for number, size in enumerate((4000, 1000, 2000)):
        counts = np.bincount(plan.draws.epoch[plan.draws.source == number])
        assert len(counts) > 2 and (counts[:-2] == size).all()  # of the last but one some may still wait


def test_no_document_waits_long_for_its_row():
    sources = [source("a", np.where(np.arange(1000) % 50 == 0, 20, 300))]  # 300 + 20: no row ever fills up
    plan = pack.plan(sources, seed=0, row_length=ROW, rows=3000)
    row = np.repeat(np.arange(len(plan)), np.diff(plan.row_offset))
    drawn = mixture.Draws.join(list(itertools.islice(mixture.merged(sources, 0), 20)))
    place = {key: i for i, key in enumerate(zip(drawn.epoch.tolist(), drawn.document.tolist(), strict=True))}
    keys = zip(plan.draws.epoch.tolist(), plan.draws.document.tolist(), strict=True)
    due = np.array([place[key] for key in keys]) * len(plan) // len(plan.draws)
    window = pack._window_rows(sources, ROW)
    assert np.abs(row - due).max() <= (pack.MAX_AGE + 2) * window


def test_the_first_rows_do_not_depend_on_how_many_are_asked_for():
    long, short = (pack.plan(mix(), seed=0, row_length=ROW, rows=rows) for rows in (1000, 100))
    assert rows_equal(short, long, 100)
    other = pack.plan(mix(), seed=1, row_length=ROW, rows=100)
    assert not rows_equal(other, long, 100)


def test_a_change_starts_at_its_row_from_every_cursor():
    sources = mix()
    heavier = [
        Source(s.config.replace(weight=4.0 if s.name == "text" else 1.0), s.name, s.lengths, ROW) for s in sources
    ]
    plain = pack.plan(sources, seed=0, row_length=ROW, rows=900)
    changed = pack.plan(sources, seed=0, row_length=ROW, rows=9000, changes=[(300, heavier)])
    assert rows_equal(plain, changed, 300)
    assert rows_equal(changed, pack.plan(sources, seed=0, row_length=ROW, rows=900, changes=[(300, heavier)]), 900)
    assert rows_equal(pack.plan(sources, seed=0, row_length=ROW, rows=200, changes=[(300, heavier)]), plain, 200)
    draws = changed.draws
    seen = Counter(zip((draws.source % 3).tolist(), draws.epoch.tolist(), draws.document.tolist(), strict=True))
    assert set(seen.values()) == {1}  # nothing twice across the change
    for number, size in enumerate((4000, 1000, 2000)):
        counts = np.bincount(draws.epoch[draws.source % 3 == number])
        assert (counts[:-4] == size).all()  # and nothing lost
    longer = pack.plan(sources, seed=0, row_length=ROW, rows=6000, changes=[(300, heavier)])
    later = longer.draws.take(slice(int(longer.row_offset[1000]), None))
    share = later.length[later.source == 5].sum() / later.length.sum()
    assert abs(share - 4 / 6) < 0.02
    with pytest.raises(PlanError, match="ascend"):
        pack.plan(sources, seed=0, row_length=ROW, rows=900, changes=[(300, heavier), (300, sources)])


def test_documents_too_long_are_reported():
    plan = pack.plan([source("a", np.array([100, 600, 200]))], seed=0, row_length=ROW, rows=10)
    assert plan.rejected == {"a": {f"longer than {ROW} tokens": 1}} and 1 not in plan.draws.document


def test_dropping_text_shortens_what_is_packed():
    plan = pack.plan(mix(), seed=0, row_length=ROW, rows=500)
    dropped = (plan.draws.flags & mixture.DROP) > 0
    assert dropped.any() and set(plan.draws.length[dropped].tolist()) == {70, 280}


def test_sources_of_another_row_length_are_refused():
    with pytest.raises(PlanError, match="fits no row of 256"):
        pack.plan([source("a", np.full(10, 400))], seed=0, row_length=256, rows=3)
    with pytest.raises(PlanError, match="at least one row"):
        pack.plan(mix(), seed=0, row_length=ROW, rows=0)


def test_plan_once_holds_every_document_once():
    documents = np.arange(3, 203)
    plan = pack.plan_once("a", documents, documents * 0, documents + 7, row_length=ROW)
    assert sorted(plan.draws.document) == documents.tolist() and not plan.draws.flags.any()
    assert np.array_equal(plan.draws.length, plan.draws.document + 7)
    assert np.add.reduceat(plan.draws.length, plan.row_offset[:-1]).max() <= ROW


def test_saved_and_loaded(tmp_path):
    plan = pack.plan(mix(), seed=0, row_length=ROW, rows=50)
    back = pack.plan(mix(), seed=0, row_length=ROW, rows=50, directory=tmp_path / "plans" / "one")
    assert isinstance(back.draws.document, np.memmap)
    assert rows_equal(plan, back, 50) and back.summary() == plan.summary()
    assert [p.name for p in (tmp_path / "plans").iterdir()] == ["one"]  # nothing temporary is left
    # Another host that made it at the same time finds it there and takes it.
    again = pack.plan(mix(), seed=0, row_length=ROW, rows=50, directory=tmp_path / "plans" / "one")
    assert rows_equal(plan, again, 50) and [p.name for p in (tmp_path / "plans").iterdir()] == ["one"]
    (tmp_path / "plans" / "one" / "flags.bin").write_bytes(b"")
    with pytest.raises(PlanError, match="not a whole plan"):
        pack.load(tmp_path / "plans" / "one")


def test_a_row_predicts_inside_documents_only():
    row = assemble([encoded(3, 10), encoded(4, 20)], 10, pad=99)
    assert row["ids"].tolist() == [10, 11, 12, 20, 21, 22, 23, 99, 99, 99]
    assert row["target"].tolist() == [11, 12, 99, 21, 22, 23, 99, 99, 99, 99]
    number, *place = row["position"].T.tolist()
    assert number == [0, 1, 2, 0, 1, 2, 3, 0, 0, 0]
    assert place[0] == [10, 11, 12, 20, 21, 22, 23, 0, 0, 0] and place[1] == [-n for n in place[0]]
    assert place[2] == [11, 12, 0, 21, 22, 23, 0, 0, 0, 0] and place[3] == [-n for n in place[2]]
    assert row["first"].tolist() == [0, 0, 0, 3, 3, 3, 3, -1, -1, -1]
    assert row["modality"].tolist() == [1, 2, 0, 2, 0, 1, 2, 0, 0, 0]
    w3, w4 = encoded(3).weight, encoded(4).weight
    assert np.array_equal(row["weight"], np.concatenate([w3[1:], [0], w4[1:], [0, 0, 0, 0]]).astype(np.float32))
    assert {k: v.dtype.name for k, v in row.items() if k != "weight"} == dict.fromkeys(
        ("ids", "target", "modality", "position", "first"), "int32"
    )


def test_a_gap_is_padding_that_moves_nothing():
    whole = assemble([encoded(3), encoded(4), encoded(2)], 12, pad=99)
    gap = assemble([encoded(3), 4, encoded(2)], 12, pad=99)
    for name, values in gap.items():
        assert np.array_equal(np.delete(values, slice(3, 7), 0), np.delete(whole[name], slice(3, 7), 0))
    assert (gap["ids"][3:7] == 99).all() and not gap["weight"][3:7].any() and (gap["first"][3:7] == -1).all()


def test_a_row_that_does_not_fit_is_an_error():
    with pytest.raises(RowError, match="ends at token 7 of a row of 6"):
        assemble([encoded(3), encoded(4)], 6, pad=0)
