"""The corpus on disk: complete, deterministic, without held-out pairs or evaluation scenes, and safe to write again."""

import hashlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mmgpt.data.media import decode_image, decode_video
from mmgpt.evaluate.shapes import changes, corpus, language, questions, world
from mmgpt.evaluate.shapes.corpus import CorpusError, write_corpus
from mmgpt.evaluate.shapes.oracle import read_scene, scene_right
from mmgpt.evaluate.shapes.world import Scene

SIZES = {"pairs": 40, "stories": 10, "clips": 8, "questions": 10, "edits": 12, "eval_each": 6}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "shapes"
    write_corpus(out, **SIZES, seed=3, workers=1)
    return out


def documents(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "documents.jsonl").read_text().splitlines()]


def digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def pairs_of(out: Path) -> list[tuple[np.ndarray, str]]:
    with tarfile.open(out / "pairs" / "shard-00000.tar") as tar:
        blobs = {m.name: f.read() for m in tar if (f := tar.extractfile(m)) is not None}
    texts = sorted(name for name in blobs if name.endswith(".txt"))
    stems = {name.rsplit(".", 1)[0]: name for name in blobs if not name.endswith(".txt")}
    return [(decode_image(blobs[stems[t[:-4]]]), blobs[t].decode()) for t in texts]


def picture(folder: Path, segment: dict) -> Scene:
    return read_scene(decode_image((folder / segment["image"]).read_bytes()))


def test_pairs_show_what_they_say(written: Path) -> None:
    found = pairs_of(written)
    assert len(found) == SIZES["pairs"]
    for image, text in found:
        content = language.read_caption(text)
        assert content is not None and scene_right(content, read_scene(image))
    with tarfile.open(written / "pairs" / "shard-00000.tar") as tar:
        assert {Path(n).suffix for n in tar.getnames()} == {".jpg", ".png", ".txt"}


def test_stories_show_what_they_say(written: Path) -> None:
    found = documents(written / "stories")
    assert len(found) == SIZES["stories"] and len({d["key"] for d in found}) == len(found)
    for document in found:
        texts = [s["text"] for s in document["segments"][::2]]
        for step, segment in enumerate(document["segments"][1::2], 1):
            content = changes.read_story(texts[:step])
            assert content is not None and scene_right(content, picture(written / "stories", segment))


def test_clips_show_what_they_say(written: Path) -> None:
    films = sorted((written / "clips").glob("*.mp4"))
    assert len(films) == SIZES["clips"]
    for film in films:
        frames, fps = decode_video(film.read_bytes())
        assert frames.shape == (4, 96, 96, 3) and fps == pytest.approx(4.0)
        motion = language.read_clip_caption(film.with_suffix(".txt").read_text())
        assert motion is not None and {m[:4] for m in motion} == read_scene(frames[0]).content


def test_questions_carry_loss_on_answers_only(written: Path) -> None:
    for document in documents(written / "questions"):
        image, *rest = document["segments"]
        assert image["loss"] == 0.0 and len(rest) == 12
        assert all(s["role"] == "user" and s["loss"] == 0.0 and s["text"].endswith("?") for s in rest[::2])
        assert all(s["role"] == "assistant" and "loss" not in s for s in rest[1::2])


def test_edits_show_what_the_instruction_asks(written: Path) -> None:
    for document in documents(written / "edits"):
        before, instruction, after = document["segments"]
        assert (before["loss"], instruction["loss"], after["role"]) == (0.0, 0.0, "assistant")
        seen = picture(written / "edits", before).content
        content = changes.read_change(seen, instruction["text"])
        assert content is not None and scene_right(content, picture(written / "edits", after))


def test_no_training_file_shows_or_names_a_held_out_pair(written: Path) -> None:
    texts = [text for _, text in pairs_of(written)]
    texts += [p.read_text() for p in (written / "clips").glob("*.txt")]
    read = [read_scene(image) for image, _ in pairs_of(written)]
    for task in ("stories", "questions", "edits"):
        for document in documents(written / task):
            texts += [s["text"] for s in document["segments"] if "text" in s]
            read += [picture(written / task, s) for s in document["segments"] if "image" in s]
    assert not any(f"{colour} {shape}" in text for text in texts for colour, shape in world.UNSEEN)
    assert not any(o.pair in world.UNSEEN for scene in read for o in scene.objects)


