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
# # What a run learned
#
# Opens the run folder of a decoder, such as the one that `make quickstart` leaves, and looks at it: how it was
# trained, what it scored, what it draws, and what it answers. Set `MMGPT_RUN` for another run.

# %%
import os
from pathlib import Path

import numpy as np
from IPython.display import SVG, Markdown, display
from PIL import Image

from mmgpt.evaluate.records import load_records
from mmgpt.evaluate.report import chart, open_folder, training
from mmgpt.evaluate.samples import grid, held_out_texts
from mmgpt.generate.decode import Sampling
from mmgpt.generate.model import Model, document_of
from mmgpt.generate.sampler import Sampler

RUN = Path(os.environ.get("MMGPT_RUN", "runs/quickstart/model"))


def show(pictures: list[np.ndarray], width: int = 144) -> None:
    """Pictures of one size in a row."""
    row = Image.fromarray(grid([pictures]))
    display(
        row.resize((width * len(pictures), width * len(pictures) * row.height // row.width), Image.Resampling.NEAREST)
    )


# %% [markdown]
# ## Training
#
# Loss by modality, and on documents that were held out, by source.

# %%
opened = open_folder(RUN)
display(training(opened))
display(SVG(data=chart(opened)))

# %% [markdown]
# ## Scores
#
# What `mmgpt eval` found, if it ran: the first three prompts of each task, right or wrong.

# %%
for records in sorted((RUN / "eval").glob("*/records.json")):
    task = load_records(records.parent, 3)
    display(Markdown(f"**{task.title}**: {task.scores[task.figure]:.1%} {task.metrics[task.figure]}"))
    for record in task.records:
        words = " / ".join(part.text for part in (*record.prompt, *record.made) if part.frames is None)
        display(Markdown(f"{'✓' if record.right else '✗'} {words}"))
        pictures = [
            frame for part in (*record.prompt, *record.made) if part.frames is not None for frame in part.frames
        ]
        if pictures:
            show(pictures, 96)

# %% [markdown]
# ## Drawing
#
# The model reads captions of documents that it was not trained on, and goes on with a picture.

# %%
model = Model.open(RUN, batch=4)
room = model.longest_medium + 8
captions = held_out_texts(opened.run, 4)
drawn = model.go_on(captions, Sampling(room=room, image=Sampler(temperature=0.0)))
for continuation in drawn:
    display(Markdown(" ".join(part.text for part in continuation.prompt)))
    pictures = [part.frames[-1] for part in continuation.made if part.frames is not None]
    if pictures:
        show(pictures)

# %% [markdown]
# One caption of your own, four times: what the caption leaves open differs.

# %%
prompt = document_of(model, text="a small red circle in the top left and a large blue square on the right")
tries = model.go_on([prompt] * 4, Sampling(room=room, image=Sampler(temperature=0.7), seed=1))
pictures = [part.frames[-1] for c in tries for part in c.made if part.frames is not None]
if pictures:
    show(pictures)

# %% [markdown]
# ## Answering
#
# A picture that the model drew itself, and a question about it.

# %%
if pictures:
    question = document_of(model, pictures=[pictures[0]], text="what colour is the circle?")
    (answer,) = model.go_on([question], Sampling(room=32))
    display(Markdown(" ".join(part.text for part in answer.made) or "(no answer)"))
