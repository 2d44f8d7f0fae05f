"""Run folders that hold random parameters: a decoder, its image tokenizer and prompts, made without training."""

import json
from pathlib import Path

import jax
import numpy as np

from mmgpt.core import config
from mmgpt.core.document import Document, Image, Text, Video
from mmgpt.core.log import Metrics
from mmgpt.evaluate.shapes.world import Object, Scene
from mmgpt.train import state as states
from mmgpt.train.run import Run, build
from tests import tiny

SCENE = Scene((Object("circle", "red", "small", 16, 16), Object("square", "blue", "large", 78, 48)))
ANSWER = "a small red circle in the top left and a large blue square on the right"


def shared(folder: Path) -> Path:
    """`make` below the folder, once."""
    made = folder / "tiny-run"
    if not made.exists():
        made.mkdir()
        make(made)
    return made / "model"


def make(folder: Path) -> Path:
    """`folder/model`, `folder/vision`, and tokenised prompts in `folder/prompts/TASK`; returns the decoder's run."""
    run = tiny.run(folder, samples=2)
    vision = config.load(folder / "vision" / "config.json")
    assert isinstance(vision, Run)
    save(vision, folder / "vision", {"loss": 0.25}, {"left/psnr": 20.0})
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(config.to_json(run))
    held_out = {"left/loss/text": 3.5, "right/loss/text": 3.0, "left/loss/image": 2.5}
    losses = {"loss": 3.0, "loss/text": 3.0, "loss/image": 2.0, "step_seconds": 0.5, "matmul_share": 0.5}
    save(run, folder / "model", {**losses, "flops_per_second": 1e9}, held_out)
    for task in ("label", "draw", "next_frame"):
        tiny.write(folder / "prompts" / task, [_prompt(task, i) for i in range(3)])
    return folder / "model"


def save(run: Run, folder: Path, train: dict[str, float], held_out: dict[str, float]) -> None:
    """Writes random parameters and two lines of metrics to a run folder."""
    built = build(run)
    with jax.set_mesh(built.mesh), run.checkpoint.build(folder / "checkpoints") as checkpoints:
        state = jax.jit(lambda: states.initial(built.structure, built.optimizer, run.ema is not None))()
        checkpoints.save(2, state, 2 * run.data.batch_rows, {"steps": run.steps})
        checkpoints.wait()
    metrics = Metrics(folder)
    for step in (1, 2):
        metrics.write(step, train)
        metrics.write(step, held_out, "held_out")
    metrics.image(2, "reconstructions", np.zeros((8, 8, 3), np.uint8))
    metrics.close()


def _prompt(task: str, number: int) -> Document:
    rng = np.random.default_rng(number)
    text = Text(ids=np.array(tiny.text().encode("a red circle"), np.int32))
    segment = {"draw": text, "next_frame": Video(codes=tiny.grid(rng, (1, 2, 2)))}
    meta = {"task": task, "kind": f"kind {number % 2}", "answer": ANSWER, "scene": json.dumps(SCENE.as_json())}
    segments = (segment.get(task, Image(codes=tiny.grid(rng, (2, 3)))),)
    return Document(key=f"{task}-{number}", segments=segments, meta=meta)
