"""The image tokenizers of Emu3 (arXiv 2409.18869) and Emu3.5 (arXiv 2510.26583) at full size.

    mmgpt train emu3_vision --data.sources.0.path DATASET       270M parameters: state 4.4 GB, gradients 1.1 GB
    mmgpt train emu3_5_vision                                   455M: 7.3 GB and 1.8 GB

A picture of 512 x 512 pixels takes 34 and 31 TFLOP a step, so that at 40 % of the peak of 64 TPU v5p the batch of 256
takes 0.7 seconds and the 500,000 steps of Emu3.5's report four days; neither was trained here. Sizes, losses,
Adam and steps are the published ones, and what was not told (loss weights, Emu3's batch and steps) is VQGAN's, or as in
the other one. Name the perceptual loss's weights with `--objective.vgg FILE`; without them there is none. Published
weights need no training: `mmgpt tokenize data --vision FOLDER` takes their Hugging Face folder. Expect, as published,
24.3 dB PSNR at 720 x 720 of Emu3's on its authors' pictures.
"""

from mmgpt.data.images import ImageRows, Pictures
from mmgpt.dist.mesh import Mesh
from mmgpt.models import ModelConfig
from mmgpt.models.discriminator import PatchGAN
from mmgpt.models.ibq import IBQ
from mmgpt.models.movq import MoVQ
from mmgpt.objectives.vq_gan import VqGan
from mmgpt.train.checkpoint import Checkpoints
from mmgpt.train.optimizer import Group, Grouped, Optimizer
from mmgpt.train.run import Run


def emu3_vision() -> Run:
    """x8 in space and x4 in time, 32,768 codes: a picture is a frame shown four times."""
    objective = VqGan.Config(discriminator=PatchGAN.Config(), start=50_000)
    return _full(MoVQ.Config(remat=True, dtype="bfloat16"), objective, "runs/emu3")


def emu3_5_vision() -> Run:
    """x16, 131,072 codes, each of which every place trains."""
    objective = VqGan.Config(entropy=0.05, temperature=0.01, discriminator=PatchGAN.Config(), start=50_000)
    return _full(IBQ.Config(remat=True, dtype="bfloat16"), objective, "runs/emu3_5")


def _full(model: ModelConfig, objective: VqGan.Config, folder: str) -> Run:
    adam = Optimizer.Config(learning_rate=1e-4, warmup=15_000, b1=0.5, b2=0.9, weight_decay=0.0, final=0.0)
    return Run(
        model=model,
        objective=objective,
        data=ImageRows.Config(
            sources=(Pictures.Config(path=f"{folder}/data/pictures"),), height=512, width=512, batch_rows=256
        ),
        optimizer=Grouped(**vars(adam), groups=(Group(path="discriminator", optimizer=adam),)),
        mesh=Mesh.Config(fsdp=-1),
        checkpoint=Checkpoints.Config(keep=3, keep_every=50_000),
        steps=500_000,
        ema=0.9999,
        log_every=10,
        evaluate_every=2000,
        save_every=1000,
        samples=8,
    )
