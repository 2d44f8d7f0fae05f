"""The bench of the data path runs whole on little data, and its figures are of what it says."""

import json

import pytest

from mmgpt.core.config import ConfigError
from mmgpt.data.lengths import Lengths
from mmgpt.data.record import Dataset, Writer
from mmgpt.evaluate import bench_data as bench


def test_the_bench_writes_every_figure(tmp_path):
    bench.bench_data(planned_tokens=1 << 22, records=100, documents=50_000, turns=1, json=tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert all(value > 0 for value in figures.values())
    assert all(figures[f"fill at {row_length} (%)"] > 97 for row_length in bench.ROW_LENGTHS)
    assert figures["loading over the faster of Grain's"] == pytest.approx(
        figures["loading, mmgpt (M tokens/s/core)"]
        / max(figures[f"loading, Grain {kind} fit (M tokens/s/core)"] for kind in ("first", "best"))
    )


def test_a_plan_of_an_epoch_holds_nearly_all_documents(tmp_path):
    figures = bench._billion(tmp_path, 200_000)
    assert 0.98 < figures["documents"] / 200_000 < 1 and figures["fill (%)"] > 99


def test_grains_packers_are_given_the_same_records(tmp_path):
    import grain

    grammar = bench._grammar()
    with Writer(tmp_path / "records", name="records") as writer:
        for document in bench._documents(100):
            writer.write(document)
    dataset = Dataset(tmp_path / "records")
    lengths = Lengths.measure(grammar, dataset.index).full
    fitting = int(lengths[lengths <= 8192].sum())
    found = bench._grains(grain.experimental.FirstFitPackIterDataset, dataset, grammar, 8192, lengths)
    assert 0.6 * fitting < found <= fitting  # all but what the last batch leaves


def test_numbers_that_make_no_bench_are_told():
    with pytest.raises(ConfigError, match="--turns"):
        bench.bench_data(turns=0)
