"""A tokenizer's run from pictures on disk: held-out figures, exact resume, and what inference sees of it."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from mmgpt.core.document import Document, Image
from mmgpt.core.log import Metrics
from mmgpt.data.images import ImageRows, Pictures
from mmgpt.data.media import encode_png
from mmgpt.data.record import Writer
from mmgpt.evaluate.samples import sample_hook
from mmgpt.models.discriminator import PatchGAN
from mmgpt.models.movq import MoVQ
from mmgpt.objectives.vq_gan import VqGan
from mmgpt.tokenize.vision import VisionTokenizer
from mmgpt.train.loop import train
from mmgpt.train.optimizer import Group, Grouped, Optimizer
from mmgpt.train.run import Opened, Run, open_run

pytestmark = pytest.mark.slow


def pictures(folder: Path) -> str:
    rng = np.random.default_rng(0)
    with Writer(folder, name="pictures", shard_documents=100) as writer:
        for number in range(48):
            pixels = np.full((16, 16, 3), 230, np.uint8)
            row, column = rng.integers(0, 12, 2)
            pixels[row : row + 4, column : column + 4] = rng.integers(0, 200, 3)
            writer.write(Document(key=str(number), segments=(Image(data=encode_png(pixels)),)))
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """MoVQ at its smallest, which has batch norms, beside a discriminator with others."""
    folder = tmp_path_factory.mktemp("pictures")
    adam = Optimizer.Config(learning_rate=1e-3, warmup=1)
    return Run(
        model=MoVQ.Config(codes=16, channels=8, multiples=(1,), blocks=1, attention=(), temporal=2),
        objective=VqGan.Config(discriminator=PatchGAN.Config(channels=4, layers=1), entropy=0.1, temperature=0.1),
        data=ImageRows.Config(
            sources=(Pictures.Config(path=pictures(folder / "data")),), height=16, width=16, batch_rows=8, held_out=0.3
        ),
        optimizer=Grouped(learning_rate=1e-3, warmup=1, groups=(Group(path="discriminator", optimizer=adam),)),
        steps=6,
        log_every=1,
        evaluate_every=3,
        save_every=3,
        held_out_batches=2,
        samples=2,
    )


@pytest.fixture(scope="module")
def straight(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    train(run, folder, sample_hook(run))
    return folder


def lines(folder: Path, kind: str) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def test_held_out_figures_are_of_all_held_out_pictures(run: Run, straight: Path) -> None:
    told = lines(straight, "held_out")
    assert [line["step"] for line in told] == [3, 6]
    names = {"psnr", "ssim", "use/codes", "perplexity/codes", "reconstruction", "discriminator", "adversarial"}
    assert {f"pictures/{name}" for name in names} <= told[-1].keys()
    # Worked out again from the run's own tokenizer: which codes its held-out pictures use, over all batches.
    tokenizer = VisionTokenizer.load(straight)
    assert isinstance(run.data, ImageRows.Config)
    held_out = Pictures(run.data.sources[0], run.data.held_out)
    seen = np.stack([held_out.frames(int(i), 16, 16)[0] for i in held_out.held_out[:16]])
    codes = tokenizer.encode(seen)
    assert len(seen) > 8 and told[-1]["pictures/use/codes"] == pytest.approx(len(np.unique(codes)) / 16)
    off = (tokenizer.decode(codes).astype(float) - seen) / 127.5
    psnr = np.mean(10 * np.log10(4 / np.mean(off**2, axis=(1, 2, 3))))
    assert told[-1]["pictures/psnr"] == pytest.approx(psnr, abs=0.05)  # but for rounding to bytes
    assert sorted(p.name for p in (straight / "samples").iterdir()) == [
        "00000003-reconstructions.png",
        "00000006-reconstructions.png",
    ]


def test_inference_sees_the_tokenizer_alone(run: Run, straight: Path) -> None:
    opened = open_run(straight)
    with jax.set_mesh(opened.built.mesh):
        assert opened.step == 6 and opened.params.keys() == opened.built.structure.abstract()[0].keys()
    assert "discriminator" not in opened.params and "discriminator" not in opened.variables
    assert int(opened.variables["after"][0]["norm1"]["batches"]) == 6


def test_a_run_that_goes_on_ends_with_the_same_bits(run: Run, straight: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    first = run.replace(samples=0)
    with pytest.raises(RuntimeError, match="cut"):
        train(first, cut, _stop)
    train(first, cut)
    one, two = (jax.device_get((open_run(f).params, open_run(f).variables)) for f in (straight, cut))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, two))
    assert [line["loss"] for line in lines(cut, "train")] == [line["loss"] for line in lines(straight, "train")]


def _stop(opened: Opened, metrics: Metrics) -> None:
    """Ends the run at its last step, before that is saved."""
    if opened.step == 6:
        raise RuntimeError("cut")
