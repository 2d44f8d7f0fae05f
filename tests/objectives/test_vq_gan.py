"""Training a tokenizer beside a discriminator: who gets whose gradient, what counts, and what training reaches."""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np
import pytest
from flax import nnx

from mmgpt.core.config import ConfigError
from mmgpt.core.stream import Batch, Stream
from mmgpt.dist.mesh import Mesh
from mmgpt.models import VisionConfig
from mmgpt.models.discriminator import PatchGAN
from mmgpt.models.gain_shape_vq import GainShapeVQ
from mmgpt.nn.conv import BatchNorm, Conv, silu
from mmgpt.nn.param import by_row, normal, param, use
from mmgpt.nn.quantize import Quantized, index_backpropagation, vector_quantize
from mmgpt.objectives.objective import mean, total
from mmgpt.objectives.vq_gan import VqGan
from mmgpt.train.optimizer import Group, Grouped, Optimizer
from mmgpt.train.state import Structure
from mmgpt.train.step import make_evaluation, make_step, place
from tests import tiny

SIDE, PATCH, CODES, DIM = 16, 4, 16, 4


class Small(nnx.Module):
    """Patches of 4 x 4 pixels through a hidden layer with a batch norm, and back: all that is asked of a model."""

    class Config(VisionConfig):
        quantizer: Literal["nearest", "index"] = "nearest"

        @property
        def patch(self) -> int:
            return PATCH

        @property
        def codebooks(self) -> tuple[int, ...]:
            return (CODES,)

        def step_flops(self, batch: Batch) -> float:
            return 0.0

        def build(self, rngs: nnx.Rngs) -> "Small":
            return Small(rngs, self)

    def __init__(self, rngs: nnx.Rngs, c: "Small.Config"):
        self.function = vector_quantize if c.quantizer == "nearest" else index_backpropagation
        self.enter, self.leave = Conv(rngs, PATCH**2 * 3, 16, side=1), Conv(rngs, 16, DIM, side=1)
        self.norm = BatchNorm(rngs, 16)
        self.codebook = param(rngs, "codes channels", (CODES, DIM), normal(1.0))
        self.back, self.out = Conv(rngs, DIM, 32, side=1), Conv(rngs, 32, PATCH**2 * 3, side=1)

    def latents(self, pixels_BHWC: jax.Array, train: bool) -> jax.Array:
        x = by_row(_patches, pixels_BHWC, None, "batch height width channels")
        return self.leave(silu(self.norm(self.enter(x), train)))

    def quantized(self, z_BHWD: jax.Array, commitment: float) -> Quantized:
        return self.function(z_BHWD, use(self.codebook), commitment)

    def pixels(self, vectors_BHWC: jax.Array, train: bool) -> jax.Array:
        return by_row(_pixels, self.out(silu(self.back(vectors_BHWC))), None, "batch height width channels")


