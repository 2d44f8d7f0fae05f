"""Emu3 (8B, arXiv 2409.18869) and Emu3.5 (34B, arXiv 2510.26583) at full size: to pretrain, or to go on from weights.

    mmgpt train emu3_8b --data.sources.0.path DATASET       weights and moments take 102 GB, gradients 34 GB
    mmgpt convert Emu3-Stage1 runs/emu3 --like emu3_8b --vision Emu3-VisionTokenizer
                                                            the published weights, then `mmgpt train runs/emu3`
    mmgpt train emu3_5_34b                                  410 GB and 137 GB

None was trained here. Each preset says for which TPU its mesh is meant, and what a step takes there by the plan that
`tests/plan/golden` holds, with rows full of pictures of 4,100 tokens; its command compiles with larger windows for
products, and tells some percent less. Sizes, context, loss weights and learning rates are the published ones. Emu3's
batch and number of tokens were never told: its batch here is Emu3.5's tokens a step in rows of its own length. The
datasets are yours; `mmgpt tokenize data` writes them, with `--vision` naming the published image tokenizer.
"""

from typing import Any

from mmgpt.data.loader import PackedRows
from mmgpt.data.mixture import Source
from mmgpt.dist.mesh import Mesh
from mmgpt.models.decoder import Decoder
from mmgpt.objectives.next_token import NextToken
from mmgpt.tokens import grammars
from mmgpt.train.checkpoint import Checkpoints
from mmgpt.train.optimizer import Optimizer
from mmgpt.train.run import Run, Tokens

EMU3_VOCAB = 186_368
"""184,622 ids in steps of 2,048: what the loss's chunks and 8 ways of tensor parallelism divide evenly."""
LOGITS = 1_600_000_000
"""Bytes of logits at a time: fewer chunks add up the projection's gradient less often."""


def _emu3(model: Decoder.Config, *, row_length: int, batch_rows: int, mesh: Mesh.Config, **more: Any) -> Run:
    return Run(
        model=model,
        objective=NextToken.Config(z_loss=0.0, chunk_bytes=LOGITS),
        tokens=Tokens(
            grammar=grammars.config("emu3"), text="runs/emu3/text", vision="runs/emu3/vision", codebooks=(32_768,)
        ),
        data=PackedRows.Config(
            sources=(Source.Config(path="runs/emu3/tokens/pairs", swap=0.5, drop_text=0.05),),
            row_length=row_length,
            batch_rows=batch_rows,
        ),
        mesh=mesh,
        log_every=10,
        evaluate_every=2000,
        save_every=1000,
        samples=0,
        **more,
    )


def _emu3_8b() -> Decoder.Config:
    return Decoder.Config(
        vocab=EMU3_VOCAB,
        layers=32,
        embed=4096,
        mlp=14_336,
        heads=32,
        kv_heads=8,
        head_dim=128,
        rope_theta=1e6,
        qk_norm="none",
        dropout=0.1,  # Emu3 drops attention probabilities too, which fast kernels do not
        remat="matmuls",
        dtype="bfloat16",
    )


def emu3_0_1b() -> Run:
    """A small decoder of Emu3's ids, 0.1 B parameters and 0.14 B in its table, which is tied: to try a mixture.

    For v5e:2x4: 1.4 s a step of 0.66 M tokens, 45 % of the peak, 11 of 16 GB a chip.

        mmgpt plan emu3_0_1b --topology v5e:2x4 --documents 4.1k
    """
    model = Decoder.Config(
        vocab=EMU3_VOCAB,
        layers=12,
        embed=768,
        mlp=2304,
        heads=6,
        kv_heads=2,
        head_dim=128,
        rope_theta=1e6,
        tied=True,
        remat="matmuls",
        dtype="bfloat16",
    )
    return _emu3(
        model,
        row_length=5120,
        batch_rows=128,
        mesh=Mesh.Config(replica=-1, fsdp=8),
        microbatches=2,
        optimizer=Optimizer.Config(learning_rate=1e-3, warmup=500),
        steps=20_000,
    )