@pytest.mark.parametrize("task", corpus.EVALUATIONS)
def test_prompts_hold_their_truth(written: Path, task: str) -> None:
    folder = written / "eval" / task
    found = documents(folder)
    assert len(found) == SIZES["eval_each"]
    for document in found:
        meta, segments = document["meta"], document["segments"]
        assert meta["task"] == task and all(isinstance(value, str) for value in meta.values())
        truth = Scene.from_json(json.loads(meta["scene"]))
        assert world.for_evaluation(truth)
        if task in ("draw", "unseen", "attributes", "story"):
            text = segments[0]["text"]
            read = changes.read_story([text]) if task == "story" else language.read_caption(text)
            assert read == truth.content and len(segments) == 1
        if task == "unseen":
            assert sum(o.pair in world.UNSEEN for o in truth.objects) == 1
        if task in ("caption", "answer"):
            assert scene_right(truth, picture(folder, segments[0]))
        if task == "edit":
            assert changes.read_change(picture(folder, segments[0]).content, segments[1]["text"]) == truth.content
        if task == "next_frame":
            frames, _ = decode_video((folder / segments[0]["video"]).read_bytes())
            assert len(frames) == 3 and len(read_scene(frames[2]).objects) == len(truth.objects)


def test_question_kinds_of_the_evaluation_are_balanced(written: Path) -> None:
    kinds = Counter(d["meta"]["kind"] for d in documents(written / "eval" / "answer"))
    assert kinds == dict.fromkeys(questions.KINDS, 1)


def test_every_trained_scene_is_outside_the_evaluation_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rendered: list[Scene] = []
    render = world.render
    monkeypatch.setattr(world, "render", lambda scene: rendered.append(scene) or render(scene))
    write_corpus(tmp_path / "a", **{**SIZES, "eval_each": 0}, seed=5, workers=1)
    assert len(rendered) == 40 + 3 * 10 + 4 * 8 + 10 + 2 * 12
    assert not any(world.for_evaluation(scene) for scene in rendered)


def test_bytes_depend_on_the_seed_and_not_on_the_processes(written: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "two", **SIZES, seed=3, workers=2)
    assert digest(tmp_path / "two") == digest(written)
    write_corpus(tmp_path / "other", **{**SIZES, "clips": 0, "eval_each": 0}, seed=4, workers=1)
    mine, other = digest(written), digest(tmp_path / "other")
    assert mine["pairs/shard-00000.tar"] != other["pairs/shard-00000.tar"]


def test_writing_again_is_a_no_op_and_a_cut_off_corpus_is_completed(tmp_path: Path) -> None:
    sizes = {**SIZES, "pairs": 5, "stories": 2, "clips": 1, "questions": 2, "edits": 2, "eval_each": 1}
    out = tmp_path / "out"
    counts = write_corpus(out, **sizes, seed=1, workers=1)
    before, times = digest(out), {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert write_corpus(out, **sizes, seed=1, workers=1) == counts
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == times
    settings = json.loads((out / "corpus.json").read_text())["settings"]
    (out / "corpus.json").rename(out / "corpus.partial.json")
    assert settings["seed"] == 1
    (out / "clips" / "clip-00000.mp4").unlink()
    write_corpus(out, **sizes, seed=1, workers=1)
    assert digest(out) == before


def test_a_folder_with_other_files_or_other_settings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    with pytest.raises(CorpusError, match="neither an empty folder nor a shapes corpus"):
        write_corpus(tmp_path / "mine", **SIZES, seed=0, workers=1)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    none = dict.fromkeys(SIZES, 0)
    write_corpus(tmp_path / "out", **none, seed=0, workers=1)
    with pytest.raises(CorpusError, match="with settings"):
        write_corpus(tmp_path / "out", **none, seed=1, workers=1)
    (tmp_path / "out" / "corpus.json").write_text("{")
    with pytest.raises(CorpusError, match="is not what write_corpus writes"):
        write_corpus(tmp_path / "out", **none, seed=0, workers=1)


def test_png_and_jpeg_both_decode(written: Path) -> None:
    data = next((written / "edits" / "images").glob("*.png")).read_bytes()
    assert decode_image(data).shape == (96, 96, 3) and io.BytesIO(data).read(4) == b"\x89PNG"
