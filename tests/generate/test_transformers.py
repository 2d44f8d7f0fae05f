"""Greedy generation is transformers': same weights, the published logits processor, with and without guidance."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import numpy as np
import pytest

from mmgpt.evaluate.bench_generate import untrained
from mmgpt.evaluate.bench_generate_peer import Peer
from mmgpt.generate.decode import Generator, Prompt
from mmgpt.generate.sampler import Sampler, Sampling
from mmgpt.models.decoder import Decoder
from tests import tiny
from tests.generate.untrained import one_device

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SIZE = (3, 5)
ROOM = SIZE[0] * (SIZE[1] + 1) + 3


@pytest.fixture(scope="module")
def pair() -> tuple[Generator, Peer]:
    torch.set_num_threads(1)
    grammar = tiny.grammar((64,))
    c = Decoder.Config(
        layers=2, embed=32, mlp=64, heads=4, kv_heads=2, head_dim=8, rope_theta=1e6, qk_norm="none", scan=False
    )
    opened = untrained(c, grammar, 128, one_device())
    params = jax.tree.map(lambda leaf: leaf * (10.0 if leaf.ndim > 1 else 1.0), opened.params)  # logits far apart
    opened = type(opened)(opened.built, 0, params, {})
    model = opened.built.run.model
    assert isinstance(model, Decoder.Config)
    return Generator(opened, [(0, *SIZE)], batch=3), Peer(model, params, grammar, 128)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("jacobi", [0, 4])
def test_greedy_ids_are_identical(pair: tuple[Generator, Peer], guidance: float, jacobi: int) -> None:
    generator, peer = pair
    grammar, rng = generator.grammar, np.random.default_rng(0)
    opening = grammar.open_image(*SIZE)
    texts = rng.integers(0, tiny.text().size, (3, 7))
    prompts = np.stack([np.concatenate([[grammar.bos], text, opening]) for text in texts])
    negative = np.stack([np.concatenate([[grammar.bos], text[:2], opening]) for text in texts[::-1]])
    sampling = Sampling(room=ROOM, guidance=guidance, image=Sampler(temperature=0.0), jacobi=jacobi)
    made = generator.run([Prompt(ids=p, negative=n) for p, n in zip(prompts, negative, strict=True)], sampling)
    expected = peer.generate(prompts, None if guidance == 1.0 else negative, SIZE, ROOM, guidance)
    assert expected.shape == (3, prompts.shape[1] + ROOM)
    for row, ours in zip(expected, made, strict=True):
        assert np.array_equal(row, ours.ids)
    codes = expected[:, prompts.shape[1] :]
    assert len(np.unique(codes[codes >= grammar.vocabulary.visual_start])) > 8  # not one id over and over
