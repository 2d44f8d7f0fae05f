"""Rows of mixtures: plans that are kept, documents that are split, and two resolutions of one dataset."""

import numpy as np
import pytest

from mmgpt.core.document import Document, Text
from mmgpt.data import loader
from mmgpt.data.loader import PackedRows
from mmgpt.data.mixture import Change, Source
from tests.data.test_loader import BATCH, EOS, ROW, build, captions, joined, mixture, same, write


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> PackedRows.Config:
    return mixture(tmp_path_factory.mktemp("data"))


def test_a_plan_is_kept_and_made_again_only_where_it_must_be(config, tmp_path, monkeypatch):
    first = build(config, folder=tmp_path).plan
    other = build(config, seed=1, folder=tmp_path).plan
    assert not np.array_equal(first.draws.document, other.draws.document)
    with monkeypatch.context() as patched:
        patched.setattr(loader.pack, "plan", None)
        assert np.array_equal(build(config, folder=tmp_path).plan.draws.document, first.draws.document)
    (first.directory / "document.bin").write_bytes(b"cut")
    again = build(config, folder=tmp_path).plan
    assert (again.directory == first.directory and len(again.draws) == len(other.draws)) or len(again) == len(first)
    assert same(next(build(config, folder=tmp_path).batches(0)), next(build(config).batches(0)))


def test_parts_of_a_long_document_come_once_each_and_only_the_last_ends_it(tmp_path):
    rng = np.random.default_rng(0)
    long = [
        Document(key=str(i), segments=tuple(Text(ids=np.full(int(n), i, np.int32)) for n in rng.integers(20, 90, 12)))
        for i in range(40)
    ]
    source = Source.Config(path=write(tmp_path, "long", long), split=True, max_epochs=3)
    sizes = {i: [len(s.ids) for s in d.segments] for i, d in enumerate(long)}
    rows = 600
    for step in range(1, 12, 2):  # a change cuts a document between its parts
        changes = (Change(step=step, sources=(source.replace(swap=0.1),)),)
        data = PackedRows.Config(sources=(source,), changes=changes, row_length=ROW, batch_rows=BATCH, held_out=0.0)
        loaded = build(data, rows=rows)
        draws = loaded.plan.draws
        parts = sorted(zip(draws.epoch.tolist(), draws.document.tolist(), draws.part.tolist(), strict=True))
        assert len(set(parts)) == len(parts)
        done = [part for part in parts if part[0] == 0]
        assert len(done) == sum(max(p for _, d, p in done if d == i) for i in range(40))
    stream = joined(list(loaded.batches(0))).streams["tokens"]
    ends = (stream.target == EOS) & (stream.position[..., 0] > 0)
    assert 0 < (stream.weight[ends] > 0).sum() < ends.sum() / 2
    assert min(map(sum, sizes.values())) > ROW


def test_two_resolutions_of_one_dataset_hold_out_the_same_documents(config, tmp_path):
    twin = Source.Config(path=write(tmp_path / "large", "captions", captions(300, 1)), name="large captions")
    rows = build(config.replace(changes=(Change(step=6, sources=(twin, config.sources[1])),)), rows=4000)
    assert rows.sources == ("captions", "stories", "large captions")
    draws, sources = rows.plan.draws, np.array(rows.plan.sources)
    small, large = (set(draws.document[sources[draws.source] == name]) for name in ("captions", "large captions"))
    assert len(large) == 300 - rows.summary()["held_out"]["captions"] and small <= large
    changed = rows.plan.row_offset[6 * BATCH]
    assert not (sources[draws.source[:changed]] == "large captions").any()
