"""A process that is lost, or that never comes, is named, and the others do not wait for it for ever."""

import signal
import subprocess

import pytest

from tests.dist.test_hosts import free_port, launch

FOREVER = """
from jax.experimental import multihost_utils
for i in range(10**6):
    hosts.begin_step()
    multihost_utils.process_allgather(jnp.ones(3) * i)
    if i == 20: print("trains", flush=True)
    if i == 40 and {fails}: 1 / 0
    hosts.preempted(i)
"""


def pair(*fails: int) -> list[subprocess.Popen]:
    """Two processes that compute together, of which some fail by themselves."""
    port = free_port()

    def start(number: int) -> str:
        settings = "hosts.Hosts.Config(heartbeat=3)"
        return f'hosts.start("127.0.0.1:{port}", 2, {number}, {settings})'

    code = [f"{start(i)}\nwith hosts.watched():" for i in range(2)]
    bodies = [FOREVER.replace("{fails}", str(i in fails)).replace("\n", "\n    ") for i in range(2)]
    return [launch(head + body) for head, body in zip(code, bodies, strict=True)]


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("victim", "how"),
    [
        (0, signal.SIGKILL),
        (1, signal.SIGSTOP),
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_the_others_end_to_be_queued_again_and_say_who_was_lost(victim: int, how: int) -> None:
    both = pair()
    for process in both:
        assert process.stdout is not None
        while "trains" not in (line := process.stdout.readline()):
            assert line, process.communicate()[1][-3000:]
    both[victim].send_signal(how)
    _, said = both[1 - victim].communicate(timeout=120)
    both[victim].kill()
    both[victim].communicate()
    assert both[1 - victim].returncode == 75, said[-3000:]
    (line,) = [line for line in said.splitlines() if "lost" in line]
    assert line.startswith(f"process {victim} of 2 was lost, so process {1 - victim} ends; run the same command")
    assert "Fatal Python error" not in said and "terminate called" not in said


@pytest.mark.multiproc
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_who_fails_by_itself_has_its_own_code(victim: int) -> None:
    both = pair(victim)
    said = [process.communicate(timeout=120)[1] for process in both]
    assert both[victim].returncode == 1 and "ZeroDivisionError" in said[victim], said[victim][-3000:]
    assert both[1 - victim].returncode == 75, said[1 - victim][-3000:]
    assert f"process {victim} of 2 was lost" in said[1 - victim]


@pytest.mark.multiproc
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_waits_in_vain_says_for_whom_and_where(number: int) -> None:
    address = f"127.0.0.1:{free_port()}"
    process = launch(f'hosts.start("{address}", 2, {number}, hosts.Hosts.Config(join=2))')
    _, said = process.communicate(timeout=120)
    last = said.strip().splitlines()[-1]
    assert process.returncode == 1 and "JoinError" in last, said[-3000:]
    assert address in last and "within 2 s" in last and "hosts.join" in last
    assert ("waited" if number == 0 else "did not reach process 0") in last
