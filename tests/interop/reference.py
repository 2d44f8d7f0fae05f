"""Tiny models of transformers with random weights that are large enough to tell right from wrong, saved as folders."""

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [1],
    "hidden_size": 64,
    "codebook_size": 64,
}
CHAMELEON_VISION: dict[str, Any] = {
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "embed_dim": 8,
    "latent_channels": 8,
    "num_embeddings": 16,
    "resolution": 16,
}


def emu3(**sizes: Any) -> Any:
    return transformers.Emu3ForCausalLM(
        transformers.Emu3TextConfig(**SIZES | {"bos_token_id": 1, "eos_token_id": 2} | sizes)
    )


def emu3_whole(**sizes: Any) -> Any:
    text = transformers.Emu3TextConfig(**SIZES | {"bos_token_id": 1, "eos_token_id": 2} | sizes).to_dict()
    return transformers.Emu3ForConditionalGeneration(
        transformers.Emu3Config(text_config=text, vq_config=VISION, vocabulary_map={"<image>": 4, "<|extra_200|>": 5})
    )


def emu3_vision() -> Any:
    return transformers.Emu3VQVAE(transformers.Emu3VQVAEConfig(**VISION))


def qwen3(**sizes: Any) -> Any:
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SIZES | {"head_dim": 24, "rope_theta": 1e6} | sizes)
    )


def llama(**sizes: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | sizes))


def chameleon(**sizes: Any) -> Any:
    words = {"<image>": 4, **{f"IMGIMG{letter}Z": 5 + i for i, letter in enumerate("ABCD")}}
    config = transformers.ChameleonConfig(**SIZES | sizes, vocabulary_map=words, vq_config=CHAMELEON_VISION)
    return transformers.ChameleonForConditionalGeneration(config)


MODELS = {
    "emu3": emu3,
    "emu3 whole": emu3_whole,
    "emu3 vision": emu3_vision,
    "qwen3": qwen3,
    "llama": llama,
    "chameleon": chameleon,
}


def drawn(model: Any, seed: int = 0) -> Any:
    """The model with weights at which logits are of order one and every gain and bias matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim >= 2 and "q_norm" not in name and "k_norm" not in name:
                tied = getattr(model.config, "tie_word_embeddings", False)
                width = value[0].numel() if tied or "embed_tokens" not in name else 1
                value.copy_(noise * width**-0.5)
            else:
                value.copy_(noise * 0.3 + (0.0 if "bias" in name else 1.0))
        for name, value in model.named_buffers():
            if name.endswith("num_batches_tracked"):
                value.fill_(7)
            elif "running" in name:
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return model.eval()


def save(model: Any, folder: Path, shard: str = "1GB") -> Path:
    """Saves it as transformers does."""
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def emu3_5(folder: Path, dtype: Any = torch.float32) -> Path:
    """Emu3.5 as it is published: Emu3's own kind of config over a model of Qwen3's shape."""
    model = drawn(qwen3()).to(dtype)
    save(model, folder)
    config = {
        "architectures": ["Emu3ForCausalLM"],
        "model_type": "Emu3",
        **SIZES,
        "head_dim": 24,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": None,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "boi_token_id": 151852,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
