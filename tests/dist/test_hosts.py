"""A SIGTERM ends the run after a whole step, on all processes after the same one."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from mmgpt.dist import hosts
from mmgpt.dist.peers import JoinError

STEPS = """
import os, signal, sys, time
from mmgpt.dist import hosts
import jax, jax.numpy as jnp

def run(before=None, at=None, steps=4000):
    {start}
    if before: before()
    step = jax.jit(lambda x: x @ x)
    x = jnp.eye(8)
    for i in range(100, 100 + steps):
        x = step(x)
        if at == i: os.kill(os.getpid(), signal.SIGTERM)
        hosts.barrier("step")
        time.sleep(0.002)
        if hosts.preempted(i):
            assert hosts.preempted(i + 1)
            print("stopped", i, flush=True)
            hosts.shutdown()
            sys.exit(hosts.REQUEUE)
    sys.exit("never preempted")
"""


def launch(code: str, start: str = "hosts.start()", **environment: str) -> subprocess.Popen:
    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("JAX_COORD", "JAX_NUM", "JAX_PROCESS", "JAX_COMPILATION", "SLURM"))
    }
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", STEPS.replace("{start}", start) + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env | {"JAX_PLATFORMS": "cpu"} | environment,
    )


def stopped_at(process: subprocess.Popen) -> int:
    out, err = process.communicate(timeout=120)
    assert process.returncode == hosts.REQUEUE, err[-3000:]
    return int(out.split()[-1])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(autouse=True)
def _left_as_found():
    hosts.shutdown()  # what a test of another file has left
    before = signal.getsignal(signal.SIGTERM)
    yield
    hosts.shutdown()
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_process_stops_after_the_step_in_which_it_got_the_signal() -> None:
    hosts.start(num_processes=1)
    hosts.start(num_processes=1)
    assert hosts.process_count() == 1 and hosts.process_index() == 0 and hosts.is_lead()
    hosts.barrier("alone")
    assert not hosts.preempted(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert hosts.preempted(2) and hosts.preempted(3)


def test_a_new_start_forgets_the_signal_of_the_run_before() -> None:
    hosts.start()
    os.kill(os.getpid(), signal.SIGTERM)
    assert hosts.preempted(1)
    hosts.shutdown()
    hosts.start()
    assert not hosts.preempted(1)


def test_a_signal_before_the_first_step_and_during_the_compile_is_kept() -> None:
    process = launch("run(before=lambda: os.kill(os.getpid(), signal.SIGTERM))")
    slow_trace = "run(before=lambda: jax.jit(lambda x: (os.kill(os.getpid(), signal.SIGTERM), x + 1)[1])(jnp.ones(3)))"
    other = launch(slow_trace)
    assert stopped_at(process) == 100
    assert stopped_at(other) == 100


def test_a_forked_worker_still_dies_of_sigterm() -> None:
    code = """
hosts.start()
pid = os.fork()
if pid == 0:
    time.sleep(60)
    os._exit(0)
time.sleep(0.2)
os.kill(pid, signal.SIGTERM)
_, status = os.waitpid(pid, 0)
sys.exit(0 if os.WTERMSIG(status) == signal.SIGTERM and not hosts.preempted(1) else "the worker lived")
"""
    # JAX warns about any fork; data workers that fork do it all the same.
    process = launch("import warnings; warnings.simplefilter('ignore')" + code)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


def test_start_beside_the_main_thread_does_not_fail() -> None:
    thread = threading.Thread(target=hosts.start)
    thread.start()
    thread.join()
    assert not hosts.preempted(1)


@pytest.mark.parametrize(
    ("address", "processes", "said"),
    [("nonsense", "2", "'nonsense' is not HOST:PORT"), ("127.0.0.1:1", "x", "JAX_NUM_PROCESSES is 'x'")],
)
def test_an_environment_that_names_no_run_is_told(
    monkeypatch: pytest.MonkeyPatch, address: str, processes: str, said: str
) -> None:
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
    monkeypatch.setenv("JAX_NUM_PROCESSES", processes)
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    try:
        with pytest.raises(JoinError, match=said):
            hosts.start()
    finally:
        hosts.shutdown()


def test_half_an_address_is_refused_with_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    process = launch("run()", f'hosts.start("127.0.0.1:{free_port()}", 2)')
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Give all three" in err


@pytest.mark.multiproc
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_two_processes_stop_after_the_same_step(victim: int) -> None:
    port = free_port()
    said = [f'hosts.start("127.0.0.1:{port}", 2, 0)', "hosts.start()"]
    environment = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    both = [launch(f"run(at={105 if i == victim else None})", said[i], **(environment if i else {})) for i in range(2)]
    steps = [stopped_at(p) for p in both]
    assert steps[0] == steps[1] >= 105


def between_steps(code: str) -> list[str]:
    """What two processes say that do this after a step, end to be queued again; it knows its process's `number`."""
    port = free_port()
    begin = f"""
with hosts.stoppable():
    hosts.start("127.0.0.1:{port}", 2, number := NUMBER)
    hosts.begin_step()
    assert not hosts.preempted(1, lambda: print("saved", flush=True) or True)
"""
    both = [launch(begin.replace("NUMBER", str(i)) + code, "pass") for i in range(2)]
    told = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [hosts.REQUEUE] * 2, [err[-3000:] for _, err in told]
    return [out for out, _ in told]


@pytest.mark.multiproc
def test_two_processes_leave_what_they_do_together_at_the_same_place() -> None:
    said = between_steps("""
    for place in range(300):
        if number == 1 and place == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        hosts.barrier("batch")
        if hosts.preempted_within("an evaluation"):
            print("left at", place, flush=True)
            hosts.shutdown()
            os._exit(hosts.REQUEUE)
    os._exit(3)
""")
    places = [out.split("left at")[1].split()[0] for out in said]
    assert places[0] == places[1] and int(places[0]) >= 20 and not any("saved" in out for out in said)


@pytest.mark.multiproc
def test_two_processes_that_wait_for_data_are_saved_at_once() -> None:
    said = between_steps("""
    hosts.rest()
    if number == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)
    os._exit(3)
""")
    assert all("saved" in out for out in said)


def test_a_sigterm_that_another_handler_took_is_not_ours() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []
    hosts.start()
    try:
        signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        assert seen == [1] and not hosts.preempted(1)
    finally:
        hosts.shutdown()
        signal.signal(signal.SIGTERM, before)
