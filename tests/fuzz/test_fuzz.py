"""A few hundred mutants of each format: all decode or are refused by name. `python -m tests.fuzz.run` takes more."""

import pytest

from tests.fuzz import run
from tests.fuzz.decoders import DECODERS
from tests.fuzz.mutate import mutant, png_checksums, tar_checksums


@pytest.mark.parametrize("name", DECODERS)
def test_mutants_decode_or_are_refused_by_name(name: str) -> None:
    report = run.fuzz(name, 300, seed=1)
    assert report.mutants == 300 and not report.faults, report.faults
    assert len(report.outcomes) >= 2


def test_a_mutant_is_known_by_its_seed_and_number() -> None:
    files = DECODERS["png"].files()
    made = [mutant(files, seed, number) for seed in (0, 1) for number in range(100)]
    assert made == [mutant(files, seed, number) for seed in (0, 1) for number in range(100)]
    assert len(set(made)) > 190


def test_checksums_are_made_right() -> None:
    for repair, name in ((png_checksums, "png"), (tar_checksums, "tar")):
        decoder = DECODERS[name]
        for data in decoder.files():
            wrong = bytearray(data)
            at = data.index(b"IHDR") + 16 if name == "png" else 148
            wrong[at + 1] ^= 1
            repair(wrong)
            assert decoder.decode(bytes(wrong)) == "decoded", name


@pytest.mark.parametrize(
    ("name", "what"),
    [("raises", "KeyError"), ("dies", "ended with -11"), ("crawls", "of CPU time"), ("grows", "memory grew")],
)
def test_what_no_decoder_may_do_is_told_with_its_number(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "crawls":  # the others keep the real limit: on a busy machine honest work takes 0.2 s
        monkeypatch.setattr(run, "SECONDS", 0.2)
    report = run.fuzz(name, 120, seed=0, module="tests.fuzz.broken")
    assert report.mutants == 120 and report.faults and all(what in fault["what"] for fault in report.faults)
    if name in ("raises", "dies"):
        assert len(report.faults) > 1 and len({fault["number"] for fault in report.faults}) == len(report.faults)
        assert report.outcomes["decoded"] == 120 - len(report.faults)


def test_a_decoder_that_stands_still_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "tests.fuzz.broken"
    (number, *_) = (fault["number"] for fault in run.fuzz("raises", 120, seed=0, module=module).faults)
    monkeypatch.setattr(run, "STILL", 5.0)
    report = run.fuzz("stands", number + 1, seed=0, module=module)
    assert report.mutants == number + 1 and [fault["number"] for fault in report.faults] == [number]
    assert all("stood still" in fault["what"] for fault in report.faults)
