"""The worker as a process: hello, plans over the real link, a new session, refusal, deadlines, farewell."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from baton_wire.fingerprint import fingerprint
from baton_wire.hello import Refusal, WorkerHello
from baton_wire.link import Listener
from baton_wire.plan import ADMISSION, APPEND, CHUNK, Plan
from baton_wire.result import Result
from baton_wire.transport import RouterSocket, ipc_endpoint, private_ipc_dir, wait
from gpu_worker.config import parse
from gpu_worker.dialling import Dialling
from gpu_worker.errors import ConfigError
from gpu_worker.process import _leave_device_alone
from tests.support.random_checkpoints import Shape, write_checkpoint
from tests.worker import drive

PATIENCE_S = 60.0
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), Shape())


class Core:
    """Listens for one worker."""

    def __init__(self, endpoint, refusal=None):
        self.router, self.listener = RouterSocket(endpoint), Listener(1)
        self.refusal = refusal
        self.hello: WorkerHello | None = None
        self.results: list[Result] = []
        self.left = False

    def turn(self):
        """Takes in what came, waiting a little for it."""
        wait([self.router], 0.02)
        now = time.monotonic()
        for peer, data in self.router.receive_all():
            event = self.listener.receive(peer, data, now)
            replies = event.replies
            self.left = self.left or event.closed
            if event.hello is not None:
                self.hello = WorkerHello.decode(event.hello)
                if self.refusal is None:
                    replies = self.listener.accept(peer, now)
                else:
                    replies = self.listener.refuse(peer, self.refusal)
            self.results += map(Result.decode, event.payloads)
            for reply in replies:
                self.router.send(peer, reply)
        for peer, data in self.listener.tick(now):
            self.router.send(peer, data)

    def until(self, what):
        ends = time.monotonic() + PATIENCE_S
        while not what():
            assert time.monotonic() < ends, "the worker did not do it in time"
            self.turn()

    def send(self, plan):
        (peer,) = self.listener.peers()
        self.router.send(peer, self.listener.send(peer, plan.encode()))

    def play(self, tokens):
        """A request of `tokens` tokens, all its plans sent ahead; the tokens."""
        admission = np.zeros(1, ADMISSION)
        admission["max_length"] = len(PROMPT) + tokens
        first = Plan(
            step=1,
            row_bound=1,
            bucket=8,
            admissions=admission,
            appends=np.array([(0, block) for block in range(3)], APPEND),
            chunks=np.array([(0, 1, 0, len(PROMPT))], CHUNK),
            chunk_tokens=np.array(PROMPT, np.int32),
        )
        self.results.clear()
        self.send(first)
        for step in range(2, tokens + 1):
            self.send(Plan(step=step, row_bound=1, bucket=8))
        self.until(lambda: len(self.results) == tokens)
        assert [result.step for result in self.results] == list(range(1, tokens + 1))
        return [int(result.tokens[0]) for result in self.results]

    def close(self):
        self.router.close()


@pytest.fixture
def place():
    run_dir = private_ipc_dir()
    yield run_dir, ipc_endpoint(run_dir / "workers.ipc")
    shutil.rmtree(run_dir)


@pytest.fixture
def start(folder, place):
    """Starts a worker for the run directory; ends it after the test."""
    started = []

    def run(*arguments):
        command = [sys.executable, "-m", "gpu_worker", "--model", str(folder), "--run-dir", str(place[0])]
        command += ["--max-num-seqs", "4", "--num-kvcache-blocks", "32", "--group", "g", *arguments]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
        started.append(process)
        return process

    yield run
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def stderr(process):
    return process.communicate(timeout=PATIENCE_S)[1]


def test_a_worker_serves_survives_a_restart_and_leaves(folder, place, start):
    expected = drive.generate(
        drive.runner(drive.load(folder), max_num_seqs=4), [drive.Request(PROMPT, 12)]
    ).tokens[0]
    worker = start()
    time.sleep(0.5)  # the worker is there first, and waits
    core = Core(place[1])
    core.until(lambda: core.listener.peers())
    worker.send_signal(signal.SIGUSR1)  # nothing to trace: no folder
    assert core.hello is not None
    assert core.hello == WorkerHello(
        group="g",
        rank=0,
        ranks=1,
        fingerprint=fingerprint(folder),
        block_size=16,
        num_blocks=32,
        max_slots=4,
        max_model_len=512,
        max_tokens_per_step=2048,
        vocab_size=320,
        row_multiple=core.hello.row_multiple,
    )
    assert core.play(12) == expected
    core.send(Plan(step=13, row_bound=0, bucket=0))
    core.close()

    core = Core(place[1])  # knows nothing of the session that was
    core.until(lambda: core.listener.peers())
    assert core.play(12) == expected, "the new session did not begin with an empty slot table"

    worker.send_signal(signal.SIGTERM)
    core.until(lambda: core.left)
    said = stderr(worker)
    assert worker.returncode == 0
    assert "session lost" in said
    core.close()


def test_a_refused_worker_says_why(place, start):
    core = Core(place[1], Refusal("FINGERPRINT_MISMATCH", "another model"))
    worker = start()
    core.until(lambda: worker.poll() is not None)
    assert worker.returncode == 69
    assert "FINGERPRINT_MISMATCH: another model" in stderr(worker).splitlines()[-1]
    core.close()


def test_a_step_that_takes_too_long_ends_the_worker(place, start):
    core = Core(place[1])
    worker = start("--step-timeout-s", "0.005", "--max-num-batched-tokens", "400000")
    core.until(lambda: core.listener.peers())
    admission = np.zeros(4, ADMISSION)
    admission["slot"] = np.arange(4)
    admission["max_length"] = 600
    core.send(
        Plan(
            step=1,
            row_bound=4,
            bucket=8,
            admissions=admission,
            appends=np.array([(slot, block) for slot in range(4) for block in range(32)], APPEND),
            chunks=np.array([(slot, 0, 0, 512) for slot in range(4)], CHUNK),
            chunk_tokens=np.zeros(2048, np.int32),
        )
    )
    core.until(lambda: worker.poll() is not None)
    assert worker.returncode == 70
    assert stderr(worker).splitlines()[-1] == "gpu_worker: step 1 took longer than 0.005 s"
    core.close()


DEVICE = """
import sys, time
from collections import deque
from types import SimpleNamespace
from gpu_worker.dialling import Dialling
from gpu_worker.process import serve
from gpu_worker.watchdog import Watchdog

