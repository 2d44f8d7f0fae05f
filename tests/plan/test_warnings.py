"""What a plan warns of before anything is run."""

from types import SimpleNamespace
from typing import Any

import pytest

from mmgpt.models.decoder import Decoder
from mmgpt.objectives.next_token import NextToken
from mmgpt.plan.compiled import Weight
from mmgpt.plan.report import _ill_laid

GOOD = Weight("mlp/up", (4, 1024, 4096), (4, 64, 4096), 64 << 20)


def found(*weights: Weight, fsdp: int = 16, used: int = 0, head_dim: int = 128) -> Any:
    run = SimpleNamespace(model=Decoder.Config(vocab=4096, head_dim=head_dim), objective=NextToken.Config(vocab=used))
    return SimpleNamespace(run=run, mesh=SimpleNamespace(shape={"fsdp": fsdp}), weights=weights)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (found(Weight("w", (1023, 4097), (1023, 4097), 16 << 20)), "w: 17 MB lie whole on every device"),
        (found(Weight("w", (1024, 4096), (4, 4096), 16 << 20)), "w: a device's part is 4 x 4096, under a tile"),
        (found(Weight("w", (2, 4096, 1024), (2, 4096, 64), 16 << 20)), "w: a device's part is 4096 x 64"),
        (found(GOOD, used=3000), "model.vocab 4096 has 1096 rows beyond the 3000 ids"),
        (found(GOOD, head_dim=96), "model.head_dim 96 is padded"),
    ],
)
def test_it_warns(plan: Any, said: str) -> None:
    (only,) = _ill_laid(plan)
    assert said in only


def test_it_is_quiet_where_all_is_well() -> None:
    small, gain = Weight("s", (128, 128), (128, 128), 1 << 16), Weight("g", (1 << 20,), (1 << 20,), 4 << 20)
    stacked = Weight("stack/stacked/norm/scale", (80, 8192), (80, 8192), 3 << 20)
    assert _ill_laid(found(GOOD, small, gain, stacked, used=4096)) == []
    assert _ill_laid(found(Weight("w", (1023, 4097), (1023, 4097), 16 << 20), fsdp=1)) == []
