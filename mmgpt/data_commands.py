"""The commands that show data: what datasets hold, and what a run will read of them."""

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.table import Table

from mmgpt import presets
from mmgpt.core import config
from mmgpt.core.config import ConfigError
from mmgpt.core.errors import UserError
from mmgpt.core.log import check_writable, console, show, table, write_atomic, write_json
from mmgpt.data.pages import number, percent

if TYPE_CHECKING:
    from mmgpt.data.inspect import Shown
    from mmgpt.data.loader import PackedRows
    from mmgpt.data.record import Dataset
    from mmgpt.train.run import Tokens

MANIFEST = "manifest.json"
"""The file that makes a folder a dataset."""


def preset_or_run(name: str) -> tuple[Any, Path | None]:
    """A preset's config, or that of a run folder with the folder."""
    if (Path(name) / "config.json").is_file():
        return config.load(Path(name) / "config.json"), Path(name)
    if Path(name).is_dir() or "/" in name:
        raise ConfigError(
            f"{name} is no run folder: it has no config.json. Give a preset or a folder that a run wrote."
        )
    return presets.preset(name), None


def data_inspect(
    path: tyro.conf.Positional[Path],
    documents: int = 20,
    html: Path | None = None,
    run: str | None = None,
    text: Path | None = None,
    vision: Path | None = None,
    json: Path | None = None,
) -> None:
    """Shows what a dataset holds, or each of a folder of datasets: statistics, lengths, and a page of documents.

    Args:
        path: a dataset folder, raw or tokenised, or a folder of them.
        documents: how many documents of each dataset the page shows.
        html: write a page of documents with their pictures and tokens.
        run: preset or run folder whose grammar lays tokenised documents out and whose tokenizers show them.
        text: text tokenizer that turns a tokenised dataset's ids back into text on the page.
        vision: image tokenizer's run folder that draws its codes.
        json: write the statistics.
    """
    from mmgpt.data.inspect import page_html, statistics

    check_writable(html, json)
    datasets = _datasets(path)
    shown = _shown(list(datasets.values()), run, text, vision, draw=html is not None)
    found = {name: statistics(dataset, shown.grammar) for name, dataset in datasets.items()}
    if len(found) == 1:
        ((name, each),) = found.items()
        values = {key: value for key, value in _flat(each).items() if not key.startswith("histogram.")}
        show(table(str(path), {key: {"value": value} for key, value in values.items()}))
        show(_by_length(name, each))
    else:
        show(_by_source(path, found))
    if html is not None:
        write_atomic(html, page_html(path.resolve().name, datasets, documents, shown, found))
        console.print(f"wrote {html}")
    if json is not None:
        write_json(json, next(iter(found.values())) if path in _folders(path) else found)


def _folders(path: Path) -> list[Path]:
    """The folder where it is a dataset, else those below it that are, at most two levels down."""
    if (path / MANIFEST).is_file():
        return [path]
    return sorted(found.parent for depth in ("*", "*/*") for found in path.glob(f"{depth}/{MANIFEST}"))


def _datasets(path: Path) -> "dict[str, Dataset]":
    """Datasets by their names, or by their places below the folder."""
    from mmgpt.data.record import Dataset

    folders = _folders(path)
    if folders in ([], [path]):
        dataset = Dataset(path)  # its error says why this is none
        return {dataset.name: dataset}
    return {folder.relative_to(path).as_posix(): Dataset(folder) for folder in folders}


