"""What `mmgpt data inspect` shows: every document and every id is counted, what is folded is told, text stays text."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from mmgpt import cli
from mmgpt.core import config
from mmgpt.core.document import Document, Image, Text
from mmgpt.data.inspect import Shown, page_html
from mmgpt.data.laid_out import SHOWN, WORDS, pieces
from mmgpt.data.record import Dataset, Writer
from mmgpt.data.statistics import edges, histogram, statistics
from mmgpt.tokens import grammars
from tests import tiny


def call(*arguments: str) -> int:
    try:
        return cli.main(list(arguments))
    except SystemExit as e:
        return int(e.code or 0)


def picture(side: int, seed: int = 0) -> np.ndarray:
    return tiny.grid(np.random.default_rng(seed), (side, side), blanks=False)


def words(text: str, **changes: object) -> Text:
    return dataclasses.replace(Text(ids=np.array(tiny.text().encode(text), np.int32)), **changes)


# --- numbers


def test_lengths_are_what_the_grammar_lays_out(tmp_path: Path) -> None:
    found = tiny.documents(30, 0)
    dataset = Dataset(Path(tiny.write(tmp_path / "d", found)))
    told = statistics(dataset, tiny.grammar())
    tokens = [len(tiny.grammar().encode(document).ids) for document in found]
    assert told["length_unit"] == "tokens" and told["lengths"]["sum"] == sum(tokens) == sum(
        told["length_sums"].values()
    )
    bars = told["histogram"]
    for low, high, documents, held in zip(
        bars["edges"], bars["edges"][1:], bars["documents"], bars["lengths"], strict=False
    ):
        inside = [n for n in tokens if low <= n < high]
        assert (len(inside), sum(inside)) == (documents, held)
    assert json.loads(json.dumps(told)) == told


def test_without_a_grammar_ids_and_codes_are_counted(tmp_path: Path) -> None:
    document = Document(key="a", segments=(Text(ids=np.arange(7, dtype=np.int32)), Image(codes=picture(3))))
    told = statistics(Dataset(Path(tiny.write(tmp_path / "d", [document]))))
    assert told["length_unit"] == "ids and codes" and told["length_sums"] == {"text": 7, "image": 3 * 3 * 2}
    raw = statistics(Dataset(Path(tiny.write(tmp_path / "r", [Document(key="a", segments=(Text(text="abcde"),))]))))
    assert raw["length_unit"] == "characters" and raw["lengths"]["max"] == 5


@pytest.mark.parametrize(
    "lengths", [[5], [0, 0], [3, 900_000, 7, 7], list(range(13, 400)), [4100, 4164, 4120], [1, 2**31]]
)
def test_a_histogram_holds_every_document_in_few_bars(lengths: list[int]) -> None:
    values = np.array(lengths)
    bounds = edges(values)
    bars = histogram(values, bounds)
    assert bounds == sorted(set(bounds)) and len(bounds) <= 34
    assert sum(bars["documents"]) == len(lengths) and sum(bars["lengths"]) == sum(lengths)
    assert len(bars["documents"]) == len(bounds) - 1 and bars["documents"][0] and bars["documents"][-1]


def test_a_dataset_of_nothing_has_a_page(tmp_path: Path) -> None:
    dataset = Dataset(Path(tiny.write(tmp_path / "d", [])))
    assert statistics(dataset)["documents"] == 0
    assert "<b>0</b> raw documents" in page_html("d", {"d": dataset, "e": dataset}, 3, Shown())


# --- tokens


@pytest.mark.parametrize("side", [2, 5, 12])
def test_every_id_is_shown_or_counted_in_a_fold(side: int) -> None:
    grammar = tiny.grammar()
    long = Text(ids=np.full(SHOWN["text"] + side, tiny.text().encode("a")[0], np.int32))
    document = Document(key="a", segments=(long, Image(codes=picture(side)), words("two stars")))
    laid = grammar.encode(document)
    found = list(pieces(grammar, laid))
    assert sum(piece.folded or 1 for piece in found) == len(laid.ids)
    shown = [piece for piece in found if not piece.folded]
    assert [piece.label for piece in shown if piece.kind == "control"][:1] == [WORDS["BOS"]]
    codes = [piece for piece in shown if piece.kind == "code"]
    folds = [piece for piece in found if piece.folded and piece.kind == "code"]
    assert (
        len(codes) + sum(int(re.findall(r"([\d,]+) code", f.label)[0].replace(",", "")) for f in folds) == side**2 * 2
    )
    assert len(codes) <= SHOWN["code"] + 2
    assert bool(folds) == (side > 2)


def test_pieces_of_text_join_to_the_text() -> None:
    grammar = tiny.grammar()
    text = "what colour is the ring? ä 你"
    found = pieces(grammar, grammar.encode(Document(key="a", segments=(words(text),))))
    plain = [piece for piece in found if piece.kind == "text"]
    assert "".join(piece.label for piece in plain).startswith("what colour is the ring? ")
    assert [piece.id for piece in plain] == tiny.text().encode(text)


@pytest.mark.parametrize("name", grammars.names())
def test_controls_of_every_grammar_have_words(name: str) -> None:
    grammar = grammars.config(name).build(tiny.text(), tiny.BOOKS)
    assert set(grammar.vocabulary.controls) <= set(WORDS)


def test_weights_are_those_of_the_loss_and_none_is_faded(tmp_path: Path) -> None:
    document = Document(key="a", segments=(words("a red ring", loss=0.0), Image(codes=picture(2), loss=3.0)))
    dataset = Dataset(Path(tiny.write(tmp_path / "d", [document])))
    laid = tiny.grammar().encode(document)
    assert [p.weight for p in pieces(tiny.grammar(), laid) if not p.folded] == laid.weight.tolist()
    page = page_html("d", {"d": dataset}, 1, Shown(grammar=tiny.grammar()))
    assert page.count('class="text none"') == len(tiny.text().encode("a red ring"))
    assert "<i>×0</i>" in page and "<i>×1.5</i>" in page


# --- the page and the command


def test_foreign_text_stays_text_and_nothing_is_loaded(tmp_path: Path) -> None:
    evil = "</p><script>alert(1)</script><img src=http://example.org/x>"
    with_text = [Document(key=evil, segments=(Text(text=evil, role=evil),), meta={evil: evil})]
    laid = [Document(key="b", segments=(words(evil), Image(codes=picture(2))))]
    datasets = {evil: Dataset(Path(tiny.write(tmp_path / "a", with_text)))}
    datasets["b"] = Dataset(Path(tiny.write(tmp_path / "b", laid)))
    page = page_html(evil, datasets, 5, Shown(grammar=tiny.grammar(), text=tiny.text().decode))
    assert "<script" not in page and "<img" not in page and "default-src 'none'" in page
    assert "&lt;script&gt;" in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)


def test_of_a_book_the_page_shows_the_beginning_and_tells_what_is_left(tmp_path: Path) -> None:
    book = Document(key="book", segments=(Text(text="tui " * 2000),) * 300)
    dataset = Dataset(Path(tiny.write(tmp_path / "books", [book])))
    page = page_html("d", {"d": dataset}, 1, Shown())
    assert len(page) < 500_000 and page.count("… 7,000 characters more") == 256 and "… 44 segments more" in page


def test_a_document_that_cannot_be_laid_out_is_told_on_the_page(tmp_path: Path) -> None:
    wrong = Document(key="a", segments=(Image(codes=np.full((2, 2, 2), 99, np.int32)),))
    dataset = Dataset(Path(tiny.write(tmp_path / "d", [wrong, *tiny.documents(2, 0)])))
    page = page_html("d", {"d": dataset}, 3, Shown(grammar=tiny.grammar()))
    assert "a code is outside its codebook" in page and page.count("document begins") == 2


def saved(tmp_path: Path) -> str:
    run = tiny.run(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(config.to_json(run))
    return str(tmp_path / "run")


def test_a_dataset_and_a_folder_of_them_by_a_runs_grammar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, page, values = saved(tmp_path), tmp_path / "page.html", tmp_path / "found.json"
    assert (
        call("data", "inspect", str(tmp_path / "left"), "--run", run, "--html", str(page), "--json", str(values)) == 0
    )
    one = json.loads(values.read_text())
    out = capsys.readouterr()
    assert one["length_unit"] == "tokens" and "left by length" in out.out
    assert (
        "pictures are not drawn: " in out.err and "document begins" in page.read_text()
    )  # that tokenizer is untrained
    assert call("data", "inspect", str(tmp_path), "--run", run, "--html", str(page), "--json", str(values)) == 0
    every = json.loads(values.read_text())
    assert list(every) == ["left", "right"] and every["left"] == one
    assert re.search(r"left .*60.*█", capsys.readouterr().out) and page.read_text().count("<section") == 2


def test_other_words_than_the_datasets_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = saved(tmp_path)
    with Writer(tmp_path / "d", name="d", meta={"settings": {"text_probe": "another"}}) as writer:
        writer.write(tiny.documents(1, 0)[0])
    assert call("data", "inspect", str(tmp_path / "d"), "--run", run) == 1
    assert "its text was tokenised with another tokenizer" in capsys.readouterr().err
    assert call("data", "inspect", str(tmp_path / "d"), "--run", "quickstart_vision") == 1
    assert "it has no grammar" in capsys.readouterr().err
