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
# # What an image tokenizer keeps, and what it loses
#
# Pictures beside what their codes give back, where the error lies, how much of the codebooks is in use, and what one
# code is responsible for. Set `MMGPT_VISION` to a tokenizer's run folder or a Hugging Face folder, and
# `MMGPT_PICTURES` to a raw dataset or a folder of picture files, best of pictures that it was not trained on.

# %%
import itertools
import os
from pathlib import Path

import numpy as np
from IPython.display import SVG, Markdown, display
from PIL import Image

from mmgpt.evaluate.charts import lines_svg
from mmgpt.evaluate.kinds.reconstruction import Codes
from mmgpt.evaluate.pictures import fitted, of_path
from mmgpt.evaluate.samples import grid
from mmgpt.nn.image_metrics import psnr
from mmgpt.tokenize.vision import VisionTokenizer

VISION = Path(os.environ.get("MMGPT_VISION", "runs/quickstart/vision"))
PICTURES = Path(os.environ.get("MMGPT_PICTURES", "runs/quickstart/data/draw"))
COUNT = int(os.environ.get("MMGPT_COUNT", "64"))
AREA = 512 * 512

vision = VisionTokenizer.load(VISION)
frames = [fitted(p.frames(), AREA, vision.patch)[0] for p in itertools.islice(of_path(PICTURES), COUNT)]
frames = np.stack([frame for frame in frames if frame.shape == frames[0].shape])
codes = vision.encode(frames)
made = vision.decode(codes)
_, h, w, _ = codes.shape
bits = h * w * np.log2(vision.codebooks).sum()
display(
    Markdown(
        f"{len(frames)} pictures of {frames.shape[2]} x {frames.shape[1]} pixels, each {w} x {h} places of "
        f"{' x '.join(f'{size:,}' for size in vision.codebooks)} codes: {frames[0].size * 8 / bits:.0f} times fewer "
        "bits than the pixels."
    )
)


def show(rows: list[list[np.ndarray]], width: int = 96) -> None:
    """Rows of pictures of one size."""
    picture = Image.fromarray(grid(rows))
    wide = width * len(rows[0])
    display(picture.resize((wide, wide * picture.height // picture.width), Image.Resampling.NEAREST))


# %% [markdown]
# ## Beside each other
#
# Pictures, what the codes give back, and the error: white where nothing is lost, red where it was brighter, blue where
# it was darker.

# %%
SHOWN = min(8, len(frames))


def error(picture: np.ndarray, again: np.ndarray) -> np.ndarray:
    """The mean difference over colours as red and blue on white."""
    off = (picture.astype(np.float32) - again).mean(axis=2) * 2
    brighter, darker = np.clip(off, 0, 255), np.clip(-off, 0, 255)
    return (255 - np.stack([darker, brighter + darker, brighter], axis=2)).clip(0, 255).astype(np.uint8)


show(
    [
        list(frames[:SHOWN]),
        list(made[:SHOWN]),
        [error(*pair) for pair in zip(frames[:SHOWN], made[:SHOWN], strict=True)],
    ]
)

# %% [markdown]
# ## How much
#
# PSNR of each picture, sorted. A long tail on the left says that some kind of picture is lost; it is shown below.

# %%
decibels = np.asarray(psnr(frames.astype(np.float32), made.astype(np.float32), span=255.0))
order = np.argsort(decibels)
ranks = np.linspace(0, 100, len(order))
used = Codes(vision.codebooks)
used.add(codes)
display(SVG(data=lines_svg({"PSNR in dB": {"pictures": (ranks, decibels[order])}}, "percent of pictures", "psnr")))
display(Markdown(f"Median {np.median(decibels):.1f} dB; {', '.join(f'{k} {v:.3g}' for k, v in used.scores().items())}"))

# %% [markdown]
# The worst, above what came back.

# %%
worst = order[:SHOWN]
show([list(frames[worst]), list(made[worst])])

# %% [markdown]
# ## How alike the codes are used
#
# Codes of each codebook by how often they occur. A codebook that is used evenly falls slowly; one that fell apart has
# few codes with all the places.

# %%
curves = {}
for book, size in enumerate(vision.codebooks):
    counts = np.sort(np.bincount(codes[..., book].ravel(), minlength=size))[::-1]
    curves[f"codebook {book}"] = (np.arange(1, size + 1) / size * 100, np.cumsum(counts) / counts.sum() * 100)
display(SVG(data=lines_svg({"share of places": curves}, "percent of codes, most frequent first", "codes")))

# %% [markdown]
# ## What one code is responsible for
#
# One place of a picture gets the codes of another picture's place; what changes is what the code alone decides. The
# wider the change, the more a place leans on its neighbours.

# %%
if len(frames) > 1:
    row, column = codes.shape[1] // 2, codes.shape[2] // 2
    changed = codes[:1].copy()
    others = [i for i in range(1, len(codes)) if (codes[i, row, column] != codes[0, row, column]).any()]
    if others:
        changed[0, row, column] = codes[others[0], row, column]
        again = vision.decode(changed)[0]
        show([[made[0], again, error(made[0], again)]], 144)
        moved = (np.abs(made[0].astype(int) - again) > 8).any(axis=2)
        place = np.zeros_like(moved)
        place[row * vision.patch : (row + 1) * vision.patch, column * vision.patch : (column + 1) * vision.patch] = True
        share = (moved & place).sum() / max(1, moved.sum())
        display(Markdown(f"{moved.sum()} pixels changed, {share:.0%} of them inside the place."))