def _patches(x_BHWC: jax.Array, _: None) -> jax.Array:
    B, H, W, C = x_BHWC.shape
    x = x_BHWC.reshape(B, H // PATCH, PATCH, W // PATCH, PATCH, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, H // PATCH, W // PATCH, -1)


def _pixels(x_BHWC: jax.Array, _: None) -> jax.Array:
    B, h, w, _ = x_BHWC.shape
    x = x_BHWC.reshape(B, h, w, PATCH, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, h * PATCH, w * PATCH, 3)


JUDGE = PatchGAN.Config(channels=4, layers=1)
OPTIMIZER = Grouped(
    learning_rate=1e-2,
    warmup=5,
    weight_decay=0.0,
    groups=(Group(path="discriminator", optimizer=Optimizer.Config(learning_rate=1e-3, warmup=5, weight_decay=0.0)),),
)


def pictures(rows: int, seed: int) -> Batch:
    """A bar across or a block in one of three colours on grey: two dozen kinds of patches."""
    rng = np.random.default_rng(seed)
    feats = np.full((rows, SIDE, SIDE, 3), 0.6, np.float32)
    inks = np.array([[-1, -1, -1], [1, -0.8, -0.8], [-0.8, -0.6, 1]], np.float32)
    for picture in feats:
        ink, row, column = inks[rng.integers(3)], *(4 * rng.integers(0, 4, 2))
        if rng.integers(2):
            first = row + rng.integers(0, 3)
            picture[first : first + 2] = ink
        else:
            first = column + rng.integers(0, 4)
            picture[row : row + 4, first : column + 4] = ink
    stream = Stream(feats=feats, weight=np.ones((rows, 1), np.float32), kind="pixels")
    return Batch(streams={"pixels": stream}, visibility={}, row_id=np.arange(rows, dtype=np.int64))


def made(objective: VqGan.Config, quantizer: Literal["nearest", "index"] = "nearest") -> Structure:
    return Structure(objective.trained(Small.Config(quantizer=quantizer)), seed=0)


def arrays(structure: Structure) -> tuple[Any, Any]:
    return jax.jit(structure.fresh)()


@pytest.fixture
def one_device():
    with jax.set_mesh(Mesh.Config().build(jax.devices()[:1])):
        yield


def slopes(structure: Structure, objective: VqGan, arrays: tuple[Any, Any], batch: Batch, coefficients: Any) -> Any:
    """Gradients of the total in training under these coefficients."""

    def value(params: Any) -> jax.Array:
        return total(objective.loss(structure.merge(params, arrays[1]), batch, jax.random.key(0)), coefficients)

    return jax.jit(jax.grad(value))(arrays[0])


def nonzero(tree: Any) -> bool:
    return any(bool(np.any(leaf)) for leaf in jax.tree.leaves(tree))


def test_generator_and_discriminator_get_their_own_terms_gradients_alone(one_device) -> None:
    config = VqGan.Config(discriminator=JUDGE, entropy=0.1, temperature=0.1)
    structure, objective, batch = made(config), config.build(), place(pictures(8, 0))
    start = arrays(structure)
    none = dict.fromkeys(objective.coefficients, 0.0)
    both = slopes(structure, objective, start, batch, objective.coefficients)
    judged = slopes(structure, objective, start, batch, none | {"discriminator": 1.0})
    drawn = slopes(structure, objective, start, batch, objective.coefficients | {"discriminator": 0.0})
    fooled = slopes(structure, objective, start, batch, none | {"adversarial": 1.0})
    of_judge = judged.pop("discriminator"), both.pop("discriminator")
    assert nonzero(of_judge[0]) and not nonzero(judged)
    assert not nonzero(drawn.pop("discriminator")) and not nonzero(fooled.pop("discriminator"))
    assert nonzero(fooled) and nonzero(drawn["codebook"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), of_judge[0], of_judge[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), drawn, both)


def test_the_discriminator_joins_in_at_its_step(one_device) -> None:
    config = VqGan.Config(discriminator=JUDGE, start=2)
    structure, objective = made(config), config.build()
    optimizer = OPTIMIZER.build(20)
    step = make_step(structure, objective, optimizer, seed=0, ema=None)
    state, told, judges = tiny.state(structure, optimizer), [], []
    state["variables"] = arrays(structure)[1]
    for i in range(3):
        judges.append(jax.device_get(state["params"]["discriminator"]))
        state, values = step(state, place(pictures(8, i)))
        told.append((float(values["discriminator"]), float(values["adversarial"])))
    assert told[:2] == [(0.0, 0.0)] * 2 and told[2][0] > 0 and told[2][1] != 0
    assert jax.tree.all(jax.tree.map(np.array_equal, judges[0], judges[2]))
    assert not jax.tree.all(jax.tree.map(np.array_equal, judges[2], jax.device_get(state["params"]["discriminator"])))
    assert int(state["variables"]["discriminator"]["steps"]) == 3


def test_gradients_that_are_not_finite_leave_running_statistics_as_they_were(one_device) -> None:
    config = VqGan.Config(discriminator=JUDGE)
    structure, optimizer = made(config), OPTIMIZER.build(20)
    step = make_step(structure, config.build(), optimizer, seed=0, ema=None)
    state = tiny.state(structure, optimizer) | {"variables": arrays(structure)[1]}
    state, _ = step(state, place(pictures(8, 0)))
    before = jax.device_get(state)
    assert int(before["variables"]["norm"]["batches"]) == 1
    broken = pictures(8, 1)
    broken.streams["pixels"].feats[3, 2, 2] = np.nan
    state, values = step(state, place(broken))
    after = jax.device_get(state)
    assert float(values["skipped"]) == 1.0 and int(after.pop("step")) == int(before.pop("step")) + 1
    assert jax.tree.all(jax.tree.map(np.array_equal, after, before))


def test_loss_gradients_and_statistics_are_the_same_on_several_devices() -> None:
    config = VqGan.Config(discriminator=JUDGE, entropy=0.1, temperature=0.1)
    objective = config.build()

    def run(count: int) -> Any:
        with jax.set_mesh(Mesh.Config().build(jax.devices()[:count])):
            structure = made(config)

            @jax.jit
            def both(params: Any, variables: Any, batch: Batch) -> Any:
                def value(params: Any) -> Any:
                    loss = objective.loss(structure.merge(params, variables), batch, jax.random.key(0))
                    return total(loss, objective.coefficients), loss

                return jax.value_and_grad(value, has_aux=True)(params)

            return jax.device_get(both(*arrays(structure), place(pictures(8, 0))))

    one, eight = run(1), run(8)
    assert jax.tree.structure(one) == jax.tree.structure(eight) and one[0][1].variables
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, eight)


