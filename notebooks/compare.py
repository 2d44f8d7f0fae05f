# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Two runs beside each other
#
# Where their settings differ, how they learned, what they scored, and what both make of the same prompts. Set
# `MMGPT_RUNS` to run folders, separated by colons.

# %%
import os
from pathlib import Path

import numpy as np
from IPython.display import SVG, Markdown, display
from PIL import Image

from mmgpt.evaluate.compare import config_rows, curves, labels, open_runs, score_rows
from mmgpt.evaluate.records import load_records
from mmgpt.evaluate.samples import grid

PATHS = [Path(p) for p in os.environ.get("MMGPT_RUNS", "runs/quickstart/model:runs/shapes/model").split(":")]
runs = open_runs(PATHS)
names = labels(runs)


def table(rows: dict[str, list]) -> None:
    """Rows of one value per run."""

    def shown(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    lines = [f"| | {' | '.join(names)} |", f"|---{'|---' * len(names)}|"]
    lines += [f"| {key} | {' | '.join(map(shown, values))} |" for key, values in rows.items()]
    display(Markdown("\n".join(lines)))


# %% [markdown]
# ## Settings
#
# Only those that differ.

# %%
table(config_rows(runs))

# %% [markdown]
# ## Learning
#
# Training loss, and the loss on held-out documents by modality. Any figure of `metrics.jsonl` can be asked for:
# `curves(runs, ["gradient_norm", "held_out:pairs/accuracy/image"])`.

# %%
display(SVG(data=curves(runs)))

# %% [markdown]
# ## Scores
#
# What `mmgpt eval` left in both run folders.

# %%
table(score_rows(runs))

# %% [markdown]
# ## The same prompts
#
# Prompts that both runs were judged on, where their verdicts differ first.

# %%
SHOWN = 4


def pictures(parts: tuple) -> list[np.ndarray]:
    return [part.frames[-1] for part in parts if part.frames is not None]


def words(parts: tuple) -> str:
    return " / ".join(part.text for part in parts if part.frames is None)


shared = set.intersection(*[{p.parent.name for p in (run.path / "eval").glob("*/records.json")} for run in runs])
for task in sorted(shared):
    found = [load_records(run.path / "eval" / task, 200) for run in runs]
    by_key = [{record.key: record for record in records.records} for records in found]
    keys = [key for key in by_key[0] if all(key in other for other in by_key)]
    keys.sort(key=lambda key: len({records[key].right for records in by_key}) == 1)
    display(Markdown(f"**{found[0].title}**"))
    for key in keys[:SHOWN]:
        display(Markdown(f"prompt: {words(by_key[0][key].prompt) or '(a picture)'}"))
        for name, records in zip(names, by_key, strict=True):
            record = records[key]
            display(Markdown(f"{'✓' if record.right else '✗'} {name}: {words(record.made)}"))
            drawn = pictures(record.made)
            if drawn and len({picture.shape for picture in drawn}) == 1:
                display(Image.fromarray(grid([drawn])).resize((96 * len(drawn), 96), Image.Resampling.NEAREST))
