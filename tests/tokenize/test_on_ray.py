"""The job on Ray: the same bytes as in one process, clear errors, and nothing that another machine can reach."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmgpt.tokenize import on_ray
from mmgpt.tokenize.job import JobError, Order
from mmgpt.tokenize.on_ray import Files, tokenize_on_ray
from tests.tokenize import small_job


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("small")
    small_job.make(made)
    return made


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, bytes]:
    done = small_job.run(folder, folder / "whole")
    assert done.returncode == 0, done.stderr
    return small_job.contents(folder / "whole")


@pytest.mark.slow
@pytest.mark.ray
def test_workers_write_the_bytes_of_one_process(folder, expected, tmp_path):
    done = small_job.run(folder, tmp_path / "out", "--engine", "ray", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert small_job.contents(tmp_path / "out") == expected
    assert "240/240" in done.stderr and "30 of 30 shards written now" in done.stderr
    assert len(done.stderr.splitlines()) < 12, "Ray speaks"


@pytest.mark.slow
@pytest.mark.ray
def test_a_shard_that_fails_ends_the_job_and_costs_itself_alone(folder, expected, tmp_path):
    out = tmp_path / "out"
    (out / "left" / "shard-00020.array_record").mkdir(parents=True)  # the shard cannot be renamed to this
    done = small_job.run(folder, out, "--engine", "ray", "--workers", "2")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith("error: ") and "left/shard-00020.array_record" in said and "could not be written" in said
    kept = {p: p.stat().st_mtime_ns for p in out.rglob("*.done")}
    assert len(kept) >= 18
    (out / "left" / "shard-00020.array_record").rmdir()
    assert small_job.run(folder, out).returncode == 0  # the engine may change
    assert small_job.contents(out) == expected and all(p.stat().st_mtime_ns == t for p, t in kept.items())


SOCKETS = """
import json, os, sys
from pathlib import Path
from mmgpt.tokenize.on_ray import _ray

def family():
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            pass
    mine = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    return mine

def sockets(pid):
    for fd in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            yield os.readlink(fd).removeprefix("socket:[").removesuffix("]")
        except OSError:
            pass

with _ray(None, 1) as ray:
    ray.get(ray.remote(lambda: 1).remote())
    inodes = {inode for pid in family() for inode in sockets(pid)}
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    listening = [row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]
    node = ray._private.worker._global_node
    told = {"listening": listening, "dashboard": node.webui_url, "folder": node.get_session_dir_path()}
json.dump(told, sys.stdout)
"""


@pytest.mark.slow
@pytest.mark.ray
def test_no_other_machine_reaches_what_is_started_here():
    """Ray's job interface runs any code for whoever asks; it is off, and all else is bound to this machine."""
    done = subprocess.run([sys.executable, "-c", SOCKETS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    local = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert len(found["listening"]) > 3 and set(found["listening"]) <= local and not found["dashboard"]
    assert not Path(found["folder"]).exists(), "what Ray wrote is removed"


def test_without_ray_one_error_tells_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    files = Files(text=tmp_path / "t", vision=tmp_path / "v", actions=None, batch=1)
    with pytest.raises(JobError, match=r"pip install 'mmgpt\[ray\]'"):
        tokenize_on_ray(Order(folders={}, area=1), files)
    with pytest.raises(JobError, match="--workers is -1"):
        tokenize_on_ray(Order(folders={}, area=1), files, workers=-1)


def test_a_worker_refuses_other_tokenizers_and_other_data_than_the_drivers(folder, tmp_path):
    files = Files(text=folder / "text.model", vision=folder / "vision", actions=None, batch=4)
    order = Order(folders={folder / "left": tmp_path / "out"}, area=1024)
    settings = files.load().settings()
    digests = [job.digest for job in order.jobs(settings)]
    place = {"dataset": [0], "shard": [2]}

    def told(settings: dict, digests: list[str]) -> tuple[str, int]:
        ordered = on_ray._Ordered(order=order, files=files, threads=1, settings=json.dumps(settings))
        answer = on_ray._Worker(ordered, digests)(place)
        return answer["told"][0], answer["documents"][0]

    said, count = told({**settings, "image_probe": "0"}, digests)
    assert said.startswith("error the tokenizers of a worker on ") and "(image_probe)" in said and count == 0
    said, _ = told(settings, ["0"])
    assert said.startswith("error ") and "the datasets that" in said
    (tmp_path / "out").mkdir()
    assert told(settings, digests) == ("", 6) and (tmp_path / "out" / "shard-00002.array_record.done").exists()
