"""The fake worker as a process, with the core process: real sockets, real signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from baton_sim.fake_worker import EXIT_REFUSED, FakeModel, expected_tokens, main
from baton_wire import frontend
from baton_wire.hello import FrontendHello
from baton_wire.link import Dialer
from baton_wire.plan import SAMPLING
from baton_wire.transport import DealerSocket, ipc_endpoint, private_ipc_dir, wait

ROOT = Path(__file__).resolve().parents[2]
MODEL = FakeModel(100, stop_id=5, stop_every=30)


@pytest.fixture
def stack():
    """Starts processes in a run directory; ends them."""
    run_dir = private_ipc_dir()
    processes: list[subprocess.Popen[str]] = []

    def start(module, *arguments):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), f"{ROOT}/proto", f"{ROOT}/sim"]),
        }
        command = [sys.executable, "-m", module, "--run-dir", str(run_dir), "--fingerprint", "f", *arguments]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield run_dir, start
    for process in processes:
        process.kill()
        process.communicate()
    for file in run_dir.iterdir():
        file.unlink()
    run_dir.rmdir()


class Client:
    """A front-end that submits and gathers."""

    def __init__(self, run_dir):
        self.socket = DealerSocket(ipc_endpoint(run_dir / "frontends.ipc"))
        self.dialer = Dialer(FrontendHello("test").encode(), lambda: 7)
        self.ready = 0
        self.tokens: dict[int, list[int]] = {}
        self.over: dict[int, int] = {}

    def until(self, condition, timeout_s=20.0):
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "timed out"
            now = time.monotonic()
            for data in self.socket.receive_all():
                received = self.dialer.receive(data, now)
                for reply in received.replies:
                    self.socket.send(reply)
                for payload in received.payloads:
                    self.take(frontend.decode(payload))
            for data in self.dialer.tick(now):
                self.socket.send(data)
            wait([self.socket], 0.02)

    def take(self, message):
        if isinstance(message, frontend.Service):
            self.ready = message.ready_groups
        else:
            for handle, token in zip(message.handles.tolist(), message.tokens.tolist(), strict=True):
                self.tokens.setdefault(handle, []).append(token)
            self.over.update(message.over.tolist())

    def submit(self, handle, prompt, max_tokens):
        record = np.array((handle, 1, 1, 0, 0), SAMPLING)[()]
        submit = frontend.Submit(handle, np.array(prompt, "<i4"), max_tokens, 0, record, (5,))
        for data in self.dialer.send(submit.encode()):
            self.socket.send(data)
        return expected_tokens(prompt, record, max_tokens, stop_ids=(5,), model=MODEL)


FAKE = ["--vocab-size", "100", "--stop-id", "5", "--stop-every", "30"]


def test_tokens_through_the_real_core_also_after_a_crash(stack):
    run_dir, start = stack
    start("scheduler_svc.core_process")
    doomed = start("baton_sim.fake_worker", *FAKE, "--step-us", "1000", "--crash-after", "20")
    client = Client(run_dir)
    client.until(lambda: client.ready == 1)
    want = {handle: client.submit(handle, [handle, 2, 3], 60) for handle in range(20)}
    client.until(lambda: doomed.poll() is not None)
    assert doomed.returncode == -signal.SIGKILL
    survivor = start("baton_sim.fake_worker", *FAKE)
    client.until(lambda: len(client.over) == 20)
    for handle, expected in want.items():
        assert client.tokens[handle] == expected.tokens
        assert client.over[handle] == expected.end
    survivor.terminate()
    assert survivor.wait(10) == 0
    client.until(lambda: client.ready == 0)
    client.socket.close()


def test_refused(stack):
    _, start = stack
    start("scheduler_svc.core_process")
    worker = start("baton_sim.fake_worker", "--max-num-batched-tokens", "8")
    assert worker.wait(20) == EXIT_REFUSED
    assert "BAD_LIMITS" in worker.stderr.read()


def test_arguments_that_cannot_be(capsys):
    assert main(["--model", "/nowhere"]) == 1
    assert "config.json" in capsys.readouterr().err
    assert main(["--fingerprint", "f", "--connect", "tcp://127.0.0.1:1"]) == 1
    assert "plain tcp" in capsys.readouterr().err
