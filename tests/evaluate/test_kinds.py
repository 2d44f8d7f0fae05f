"""`mmgpt eval` on annotation files, pictures and tokenizers: scores are those of what was recorded, computed apart."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmgpt.core.document import Document, Image, Text, Video
from mmgpt.core.errors import UserError
from mmgpt.data.loader import LoaderError
from mmgpt.data.media import decode_image, encode_mp4, encode_png, resize
from mmgpt.data.record import Dataset
from mmgpt.evaluate import annotations, kinds
from mmgpt.evaluate.command import evaluate
from mmgpt.evaluate.metrics.captions import caption_scores
from mmgpt.evaluate.metrics.vqa import normalised, vqa_accuracy
from mmgpt.evaluate.pictures import read_media
from mmgpt.evaluate.records import Records, load_records
from mmgpt.evaluate.report import report
from mmgpt.evaluate.subject import Options, Subject
from mmgpt.tokens.grammars.grammar import Tokens
from tests import tiny
from tests.evaluate.forward import log_probs

WORDS = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, a clip, and annotations of them in three formats."""
    folder = tmp_path_factory.mktemp("annotated")
    rng = np.random.default_rng(0)
    (folder / "media").mkdir()
    for number in range(5):
        picture = np.kron(rng.integers(0, 256, (2, 3, 3)), np.ones((12, 12, 1))).astype(np.uint8)
        (folder / "media" / f"COCO_val2014_{number:012d}.jpg").write_bytes(encode_png(picture))
    frames = np.repeat(rng.integers(0, 256, (12, 1, 1, 3)), 16, axis=1).repeat(24, axis=2).astype(np.uint8)
    (folder / "media" / "7.mp4").write_bytes(encode_mp4(frames, 4.0))
    images = [{"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg"} for n in range(5)]
    said = [{"image_id": n % 5, "caption": text} for n, text in enumerate(tiny.SENTENCES * 4)]
    write(folder / "captions.json", {"images": images, "annotations": said})
    asked = [{"image_id": n, "question": "what colour is it?", "question_id": n} for n in range(5)]
    write(folder / "questions.json", {"data_subtype": "val2014", "questions": asked})
    answers = [
        {"question_id": n, "image_id": n, "answer_type": f"kind {n % 2}", "answers": [{"answer": "red"}] * 3}
        for n in range(5)
    ]
    write(folder / "answers.json", {"annotations": answers})
    heading = "video,question,answer,qid,type,a0,a1,a2,a3,a4\n"
    lines = [f"7,what is red,{n},{n},CW,a ring,a red circle,two,a cross,blue\n" for n in range(3)]
    (folder / "choice.csv").write_text(heading + "".join(lines))
    (folder / "open.csv").write_text("video,question,answer,qid,type\n7,what is red,a ring,0,CW\n")
    return folder


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw dataset of captioned pictures."""
    rng = np.random.default_rng(1)
    documents = []
    for number in range(12):
        picture = np.kron(rng.integers(0, 256, (4, 6, 3)), np.ones((4, 4, 1))).astype(np.uint8)
        words = " ".join(rng.choice(WORDS.split(), 1 + number % 7))
        documents.append(Document(key=str(number), segments=(Text(text=words), Image(data=encode_png(picture)))))
    folder = tmp_path_factory.mktemp("raw") / "pairs"
    tiny.write(folder, documents)
    return folder


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores and records by name of one call of `mmgpt eval`."""

    run: Path
    scores: dict[str, dict[str, float]]

    def records(self, name: str) -> Records:
        return load_records(self.run / "eval" / name, 100)


def scored_by(run: Path, specs: tuple[str, ...], out: Path, **options: Any) -> Scored:
    evaluate(run, specs, json=out / "scores.json", options=Options(batch=4, **options))
    return Scored(run, json.loads((out / "scores.json").read_text()))


