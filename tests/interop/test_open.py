"""A published folder with its tokenizers opens whole, training goes on from it, and tokenizers of others are told."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgpt import presets
from mmgpt.core import config
from mmgpt.core.config import ConfigError
from mmgpt.core.document import Document, Image, Text
from mmgpt.core.errors import UserError
from mmgpt.data.images import ImageRows, Pictures
from mmgpt.data.loader import PackedRows
from mmgpt.data.media import encode_png
from mmgpt.data.mixture import Source
from mmgpt.interop.convert import convert
from mmgpt.interop.open import open_folder
from mmgpt.models.discriminator import PatchGAN
from mmgpt.objectives.vq_gan import VqGan
from mmgpt.tokens.text.byte_pairs import SPECIALS, BytePairs
from mmgpt.train.loop import train
from mmgpt.train.optimizer import Optimizer
from mmgpt.train.run import Run, load_run
from tests import tiny
from tests.interop import reference

TEXT = BytePairs({bytes([i]): i for i in range(256)})
START = 256 + len(SPECIALS)
CODES = 64
IDS = {name: 256 + SPECIALS.index(f"<|extra_{n}|>") for name, n in (("bos", 203), ("eos", 204))}
SIZES: dict[str, Any] = {
    "vocab_size": START + CODES,
    "num_hidden_layers": 2,
    "bos_token_id": IDS["bos"],
    "eos_token_id": IDS["eos"],
    "pad_token_id": 256,
    "attention_dropout": 0.0,
}


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Emu3 as a whole, with its text tokenizer."""
    folder = tmp_path_factory.mktemp("emu3") / "hf"
    reference.save(reference.drawn(reference.emu3_whole(**SIZES)), folder)
    (folder / "tiny.tiktoken").write_text(TEXT.text())
    set_ids(folder, **{"<|extra_200|>": 256 + SPECIALS.index("<|extra_200|>"), "<|visual token 000000|>": START})
    return folder


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    return shutil.copytree(published, tmp_path / "hf")


def set_ids(folder: Path, **ids: int) -> None:
    """Names ids in the config's vocabulary map."""
    body = json.loads((folder / "config.json").read_text())
    body["vocabulary_map"] = {"<image>": 4, **ids}
    (folder / "config.json").write_text(json.dumps(body))


def datasets(folder: Path) -> tuple[str, str]:
    """Pictures as codes with captions, and as pixels."""
    rng = np.random.default_rng(0)
    codes, pixels = [], []
    for i in range(40):
        caption = Text(ids=np.array(TEXT.encode(f"number {i}"), np.int32))
        grid = rng.integers(0, CODES, (2, 3, 1)).astype(np.int32)
        codes.append(Document(key=str(i), segments=(caption, Image(codes=grid))))
        picture = encode_png(rng.integers(0, 255, (16, 16, 3)).astype(np.uint8))
        pixels.append(Document(key=str(i), segments=(Image(data=picture),)))
    return tiny.write(folder / "codes", codes), tiny.write(folder / "pixels", pixels)


def test_a_published_folder_opens_with_its_grammar_and_tokenizers(published: Path, tmp_path: Path) -> None:
    convert(published, tmp_path / "run")
    for path in (published, tmp_path / "run"):
        opened = open_folder(path)
        grammar, tokens = opened.built.grammar, opened.built.run.tokens
        assert grammar is not None and tokens is not None
        assert (grammar.name, grammar.vocabulary.codebooks) == ("emu3", (CODES,))
        assert (grammar.vocabulary.visual_start, grammar.vocabulary.used) == (START, START + CODES)
        vision = open_folder(Path(tokens.vision), part="vision")
        assert vision.built.run.model.codebooks == (CODES,)
    half = open_folder(tmp_path / "run", dtype="bfloat16")
    assert half.built.run.model.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
    assert Path(tokens.text).is_dir() and Path(tokens.text).is_relative_to(tmp_path / "run")


def test_without_the_image_tokenizer_its_codes_are_the_last_ids(published: Path, tmp_path: Path) -> None:
    folder = reference.save(reference.emu3(**SIZES), tmp_path / "hf")
    assert open_folder(folder).built.grammar is None
    shutil.copy(published / "tiny.tiktoken", folder)
    tokens = open_folder(folder).built.run.tokens
    assert tokens is not None and tokens.codebooks == (CODES,) and tokens.vision == ""