@pytest.mark.parametrize(
    ("quantizer", "weights"),
    [("nearest", {"entropy": 0.02}), ("index", {"entropy": 0.05, "quantization": 0.06})],
    ids=["nearest", "index"],
)
def test_training_reconstructs_and_uses_its_codes(quantizer: Any, weights: dict[str, float], one_device) -> None:
    config = VqGan.Config(**weights, temperature=0.1, discriminator=JUDGE, adversarial=0.01, start=60)
    structure, objective, optimizer = made(config, quantizer), config.build(), OPTIMIZER.build(200)
    step = make_step(structure, objective, optimizer, seed=0, ema=None)
    state = tiny.state(structure, optimizer)
    state["params"], state["variables"] = arrays(structure)
    first = None
    for i in range(200):
        state, values = step(state, place(pictures(16, i)))
        first = float(values["psnr"]) if first is None else first
    seen = pictures(64, 999)
    evaluate = make_evaluation(structure, objective)
    loss = evaluate(state["params"], state["variables"], place(seen))
    figures = {name: float(mean(pair)) for name, pair in loss.figures().items()}
    assert first is not None and figures["psnr"] > first + 7 and figures["ssim"] > 0.5
    assert figures["use/codes"] > 0.6 and 1 < figures["perplexity/codes"] < CODES
    # The counts are those of the codes, and add up over batches.
    parts = [pictures(64, 999) for _ in range(2)]
    for number, part in enumerate(parts):
        part.streams["pixels"].weight[:] = (np.arange(64) % 2 == number)[:, None]
    counts = [evaluate(state["params"], state["variables"], place(part)).counts["codes"] for part in parts]
    assert float(np.sum(counts[0])) == 32 * 16 and not np.array_equal(counts[0], counts[1])
    np.testing.assert_allclose(np.sum(counts, axis=0), loss.counts["codes"])
    assert figures["use/codes"] == pytest.approx(np.mean(np.sum(counts, axis=0) > 0))


def test_rows_without_a_picture_do_not_count(one_device) -> None:
    config = VqGan.Config(discriminator=JUDGE, entropy=0.1, temperature=0.1)
    structure, objective = made(config), config.build()
    start, evaluate = arrays(structure), make_evaluation(structure, objective)
    full = pictures(4, 0)
    stream = full.streams["pixels"]
    feats = np.concatenate([stream.feats, np.random.default_rng(0).uniform(-1, 1, stream.feats.shape)])
    weight = np.concatenate([stream.weight, np.zeros_like(stream.weight)])
    more = dataclasses.replace(stream, feats=feats.astype(np.float32), weight=weight)
    beside = dataclasses.replace(full, streams={"pixels": more}, row_id=np.arange(8))
    one, two = (evaluate(*start, place(batch)).figures() for batch in (full, beside))
    assert one.keys() == two.keys() and "ssim" in one
    for name in one:
        assert float(mean(one[name])) == pytest.approx(float(mean(two[name])), rel=1e-4, abs=1e-6), name
    empty = dataclasses.replace(stream, weight=np.zeros_like(stream.weight))
    nothing = evaluate(*start, place(dataclasses.replace(full, streams={"pixels": empty}))).figures()
    assert all(float(mean(pair)) == 0.0 for pair in nothing.values())


def test_the_tokenizers_names_are_the_same_with_and_without_a_discriminator(one_device) -> None:
    with_judge, alone = made(VqGan.Config(discriminator=JUDGE)).abstract(), made(VqGan.Config()).abstract()
    for mine, theirs in zip(with_judge, alone, strict=True):
        assert "discriminator" not in theirs
        assert {k: v for k, v in mine.items() if k != "discriminator"} == theirs
    assert with_judge[0]["discriminator"].keys() == {"enter", "window", "norm", "leave"}


def test_a_perceptual_term_needs_its_file_only_in_training(one_device) -> None:
    config = VqGan.Config(vgg="nowhere.safetensors")
    structure, objective = made(config), config.build()
    with pytest.raises(ConfigError, match=r"objective\.vgg=nowhere\.safetensors: no such file"):
        make_evaluation(structure, objective)(*arrays(structure), place(pictures(8, 0)))


def test_a_model_that_is_not_trained_so_is_told(one_device) -> None:
    with pytest.raises(ConfigError, match="GainShapeVQ has no latents, quantized and pixels"):
        Structure(VqGan.Config().trained(GainShapeVQ.Config()), seed=0)
