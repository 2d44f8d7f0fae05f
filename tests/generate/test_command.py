"""`mmgpt generate` with a run of random parameters: files, texts on standard output, and clear errors."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest

from mmgpt.cli import main
from mmgpt.data.media import decode_image, decode_video, encode_mp4, encode_png
from mmgpt.generate.model import Model


def generate(run: Path, out: Path, *arguments: str) -> int:
    return main(["generate", str(run), "--out", str(out), "--room", "30", *arguments])


def test_a_text_prompt_gives_a_page_and_what_it_names(
    model_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert generate(model_run, tmp_path, "--prompt", "<b>red", "--count", "3", "--text-temperature", "1.0") == 0
    page = (tmp_path / "index.html").read_text()
    assert page.count("<section>") == 3 and "&lt;b&gt;red" in page and "<b>" not in page
    assert capsys.readouterr().out.strip()
    for path in tmp_path.glob("*.png"):
        assert path.name in page


def test_pictures_of_any_size_may_stand_in_the_prompt(model_run: Path, tmp_path: Path):
    (tmp_path / "a.png").write_bytes(encode_png(np.full((31, 47, 3), 99, np.uint8)))
    assert (
        generate(model_run, tmp_path / "out", "--image", str(tmp_path / "a.png"), "--prompt", "what colour is it?") == 0
    )
    assert decode_image((tmp_path / "out" / "prompt-0.png").read_bytes()).shape[2] == 3


def test_a_file_that_is_no_picture_is_named(model_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for flag in ("--image", "--video"):
        assert generate(model_run, tmp_path / "out", flag, str(tmp_path / "broken.png")) == 1
        assert f"{tmp_path / 'broken.png'}: not a" in capsys.readouterr().err.replace("\n", "")


def test_a_video_gains_frames(model_run: Path, tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(encode_mp4(np.full((1, 16, 16, 3), 99, np.uint8), 4))
    assert generate(model_run, tmp_path / "out", "--video", str(tmp_path / "a.mp4"), "--add-frames", "1") == 0
    assert (tmp_path / "out" / "000-0.gif").is_file()
    frames, _ = decode_video((tmp_path / "out" / "000-0.mp4").read_bytes())
    assert len(frames) == 2


def test_more_frames_than_a_row_has_room_for_are_refused(
    model_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "a.mp4").write_bytes(encode_mp4(np.full((1, 16, 16, 3), 99, np.uint8), 4))
    video = ("--video", str(tmp_path / "a.mp4"))
    assert generate(model_run, tmp_path / "out", *video, "--add-frames", "1000") == 1
    message = capsys.readouterr().err
    assert "--add-frames is 1000" in message
    most = re.search(r"room for (\d+)", message.replace("\n", " "))
    assert most is not None
    assert generate(model_run, tmp_path / "out", *video, "--add-frames", str(int(most[1]) + 1)) == 1
    capsys.readouterr()
    assert generate(model_run, tmp_path / "out", *video, "--add-frames", most[1]) == 0  # they fit if they are blank
    assert "fewer --add-frames" in capsys.readouterr().err


def test_a_picture_is_drawn_at_once_where_a_size_is_asked_for(
    model_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for size, shape in (("2*3", (8, 12, 3)), ("8*12px", (8, 12, 3))):
        assert generate(model_run, tmp_path / "a", "--prompt", "red", "--size", size, "--jacobi", "3") == 0
        assert decode_image((tmp_path / "a" / "000-0.png").read_bytes()).shape == shape
    assert str(tmp_path / "a" / "000-0.png") in capsys.readouterr().out


def test_a_text_becomes_a_clip(model_run: Path, tmp_path: Path):
    assert generate(model_run, tmp_path, "--prompt", "red", "--frames", "2", "--size", "1*2") == 0
    frames, rate = decode_video((tmp_path / "000-0.mp4").read_bytes())
    assert frames.shape[:3] == (2, 4, 8) and rate == 4.0


def test_examples_stand_before_the_question(model_run: Path, tmp_path: Path):
    for name, grey in (("a", 10), ("b", 200)):
        (tmp_path / f"{name}.png").write_bytes(encode_png(np.full((8, 8, 3), grey, np.uint8)))
    shots = ("--shot", str(tmp_path / "a.png"), "dark", "--shot", str(tmp_path / "b.png"), "light")
    assert generate(model_run, tmp_path / "out", *shots, "--prompt", "red", "--room", "4") == 0
    page = (tmp_path / "out" / "index.html").read_text().split("</h1>")[1]
    assert page.index("prompt-0.png") < page.index("dark") < page.index("prompt-2.png") < page.index("light")
    pieces = [{"image": "a.png", "text": "dark"}, {"image": "b.png", "text": "light"}, {"text": "red"}]
    (tmp_path / "list.json").write_text(json.dumps(pieces))
    assert generate(model_run, tmp_path / "again", "--segments", str(tmp_path / "list.json"), "--room", "4") == 0
    assert (tmp_path / "again" / "index.html").read_text().split("</h1>")[1] == page


def test_a_conversation_is_answered_turn_by_turn(
    model_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """A file's turns without an answer are answered; so are lines of standard input."""
    turns = [
        {"role": "user", "text": "red"},
        {"role": "assistant", "text": "a ring"},
        {"role": "user", "text": "blue?"},
        {"role": "user", "text": "a star?"},
    ]
    (tmp_path / "chat.json").write_text(json.dumps(turns))
    assert generate(model_run, tmp_path / "out", "--chat", str(tmp_path / "chat.json"), "--room", "3") == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<section>") == 2
    assert page.index("a ring") < page.index("blue?") < page.index("a star?")
    monkeypatch.setattr("sys.stdin", io.StringIO("red\nblue?\n"))
    assert generate(model_run, tmp_path / "live", "--chat", "-", "--room", "3") == 0
    assert (tmp_path / "live" / "index.html").read_text().count("<section>") == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("{}", "expected a list of pieces"),
        ('[{"txt": "red"}]', "piece 0: expected a table with text, image, video and role"),
        ('[{"text": "red", "role": "robot"}]', "a role is user or assistant"),
        ('[{"image": "none.png"}]', "none.png: no such file"),
        ("[" * 100_000, "not JSON"),
        ("9" * 5000, "not JSON"),
    ],
)
def test_a_list_of_pieces_that_cannot_be_read_is_told(
    model_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
):
    (tmp_path / "list.json").write_text(text)
    assert generate(model_run, tmp_path / "out", "--segments", str(tmp_path / "list.json")) == 1
    assert message in capsys.readouterr().err