@pytest.fixture(scope="module")
def scored(model_run: Path, files: Path, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """All kinds on the decoder, in one call."""
    media = files / "media"
    specs = (
        f"captions={files / 'captions.json'},{media}",
        f"vqa={files / 'questions.json'},{files / 'answers.json'},{media}",
        f"nextqa={files / 'choice.csv'},{media}",
        f"nextqa={files / 'open.csv'},{media}",
        f"fid={raw}",
        f"fid={files / 'captions.json'},{media},tests.evaluate.test_features:brightness",
        f"reconstruction={raw}",
        f"reconstruction={media},tokenizer",
        f"perplexity={model_run.parent / 'left'}",
    )
    options = {"template": "{question}", "frames": 2, "temperature": 1.0, "guidance": 2.0, "area": 48 * 48, "limit": 12}
    return scored_by(model_run, specs, tmp_path_factory.mktemp("scored"), **options)


def test_captions_are_scored_against_all_references(scored: Scored, files: Path):
    scores, records = scored.scores["captions-captions"], scored.records("captions-captions")
    references = {a.key: a.answers for a in annotations.read("captions", [files / "captions.json"])}
    made = {record.key: record.made[0].text for record in records.records}
    assert made.keys() == references.keys() and scores["count"] == 5
    expected, _ = caption_scores(made, references)
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    first = records.records[0]
    assert first.prompt[0].frames is not None and first.truth == " | ".join(references[first.key])


def test_questions_are_scored_by_the_rule_and_by_kind(scored: Scored):
    scores, records = scored.scores["vqa-questions"], scored.records("vqa-questions")
    each = [vqa_accuracy(r.made[0].text, ["red"] * 3) for r in records.records]
    assert len(each) == 5 and scores["accuracy"] == pytest.approx(np.mean(each), abs=1e-4)
    assert {"accuracy/kind 0", "accuracy/kind 1"} < scores.keys()
    assert all(record.prompt[-1].text == "what colour is it?" for record in records.records)


def test_examples_come_before_the_question_with_or_without_pictures(model_run: Path, files: Path, tmp_path: Path):
    spec = f"vqa={files / 'questions.json'},{files / 'answers.json'},{files / 'media'}"
    found = scored_by(model_run, (spec,), tmp_path, shots=1, template="{question}", limit=4, shot_media=False)
    for record in found.records("vqa-questions").records:
        text, picture, question = record.prompt
        assert text.text.split() == ["what", "colour", "is", "it?", "red"] and question.text == "what colour is it?"
        assert picture.frames is not None
    with pytest.raises(UserError, match="Give fewer --shots"):
        scored_by(model_run, (spec,), tmp_path, shots=2, template="{question}")


def test_the_likeliest_option_is_the_answer(scored: Scored, files: Path):
    subject = Subject(scored.run)
    options = annotations.read("nextqa", [files / "choice.csv"])[0].choices
    records = scored.records("nextqa-choice").records
    frames = [part.frames for part in records[0].prompt if part.frames is not None]
    assert len(frames) == 1 and frames[0].shape == (2, 8, 12, 3) and len({r.made[0].text for r in records}) == 1
    sums = []
    for option in options:
        tokens, given = laid_out(subject, files, option)
        after = log_probs(subject.opened, [tokens], 64)[0]
        sums.append(sum(after[t - 1, tokens.ids[t]] for t in range(given, len(tokens.ids))))
    said = records[0].made[0].text
    assert said == options[int(np.argmax(sums))]
    right = [said == option for option in options[:3]]
    assert scored.scores["nextqa-choice"]["accuracy"] == pytest.approx(np.mean(right), abs=1e-4)


def laid_out(subject: Subject, files: Path, option: str) -> tuple[Tokens, int]:
    """The prompt with an option, by hand, and the length of the prompt."""
    frames = np.stack([resize(f, 8, 12) for f in read_media(files / "media", "7.mp4", 2)])
    clip = Video(codes=subject.vision.encode(frames))
    question, answer = (Text(ids=np.array(tiny.text().encode(t), np.int32)) for t in ("what is red", option))
    head = subject.grammar.encode(Document(key="", segments=(clip, question)), end=False)
    return subject.grammar.encode(Document(key="", segments=(clip, question, answer)), end=False), len(head.ids)


def test_open_answers_are_right_by_their_words(scored: Scored):
    (record,) = scored.records("nextqa-open").records
    assert scored.scores["nextqa-open"]["accuracy"] == float(normalised(record.made[0].text) == "ring")


def frechet(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """Of thumbnails and spreads. The trace of the root is the nuclear norm of the product of the centred features."""
    x, y = (
        np.array([np.concatenate([resize(p, 8, 8).ravel() / 255, p.reshape(-1, 3).std(0) / 255]) for p in pictures])
        for pictures in (a, b)
    )
    shift = np.square(x.mean(0) - y.mean(0)).sum()
    x, y = ((f - f.mean(0)) / np.sqrt(len(f) - 1) for f in (x, y))
    return float(shift + np.square(x).sum() + np.square(y).sum() - 2 * np.linalg.norm(x @ y.T, "nuc"))


def test_drawn_pictures_are_compared_as_a_set(scored: Scored, raw: Path):
    scores, records = scored.scores["fid-pairs"], scored.records("fid-pairs")
    drawn = [part.frames[0] for r in records.records for part in r.made if part.frames is not None]
    dataset = Dataset(raw)
    true = [decode_image(s.data) for i in range(len(dataset)) for s in dataset[i].segments if isinstance(s, Image)]  # pyright: ignore
    assert scores["count"] == len(drawn) == 12 and {picture.shape for picture in drawn} == {(8, 12, 3)}
    assert scores["frechet"] == pytest.approx(frechet([resize(p, 8, 12) for p in true], drawn), abs=2e-4)
    assert all(r.prompt[0].text.split()[0] in WORDS for r in records.records)


def test_captions_and_a_folder_are_drawn_as_well(scored: Scored):
    assert scored.scores["fid-captions"]["count"] == 5 and scored.scores["fid-captions"]["frechet"] >= 0
    assert scored.records("fid-captions").metrics["frechet"].endswith("tests.evaluate.test_features:brightness")


def check_reconstruction(scores: dict[str, float], records: Records, folder: Path) -> list[tuple[Any, Any]]:
    """Scores are those of the pictures that were recorded."""
    pairs = [(r.prompt[0].frames[0], r.made[0].frames[0]) for r in records.records]  # pyright: ignore
    errors = [np.square(a.astype(float) - b).mean() for a, b in pairs]
    assert len(pairs) == scores["count"]
    assert scores["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / np.array(errors))), abs=1e-3)
    codes = Subject(folder).vision.encode(np.stack([a for a, _ in pairs]))
    assert scores["codes_used/0"] == pytest.approx(len(np.unique(codes[..., 0])) / tiny.BOOKS[0], abs=1e-4)
    return pairs


def test_the_tokenizer_that_a_model_reads_with_is_measured(scored: Scored):
    check_reconstruction(scored.scores["reconstruction-pairs"], scored.records("reconstruction-pairs"), scored.run)
    for name in ("pairs", "media"):
        assert -1 < scored.scores[f"reconstruction-{name}"]["ssim"] < 1


def test_a_tokenizer_is_measured_on_pictures_and_clips(model_run: Path, files: Path, raw: Path, tmp_path: Path):
    clip = Document(key="c", segments=(Video(data=(files / "media" / "7.mp4").read_bytes()),))
    tiny.write(tmp_path / "clips", [clip])
    specs = (f"reconstruction={raw}", f"reconstruction={tmp_path / 'clips'}")
    found = scored_by(model_run.parent / "vision", specs, tmp_path, area=96)
    scores = found.scores["reconstruction-pairs"]
    pairs = check_reconstruction(scores, found.records("reconstruction-pairs"), found.run)
    assert pairs[0][0].shape == (8, 12, 3) and "ssim" not in scores  # of 8 pixels there is no window of 11
    assert scores["frechet"] == pytest.approx(frechet([a for a, _ in pairs], [b for _, b in pairs]), abs=2e-4)
    (record,) = found.records("reconstruction-clips").records
    assert found.scores["reconstruction-clips"]["count"] == 12 and record.made[0].clip


WRONG = [
    ("perplexty=x", r"no task 'perplexty'.* Did you mean perplexity=...\? Give folders, or:"),
    ("nowhere", "no folder of tokenised prompts and no kind of task"),
    ("perplexity=nowhere", "nowhere: no such dataset"),
    ("perplexity={left},all", r"expected perplexity=DATASET\[,held_out\]"),
    ("captions={files}/captions.json", "expected captions=ANNOTATIONS.json,FOLDER"),
    ("captions={files}/no.json,{files}/media", "no.json: no such annotation file"),
    ("captions={files}/captions.json,{files}", "5 of 5 media files are missing, the first: COCO_val2014_000000000000"),
    ("vqa={files}/captions.json,{files}/answers.json,{files}/media", "has no 'data_subtype'"),
    ("vqa=,x", "separated by commas"),
    ("fid={raw},nothing", "no feature 'nothing'; there are pixels, tokenizer, or your own as module:function"),
    ("fid={raw},json:nothing", "feature json:nothing: .* Put its module on Python's path"),
    ("reconstruction={files}", "neither a raw dataset nor a folder with .png"),
    ("{raw}", "expected prompts of one known task"),
]


@pytest.mark.parametrize(("spec", "told"), WRONG, ids=[spec for spec, _ in WRONG])
def test_what_is_wrong_is_told_before_anything_is_loaded(
    spec: str, told: str, model_run: Path, files: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mmgpt.evaluate.subject.open_folder", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=told):
        evaluate(model_run, (spec.format(files=files, raw=raw, left=model_run.parent / "left"),))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"shots": -1}, "--shots is -1"),
        ({"limit": 0}, "--limit is 0"),
        ({"batch": 0}, "--batch is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"seed": 10**20}, "--seed is 1000"),
        ({"shots": 5}, "--shots 5: .* has too few media"),
        ({"template": "what?"}, "it must hold {question}"),
    ],
)
def test_wrong_options_are_told_before_anything_is_loaded(
    options: dict, told: str, model_run: Path, files: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mmgpt.evaluate.subject.open_folder", lambda *a, **k: pytest.fail("a model was loaded"))
    spec = f"vqa={files / 'questions.json'},{files / 'answers.json'},{files / 'media'}"
    with pytest.raises(UserError, match=told):
        evaluate(model_run, (spec,), options=Options(**options))


def test_scores_of_one_name_are_told_apart_and_outlive_a_failure(
    model_run: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spec, out = f"reconstruction={files / 'media'}", tmp_path / "scores.json"
    evaluate(model_run, (spec, f"{spec}/"), json=out, options=Options(limit=2))
    assert list(json.loads(out.read_text())) == ["reconstruction-media", "reconstruction-media-2", "seconds"]

    def fail(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("mmgpt.evaluate.kinds.perplexity._run", fail)
    with pytest.raises(MemoryError):
        evaluate(
            model_run, (f"perplexity={model_run.parent / 'left'}", spec), json=out.with_name("x"), options=Options()
        )
    with pytest.raises(MemoryError):
        evaluate(model_run, (spec, f"perplexity={model_run.parent / 'left'}"), json=out, options=Options(limit=2))
    assert list(json.loads(out.read_text())) == ["reconstruction-media", "seconds"] and not out.with_name("x").exists()


def test_scores_that_cannot_be_written_are_told_before_anything_is_loaded(
    model_run: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mmgpt.evaluate.subject.open_folder", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(IsADirectoryError):
        evaluate(model_run, (f"reconstruction={files / 'media'}",), json=tmp_path)


def test_words_of_another_text_tokenizer_are_told(model_run: Path, tmp_path: Path):
    """Their ids would be other words, and the scores those of nonsense."""
    left = model_run.parent / "left"
    shutil.copytree(left, tmp_path / "left")
    manifest = json.loads((left / "manifest.json").read_text())
    for probe, told in (("0", True), (tiny.text().fingerprint(), False)):
        manifest["meta"]["settings"] = {"text_probe": probe}
        (tmp_path / "left" / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(LoaderError, match="another tokenizer") if told else contextlib.nullcontext():
            kinds.prepare(f"perplexity={tmp_path / 'left'}", Options(), Subject(model_run))


def test_no_task_and_one_twice_are_told(model_run: Path, raw: Path):
    for specs, told in (((), "name at least one"), ((f"fid={raw}",) * 2, "given twice")):
        with pytest.raises(UserError, match=told):
            evaluate(model_run, specs)


def test_a_tokenizer_takes_no_task_of_tokens(model_run: Path, raw: Path):
    for spec in (f"perplexity={raw}", f"fid={raw}", str(model_run.parent / "prompts" / "draw")):
        with pytest.raises(UserError, match="needs a model over tokens"):
            evaluate(model_run.parent / "vision", (spec,))


def test_every_kind_tells_its_usage():
    text = kinds.usage()
    assert all(f"  {name}=" in text for name in kinds.names())
    assert {"captions", "vqa", "fid", "lm_eval", "perplexity", "reconstruction"} < set(kinds.names())


def test_the_report_shows_numbers_and_shares(scored: Scored):
    report(scored.run.parent, examples=2)
    page = (scored.run.parent / "report.html").read_text()
    assert "Captions: captions-captions" in page and "Perplexity of left" in page
    assert f"{scored.scores['perplexity-left']['perplexity/text']:.4g}</b> perplexity of text" in page
    assert json.loads((scored.run.parent / "scores.json").read_text())["fid-pairs"] == scored.scores["fid-pairs"]