def emu3_1b() -> Run:
    """A decoder of Emu3's ids with 1.2 B parameters and 0.8 B in its tables.

    For v5p:2x2x4: 5.6 s a step of 2.6 M tokens, 67 % of the peak, 58 of 95 GB a chip.

        mmgpt plan emu3_1b --topology v5p:2x2x4 --documents 4.1k
    """
    model = Decoder.Config(
        vocab=EMU3_VOCAB,
        layers=24,
        embed=2048,
        mlp=6144,
        heads=16,
        kv_heads=8,
        head_dim=128,
        rope_theta=1e6,
        remat="matmuls",
        dtype="bfloat16",
    )
    return _emu3(
        model,
        row_length=5120,
        batch_rows=512,
        mesh=Mesh.Config(replica=-1, fsdp=8),
        microbatches=4,
        optimizer=Optimizer.Config(learning_rate=3e-4, warmup=1000),
        steps=50_000,
    )


def emu3_8b() -> Run:
    """Emu3's first stage: rows of 5,120 tokens of text and images.

    For v5p:8x8x4: 8.8 s a step of 15.7 M tokens, 74 % of the peak, 60 of 95 GB a chip.

        mmgpt plan emu3_8b --topology v5p:8x8x4 --documents 4.1k
    """
    return _emu3(
        _emu3_8b(),
        row_length=5120,
        batch_rows=3072,
        mesh=Mesh.Config(replica=-1, fsdp=64),
        microbatches=4,
        optimizer=Optimizer.Config(learning_rate=5e-5, warmup=700, final=0.0, epsilon=1e-6, clip=5.0),
        checkpoint=Checkpoints.Config(keep=3, keep_every=20_000),
        steps=200_000,
    )


def emu3_8b_131k() -> Run:
    """Emu3's second stage: rows of 131,072 tokens, with video; it goes on from the first stage's weights.

    For v5p:8x8x4: 10.0 s a step of 16.8 M tokens, 71 % of the peak, 72 of 95 GB a chip.

        mmgpt plan emu3_8b_131k --topology v5p:8x8x4 --documents 4.1k
    """
    return _emu3(
        _emu3_8b(),
        row_length=131_072,
        batch_rows=128,
        mesh=Mesh.Config(replica=-1, fsdp=16, context=8),
        microbatches=4,
        optimizer=Optimizer.Config(learning_rate=5e-5, warmup=700, final=0.0, epsilon=1e-6, clip=5.0),
        checkpoint=Checkpoints.Config(keep=3, keep_every=20_000),
        steps=50_000,
    )


def emu3_5_34b() -> Run:
    """Emu3.5's first stage: 700,000 steps of 448 rows of 32,768 tokens, 10.3T in all, most of them video with words.

    For v5p:8x8x8: 19.5 s a step of 14.7 M tokens, 67 % of the peak, 82 of 95 GB a chip.

        mmgpt plan emu3_5_34b --topology v5p:8x8x8 --documents 4.1k
    """
    folder = "runs/emu3_5/tokens"
    mixture = {"text": 0.20, "image_text": 0.20, "video_text": 0.05, "video_interleaved": 0.55}
    return Run(
        model=Decoder.Config(
            vocab=284_672,  # 282,926 in steps of 2,048
            layers=64,
            embed=5120,
            mlp=25_600,
            heads=64,
            kv_heads=8,
            head_dim=128,
            rope_theta=1e6,
            qk_norm="rms",
            dropout=0.1,
            remat="matmuls",
            dtype="bfloat16",
        ),
        objective=NextToken.Config(z_loss=0.0, chunk_bytes=LOGITS),
        tokens=Tokens(
            grammar=grammars.config("emu3_5"),
            text="runs/emu3_5/text",
            vision="runs/emu3_5/vision",
            codebooks=(131_072,),
        ),
        data=PackedRows.Config(
            sources=tuple(
                Source.Config(path=f"{folder}/{name}", weight=weight, swap=0.5 if name == "image_text" else 0.0)
                for name, weight in mixture.items()
            ),
            row_length=32_768,
            batch_rows=448,
        ),
        optimizer=Optimizer.Config(learning_rate=5e-4, warmup=700, final=0.0, clip=5.0),
        mesh=Mesh.Config(replica=-1, fsdp=32, context=8),
        microbatches=7,
        checkpoint=Checkpoints.Config(keep=3, keep_every=20_000),
        steps=700_000,
        log_every=10,
        evaluate_every=2000,
        save_every=1000,
        samples=0,
    )
