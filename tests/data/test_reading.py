"""What reading ahead promises: the same rows for every host count, restart and worker count; deaths leave nothing."""

import itertools
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from mmgpt.core.document import Document, Text
from mmgpt.core.stream import Batch
from mmgpt.data.loader import LoaderError, PackedRows
from mmgpt.data.mixture import Source
from mmgpt.data.reading import Rejects
from mmgpt.data.record import Dataset
from mmgpt.data.shuffle import is_held_out
from tests.data import loading
from tests.data.loading import BATCH, build

PATIENCE = 60.0
"""Seconds after which something that must happen at once has not happened."""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> PackedRows.Config:
    return loading.mixture(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(config) -> list[Batch]:
    return list(build(config).batches(0))


def same(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def joined(parts: list[Batch]) -> Batch:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def wait_until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_hosts_that_come_and_go_load_the_same_batches(config, whole):
    step, seen = 0, []
    for hosts, steps in ((4, 7), (2, 15), (8, 9), (1, 9)):
        loaders = [build(config).batches(step * BATCH, (i, hosts)) for i in range(hosts)]
        for _ in range(steps):
            seen.append(joined([next(loader) for loader in loaders]))
        step += steps
    assert len(seen) == len(whole) == 40
    assert all(same(a, b) for a, b in zip(seen, whole, strict=True))


def test_no_document_is_missing_and_none_comes_twice(config):
    once = config.replace(
        changes=(), sources=tuple(s.replace(max_epochs=1, swap=0.0, max_tokens=None) for s in config.sources)
    )
    rows = 1
    while True:  # the longest plan that one epoch gives
        try:
            plan = once.build(loading.grammar(), seed=0, rows=rows, folder=None).plan
        except ValueError:
            break
        rows += 1
    loader = once.replace(batch_rows=1).build(loading.grammar(), seed=0, rows=len(plan), folder=None)
    found = [document for batch in loader.batches(0) for document in loading.present(batch)]
    expected = []
    for name, source in zip(("one", "two"), config.sources, strict=True):
        numbers = np.arange(len(Dataset(Path(source.path))))
        kept = ~is_held_out(name, numbers, 0.05) & ~np.isin(numbers, loading.BAD)
        if name == "one":
            kept &= np.arange(600) % 5 > 0
        expected += [(30 + i % 200, 30 + i // 200) for i in np.flatnonzero(kept).tolist()]
    assert sorted(found) == sorted(expected)


def test_a_restart_at_every_step_of_two_epochs_goes_on_the_same(config, tmp_path):
    whole = list(build(config, 60, tmp_path).batches(0))
    epochs = [entry["epochs"] for entry in build(config, 60, tmp_path).summary()["sources"].values()]
    assert min(epochs) >= 3  # two are complete
    for step in range(60):
        rest = build(config, 60, tmp_path).batches(step * BATCH)
        assert same(next(rest), whole[step])
        if step % 20 == 0:
            assert all(same(a, b) for a, b in zip(rest, whole[step + 1 :], strict=True))


@pytest.mark.multiproc
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_deliver_the_same_batches(config, whole, tmp_path, workers):
    found = build(config.replace(workers=workers), folder=tmp_path).batches(0)
    assert all(same(a, b) for a, b in zip(found, whole, strict=True))
    wait_until(lambda: not multiprocessing.active_children())


def bad_documents(config: PackedRows.Config, loader: PackedRows) -> set[str]:
    """Those of the bad documents that the plan holds."""
    names = [*loader.plan.sources]
    draws = loader.plan.draws
    return {
        f"{names[source]}:{document}"
        for source, document in zip(draws.source.tolist(), draws.document.tolist(), strict=True)
        if document in loading.BAD
    }


@pytest.mark.multiproc
def test_one_bad_sample_in_a_hundred_is_rejected_and_all_others_come(config, tmp_path):
    loader = build(config.replace(workers=4), folder=tmp_path)
    found = [document for batch in loader.batches(0) for document in loading.present(batch)]
    draws = loader.plan.draws
    good = [(30 + i % 200, 30 + i // 200) for i in draws.document.tolist() if i not in loading.BAD]
    assert sorted(found) == sorted(good)
    lines = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    expected = bad_documents(config, loader)
    assert len(expected) > 4 and sorted(line["key"] for line in lines) == sorted(expected)  # each once
    assert all("outside its codebook" in line["reason"] for line in lines)
    assert loader.summary()["rejected_at_load"] == len(expected)
    list(build(config.replace(workers=2), folder=tmp_path).batches(0))  # the run again
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == len(expected)


def segments() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "sem.mp-"))}


@pytest.mark.multiproc
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /dev/shm")
def test_a_killed_worker_is_an_error_and_leaves_nothing(config, tmp_path):
    batches = build(config.replace(workers=2), 10**4, tmp_path).batches(0)
    next(batches)
    victim, other = loading.started(batches, 2)
    for asked_to_end in (signal.SIGTERM, signal.SIGINT):  # which reach every process of a job, and are the trainer's
        os.kill(victim, asked_to_end)
    for _ in range(20):
        next(batches)
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(LoaderError, match=r"a data worker died .*-9.*goes on from the last checkpoint"):
        for _ in range(10**4):
            next(batches)
    wait_until(lambda: not multiprocessing.active_children())
    with pytest.raises(ProcessLookupError):
        os.kill(other, 0)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.multiproc
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc and /dev/shm")
def test_a_killed_trainer_leaves_no_worker_and_no_shared_memory(tmp_path):
    before = segments()
    command = [sys.executable, "-m", "tests.data.loading", str(tmp_path), "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as trainer:
        assert trainer.stdout is not None
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        loading_at_work = len(workers) == 2 and all(map(alive, workers))
        made = segments() - before
        trainer.kill()
    assert loading_at_work and made
    wait_until(lambda: not any(map(alive, workers)))
    wait_until(lambda: not made & segments())


def test_rejects_are_counted_over_processes_and_the_breaker_is_on_their_share(tmp_path):
    path = tmp_path / "rejects.jsonl"
    first, second = Rejects(path, 0.012), pickle.loads(pickle.dumps(Rejects(path, 0.012)))
    first.add("a", "broken", "data, document 1")
    second.add("a", "broken", "data, document 1")
    second.add("b", "broken", "data, document 2")
    assert len(path.read_text().splitlines()) == 2 and len(first) == len(second) == 2
    for _ in range(3):  # one in a hundred for ever
        for i in range(990):
            first.passed()
            if i % 99 == 0:
                first.add("a", "broken", "data, document 1")
    with pytest.raises(LoaderError, match=r"13 of the last .* max_rejected 0.012 .*document 9: broken"):
        for _ in range(20):
            first.add("c", "broken", "data, document 9")


def test_rows_of_a_share_are_those_of_its_part(config):
    for start, hosts in itertools.product((0, 5), (1, 2, 4)):
        ids = [[b.row_id.tolist() for b in build(config, 3).batches(start, (i, hosts))] for i in range(hosts)]
        steps = [list(itertools.chain(*parts)) for parts in zip(*ids, strict=True)]
        assert steps == [list(range(first, first + BATCH)) for first in range(start, 24 - BATCH + 1, BATCH)]


def test_books_longer_than_a_row_are_held_out_in_parts(tmp_path):
    words = [np.full(100, 30 + i, np.int32) for i in range(20)]
    books = [Document(key=str(i), segments=(Text(ids=ids),) * 9) for i, ids in enumerate(words)]
    source = Source.Config(path=loading.write(tmp_path, "books", books), split=True)
    rows = build(PackedRows.Config(sources=(source,), row_length=loading.ROW, batch_rows=BATCH, held_out=0.3))
    held = np.concatenate([b.streams["tokens"].ids for b in rows.held_out_batches("books", 4)])
    trained = np.concatenate([b.streams["tokens"].ids for b in rows.batches(0)])
    out = {i for i in range(20) if is_held_out("books", np.array([i]), 0.3)[0]}
    assert out and set(held.ravel().tolist()) & set(range(30, 50)) == {30 + i for i in out}
    assert all(np.count_nonzero(held == 30 + i) == 900 for i in out)
    assert not set(trained.ravel().tolist()) & {30 + i for i in out}
