"""`baton up` and `baton down`: a stack's whole life, and its ways to die."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest

from baton_client import Client, Sampling, Stack, StackError, StackOptions
from baton_client.cli.up import _WORKER_FLAGS, _WORKER_OPTIONS
from demo.corpus import load_pairs
from gpu_worker.config import _parser
from tests.clients.command import (
    DEMO_MODEL,
    ROOT,
    THREADS,
    assert_one_clear_line,
    baton,
    errors_of,
    output_of,
    processes_with,
)

ANSWERS = {pair.questions[0]: pair.answer for pair in load_pairs()}


@pytest.fixture
def run_dir(tmp_path_factory):
    """A run directory with a short path; nothing that was started in it survives the test."""
    path = tmp_path_factory.mktemp("run")
    yield path
    for pid in processes_with(str(path)):
        os.kill(pid, signal.SIGKILL)


def up(run_dir, *arguments):
    """Start `baton up` in the foreground on a free port; return it once it serves, with its lines to try."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "baton_client.cli", "up", "--listen", "127.0.0.1:0"),
            *("--run-dir", str(run_dir), *arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **THREADS},
        cwd=ROOT,
    )
    lines = [output_of(process).readline() for _ in range(5)]
    assert lines[0].startswith("Baton serves at "), errors_of(process).read()
    return process, lines


def gone(run_dir):
    """Whether every process of the stack in `run_dir` ends within half a minute."""
    deadline = time.monotonic() + 30
    while processes_with(str(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not processes_with(str(run_dir))


def test_detached_life(run_dir):
    done = baton("up", "--detach", "--listen", "127.0.0.1:0", "--run-dir", run_dir)
    assert done.returncode == 0, done.stderr
    address = done.stdout.split("serves at ")[1].split(". Try")[0]
    stop = done.stdout.split("stop: ")[1].strip()
    assert stop.endswith(f"baton down --run-dir {run_dir}")
    with Client(address) as client:
        question, answer = next(iter(ANSWERS.items()))
        greedy = Sampling(temperature=0.0)
        assert client.complete([{"role": "user", "content": question}], greedy).text == answer
    assert_one_clear_line(baton("up", "--run-dir", run_dir), address, "baton down")
    assert_one_clear_line(baton("up", "--detach", "--run-dir", run_dir), address, "baton down")
    done = subprocess.run(shlex.split(stop), capture_output=True, text=True, cwd=os.getcwd())
    assert (done.returncode, done.stdout) == (0, f"stopped {DEMO_MODEL} at {address}\n")
    assert gone(run_dir)
    done = baton("down", "--run-dir", run_dir)
    assert (done.returncode, done.stdout) == (0, f"no stack runs in {run_dir}\n")


def test_down_while_it_is_starting(run_dir):
    command = [sys.executable, "-m", "baton_client.cli", "up", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(
        [*command, "--run-dir", str(run_dir)], stderr=subprocess.PIPE, text=True
    ) as process:
        while not (run_dir / "scheduler.log").exists():
            time.sleep(0.01)
        done = baton("down", "--run-dir", run_dir)
        assert (done.returncode, done.stdout) == (0, f"stopped {DEMO_MODEL} while it was starting\n")
        assert process.wait(30) == 130
        assert "Traceback" not in errors_of(process).read()
    assert gone(run_dir)


def test_lines_to_try_work_as_printed_and_interrupt_stops(run_dir):
    process, lines = up(run_dir)
    for line in lines[1:4]:  # baton, Python, buf curl
        done = subprocess.run(shlex.split(line), capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert done.returncode == 0, (line, done.stderr)
        text = "".join(re.findall(r'"text": "(.*)"', done.stdout)) if "curl" in line else done.stdout
        assert len(text.split()) > 3, line
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0, errors_of(process).read()
    assert gone(run_dir)


def test_sigusr1_ends_nothing(run_dir):
    process, _ = up(run_dir)
    for pid in processes_with(str(run_dir)):
        os.kill(pid, signal.SIGUSR1)
    deadline = time.monotonic() + 20
    while not (run_dir / "state.json").exists():  # the core's answer
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)  # two looks at the parts
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, errors_of(process).read()
    assert gone(run_dir)


def test_a_worker_that_dies_takes_the_stack_down_with_a_reason(run_dir):
    process, _ = up(run_dir)
    (worker,) = processes_with(f"gpu_worker\0--model\0{DEMO_MODEL}\0--run-dir\0{run_dir}")
    os.kill(worker, signal.SIGKILL)
    assert process.wait(60) not in (0, None)
    assert "the worker 0 was killed by SIGKILL" in errors_of(process).read()
    assert gone(run_dir)


def test_nothing_outlives_a_killed_command(run_dir):
    process, _ = up(run_dir)
    process.kill()
    process.wait()
    assert gone(run_dir)


def test_a_model_that_cannot_be_read_is_named(run_dir, tmp_path):
    done = baton("up", "--model", tmp_path, "--listen", "127.0.0.1:0", "--run-dir", run_dir)
    assert done.returncode not in (0, 1)
    assert str(tmp_path) in done.stderr
    assert "Traceback" not in done.stderr
    detached = baton("up", "--detach", "--model", tmp_path, "--listen", "127.0.0.1:0", "--run-dir", run_dir)
    assert detached.returncode == done.returncode
    assert str(tmp_path) in detached.stderr
    assert gone(run_dir)


def test_a_port_in_use_is_named(run_dir):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        done = baton("up", "--listen", address, "--run-dir", run_dir)
    assert done.returncode not in (0, 1)
    assert address in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [("--workers", "0"), ("--model", "no/such/folder")])
def test_wrong_arguments(run_dir, arguments):
    done = baton("up", "--listen", "127.0.0.1:0", "--run-dir", run_dir, *arguments)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert gone(run_dir)


def test_a_worker_that_never_dials_is_a_timeout():
    options = StackOptions(
        model=str(DEMO_MODEL), worker_command=("calendar",), worker_args=("-h",), ready_timeout_s=60.0
    )
    with pytest.raises(StackError, match=r"the worker 0 exited with \d"):
        Stack.start(options)
    idle = ("tests.clients.idle_worker",)
    options = StackOptions(model=str(DEMO_MODEL), worker_command=idle, ready_timeout_s=3.0)
    with pytest.raises(StackError, match="not ready after 3 s"):
        Stack.start(options)


def test_two_workers_serve_one_model():
    with (
        Stack.start(StackOptions(model=str(DEMO_MODEL), workers=2, environment=THREADS)) as stack,
        Client(stack.address) as client,
    ):
        assert client.model().ready_groups == 2
        run_dir = stack.run_dir
    assert not run_dir.exists()


def test_the_workers_options_are_passed_through_by_their_own_names():
    """All but those that say where it meets the scheduler, its patience, and tools of who runs it by hand."""
    own = {option for action in _parser()._actions for option in action.option_strings}
    by_hand = {"--model", "--run-dir", "--connect", "--group", "--threads", "--trace-dir", "--trace-steps"}
    rest = {option for option in own if not option.endswith("-timeout-s")} - by_hand
    assert rest - {"-h", "--help", "--log-level"} == {*_WORKER_OPTIONS, *_WORKER_FLAGS}