def _by_source(path: Path, found: dict[str, dict[str, Any]]) -> Table:
    """A row for each dataset of a folder, with its lengths as a line of bars."""
    kinds = list(dict.fromkeys(kind for each in found.values() for kind in each["segments"]))
    made = Table("source", "documents", *kinds, "length in", "sum", "mean", "p5", "p95", title=str(path))
    made.add_column("by length", no_wrap=True)
    made.add_column("rejected")
    for name, each in found.items():
        segments = [f"{each['segments'].get(kind, 0):,}" for kind in kinds]
        lengths = [number(each["lengths"].get(key, 0)) for key in ("sum", "mean", "p5", "p95")]
        counts = each["histogram"]["documents"]
        line = "".join(_LEVELS[-(-8 * count // max(1, *counts))] for count in counts)
        made.add_row(
            name, number(each["documents"]), *segments, each["length_unit"], *lengths, line, number(each["rejected"])
        )
    return made


_LEVELS = " ▁▂▃▄▅▆▇█"


def _by_length(name: str, found: dict[str, Any]) -> Table:
    """Documents by length, as text."""
    bars, unit = found["histogram"], found["length_unit"]
    made = Table(f"{unit} of a document", "documents", f"{unit} in them", "", title=f"{name} by length")
    most = max(1, *bars["documents"])
    for low, high, documents, held in zip(
        bars["edges"], bars["edges"][1:], bars["documents"], bars["lengths"], strict=False
    ):
        span = f"{low:,}" if high == low + 1 else f"{low:,} to {high - 1:,}"
        made.add_row(span, f"{documents:,}", f"{held:,}", "█" * round(40 * documents / most))
    return made


def _shown(datasets: "list[Dataset]", run: str | None, text: Path | None, vision: Path | None, draw: bool) -> "Shown":
    """How to show tokenised datasets: by a run's grammar and tokenizers, or by files of their own."""
    from mmgpt.data.inspect import Shown
    from mmgpt.data.loader import check_text
    from mmgpt.data.statistics import tokenised
    from mmgpt.tokens.text import TextTokenizer

    datasets = [dataset for dataset in datasets if tokenised(dataset)]
    tokens = _tokens(datasets, run, text, vision)
    grammar = tokens.build() if datasets and tokens is not None else None
    words = grammar.text if grammar is not None else None if text is None else TextTokenizer.load(text)
    for dataset in datasets:
        if words is not None:
            check_text(dataset, words)
    folder = vision or (Path(tokens.vision) if tokens is not None and tokens.vision else None)
    shown = Shown(grammar=grammar, text=None if words is None else lambda ids: words.decode(ids))
    if not (draw and datasets and folder):
        return shown
    from mmgpt.tokenize.vision import VisionTokenizer

    try:
        drawing = VisionTokenizer.load(folder)
    except UserError as e:
        if vision is not None:
            raise
        console.print(f"pictures are not drawn: {e}")  # the run's own tokenizer need not be here to see the rest
        return shown
    return dataclasses.replace(shown, pixels=drawing.decode, clip=drawing.decode_clip)


def _tokens(datasets: "list[Dataset]", run: str | None, text: Path | None, vision: Path | None) -> "Tokens | None":
    """What lays the documents out, where enough is known for that."""
    from mmgpt.train.run import Run, Tokens

    if run is not None:
        found, _ = preset_or_run(run)
        if not isinstance(found, Run) or found.tokens is None:
            raise ConfigError(f"--run {run}: it has no grammar. Give a preset or a run folder of a model over tokens.")
        files = {name: str(path) for name, path in (("text", text), ("vision", vision)) if path is not None}
        return found.tokens.replace(**files)
    books = {tuple(d.manifest["meta"].get("settings", {}).get("codebooks", ())) for d in datasets}
    if text is None or len(books) != 1:
        return None
    (codebooks,) = books
    if len(codebooks) == 1:
        return Tokens(text=str(text), codebooks=codebooks)
    # Of several codebooks the image tokenizer says whether a blank place is one id.
    return None if vision is None else Tokens(text=str(text), vision=str(vision))


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# --- the plan of a run


def data_plan(
    name: str,
    run: Any,
    folder: Path | None,
    html: Path | None = None,
    json: Path | None = None,
    png: Path | None = None,
) -> None:
    """Tells what a run will read, without its model; the plan is kept in the run's folder where there is one."""
    from mmgpt.data.loader import PackedRows
    from mmgpt.data.plan_page import plan_html, rows_picture
    from mmgpt.data.plan_values import describe
    from mmgpt.data.plan_warnings import warnings

    if not isinstance(run.data, PackedRows.Config):
        raise ConfigError(f"{name} reads no packed documents but {type(run.data).__qualname__}: it has no such plan.")
    if run.tokens is None:
        raise ConfigError(f"{name} has no grammar to lay documents out; name one in its tokens.")
    check_writable(html, json, png)
    _check_datasets(run.data, run.tokens)
    with contextlib.ExitStack() as stack:
        if folder is None:  # memory holds one window of rows, however long the plan is
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mmgpt-plan-")))
        rows = run.data.build(run.tokens.build(), seed=run.seed, rows=run.steps * run.data.batch_rows, folder=folder)
        told = describe(run.data, rows, run.steps)
        warned = warnings(told)
        _show_plan(name, told.values, warned)
        if html is not None:
            write_atomic(html, plan_html(told, warned, name))
        if png is not None:
            write_atomic(png, rows_picture(told))
        if json is not None:
            write_json(json, told.values | {"warnings": warned})
        rows.close()
    for file in (html, json, png):
        if file is not None:
            console.print(f"wrote {file}")


def _check_datasets(data: "PackedRows.Config", tokens: "Tokens") -> None:
    """ConfigError that names the datasets that are not there, and what makes them."""
    from mmgpt.recipe import Recipe

    everything = [source.path for phase in (data.sources, *(c.sources for c in data.changes)) for source in phase]
    missing = [path for path in dict.fromkeys(everything) if not (Path(path) / MANIFEST).is_file()]
    if not missing:
        return
    made = (
        f"`mmgpt tokenize data RAW_DATASET --text {tokens.text or 'TEXT'} --vision {tokens.vision or 'VISION'} --out "
        f"{Path(missing[0]).parent}` writes it"
    )
    recipes = {name: found for name in presets.names() if isinstance(found := presets.preset(name), Recipe)}
    for name, recipe in recipes.items():
        if Path(missing[0]).is_relative_to(recipe.directory):
            made = f"`mmgpt run {name}` makes it with all else; {made} alone"
    count = "" if len(missing) == 1 else f" (and {len(missing) - 1} more: {', '.join(missing[1:])})"
    raise ConfigError(f"{missing[0]}{count}: no dataset is there. {made}; or name yours in --data.sources.")


def _show_plan(name: str, values: dict[str, Any], warned: list[str]) -> None:
    facts = {
        "steps": f"{values['steps']:,} of {values['batch_rows']:,} rows of {values['row_length']:,} tokens",
        "rows": f"{values['rows']:,}, {values['documents']:,} documents",
        "tokens": f"{values['tokens']:,}",
        "fill": percent(values["fill"]),
        "wasted context": f"{percent(values['padding_share'])}, {values['padding']:,} tokens of padding",
    }
    made = Table("", "", title=f"{name}: what it will read", show_header=False)
    for fact, value in facts.items():
        made.add_row(fact, value)
    show(made)
    columns = ("weight", "share", "tokens", "documents", "passes", "mean length", "rows", "a batch", "held out")
    sources = Table("source", *columns, "rejected", title="by source")
    for source, s in values["sources"].items():
        numbers = (s["tokens"], s["documents"], s["epochs"], s["mean_length"])
        sources.add_row(
            source,
            percent(s["weight"]),
            percent(s["share"]),
            *map(number, numbers),
            percent(s["rows"] / values["rows"]),
            number(s["documents_a_batch"]),
            number(s["held_out"]),
            ", ".join(f"{n:,} {reason}" for reason, n in s["rejected"].items()) or "0",
        )
    show(sources)
    if len(values["mixtures"]) > 1:
        mixtures = Table("steps", "tokens", "fill", *values["sources"], title="by mixture: share of weight")
        for m in values["mixtures"]:
            cells = [m["sources"].get(source) for source in values["sources"]]
            shares = [f"{percent(c['share'])} of {percent(c['weight'])}" if c else "" for c in cells]
            mixtures.add_row(
                f"{m['from_step']:,} to {m['to_step']:,}", number(m["tokens"]), percent(m["fill"]), *shares
            )
        show(mixtures)
    for warning in warned:
        show(f"! {warning}")
