"""Kills the tokenisation job at random times, again and again, and holds its output to that of an undisturbed run.

    python -m tests.tokenize.kill_tokenize --kills 50 [--engine ray]

After each kill at most one shard (a worker) may be half-written, and what was finished is never touched again; when
the job is let run to its end, every byte is that of the undisturbed run.
"""

import argparse
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tests.tokenize import small_job


def kill_often(folder: Path, kills: int, seed: int, workers: int = 0) -> dict[str, int]:
    """Returns counts of what happened; AssertionError where a promise is broken. `workers` are of Ray, 0 without."""
    options = ("--engine", "ray", "--workers", str(workers)) if workers else ()
    whole = folder / "whole"
    done = small_job.run(folder, whole, *options)
    assert done.returncode == 0, done.stderr
    expected = small_job.contents(whole)
    chance = random.Random(seed)
    counts = {"kills": 0, "rounds": 0, "shards": 0, "lost": 0, "in the middle": 0}
    while counts["kills"] < kills:
        out = folder / f"round-{counts['rounds']}"
        while counts["kills"] < kills and _killed(folder, out, options, chance, counts, max(1, workers)):
            counts["kills"] += 1
            print(counts, flush=True)
        done = small_job.run(folder, out, *options)
        assert done.returncode == 0, done.stderr
        found = small_job.contents(out)
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []
        counts["rounds"] += 1
    return counts


def _killed(
    folder: Path, out: Path, options: tuple[str, ...], chance: random.Random, counts: dict[str, int], workers: int
) -> bool:
    """Starts the command and kills it at some moment; False if it ended before."""
    before = _finished(out)
    total = sum(small_job.SHARDS.values())
    process = subprocess.Popen(
        small_job.command(folder, out, *options), env=small_job.environment(folder), stderr=subprocess.PIPE, text=True
    )
    kind = chance.random()
    # While it starts; while it writes; and, where few shards are left, while it completes the datasets.
    wanted = len(before) if kind < 0.1 else total if kind > 0.8 and total - len(before) < 8 else len(before) + 1
    begun = time.monotonic()
    patience = chance.uniform(0.0, 10.0) if kind < 0.1 else 300.0
    while (
        process.poll() is None and len(_finished(out)) < wanted + (kind < 0.1) and time.monotonic() - begun < patience
    ):
        time.sleep(0.002)
    time.sleep(chance.uniform(0.0, 0.25 if wanted < total else 0.02))
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), said
    if workers > 1 or options:
        time.sleep(2.0)  # Ray's workers end soon after the driver
    after = _finished(out)
    assert all(after[name] == state for name, state in before.items()), "a finished shard was written again"
    begun_shards = [
        p for p in out.glob("*/.shard-*.array_record.*.tmp") if ".done." not in p.name and ".npz." not in p.name
    ]
    unmarked = [p for p in out.glob("*/shard-*.array_record") if str(p.relative_to(out)) not in after]
    assert len(begun_shards) + len(unmarked) <= workers, "more was lost than the shard that was being written"
    counts["shards"] += len(after) - len(before)
    counts["lost"] += len(begun_shards) + len(unmarked)
    counts["in the middle"] += 0 < len(after) < total
    return process.returncode != 0


def _finished(out: Path) -> dict[str, tuple[int, ...]]:
    """The shards that have a marker, and what tells whether one of their files was written since."""
    found = {}
    for marker in out.glob("*/*.done"):
        shard = marker.with_suffix("")
        states = [path.stat() for path in (marker, shard, shard.with_name(shard.name + ".npz"))]
        found[str(shard.relative_to(out))] = tuple(n for s in states for n in (s.st_mtime_ns, s.st_ino, s.st_size))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("process", "ray"), default="process")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        small_job.make(Path(folder))
        begun = time.monotonic()
        counts = kill_often(Path(folder), args.kills, args.seed, 2 if args.engine == "ray" else 0)
        print(f"{counts} in {time.monotonic() - begun:.0f} s: the same bytes every time")


if __name__ == "__main__":
    main()
