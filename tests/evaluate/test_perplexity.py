"""Perplexity against brute force: each document alone, logits of the decoder, sums in float64 by numpy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmgpt.core.document import Document, Text
from mmgpt.core.stream import MODALITIES
from mmgpt.data.record import Dataset
from mmgpt.data.shuffle import is_held_out
from mmgpt.evaluate.command import evaluate
from mmgpt.evaluate.likelihood import Likelihood
from mmgpt.evaluate.subject import Options
from mmgpt.evaluate.tasks import TaskError
from mmgpt.train.run import Opened, open_run
from tests import tiny
from tests.evaluate.forward import log_probs

LENGTH = 64


@pytest.fixture(scope="module")
def opened(model_run: Path) -> Opened:
    return open_run(model_run)


def alone(opened: Opened, documents: list[Document]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Log-probabilities, float64 `[N - 1]`, and whether each id was the first choice; a document a row."""
    grammar = opened.built.grammar
    assert grammar is not None
    sequences = [grammar.encode(d) for d in documents]
    found = []
    for tokens, after in zip(sequences, log_probs(opened, sequences, LENGTH), strict=True):
        after = after[:-1]
        found.append((after[np.arange(len(after)), tokens.ids[1:]], after.argmax(-1) == tokens.ids[1:]))
    return found


def by_modality(opened: Opened, documents: list[Document]) -> dict[str, tuple[float, float, int]]:
    """(loss, accuracy, tokens) by modality of the predicted id, and of visual codes."""
    grammar = opened.built.grammar
    assert grammar is not None
    parts: dict[str, list[tuple[float, bool]]] = {name: [] for name in (*MODALITIES, "codes")}
    for document, (chosen, right) in zip(documents, alone(opened, documents), strict=True):
        tokens = grammar.encode(document)
        for t in range(1, len(tokens.ids)):
            if tokens.weight[t] > 0:
                parts[MODALITIES[tokens.modality[t]]].append((-chosen[t - 1], right[t - 1]))
                if tokens.ids[t] >= grammar.vocabulary.visual_start:
                    parts["codes"].append((-chosen[t - 1], right[t - 1]))
    means = {name: np.mean(values, axis=0) for name, values in parts.items() if values}
    return {name: (mean[0], mean[1], len(parts[name])) for name, mean in means.items()}


def scores_of(run: Path, spec: str, tmp_path: Path, **options: Any) -> dict[str, float]:
    evaluate(run, (spec,), json=tmp_path / "scores.json", options=Options(**options))
    found = json.loads((tmp_path / "scores.json").read_text())
    return found[next(name for name in found if name.startswith("perplexity-"))]


def test_perplexity_is_that_of_brute_force(model_run: Path, opened: Opened, tmp_path: Path):
    dataset = Dataset(model_run.parent / "left")
    expected = by_modality(opened, [dataset[i] for i in range(len(dataset))])
    scores = scores_of(model_run, f"perplexity={dataset.directory}", tmp_path)
    assert {name.partition("/")[2] for name in scores if "/" in name} == expected.keys() == {*MODALITIES[:3], "codes"}
    for name, (loss, accuracy, tokens) in expected.items():
        assert scores[f"loss/{name}"] == pytest.approx(loss, rel=1e-5)
        assert scores[f"perplexity/{name}"] == pytest.approx(np.exp(loss), rel=1e-4)
        assert scores[f"accuracy/{name}"] == pytest.approx(accuracy) and scores[f"tokens/{name}"] == tokens
    assert scores["count"] == len(dataset) and scores["left_out"] == 0


def test_held_out_documents_alone(model_run: Path, opened: Opened, tmp_path: Path):
    dataset = Dataset(model_run.parent / "right")
    kept = np.flatnonzero(is_held_out("right", np.arange(len(dataset)), 0.2))
    expected = by_modality(opened, [dataset[int(i)] for i in kept])
    scores = scores_of(model_run, f"perplexity={dataset.directory},held_out", tmp_path, batch=3)
    assert 0 < scores["count"] == len(kept) < len(dataset)
    assert scores["loss/text"] == pytest.approx(expected["text"][0], rel=1e-5)


@pytest.mark.parametrize(("row_length", "batch"), [(64, 8), (200, 3)])
def test_packing_does_not_change_a_score(opened: Opened, row_length: int, batch: int):
    documents = tiny.documents(12, seed=5)
    grammar = opened.built.grammar
    assert grammar is not None
    found = list(Likelihood(opened, row_length, batch).score(grammar.encode(d) for d in documents))
    for document, (tokens, scored), (chosen, right) in zip(documents, found, alone(opened, documents), strict=True):
        assert np.array_equal(tokens.ids, grammar.encode(document).ids)
        assert scored.log_prob == pytest.approx(chosen, abs=1e-4)
        assert np.array_equal(scored.likeliest, right)


def test_what_no_row_holds_is_counted_and_without_any_it_is_an_error(model_run: Path, tmp_path: Path):
    long = Document(key="long", segments=(Text(ids=np.ones(300, np.int32)),))
    short = tiny.documents(3, seed=7)
    tiny.write(tmp_path / "mixed", [short[0], long, *short[1:]])
    assert scores_of(model_run, f"perplexity={tmp_path / 'mixed'}", tmp_path)["left_out"] == 1
    tiny.write(tmp_path / "long", [long])
    with pytest.raises(TaskError, match="no token of it is scored: 1 documents"):
        evaluate(model_run, (f"perplexity={tmp_path / 'long'}",))
