"""lm-eval's own evaluator on tasks of a folder and local data, and its requests against brute force."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmgpt.evaluate.command import evaluate
from mmgpt.evaluate.subject import Options, Subject
from mmgpt.evaluate.tasks import TaskError
from mmgpt.generate.decode import Prompt, Sampling
from tests import tiny
from tests.evaluate.forward import log_probs, of_text

pytest.importorskip("lm_eval")  # without torch on Python 3.12

from lm_eval.api.instance import Instance

from mmgpt.evaluate.lm_eval import TextModel

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval and what it imports

COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}, cache_dir: CACHE}
test_split: test
"""
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "tiny_words": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "tiny_answer": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
DOCUMENTS = [
    {"question": "a red circle", "choices": [" left of a", " two green stars"], "label": 0, "answer": "x"},
    {"question": "two green stars below", "choices": [" a small cross", " a ring", " what"], "label": 1, "answer": "y"},
    {"question": "what colour is the ring?", "choices": [" red", " blue"], "label": 1, "answer": "z"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files, the documents of all of them, and a place for the caches of `datasets`."""
    made = tmp_path_factory.mktemp("tasks")
    (made / "documents.json").write_text("".join(json.dumps(d) + "\n" for d in DOCUMENTS))
    (made / "yaml").mkdir()
    for name, text in TASKS.items():
        common = COMMON.replace("FILE", str(made / "documents.json")).replace("CACHE", str(made / "cache"))
        (made / "yaml" / f"{name}.yaml").write_text(f"task: {name}\n{common}{text}")
    return made


@pytest.fixture(scope="module")
def model(model_run: Path) -> TextModel:
    return TextModel(Subject(model_run), batch=4)


def requests(kind: Any, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def brute(model: TextModel, given: list[int], wanted: list[int]) -> tuple[float, bool]:
    """Sum of log-probabilities of ids after others, and whether each was the first choice."""
    tokens = of_text(model._opened, [*given, *wanted])
    after = log_probs(model._opened, [tokens], 64)[0][len(given) : -1]
    return float(after[np.arange(len(after)), wanted].sum()), bool((after.argmax(-1) == wanted).all())


def test_a_continuation_is_as_likely_as_by_brute_force(model: TextModel):
    pairs = [(d["question"], c) for d in DOCUMENTS for c in d["choices"]] + [("", "a red"), ("a ", "ring")]
    found = model.loglikelihood(requests("loglikelihood", pairs))
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        given, wanted = model.pair(context, continuation)
        assert tiny.text().decode(given + wanted).split() == (context + continuation).split()
        expected, likeliest = brute(model, given, wanted)
        assert total == pytest.approx(expected, rel=1e-4) and greedy is likeliest


def test_what_greedy_decoding_gives_is_greedy(model: TextModel):
    """The ids that the generator makes are the likeliest ones, and any other id is not."""
    context = tiny.text().encode("what colour is")
    after = log_probs(model._opened, [of_text(model._opened, context)], 64)[0][-1]
    best, other = int(after.argmax()), int(after.argsort()[-2])
    assert brute(model, context, [best])[1] and not brute(model, context, [other])[1]


def test_a_long_context_loses_its_beginning(model: TextModel):
    """Rows of the run hold 64 tokens: the opening, the end of the context, and the continuation."""
    context, continuation = "two green stars below a small cross " * 20, "what colour"
    ((total, _),) = model.loglikelihood(requests("loglikelihood", [(context, continuation)]))
    given, wanted = model.pair(context, continuation)
    assert len(given) > 64
    assert total == pytest.approx(brute(model, given[-(63 - len(wanted)) :], wanted)[0], rel=1e-4)


def test_a_whole_text_is_scored_token_by_token_also_over_windows(model: TextModel):
    short, long = "a red circle left of a blue square", "two green stars below a small cross " * 5
    totals = model.loglikelihood_rolling(requests("loglikelihood_rolling", [(short,), (long,)]))
    assert totals[0] == pytest.approx(brute(model, [], tiny.text().encode(short))[0], rel=1e-4)
    ids = tiny.text().encode(long)
    assert 63 < len(ids) < 126
    first, rest = brute(model, [], ids[:63])[0], ids[63:]
    grammar = tiny.grammar()
    window = [*ids[len(ids) - 64 : len(ids)]]
    tokens = of_text(model._opened, window[1:])
    tokens.ids[0] = window[0]  # the context of a later window takes the place of the opening
    after = log_probs(model._opened, [tokens], 64)[0][-len(rest) - 1 : -1]
    assert grammar.bos not in window
    expected = first + float(after[np.arange(len(rest)), rest].sum())
    assert totals[1] == pytest.approx(expected, rel=1e-4)


def test_texts_are_generated_up_to_the_stop(model: TextModel):
    settings = [{"until": ["zzz"], "max_gen_toks": 9}, {"until": ["zzz"], "max_gen_toks": 9}, {"until": "e"}]
    asked = [("a red circle", settings[0]), ("what colour", settings[1]), ("a red circle", settings[2])]
    first, second, cut = model.generate_until(requests("generate_until", asked))
    ids = np.array([model._opening[0], *tiny.text().encode("a red circle")], np.int32)
    (made,) = model._generator.generate([Prompt(ids=ids)], Sampling(room=9))
    new = made[len(ids) :]
    assert first == tiny.text().decode(new[new < tiny.text().size].tolist())
    assert "e" not in cut and isinstance(second, str)


def test_lm_evals_tasks_run_on_a_run_folder(model_run: Path, model: TextModel, folder: Path, tmp_path: Path):
    specs = tuple(f"lm_eval={name},{folder / 'yaml'}" for name in TASKS)
    evaluate(model_run, specs, json=tmp_path / "scores.json", options=Options(batch=4))
    scores = json.loads((tmp_path / "scores.json").read_text())
    right = 0
    for document in DOCUMENTS:
        sums = [brute(model, *model.pair(document["question"], " " + c))[0] for c in document["choices"]]
        right += int(np.argmax(sums)) == document["label"]
    assert scores["lm_eval-tiny_choice"] == {"acc": pytest.approx(right / 3, abs=1e-4), "count": 3}
    texts = [d["question"] for d in DOCUMENTS]
    total = sum(brute(model, [], tiny.text().encode(text))[0] for text in texts)
    words = sum(len(text.split()) for text in texts)
    found = scores["lm_eval-tiny_words"]
    assert np.log(found["word_perplexity"]) == pytest.approx(-total / words, rel=1e-3)
    assert found["bits_per_byte"] == pytest.approx(-total / sum(map(len, texts)) / np.log(2), rel=1e-3)
    assert scores["lm_eval-tiny_answer"] == {"exact_match": 0.0, "count": 3}


def test_examples_come_before_the_question(model_run: Path, folder: Path, tmp_path: Path):
    spec = f"lm_eval=tiny_choice,{folder / 'yaml'}"
    evaluate(model_run, (spec,), json=tmp_path / "scores.json", options=Options(shots=1, limit=2, batch=4))
    assert json.loads((tmp_path / "scores.json").read_text())["lm_eval-tiny_choice"]["count"] == 2


def test_an_unknown_task_is_told_before_the_model_is_loaded(model_run: Path, folder: Path, monkeypatch):
    monkeypatch.setattr("mmgpt.evaluate.subject.open_folder", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(TaskError, match=r"no task 'tiny_choise'\. Did you mean tiny_choice"):
        evaluate(model_run, (f"lm_eval=tiny_choise,{folder / 'yaml'}",))
    with pytest.raises(TaskError, match="no such folder of task files"):
        evaluate(model_run, ("lm_eval=tiny_choice,nowhere",))