def test_a_prompt_that_is_too_long_is_told_before_the_model_is_loaded(
    model_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Model, "open", lambda *a, **k: pytest.fail("loaded"))
    assert generate(model_run, tmp_path, "--prompt", "red " * 80) == 1
    assert "nothing is left to generate" in capsys.readouterr().err
    (tmp_path / "a.png").write_bytes(encode_png(np.full((31, 47, 3), 99, np.uint8)))
    assert generate(model_run, tmp_path, *("--image", str(tmp_path / "a.png")) * 9) == 1
    assert "nothing is left to generate" in capsys.readouterr().err


def test_where_no_page_can_be_written_is_told_before_the_model_is_loaded(
    model_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Model, "open", lambda *a, **k: pytest.fail("loaded"))
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "x"):
        assert generate(model_run, out, "--prompt", "red") == 1
        assert f"{out / 'index.html'}: " in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


def test_a_conversation_in_which_nobody_asks_is_told(
    model_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "chat.json").write_text('[{"role": "user", "text": "a"}, {"role": "assistant", "text": "b"}]')
    assert generate(model_run, tmp_path / "out", "--chat", str(tmp_path / "chat.json")) == 1
    assert "nobody waits for an answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image", "none.png"), "none.png: no such file"),
        (("--image", "."), ".: is a folder; name one file"),
        (("--count", "0"), "ask for at least one"),
        (("--size", "2*"), "--size is '2*'; give H*W places"),
        (("--size", "9*12px"), "sides in pixels are multiples of 4"),
        (("--size", "40*40"), "a medium of 40*40 places takes"),
        (("--frames", "1", "--add-frames", "1"), "give one of them"),
        (("--segments", "none.json"), "none.json: no such file"),
        (("--chat", "none.json", "--prompt", "red"), "are the whole prompt"),
        (("--shot", "none.png", "red"), "none.png: no such file"),
        (("--fps", "0"), "--fps is 0.0"),
        (("--jacobi", "-1"), "jacobi is -1; give"),
        (("--jacobi", "3000"), "jacobi is 3000; give"),
        (("--segments", "-"), "-: no such file"),
        (("--size", "2*3", "--room", "2"), "--room is 2, and a medium of that --size takes"),
        (("--text-temperature", "1e-40"), "give 0 (the likeliest id), or 1e-06 or more"),
        (("--guidance", "nan"), "guidance is nan"),
        (("--add-frames", "1"), "goes on with a video"),
        (("--add-frames", "-1"), "--add-frames is -1"),
        (("--prompt", "red " * 80), "nothing is left to generate"),
        (("--temperature", "-1"), "temperature is -1.0; give 0"),
        (("--text-temperature", "nan"), "temperature is nan"),
        (("--top-p", "0"), "top_p is 0.0; give more than 0"),
        (("--top-k", "-2"), "top_k is -2; give 0"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_one_clear_error(
    model_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
):
    assert generate(model_run, tmp_path, *arguments) == 1
    assert message in capsys.readouterr().err