def test_an_image_tokenizer_that_was_published_apart_joins_its_model(published: Path, tmp_path: Path) -> None:
    folder = reference.save(reference.emu3(**SIZES), tmp_path / "hf")
    shutil.copy(published / "tiny.tiktoken", folder)
    fits = reference.save(reference.emu3_vision(), tmp_path / "vision")
    convert(folder, tmp_path / "run", vision=fits)
    tokens = load_run(tmp_path / "run").tokens
    assert tokens is not None and tokens.vision == str(fits)
    body = json.loads((fits / "config.json").read_text())
    (fits / "config.json").write_text(json.dumps(body | {"codebook_size": 65}))
    with pytest.raises(UserError, match=r"quantize\.embedding\.weight: shape \[64, 4\], expected \[65, 4\]"):
        convert(folder, tmp_path / "other", vision=fits)
    with pytest.raises(ConfigError, match="codebooks are none"):
        convert(folder, tmp_path / "other", vision=tmp_path / "run")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"<|extra_200|>": 7}, "EOL is 459 by the tokenizer and 7 by config.json"),
        ({"<|visual token 000000|>": 400}, "first visual code is 467 by the tokenizer and 400"),
    ],
)
def test_control_ids_of_another_model_are_told(ids: dict, message: str, copy: Path) -> None:
    set_ids(copy, **ids)
    with pytest.raises(ConfigError, match=message):
        open_folder(copy)


def test_a_text_tokenizer_of_another_model_is_told(copy: Path, tmp_path: Path) -> None:
    other = BytePairs({**TEXT.ranks, b"ab": 256, b"cd": 257})
    (copy / "tiny.tiktoken").write_text(other.text())
    with pytest.raises(ConfigError, match="the tokenizer is of another model"):
        open_folder(copy)
    (copy / "tiny.tiktoken").write_text("nonsense")
    with pytest.raises(UserError, match=r"tiny\.tiktoken"):
        open_folder(copy)


def test_a_grammar_that_a_converted_run_was_not_trained_with_is_told(published: Path, tmp_path: Path) -> None:
    convert(published, tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert run.tokens is not None
    (tmp_path / "text.model").write_bytes(tiny.text().model)
    wrong = run.tokens.replace(text=str(tmp_path / "text.model"))
    (tmp_path / "run" / "config.json").write_text(config.to_json(run.replace(tokens=wrong)))
    with pytest.raises(ConfigError, match="it was not trained with this grammar"):
        open_folder(tmp_path / "run")


def trained(run_dir: Path, changes: dict[str, Any]) -> Run:
    """The run after a step that moves nothing, with other data than before."""
    still = Optimizer.Config(learning_rate=0.0, warmup=0)
    run = load_run(run_dir).replace(steps=1, samples=0, held_out_batches=1, optimizer=still, **changes)
    assert train(run, run_dir).step == 1
    return run


def test_training_goes_on_from_a_converted_checkpoint(published: Path, tmp_path: Path) -> None:
    convert(published, tmp_path / "run")
    before = jax.tree.map(np.asarray, open_folder(published).params)
    codes, _ = datasets(tmp_path)
    rows = PackedRows.Config(sources=(Source.Config(path=codes),), row_length=64, batch_rows=8, held_out=0.2)
    trained(tmp_path / "run", {"data": rows, "ema": 0.5})
    after = open_folder(tmp_path / "run")
    assert after.step == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, before)
    convert(tmp_path / "run", tmp_path / "back")
    again = open_folder(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, again.params, before)


@pytest.mark.slow
def test_an_image_tokenizer_is_trained_on_with_a_fresh_discriminator(published: Path, tmp_path: Path) -> None:
    convert(published, tmp_path / "run")
    before = jax.tree.map(np.asarray, open_folder(published, part="vision").params)
    _, pixels = datasets(tmp_path)
    rows = ImageRows.Config(sources=(Pictures.Config(path=pixels),), height=16, width=16, batch_rows=8, held_out=0.2)
    objective = VqGan.Config(discriminator=PatchGAN.Config())
    trained(tmp_path / "run" / "vision", {"data": rows, "objective": objective})
    after = open_folder(tmp_path / "run" / "vision")
    assert after.step == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, before)


def test_a_preset_gives_a_converted_run_its_data(published: Path, tmp_path: Path) -> None:
    preset = presets.preset("emu3_8b")
    assert isinstance(preset, Run)
    convert(published, tmp_path / "run", like=preset)
    run = load_run(tmp_path / "run")
    assert run.data == preset.data and run.optimizer == preset.optimizer
    assert run.model == open_folder(published).built.run.model
    assert open_folder(tmp_path / "run").step == 0
