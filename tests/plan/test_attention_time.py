"""Times of attention's kernels in a plan, held against the operations that they do."""

import dataclasses

import pytest

from mmgpt import presets
from mmgpt.models.decoder import Decoder
from mmgpt.plan.attention_time import HEADS, Attention, attention
from mmgpt.plan.chips import CHIPS
from mmgpt.train.run import Run

LENGTH, ROWS = 8192, 2
ALONE = {"tensor": 1, "context": 1}


def of(chip: str, heads: int, kv_heads: int, head_dim: int) -> Attention:
    run = presets.preset("emu3_8b")
    assert isinstance(run, Run) and isinstance(run.model, Decoder.Config)
    model = dataclasses.replace(run.model, heads=heads, kv_heads=kv_heads, head_dim=head_dim, qk_norm="rms")
    return attention(model, CHIPS[chip], length=LENGTH, rows=ROWS, kind="one", shards=ALONE)


@pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("chip, head_dim", [("v5p", 128), ("v5e", 128), ("v6e", 128), ("v6e", 256), ("tpu7x", 128)])
def test_no_pass_is_faster_than_its_operations_and_none_takes_four_times_as_long(
    chip: str, head_dim: int, group: int
) -> None:
    found = of(chip, 8 * group, 8, head_dim)
    pairs = LENGTH * (LENGTH + 1) // 2 * ROWS
    for seconds, products in ((found.forward, 2), (found.backward, 5)):
        least = products * 2 * pairs * 8 * group * head_dim / CHIPS[chip].peak
        assert least < seconds < 4 * least, (seconds / least, products)


@pytest.mark.parametrize("head_dim", sorted(HEADS))
def test_twice_as_many_heads_of_queries_take_twice_as_long(head_dim: int) -> None:
    some, more = of("v6e", 16, 8, head_dim), of("v6e", 32, 8, head_dim)
    assert more.forward == pytest.approx(2 * some.forward, rel=0.1)
    assert more.backward == pytest.approx(2 * some.backward, rel=0.1)
