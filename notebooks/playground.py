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
# # A playground for generation
#
# One model, every way to prompt it: draw, vary the sampling, edit, give examples, move a clip, talk. Set `MMGPT_RUN`
# to a run folder or a Hugging Face folder, and change what you like.

# %%
import os
from pathlib import Path

import numpy as np
from IPython.display import Markdown, display
from PIL import Image

from mmgpt.evaluate.samples import grid
from mmgpt.generate.chat import Chat
from mmgpt.generate.decode import PromptError
from mmgpt.generate.model import Continuation, Model, Order
from mmgpt.generate.outputs import save
from mmgpt.generate.prompts import Piece
from mmgpt.generate.sampler import Sampling

RUN = Path(os.environ.get("MMGPT_RUN", "runs/quickstart/model"))
OUT = Path(os.environ.get("MMGPT_OUT", "generated"))
CAPTION = "a small red circle in the top left and a large blue square on the right."

model = Model.open(RUN, batch=4, clips=True)
images = [size[1:] for size in model.sizes if size[0] == 0]
draw = Order(size=max(images, key=lambda size: size[0] * size[1]))
display(Markdown(f"Grammar {model.grammar.name}; pictures of {', '.join(f'{h}*{w}' for h, w in images)} places."))


def pictures(made: list[Continuation]) -> list[np.ndarray]:
    """The last frame of each continuation's first medium, as far as they are of one size."""
    found = [continuation.media[0][-1] for continuation in made if continuation.media]
    return [picture for picture in found if picture.shape == found[0].shape]


def show(row: list[np.ndarray], width: int = 120) -> None:
    """Pictures of one size in a row."""
    if row:
        picture = Image.fromarray(grid([row]))
        wide = width * len(row)
        display(picture.resize((wide, wide * picture.height // picture.width), Image.Resampling.NEAREST))


# %% [markdown]
# ## Drawing
#
# `Order(size=...)` opens a picture of that size at once; without it the model chooses what comes, and when. Each row is
# one way of sampling, each column another draw: what the caption leaves open should differ, what it says should not.
# `jacobi` drafts and verifies several codes in one pass: the same distribution in fewer passes.

# %%
WAYS = {
    "the likeliest": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0},
    "guidance 3": {"guidance": 3.0},
    "temperature 1, eight codes a pass": {"jacobi": 8},
}
for name, way in WAYS.items():
    made = model.generate(CAPTION, count=4, order=draw, seed=1, **way)
    display(Markdown(name))
    show(pictures(made))

# %% [markdown]
# ## Reading, editing, examples
#
# A prompt is texts, pictures `[H, W, 3]` and clips `[T, H, W, 3]` in any order. An example is a picture and its text,
# before the picture that is asked about.

# %%
drawn = pictures(model.generate(CAPTION, count=4, order=draw, temperature=0.0))
if drawn:
    said = model.generate(drawn[0], room=48)[0].text
    display(Markdown(f"It reads its own picture as: {said or '(nothing)'}"))
    edited = model.generate(drawn[0], "change the circle to green.", order=draw, temperature=0.0)
    show([drawn[0], *pictures(edited)])

# %% [markdown]
# ## Moving
#
# A still clip of one frame, and what the model adds to it. `save` writes PNG, MP4, GIF and a page.

# %%
if drawn and any(size[0] > 1 for size in model.sizes):
    moved = model.generate(drawn[0][None], order=Order(add_frames=1), temperature=0.0)
    if moved[0].media:
        show(list(moved[0].media[0]))
        display(Markdown(", ".join(f"`{path}`" for path in save(OUT, moved, "moved"))))

# %% [markdown]
# ## Talking
#
# Every answer stays in the conversation. A published model's template goes around the turns by itself.

# %%
chat = Chat(model, Sampling(room=24), Order())
for turn in ("how many shapes are there?", "what colour is the circle?"):
    shown = [Piece(frames=drawn[0][None], role="user")] if drawn and not chat.segments else []
    chat.say([*shown, Piece(text=turn, role="user")])
    try:
        answer = chat.answer()
    except PromptError as full:  # the rows of a small model are soon full
        display(Markdown(f"**{turn}** ({full})"))
        break
    display(Markdown(f"**{turn}** {answer.text or '(nothing)'}"))
