"""The digits as files: scikit-learn's split, captions that name the digit, prompts on scans never trained on."""

import json

import numpy as np
import pytest
from sklearn import datasets as sklearn_datasets

from mmgpt.data.importing import import_dataset
from mmgpt.data.media import decode_image
from mmgpt.evaluate import digits


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "raw"
    return out, digits.write_digits(out, copies=2, seed=0)


def test_half_trains_and_half_is_kept(written):
    out, counts = written
    total = len(sklearn_datasets.load_digits().target)
    assert counts["train"] == 2 * (total // 2) and counts["eval"] == total - total // 2
    assert len(list((out / "train").glob("*.png"))) == counts["train"]


def test_the_machine_it_is_compared_with_is_sklearns_own(written):
    assert written[1]["svm"] == pytest.approx(0.969, abs=0.002)


def test_captions_and_answers_name_the_digit(written):
    out, _ = written
    labels = sklearn_datasets.load_digits().target
    assert (out / "train" / "0007-00.txt").read_text() == f"a handwritten {digits.NAMES[labels[7]]}"
    line = json.loads((out / "eval" / "documents.jsonl").read_text().splitlines()[3])
    assert line["meta"]["answer"] == f"a handwritten {digits.NAMES[labels[len(labels) // 2 + 3]]}"


def test_the_first_copy_is_the_scan_and_the_others_vary(written):
    out, _ = written
    scan = sklearn_datasets.load_digits().images[5]
    first, second = (decode_image((out / "train" / f"0005-0{c}.png").read_bytes())[::2, ::2, 0] for c in (0, 1))
    assert np.abs(255 - scan * (255 / 16) - first).max() <= 1
    assert np.abs(first.astype(int) - second).max() > 20


def test_both_folders_import_and_a_second_write_changes_nothing(written, tmp_path):
    out, counts = written
    assert import_dataset("folder", out / "train", tmp_path / "train").documents == counts["train"]
    assert import_dataset("jsonl", out / "eval", tmp_path / "eval").documents == counts["eval"]
    before = (out / "eval" / "documents.jsonl").stat().st_mtime_ns
    assert digits.write_digits(out, copies=2, seed=0) == counts
    assert (out / "eval" / "documents.jsonl").stat().st_mtime_ns == before


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(digits.DigitsError, match="holds other files"):
        digits.write_digits(tmp_path, copies=1, seed=0)
    assert (tmp_path / "train" / "holiday.jpg").read_bytes() == b"mine"


def test_a_cut_off_write_is_written_again(tmp_path, monkeypatch):
    out, written = tmp_path / "raw", digits.encode_png
    calls = iter(range(10))
    monkeypatch.setattr(digits, "encode_png", lambda pixels: written(pixels) if next(calls) < 5 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        digits.write_digits(out, copies=1, seed=0)
    monkeypatch.setattr(digits, "encode_png", written)
    counts = digits.write_digits(out, copies=1, seed=0)
    assert len(list((out / "train").glob("*.png"))) == counts["train"]
    assert sorted(p.name for p in out.iterdir()) == ["eval", "svm.json", "train"]
