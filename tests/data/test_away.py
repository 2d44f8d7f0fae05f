"""Datasets whose files cannot be read for a while, as on a network share that comes and goes."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from mmgpt.data import record
from mmgpt.data.record import Dataset, DatasetError, RecordError
from tests.data.test_record import written


def gone(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # a reader that is open still has it


def cut(path: Path, data: bytes) -> None:
    os.truncate(path, 1000)


@pytest.mark.parametrize("harm", [gone, cut])
def test_a_file_that_cannot_be_read_for_a_while_costs_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Any
):
    written(tmp_path / "d", 9)
    (path,) = (tmp_path / "d").glob("*.array_record")
    data, waited = path.read_bytes(), list[float]()
    dataset = Dataset(tmp_path / "d")  # its reader opens the file later
    monkeypatch.setattr(record.time, "sleep", waited.append)
    harm(path, data)
    with pytest.raises(DatasetError, match=rf"{path.name}: .*, for a minute\. Make it readable"):
        dataset[0]
    assert 60 < sum(waited) < 90 and len(waited) == len(record.WAITS)

    def mended(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) % 3 == 0:
            path.write_bytes(data)

    monkeypatch.setattr(record.time, "sleep", mended)
    for number in (0, 8):
        waited.clear()
        assert dataset[number].key == f"key-{number}"
        harm(path, data)
    path.write_bytes(bytes(len(data)))  # of the right size: the records are to blame
    dataset, waited[:] = Dataset(tmp_path / "d"), []
    with pytest.raises(RecordError, match="copy the shard again"):
        [dataset[number] for number in range(9)]
    assert not waited


@pytest.mark.parametrize("harm", [gone, cut])
def test_a_worker_waits_for_a_file_that_cannot_be_read_as_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Any
):
    """Its parent has opened the dataset, which was whole then."""
    written(tmp_path / "d", 9)
    (path,) = (tmp_path / "d").glob("*.array_record")
    data, waited = path.read_bytes(), list[float]()
    sent = pickle.dumps(Dataset(tmp_path / "d"))
    monkeypatch.setattr(record.time, "sleep", waited.append)
    harm(path, data)
    with pytest.raises(DatasetError, match=rf"{path.name}: .*the manifest says"):
        pickle.loads(sent)
    assert sum(waited) > 60
    monkeypatch.setattr(record.time, "sleep", lambda _: path.write_bytes(data))
    assert [d.key for d in pickle.loads(sent)] == [f"key-{i}" for i in range(9)]
