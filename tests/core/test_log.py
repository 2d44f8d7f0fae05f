"""Metrics survive kills, resumes and full disks; the console obeys nothing that a caption says."""

import contextlib
import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import RecordWriter

from mmgpt.core import log
from tests.small_disk import small_disk


def frame(data: bytes) -> bytes:
    """The record as the library writes it."""
    file = io.BytesIO()
    writer = RecordWriter.__new__(RecordWriter)
    writer._writer = file
    writer.write(data)
    return file.getvalue()


def events(folder: Path) -> Iterator:
    """Every event of every TensorBoard file; records are length, crc, data, crc."""
    for path in sorted(folder.glob("tensorboard/events*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            yield Event.FromString(data[12 : 12 + length])
            assert data[: 16 + length] == frame(data[12 : 12 + length])
            data = data[16 + length :]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the console was told."""
    text = io.StringIO()
    monkeypatch.setattr(log, "console", Console(file=text, width=200, highlight=False, markup=False))
    return text


def test_metrics_read_back_as_written_in_both_places(tmp_path: Path) -> None:
    metrics = log.Metrics(tmp_path)
    metrics.write(1, {"loss": 0.5, "rate": 3})
    metrics.write(2, {"loss": math.nan, "top": math.inf, "bottom": -math.inf}, kind="eval")
    metrics.close()
    first, second = log.read_metrics(metrics.path)
    assert (first["step"], first["kind"], first["loss"], first["rate"]) == (1, "train", 0.5, 3.0)
    assert math.isnan(second["loss"]) and second["top"] == math.inf and second["bottom"] == -math.inf
    for line in metrics.path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    scalars = [(e.step, v.tag, v.simple_value) for e in events(tmp_path) for v in e.summary.value]
    assert scalars[:2] == [(1, "train/loss", 0.5), (1, "train/rate", 3.0)]
    assert [(step, tag) for step, tag, _ in scalars[2:]] == [(2, f"eval/{k}") for k in ("loss", "top", "bottom")]


def test_a_line_is_on_the_disk_when_write_returns(tmp_path: Path) -> None:
    metrics = log.Metrics(tmp_path)
    metrics.write(1, {"loss": 0.5})
    assert len(log.read_metrics(metrics.path)) == 1
    assert [v.tag for e in events(tmp_path) for v in e.summary.value] == ["train/loss"]
    metrics.close()


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_line_cut_by_a_kill_is_dropped_and_writing_goes_on(tmp_path: Path, cut: int) -> None:
    metrics = log.Metrics(tmp_path)
    metrics.write(1, {"loss": 0.5})
    metrics.write(2, {"loss": 0.25})
    metrics.close()
    metrics.path.write_bytes(metrics.path.read_bytes()[:-cut])
    assert [r["step"] for r in log.read_metrics(metrics.path)] == [1]
    metrics = log.Metrics(tmp_path)
    metrics.write(2, {"loss": 0.125})
    metrics.close()
    assert [(r["step"], r["loss"]) for r in log.read_metrics(metrics.path)] == [(1, 0.5), (2, 0.125)]


def test_a_resumed_run_has_no_step_twice(tmp_path: Path) -> None:
    metrics = log.Metrics(tmp_path)
    for step in range(1, 9):
        metrics.write(step, {"loss": 1.0})
    metrics.close()
    metrics = log.Metrics(tmp_path)
    assert metrics.truncate(5) == 3
    for step in range(6, 11):
        metrics.write(step, {"loss": 2.0})
    metrics.close()
    assert [(r["step"], r["loss"]) for r in log.read_metrics(metrics.path)] == [
        (s, 1.0 if s < 6 else 2.0) for s in range(1, 11)
    ]
    # TensorBoard drops, at a session start, what it has read of its step and later ones.
    shown: dict[int, float] = {}
    for event in events(tmp_path):
        if event.session_log.status == SessionLog.START:
            shown = {s: v for s, v in shown.items() if s < event.step}
        for value in event.summary.value:
            assert event.step not in shown
            shown[event.step] = value.simple_value
    assert shown == {s: 1.0 if s < 6 else 2.0 for s in range(1, 11)}


def test_an_unreadable_line_is_an_error_with_its_place_and_truncate_drops_it(tmp_path: Path) -> None:
    metrics = log.Metrics(tmp_path)
    metrics.write(1, {"loss": 0.5})
    with open(metrics.path, "ab") as file:
        file.write(b"\x00\x00\x00\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a metrics line"):
        log.read_metrics(metrics.path)
    metrics.truncate(1)
    assert [r["step"] for r in log.read_metrics(metrics.path)] == [1]
    metrics.close()


def test_columns_of_the_line_itself_cannot_be_overwritten(tmp_path: Path) -> None:
    metrics = log.Metrics(tmp_path)
    with pytest.raises(ValueError, match="step is a column"):
        metrics.write(1, {"step": 2.0})
    metrics.close()


def test_samples_are_files_inside_the_folder_whatever_their_name(tmp_path: Path) -> None:
    metrics = log.Metrics(tmp_path)
    picture = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    path = metrics.image(7, "../../a red\nball", picture)
    text = metrics.text(7, "/etc/caption", "red \ud800 \x1b[31m")
    metrics.close()
    assert path.parent == text.parent == tmp_path / "samples"
    assert np.array_equal(np.asarray(Image.open(path)), picture)
    assert text.read_text() == "red \\ud800 \x1b[31m"
    with pytest.raises(ValueError, match="expected uint8"):
        metrics.image(7, "x", picture.astype(np.float32))


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path: Path, said: io.StringIO) -> None:
    with small_disk(tmp_path / "disk", "128k") as folder:
        metrics = log.Metrics(folder)
        metrics.write(1, {"loss": 1.0})
        filler = folder / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(512))
        for step in range(2, 500):
            metrics.write(step, {"loss": 1.0})
            metrics.image(step, "x", np.zeros((64, 64, 3), np.uint8))
        filler.unlink()
        metrics.write(500, {"loss": 2.0})
        metrics.close()
        steps = [r["step"] for r in log.read_metrics(metrics.path)]
        assert steps[0] == 1 and steps[-1] == 500 and len(steps) < 400
        assert 500 in {e.step for e in events(folder)}
    assert 1 <= said.getvalue().count("writes lost") <= 11  # 1, 2, 4, ... 1024


def test_an_atomic_write_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    log.write_json(path, {"x": [1, 2]})
    assert json.loads(path.read_text()) == {"x": [1, 2]}
    with pytest.raises(ValueError):
        log.write_json(path, {"x": math.nan})
    with pytest.raises(OSError):
        log.write_atomic(path.parent, "a folder is in the way")
    assert json.loads(path.read_text()) == {"x": [1, 2]}
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["b.json"]


def test_a_caption_reaches_the_console_as_it_is_and_commands_nothing(said: io.StringIO) -> None:
    foreign = "\x1b[2J\x07 [red]ball[/red] \u202egnp.exe\r\n\x9b31m 日本 é"
    log.console.print(log.printable(foreign))
    assert said.getvalue() == "\\x1b[2J\\x07 [red]ball[/red] \\u202egnp.exe\\r\\n\\x9b31m 日本 é\n"
    assert len(log.printable("x" * 10_000)) == 500


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_yields_every_item_and_says_so_at_the_end(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    text = io.StringIO()
    monkeypatch.setattr(log, "console", Console(file=text, width=100, force_terminal=terminal, markup=False))
    assert list(log.progress(range(5), label="[b] read")) == [0, 1, 2, 3, 4]
    assert "[b] read" in text.getvalue() and "5/5" in text.getvalue()
    if not terminal:
        assert text.getvalue().count("\n") == 1


def test_a_counter_goes_on_where_an_earlier_process_was_and_estimates_from_its_own_part(
    monkeypatch: pytest.MonkeyPatch, said: io.StringIO
) -> None:
    clock = iter(range(0, 10_000, 20))  # 20 s from one look to the next
    monkeypatch.setattr(log.time, "monotonic", lambda: next(clock))
    with log.counter(1000, label="tokenise", done=400) as advance:
        advance(100)  # 20 s
        advance(100)  # 40 s
    lines = said.getvalue().splitlines()
    assert lines[0] == "tokenise: 500/1000, 5/s, 0:01:40 left"
    assert lines[1] == "tokenise: 600/1000, 5/s, 0:01:20 left"
    assert lines[2] == "tokenise: 600/1000 in 60.0 s"


def test_importing_it_imports_no_jax() -> None:
    code = "import sys, mmgpt.core.log; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_markup_in_names_is_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    log.show(log.table("runs/[red]x", {"a[/b]": {"[bold]": "[/]"}}))
    out = capsys.readouterr().out
    assert all(part in out for part in ("runs/[red]x", "a[/b]", "[bold]", "[/]"))


def test_a_place_where_no_file_can_be_written_is_told_at_once(tmp_path: Path) -> None:
    log.check_writable(tmp_path / "new" / "x.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path, tmp_path / "file" / "x.json", Path("/proc/nothing/x.json")):
        with pytest.raises(OSError) as told:
            log.check_writable(path)
        assert told.value.filename == str(path)
