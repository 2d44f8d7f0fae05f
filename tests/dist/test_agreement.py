"""All processes hear the same answer, and an error of one is an error of all."""

import pytest

from mmgpt.dist.agreement import Elsewhere, agree, together
from tests.train.steps import run_together


def test_one_process_agrees_with_itself() -> None:
    assert agree("alone", 3, sum_of) == 3 and together("alone", lambda: 4) == 4
    with pytest.raises(ZeroDivisionError):
        together("alone", lambda: 1 / 0)
    assert issubclass(Elsewhere, RuntimeError)


def sum_of(said: list[int]) -> int:
    return sum(said)


TWO = """
import threading
from jax._src import distributed
from mmgpt.dist.agreement import Elsewhere, agree, together

for turn in range(20):
    assert agree("main", [index, turn], lambda said: said[::-1]) == [[1, turn], [0, turn]]
    beside = []
    thread = threading.Thread(target=lambda: beside.append(agree("beside", index, sum)))
    thread.start()
    assert agree("main", 5 + index, max) == 6
    thread.join()
    assert beside == [1]
try:
    together("fails", lambda: 1 / index)
except (ZeroDivisionError, Elsewhere) as e:
    print(type(e).__name__, e)
assert together("goes on", lambda: index) == index
hosts.barrier("all have read")
left = [key for key, _ in distributed.global_state.client.key_value_dir_get("mmgpt/agree/")]
assert len(left) == 4 and all(key.endswith("/answer") for key in left), left
"""


@pytest.mark.multiproc
def test_two_processes_agree_in_several_threads_and_leave_little_behind() -> None:
    first, second = run_together(TWO, 2)
    assert first.split()[0] == "ZeroDivisionError"
    assert "Elsewhere process 0: ZeroDivisionError: division by zero" in second
