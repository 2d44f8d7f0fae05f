"""Vision tokenizers of Emu3's and Emu3.5's kind, small enough to train on a laptop's CPU.

    mmgpt run tiny_vision     2 cores: a corpus of shapes, both tokenizers, `runs/tiny_vision/report.html`

Pictures of 48 x 48 pixels become 12 x 12 codes. The report has PSNR, SSIM and the share of codes in use on held-out
pictures.
"""

from typing import Any

from mmgpt.data.images import ImageRows, Pictures
from mmgpt.dist.mesh import Mesh
from mmgpt.models import ModelConfig
from mmgpt.models.discriminator import PatchGAN
from mmgpt.models.ibq import IBQ
from mmgpt.models.movq import MoVQ
from mmgpt.objectives.vq_gan import VqGan
from mmgpt.recipe import Recipe, Step
from mmgpt.train.optimizer import Group, Grouped, Optimizer
from mmgpt.train.run import Run

DIR = "runs/tiny_vision"

STEPS = 1600


def _tiny(model: ModelConfig, objective: VqGan.Config, steps: int) -> Run:
    adam = Optimizer.Config(learning_rate=2e-3, warmup=50, b1=0.5, b2=0.9, weight_decay=0.0, final=0.02)
    groups = (
        Group(path="discriminator", optimizer=adam.replace(learning_rate=5e-4)),
        Group(path="codebook", optimizer=adam.replace(learning_rate=5e-3)),
    )
    return Run(
        model=model,
        objective=objective,
        data=ImageRows.Config(
            sources=(Pictures.Config(path=f"{DIR}/data/pairs"),), height=48, width=48, batch_rows=16, held_out=0.1
        ),
        optimizer=Grouped(learning_rate=2e-3, warmup=50, b1=0.5, b2=0.9, weight_decay=0.0, final=0.02, groups=groups),
        mesh=Mesh.Config(cpu_devices=2),
        steps=steps,
        evaluate_every=max(1, steps // 4),
        save_every=max(1, steps // 4),
        log_every=20,
        held_out_batches=32,
        samples=8,
    )


def _objective(steps: int, **changes: Any) -> VqGan.Config:
    judge = PatchGAN.Config(channels=16, layers=2)
    return VqGan.Config(discriminator=judge, adversarial=0.01, start=steps * 3 // 4, **changes)


def movq_tiny() -> Run:
    """Emu3's kind: nearest codes, time halved once, norms steered by the codes."""
    model = MoVQ.Config(
        codes=256, latent=4, channels=16, multiples=(1, 2, 4), blocks=1, attention=(), heads=1, temporal=2
    )
    return _tiny(model, _objective(STEPS, entropy=0.01, temperature=0.05), STEPS)


def ibq_tiny() -> Run:
    """Emu3.5's kind: index backpropagation through the softmax over all codes."""
    model = IBQ.Config(codes=64, dim=8, latent=32, channels=16, multiples=(1, 2, 4), blocks=1, attention=())
    return _tiny(model, _objective(STEPS, entropy=0.01, temperature=0.1, quantization=0.06), STEPS)


def tiny_vision() -> Recipe:
    """The shapes' pictures -> both tokenizers -> a report of what each keeps."""
    corpus = ("--pairs=6000", "--stories=1", "--clips=1", "--questions=1", "--edits=1", "--eval-each=1")
    commands: list[tuple[tuple[str, ...], str]] = [
        (("data", "shapes", "--out", "{dir}/raw", *corpus), ""),
        (
            ("data", "import", "webdataset", "{dir}/raw/pairs", "--out", "{dir}/data/pairs"),
            "data/pairs/manifest.json",
        ),
        (("train", "movq_tiny", "--run-dir", "{dir}/movq"), ""),
        (("train", "ibq_tiny", "--run-dir", "{dir}/ibq"), ""),
        (("report", "{dir}"), ""),
    ]
    return Recipe(directory=DIR, steps=tuple(Step(command=c, makes=m) for c, m in commands))