step_s, steps, limit_s = map(float, sys.argv[1:4])
lost = sys.argv[4:] == ['lost']  # the session, as soon as the steps are queued

class Runner:
    '''A device that takes step_s for each of the steps, all queued at once.'''
    pending, free_at = deque(), 0.0
    outstanding = property(lambda self: len(self.pending))
    def submit(self, plan):
        self.free_at = max(self.free_at, time.monotonic()) + step_s
        self.pending.append((self.free_at, plan.step))
    def finished(self):
        found = []
        while self.pending and self.pending[0][0] <= time.monotonic():
            found.append(SimpleNamespace(step=self.pending.popleft()[1]))
        return found

class Session:
    epoch, replies, hears = 1, 0, True
    def poll(self, timeout_s):
        plans, self.poll = [SimpleNamespace(step=i + 1) for i in range(int(steps))], self.later
        return plans
    def later(self, timeout_s):
        if lost and self.epoch:
            self.epoch = 0
            runner.pending.clear()  # as `reset` does
        elif lost:
            time.sleep(3 * limit_s)
            stop.asked = True
        return []
    def reply(self, result):
        Session.replies += 1
        stop.asked = Session.replies == steps

stop = SimpleNamespace(asked=False)
runner = Runner()
tracer = SimpleNamespace(before_step=lambda: None)
serve(Session(), runner, Watchdog(), limit_s, stop, tracer, Dialling("ipc://nowhere"))
"""


@pytest.mark.parametrize(
    ("step_s", "limit_s", "says"),
    [(0.1, 0.5, ""), (60, 0.2, "gpu_worker: step 1 took longer than 0.2 s"), (0.3, 0.2, "step 1 took")],
)
def test_a_device_that_hangs_ends_the_worker(step_s, limit_s, says):
    """The limit is one step's, however many are queued before it."""
    command = [sys.executable, "-c", DEVICE, str(step_s), "10", str(limit_s)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, says in done.stderr) == (70 if says else 0, True), done.stderr


@pytest.mark.parametrize(("since_s", "naps"), [(0.0, False), (0.004, False), (0.006, True), (60, True)])
def test_a_busy_device_is_looked_at_without_naps_at_first(since_s, naps, monkeypatch):
    did = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_yield", lambda: did.append("looked again"))
        patch.setattr(time, "sleep", lambda _: did.append("napped"))
        patch.setattr(time, "monotonic", lambda: 100.0 + since_s)
        _leave_device_alone(moved_s=100.0)
    assert did == ["napped" if naps else "looked again"]


def test_steps_of_a_lost_session_have_no_limit():
    """They are forgotten: nobody waits for them while the worker dials again."""
    command = [sys.executable, "-c", DEVICE, "60", "10", "0.3", "lost"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--connect", "here"], "--connect: neither ipc nor tcp: here"),
        (["--connect", "tcp://127.0.0.1:1"], "--connect: plain tcp is refused"),
        (["--run-dir", "/tmp/" + "x" * 120], "--run-dir: path of 137 bytes"),
    ],
)
def test_an_endpoint_that_cannot_be_is_refused_before_anything_is_loaded(arguments, says):
    with pytest.raises(ConfigError, match=f"^{says}"):
        parse(["--model", "not-there", *arguments])


def test_dialling_in_vain_is_said_ever_more_rarely(caplog):
    clock = itertools.count(1000.0)  # each call a second later
    dialling, said_at = Dialling("ipc:///run/b/workers.ipc", lambda: next(clock)), []
    for second in range(331):
        before = len(caplog.records)
        dialling.note(False)
        if len(caplog.records) > before:
            said_at.append(second)
    assert said_at == [5, 10, 20, 40, 80, 140, 200, 260, 320]
    first = warnings(caplog)[0]
    assert first.startswith("nobody has answered at ipc:///run/b/workers.ipc for 5 s: ")
    assert "--run-dir" in first
    dialling.note(True)
    for _ in range(5):  # a new silence, not yet long enough
        dialling.note(False)
    assert len(warnings(caplog)) == len(said_at)
    dialling.note(False)
    assert " for 5 s" in warnings(caplog)[-1]


def test_a_worker_says_that_nobody_answers(place, start):
    worker = start()
    line = next(line for line in worker.stderr if " WARNING " in line)
    assert re.search(rf"nobody has answered at {re.escape(place[1])} for \d+ s", line)
    core = Core(place[1])
    core.until(lambda: core.listener.peers())
    core.close()
    # the same of one that has answered before
    line = next(line for line in worker.stderr if " WARNING " in line)
    assert re.search(rf"nobody has answered at {re.escape(place[1])} for \d+ s", line)


def test_a_plan_that_cannot_be_ends_the_worker(place, start):
    core = Core(place[1])
    worker = start()
    core.until(lambda: core.listener.peers())
    core.send(Plan(step=1, row_bound=1, bucket=8, releases=np.array([9], np.uint16)))
    core.until(lambda: worker.poll() is not None)
    assert worker.returncode == 70
    assert "release of slot 9" in stderr(worker).splitlines()[-1]
    core.close()
