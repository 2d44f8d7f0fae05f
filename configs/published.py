"""Decoders whose speed on TPUs others have measured and published, to hold `mmgpt plan` against (`mmgpt bench plan`).

Sizes, rows of a batch and lengths are those of MaxText's runs (github.com/AI-Hypercomputer/tpu-recipes and maxtext),
their vocabularies in steps of 2,048. What the backward pass keeps, and in how many parts a batch goes through, is the
nearest that mmgpt has to what each run did. None has data: they are there to be planned.
"""

from typing import Any

from mmgpt.data.loader import PackedRows
from mmgpt.dist.mesh import Mesh
from mmgpt.models.decoder import Decoder
from mmgpt.objectives.next_token import NextToken
from mmgpt.train.optimizer import Optimizer
from mmgpt.train.run import Run

LLAMA_8B = {"layers": 32, "embed": 4096, "mlp": 14_336, "heads": 32, "kv_heads": 8}
LLAMA_70B = {"layers": 80, "embed": 8192, "mlp": 28_672, "heads": 64, "kv_heads": 8}
LLAMA_405B = {"layers": 126, "embed": 16_384, "mlp": 53_248, "heads": 128, "kv_heads": 8}


def _run(sizes: dict[str, int], *, rows: int, length: int = 8192, mesh: Mesh.Config, vocab: int, **more: Any) -> Run:
    microbatches = more.pop("microbatches", 1)
    return Run(
        model=Decoder.Config(
            vocab=vocab, **sizes, head_dim=128, rope_theta=5e5, qk_norm="none", dtype="bfloat16", **more
        ),
        objective=NextToken.Config(vocab=vocab, z_loss=0.0),
        data=PackedRows.Config(sources=(), row_length=length, batch_rows=rows),
        optimizer=Optimizer.Config(),
        mesh=mesh,
        microbatches=microbatches,
    )


def llama3_8b_v6e_256() -> Run:
    """Llama 3.1 8B, 4 rows of 8,192 a chip on v6e:16x16; measured: 7,207 tokens a second and chip, 45.5 %."""
    return _run(LLAMA_8B, rows=1024, mesh=Mesh.Config(fsdp=256), vocab=129_024, remat="offload")


def llama3_70b_v6e_256() -> Run:
    """Llama 3.1 70B, 5 rows of 8,192 a chip on v6e:16x16; measured: 960 tokens a second and chip, 50.3 %."""
    return _run(LLAMA_70B, rows=1280, mesh=Mesh.Config(fsdp=256), vocab=129_024, remat="offload")


def mistral_7b_v6e_8() -> Run:
    """Mistral 7B, 6 rows of 8,192 a chip on v6e:2x4; measured: 7,777 tokens a second and chip, 47 %."""
    return _run(LLAMA_8B, rows=48, mesh=Mesh.Config(fsdp=8), vocab=32_768, remat="offload")


def llama3_70b_v7x_64() -> Run:
    """Llama 3.1 70B, 2 rows of 8,192 a core on tpu7x:4x4x4; measured: 2,687 tokens a second and chip, 52.3 %."""
    return _run(LLAMA_70B, rows=256, mesh=Mesh.Config(fsdp=128), vocab=129_024, remat="attention")


def llama3_405b_v7x_256() -> Run:
    """Llama 3.1 405B, 3 rows of 8,192 a core on tpu7x:4x8x8; measured: 500 tokens a second and chip, 54.7 %."""
    return _run(LLAMA_405B, rows=1536, mesh=Mesh.Config(fsdp=512), vocab=129_024, remat="offload", microbatches=3)


def llama3_405b_v5p_512() -> Run:
    """Llama 3.1 405B, 2 rows of 8,192 a chip on v5p:8x8x8; measured: 124.6 tokens a second and chip, 68.5 %."""
    mesh = Mesh.Config(replica=4, fsdp=64, tensor=2)
    return _run(LLAMA_405B, rows=1024, mesh=mesh, vocab=129_024, remat="offload", microbatches=4)


def llama2_70b_v5p_256() -> Run:
    """Llama 2 70B, 4 rows of 4,096 a chip on v5p:4x8x8; measured: 692 tokens a second and chip, 65.4 %."""
    mesh = Mesh.Config(replica=4, fsdp=64)
    return _run(LLAMA_70B, rows=1024, length=4096, mesh=mesh, vocab=32_768, remat="attention", microbatches=2)
