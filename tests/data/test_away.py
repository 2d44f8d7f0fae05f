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


def whole(folder: Path) -> tuple[Path, bytes]:
    """The one shard of a dataset of nine documents that is written there, and its bytes."""
    written(folder, 9)
    (path,) = folder.glob("*.array_record")
    return path, path.read_bytes()


@pytest.mark.parametrize("harm", [gone, cut])
def test_a_file_that_cannot_be_read_for_a_while_costs_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Any
):
    (path, data), waited = whole(tmp_path / "d"), list[float]()
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
    (path, data), waited = whole(tmp_path / "d"), list[float]()
    sent = pickle.dumps(Dataset(tmp_path / "d"))
    monkeypatch.setattr(record.time, "sleep", waited.append)
    harm(path, data)
    with pytest.raises(DatasetError, match=rf"{path.name}: .*the manifest says"):
        pickle.loads(sent)
    assert sum(waited) > 60
    monkeypatch.setattr(record.time, "sleep", lambda _: path.write_bytes(data))
    assert [d.key for d in pickle.loads(sent)] == [f"key-{i}" for i in range(9)]
