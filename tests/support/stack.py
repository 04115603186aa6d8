"""A whole stack of real processes: supervisor, core, front-end and fake workers, on a free port.

`start_stack` is for tests that treat the stack badly; those that only use it share the `stack` fixture.
"""

import json
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from baton.inference.v1 import inference_pb2 as pb
from baton.inference.v1 import inference_pb2_grpc as rpc
from tests.support.demo import DEMO_MODEL
from tests.support.processes import Child, wait_until

VOCAB_SIZE = 1280  # of the demo model
SERVICE = "baton.inference.v1.InferenceService"
_LISTENING = re.compile(r"^baton: listening on (\S+) \(", re.MULTILINE)


class Stack:
    """A running stack; `address` is where it serves, "" until it listens."""

    def __init__(self, model: Path, scheduler_args: tuple[str, ...], listen: str) -> None:
        self.model = model
        self.run_dir = Path(tempfile.mkdtemp(prefix="baton-test-", dir="/tmp"))
        self.address = ""
        self.workers: dict[str, Child] = {}
        command = ("scheduler_svc", f"--model={model}", f"--listen={listen}", f"--run-dir={self.run_dir}")
        self.scheduler = Child("scheduler", (*command, *scheduler_args), self.run_dir)

    def wait_listening(self) -> None:
        """Until the port is bound."""

        def address() -> str:
            code = self.scheduler.process.poll()
            assert code is None, f"the scheduler exited with {code}\n{self.scheduler.err}"
            found = _LISTENING.search(self.scheduler.out)
            return found[1] if found else ""

        self.address = wait_until(address, why="the scheduler does not listen")

    def start_worker(self, name: str, *arguments: str) -> Child:
        """A fake worker, group `name`. Fails tokens `expected_tokens` of the same vocabulary do not."""
        command = ("baton_sim.fake_worker", f"--model={self.model}", f"--run-dir={self.run_dir}")
        limits = (f"--group={name}", f"--vocab-size={VOCAB_SIZE}", *arguments)
        self.workers[name] = Child(name, (*command, *limits), self.run_dir)
        return self.workers[name]

    def wait_ready(self, groups: int) -> None:
        """Until so many groups are ready, as clients see it."""
        with self.channel() as channel:
            stub = rpc.InferenceServiceStub(channel)
            wait_until(
                lambda: stub.GetModel(pb.GetModelRequest()).ready_groups == groups,
                why=f"{groups} ready groups",
            )

    def channel(self) -> grpc.Channel:
        """A connection of its own."""
        return grpc.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)])

    def serving(self, service: str = SERVICE) -> bool:
        """What health says."""
        with self.channel() as channel:
            check = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                health_pb2.HealthCheckRequest.SerializeToString,
                health_pb2.HealthCheckResponse.FromString,
            )
            reply = check(health_pb2.HealthCheckRequest(service=service), timeout=5.0)
            return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def pid(self, part: str) -> int:
        """Process id of "core" or "frontend"."""
        return int((self.run_dir / f"{part}.pid").read_text())

    def state(self) -> dict[str, Any]:
        """What the core counts now."""
        path = self.run_dir / "state.json"
        path.unlink(missing_ok=True)
        os.kill(self.pid("core"), signal.SIGUSR1)
        wait_until(path.exists, why="state.json")
        state: dict[str, Any] = json.loads(path.read_text())
        return state

    def wait_idle(self, timeout_s: float = 10.0) -> None:
        """Until no request is left anywhere and no block is referenced."""

        def idle() -> bool:
            state = self.state()
            groups = state["groups"].values()
            left: int = sum(g["referenced"] + g["running"] + g["waiting"] for g in groups)
            return not (left or state["requests"] or state["lobby"])

        wait_until(idle, timeout_s, why="an idle core")

    def stop(self) -> None:
        """Ends everything by process id, the scheduler first."""
        children = [self.scheduler, *self.workers.values()]
        for child in children:
            child.signal(signal.SIGTERM)
        try:
            for child in children:
                child.wait(10.0)
        finally:
            for child in children:
                child.kill()
            shutil.rmtree(self.run_dir, ignore_errors=True)


@contextmanager
def start_stack(
    *,
    workers: int = 1,
    worker_args: tuple[str, ...] = (),
    scheduler_args: tuple[str, ...] = ("--drain-grace-s=3",),
    model: Path = DEMO_MODEL,
    listen: str = "127.0.0.1:0",
) -> Iterator[Stack]:
    """A stack that listens, with so many workers ready. `listen` is for tests of ports that are in use."""
    stack = Stack(model, scheduler_args, listen)
    try:
        stack.wait_listening()
        for index in range(workers):
            stack.start_worker(f"group-{index}", *worker_args)
        stack.wait_ready(workers)
        yield stack
    finally:
        stack.stop()


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Two groups of 32 slots; steps take a millisecond; streams stop by themselves once in 64 tokens."""
    arguments = ("--max-num-seqs=32", "--step-us=1000", "--stop-id=1279", "--stop-every=64")
    with start_stack(workers=2, worker_args=arguments) as running:
        yield running
        running.wait_idle()
        for worker in running.workers.values():
            assert worker.process.poll() is None, worker.err
        assert "bug in" not in running.scheduler.err
        assert "Traceback" not in running.scheduler.err
