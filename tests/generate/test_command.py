"""`mmgpt generate` with a run of random parameters: files, texts on standard output, and clear errors."""

import re
from pathlib import Path

import numpy as np
import pytest

from mmgpt.cli import main
from mmgpt.data.media import decode_image, encode_mp4, encode_png


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image", "none.png"), "none.png: no such file"),
        (("--count", "0"), "ask for at least one"),
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
